"""The geometric median: robust against users far away, found in steps, each of them a release."""

from __future__ import annotations

import numpy as np

from recbole_cl.federated.aggregators.base import Aggregator, separate
from recbole_cl.registry import aggregators


@aggregators.register()
class GeometricMedian(Aggregator):
    """The point with the least sum of distances to its users, by steps along the mean of unit vectors to them.

    Weiszfeld's iteration weighs users by one over their distance, which no clipping bounds well. The unit vectors are
    its gradient and of length 1 whatever a user sends, so a step is as private as one of k-means; a round takes
    several, and all are charged.
    """

    prefix = "median"

    @property
    def steps(self) -> int:
        return int(self.params["steps"])

    def vectors(self, uploads: np.ndarray, rows: np.ndarray, prototypes: np.ndarray, radius: float) -> np.ndarray:
        gaps = uploads - prototypes[rows]
        lengths = np.linalg.norm(gaps, axis=1, keepdims=True)
        return radius * np.divide(gaps, lengths, out=np.zeros_like(gaps), where=lengths > 1e-9)

    def step(
        self, prototypes: np.ndarray, sums: np.ndarray, counts: np.ndarray, noise: float, radius: float
    ) -> np.ndarray:
        least = max(float(self.params["floor"]), 2 * noise)
        way = sums / np.maximum(counts, least)[:, None]
        way = way * np.minimum(1.0, radius / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-12))
        return np.where((counts >= least)[:, None], prototypes + self.params["rate"] * way, prototypes)

    def finish(
        self, prototypes: np.ndarray, counts: np.ndarray, noise: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        return separate(prototypes, float(self.params["separation"])), 0


def geometric_median(points: np.ndarray, steps: int = 200) -> np.ndarray:
    """Returns the geometric median of points, by Weiszfeld's iteration; without noise, for comparisons.

    Args:
        points: Shape ``[n, d]``.
        steps: Iterations.
    """
    at = points.mean(axis=0)
    for _ in range(steps):
        weights = 1.0 / np.maximum(np.linalg.norm(points - at, axis=1), 1e-12)
        at = (weights[:, None] * points).sum(axis=0) / weights.sum()
    return at  # type: ignore[no-any-return]
