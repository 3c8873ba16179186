"""Residual quantisation by faiss: seconds on a CPU for thousands of items."""

from __future__ import annotations

from typing import Any

import numpy as np

from recbole_cl.errors import ConfigError
from recbole_cl.generative.tokenisers.base import Tokeniser, faiss, residual_distances
from recbole_cl.registry import tokenisers


@tokenisers.register("residual_quantiser")
class ResidualQuantiser(Tokeniser):
    """faiss's ``ResidualQuantizer``: each level quantises what the levels before leave of a vector.

    Args:
        parameters: ``levels``, ``size`` (a power of two), ``beam`` (codes that are kept open while encoding).
        seed: The run's seed; k-means starts from it.
    """

    prefix = "residual_quantiser"
    _quantiser: Any

    def fit(self, vectors: np.ndarray) -> None:
        if self.size & (self.size - 1):
            raise ConfigError(
                f"property 'residual_quantiser_size' is {self.size}; faiss wants a power of two, as 256 (or the "
                f"tokeniser residual_kmeans)"
            )
        vectors = self.require(vectors)
        quantiser = faiss().ResidualQuantizer(vectors.shape[1], self.levels, self.size.bit_length() - 1)
        quantiser.max_beam_size = int(self.parameters["beam"])
        quantiser.cp.seed = self.seed
        quantiser.cp.min_points_per_centroid = 1
        quantiser.verbose = False
        quantiser.train(vectors)
        self._quantiser = quantiser
        flat = faiss().vector_to_array(quantiser.codebooks)
        self.books = flat.reshape(self.levels, self.size, vectors.shape[1])

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        if not len(vectors):
            return np.empty((0, self.levels), dtype=np.int64)
        packed = self._quantiser.compute_codes(np.ascontiguousarray(vectors, dtype=np.float32))
        return faiss().unpack_bitstrings(packed, self.levels, self.size.bit_length() - 1).astype(np.int64)

    def last_codes(self, vector: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return residual_distances(vector, codes, self.books)
