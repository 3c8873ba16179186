"""What a tokeniser of items is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from recbole_cl.errors import DataError


def faiss() -> Any:
    """Returns the package faiss, which brings threads and BLAS of its own along and tells at length where it is."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    import faiss as package

    return package


class Tokeniser:
    """A map from vectors to codes, coarse to fine, fitted once and then frozen.

    A tokeniser is one file with one class, in this package or in another one (an entry point of the group
    ``recbole_cl.tokenisers``). It is fitted on the items of the base stage; items that come later get their codes from
    the same codebooks.

    Args:
        parameters: Own properties without prefix; ``levels`` and ``size`` are read here.
        seed: The run's seed.

    Attributes:
        prefix: What its own properties begin with; its name by default.
        levels: Codes an item.
        size: Codes a level.
    """

    prefix: ClassVar[str | None] = None

    def __init__(self, parameters: Mapping[str, Any], seed: int) -> None:
        self.parameters = dict(parameters)
        self.seed = seed
        self.levels, self.size = int(self.parameters["levels"]), int(self.parameters["size"])

    def fit(self, vectors: np.ndarray) -> None:
        """Learns the codebooks.

        Args:
            vectors: Float32, shape ``[n, width]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement fit(vectors)")

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the codes of vectors of shape ``[n, width]``, int64, shape ``[n, levels]``."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode(vectors)")

    def last_codes(self, vector: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Returns the distance of a vector to what each last code stands for, behind the other codes, ``[size]``."""
        raise NotImplementedError(f"{type(self).__name__} must implement last_codes(vector, codes)")

    def require(self, vectors: np.ndarray) -> np.ndarray:
        """Returns vectors as a tokeniser can be fitted on.

        Raises:
            DataError: If there are fewer than codes, or a number is not finite.
        """
        if len(vectors) < self.size:
            raise DataError(
                f"tokeniser: {len(vectors)} items are too few for {self.size} codes a level; make the tokeniser's size "
                f"at most {1 << max(len(vectors).bit_length() - 1, 0)}, or give it more items (semantic_ids_fit: all)"
            )
        if not np.isfinite(vectors).all():
            raise DataError("tokeniser: a vector of the encoder holds a number that is not finite")
        return np.ascontiguousarray(vectors, dtype=np.float32)


def residual_distances(vector: np.ndarray, codes: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Returns squared distances of what the codes before the last leave of a vector to the last codebook.

    Args:
        vector: Shape ``[width]``.
        codes: Its codes, shape ``[levels]``; the last one is not read.
        books: Shape ``[levels, size, width]``.
    """
    left = vector - sum((books[level][code] for level, code in enumerate(codes[:-1])), np.zeros_like(vector))
    far: np.ndarray = ((books[-1] - left) ** 2).sum(axis=1)
    return far
