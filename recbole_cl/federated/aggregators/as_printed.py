"""The paper's aggregation as it is printed (Algorithms 1 and 2), for reproduction: it has no finite epsilon."""

from __future__ import annotations

import numpy as np

from recbole_cl.federated.aggregators.base import Aggregator, nearest, revive, separate
from recbole_cl.federated.privacy import Release, clip, epsilon
from recbole_cl.registry import aggregators

PAPER = {0.4: 3.4, 0.8: 1.8}
"""Epsilon that the paper tells for a sigma, at delta 1e-5."""
AUDITED = 6.5
"""What an attack on one round with a sigma of 0.4 proves at least, by exact intervals on a million trials."""


@aggregators.register()
class AsPrinted(Aggregator):
    """K-means on uploads to which the clients add noise and that are clipped afterwards, with exact counts.

    Who uploads depends on its drift; prototypes that few use begin anew at a user's upload.
    """

    prefix = "printed"
    private = False
    why_not_private = "clipping after the noise protects nothing, and its counts are exact"

    def sends(self, drift: np.ndarray) -> np.ndarray:
        return drift >= float(self.params["drift"])

    def round(
        self, uploads: np.ndarray, prototypes: np.ndarray, radius: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int]:
        sigma = float(self.params["sigma"])
        sent = clip(uploads + generator.normal(0.0, sigma, size=uploads.shape), radius)
        rows = nearest(sent, prototypes)
        counts = np.bincount(rows, minlength=len(prototypes)).astype(np.float64)
        sums = np.zeros_like(prototypes)
        np.add.at(sums, rows, sent)
        means = sums / np.maximum(counts, 1.0)[:, None] + generator.normal(0.0, sigma, size=prototypes.shape)
        momentum = float(self.params["momentum"])
        moved = separate((1 - momentum) * prototypes + momentum * means, float(self.params["separation"]), rounds=1)
        moved, revived = revive(moved, counts, float(self.params["prune"]) * counts.sum(), 0.0, generator)
        few = np.flatnonzero(counts < float(self.params["prune"]) * counts.sum())
        if len(few) and len(sent):
            moved[few] = sent[generator.integers(len(sent), size=len(few))]
            revived = len(few)
        return moved, counts, revived

    def described(self, n_releases: int, sampling: float, delta: float, radius: float) -> dict[str, str]:
        sigma = float(self.params["sigma"])
        paper = f"{PAPER[sigma]:g}" if sigma in PAPER else "not told"
        one = epsilon([Release(sigma / radius, sampling)] * n_releases, delta)
        every = epsilon([Release(sigma / radius)] * n_releases, delta)
        return {
            "epsilon by the paper": f"{paper} for sigma {sigma:g}",
            "true epsilon": (
                "infinite: nothing hides the exact counts, and the clip comes after the noise; an attack on one round "
                f"proves at least {AUDITED:g} of its noise of 0.4"
            ),
            "if its noise came after the clip, on sums": (
                f"{one:.3g} for clients drawn by chance, {every:.3g} where their drift decides, as it does here"
            ),
        }
