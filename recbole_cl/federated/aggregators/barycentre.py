"""A 2-Wasserstein barycentre: prototypes as the atoms, of equal mass, of a measure near that of all uploads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recbole_cl.federated.aggregators.base import Aggregator, separate
from recbole_cl.federated.privacy import clip
from recbole_cl.federated.prompts import exact_plan
from recbole_cl.registry import aggregators


@aggregators.register()
class WassersteinBarycentre(Aggregator):
    """A free-support barycentre (Cuturi and Doucet 2014): a transport plan, then each atom to its users' mean.

    A user sends one vector, a measure of one atom, so the barycentre of all users' measures with K atoms is the K-atom
    measure that is nearest to their mixture. The plan is entropic (Sinkhorn, by POT) and gives each prototype an equal
    share of the users, where k-means gives it those that are nearest.
    """

    prefix = "barycentre"
    private = False
    why_not_private = "one user changes the transport plan of all others, and nothing bounds by how much"

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        exact_plan(np.zeros((1, 1)))  # says what to install before anything is trained

    def round(
        self, uploads: np.ndarray, prototypes: np.ndarray, radius: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int]:
        if not len(uploads):
            return prototypes, np.zeros(len(prototypes)), 0
        sent, out = clip(uploads, radius), prototypes
        for _ in range(int(self.params["steps"])):
            plan = transport(sent, out, float(self.params["entropy"]))
            out = (plan.T @ sent) / plan.sum(0)[:, None]
        momentum = float(self.params["momentum"])
        moved = (1 - momentum) * prototypes + momentum * out
        return separate(moved, float(self.params["separation"])), len(sent) * plan.sum(0), 0


def transport(points: np.ndarray, atoms: np.ndarray, entropy: float) -> np.ndarray:
    """Returns the plan between points and atoms of equal masses for squared distances, shape ``[n, K]``.

    Args:
        points: Shape ``[n, d]``.
        atoms: Shape ``[K, d]``.
        entropy: Weight of the entropy, over the largest cost; 0 for the exact plan.
    """
    cost = ((points[:, None] - atoms) ** 2).sum(-1)
    if entropy == 0:
        return exact_plan(cost)
    import ot

    left, right = np.full(len(points), 1 / len(points)), np.full(len(atoms), 1 / len(atoms))
    return np.asarray(ot.sinkhorn(left, right, cost, entropy * max(float(cost.max()), 1e-12), method="sinkhorn_log"))
