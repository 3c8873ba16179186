"""k-means on what the levels before leave of the vectors."""

from __future__ import annotations

import numpy as np

from recbole_cl.generative.tokenisers.base import Tokeniser, faiss, residual_distances
from recbole_cl.registry import tokenisers


@tokenisers.register("residual_kmeans")
class ResidualKMeans(Tokeniser):
    """One k-means a level, each on the residuals of the one before.

    Args:
        parameters: ``levels``, ``size``, ``iterations``.
        seed: The run's seed; k-means starts from it.
    """

    prefix = "residual_kmeans"
    books: np.ndarray

    def fit(self, vectors: np.ndarray) -> None:
        left = self.require(vectors).copy()
        books = []
        for level in range(self.levels):
            means = faiss().Kmeans(
                left.shape[1],
                self.size,
                niter=int(self.parameters["iterations"]),
                seed=self.seed + level,
                min_points_per_centroid=1,
            )
            means.train(left)
            books.append(np.array(means.centroids))
            left -= books[-1][_nearest(left, books[-1])]
        self.books = np.stack(books)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        left = np.array(vectors, dtype=np.float32)
        codes = np.empty((len(left), self.levels), dtype=np.int64)
        for level, book in enumerate(self.books):
            codes[:, level] = _nearest(left, book)
            left -= book[codes[:, level]]
        return codes

    def last_codes(self, vector: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return residual_distances(vector, codes, self.books)


def _nearest(vectors: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Returns the nearest row of a codebook for each vector, shape ``[n]``."""
    norms = (book**2).sum(axis=1)
    found = [
        np.argmin(norms - 2 * (part @ book.T), axis=1) for part in np.array_split(vectors, len(vectors) // 4096 + 1)
    ]
    return np.concatenate(found)
