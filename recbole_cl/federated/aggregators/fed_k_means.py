"""DP-FedKMeans: each user joins the nearest public prototype; the server sees noisy sums and noisy counts only."""

from __future__ import annotations

import numpy as np

from recbole_cl.federated.aggregators.base import Aggregator, revive, separate
from recbole_cl.registry import aggregators


@aggregators.register()
class DPFedKMeans(Aggregator):
    """Means of the users' vectors, from one noisy matrix of sums and counts.

    A prototype moves by ``momentum`` towards its noisy sum over its noisy count. One whose count does not stand out of
    the noise stays where it is: its mean would be noise over noise.
    """

    prefix = "kmeans"

    def step(
        self, prototypes: np.ndarray, sums: np.ndarray, counts: np.ndarray, noise: float, radius: float
    ) -> np.ndarray:
        least = max(float(self.params["floor"]), 2 * noise)
        means = sums / np.maximum(counts, least)[:, None]
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        means = means * np.minimum(1.0, radius / np.maximum(lengths, 1e-12))  # no mean of clipped vectors is longer
        used = counts >= least
        moved = (1 - self.params["momentum"]) * prototypes + self.params["momentum"] * means
        return np.where(used[:, None], moved, prototypes)

    def finish(
        self, prototypes: np.ndarray, counts: np.ndarray, noise: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        margin = float(self.params["separation"])
        total = max(float(counts.clip(min=0).sum()), 0.0)
        # A share of what an even use would give: the paper's 0.01 is more than an even share of 128 prototypes.
        least = self.params["prune"] * total / len(prototypes)
        sure = counts + 2 * noise < least  # prune only what the noise cannot have hidden
        revived = 0
        if least > 0 and sure.any():
            prototypes, revived = revive(prototypes, np.where(sure, -1.0, counts), 0.0, margin, generator)
        return separate(prototypes, margin), revived
