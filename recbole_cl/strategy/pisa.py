"""Stability for users whose interests stayed, plasticity for those whose interests moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.parts.checks import check_strength
from recbole_cl.strategy.parts.outputs import Towers, check_layers, final, layers

FORWARD = "forward"


@strategies.register()
class PISA(Strategy):
    """Trains a stage twice: to see where each user would go, and again with a pull there or back to the old model.

    Yoo et al. 2025, "Embracing plasticity: balancing stability and plasticity in continual recommender systems". The
    first pass fine-tunes a forward model theta_f from theta_last. The second starts again from theta_last with ::

        L(theta) + alpha * mean_u [ w_u InfoNCE(e_u, e_u^f) + (1 - w_u) InfoNCE(e_u, e_u^last) ]
        InfoNCE(e_u, r_u) = - log [ exp(cos(e_u, r_u) / tau) / sum_v exp(cos(e_u, r_v) / tau) ],        tau = 0.5

    over the different users of a batch that theta_last knows; e are the rows of the user table. A user's weight comes
    from the shift between theta_last and theta_f, by distances to K item clusters::

        p_u = softmax_k(- |z_u - c_k|),    J_u = JSD_2(p_u^last, p_u^f) in [0, 1]
        w_u = L + (1 - 2 L) J_u / max_v J_v

    z are the vectors that scores are products of. k-means clusters the items of theta_last once; c_k is the mean of a
    cluster's items in the model at hand, so clusters mean the same in both.

    Read were the abstract and a summary of the settings (alpha 0.5, tau 0.5, K 20, L 0.2); the paper's text was not at
    hand. Ours are: the form of p, that J is taken relative to the largest, that L is the least weight of either side,
    cosines, the rows of the user table as the "user-specific parameters", and that new users are left out.

    The forward pass is auxiliary (:class:`~recbole_cl.strategy.context.Pass`): the second draws what FineTune's does.
    """

    prefix = "pisa"
    base_is_finetune = True
    plans_passes = True
    defaults = {"alpha": 0.5, "temperature": 0.5, "clusters": 20, "least": 0.2}
    neutral = {"alpha": 0.0}
    needs = frozenset({"gradient", "batch_rows", "pairwise"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.forward: torch.Tensor | None = None  # user table of the forward model
        self.shift: torch.Tensor | None = None  # w of each user that the old model knows

    def check(self, config: Any, model: nn.Module) -> None:
        check_layers(self.name, config, model)
        check_strength(self, "alpha")
        if not self.params["temperature"] > 0:
            raise ConfigError(f"pisa_temperature: {self.params['temperature']} is not positive; the default is 0.5")
        if self.params["clusters"] < 2:
            raise ConfigError(f"pisa_clusters: {self.params['clusters']} is too small; it must be at least 2")
        if not 0 <= self.params["least"] <= 0.5:
            raise ConfigError(
                f"pisa_least: {self.params['least']} is not between 0 and 0.5; it is the least share of either side"
            )

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        if ctx.index == 0:
            return [Pass()]
        return [Pass(FORWARD, auxiliary=True), Pass(init="stage_start")]

    def end_pass(self, ctx: StageContext) -> None:
        teacher = ctx.previous_model
        if ctx.pass_.name != FORWARD or teacher is None:
            return
        with torch.no_grad():
            old, new = final(layers(teacher)), final(layers(ctx.model))
            clusters = cluster(old[1][1:], int(self.params["clusters"]), ctx.generator(f"{self.name}/clusters"))
            last, ahead = (distances(towers, clusters, len(old[0])) for towers in (old, new))
            self.shift = self.weigh(divergence(last, ahead))
            self.forward = layers(ctx.model)[0][0].detach().clone()

    def weigh(self, divergences: torch.Tensor) -> torch.Tensor:
        """Returns w, in ``[L, 1 - L]``, of divergences ``[n_users]`` (row 0 is padding)."""
        least, largest = float(self.params["least"]), divergences[1:].max().clamp(min=1e-12)
        return least + (1 - 2 * least) * (divergences / largest).clamp(max=1)

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        teacher: Any = ctx.previous_model
        if teacher is None or ctx.pass_.name == FORWARD or self.shift is None or self.forward is None:
            return {}
        users = torch.unique(batch[ctx.batcher.uid])
        users = users[users < ctx.stream.stages[ctx.index - 1].n_users]
        if not len(users):
            return {}
        self.forward, self.shift = (
            self.forward.to(ctx.device),
            self.shift.to(ctx.device),
        )  # a checkpoint's are on the CPU
        alpha, t = float(self.params["alpha"]), float(self.params["temperature"])
        sides = {
            "plasticity": (self.shift[users], self.forward[users]),
            "stability": (1 - self.shift[users], teacher.user_embedding(users)),
        }
        return {
            f"{self.name}/{side}": alpha * (weights * info_nce(ctx.model.user_embedding(users), reference, t)).mean()
            for side, (weights, reference) in sides.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"forward": self.forward, "shift": self.shift}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "forward", "shift")
        self.forward, self.shift = state["forward"], state["shift"]


def info_nce(new: torch.Tensor, reference: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns -log of the share of each row's own reference among all, shape ``[B]``, of vectors ``[B, d]``."""
    scores = F.normalize(new, dim=1) @ F.normalize(reference, dim=1).T / temperature
    return torch.logsumexp(scores, dim=1) - scores.diagonal()


def cluster(items: torch.Tensor, k: int, generator: np.random.Generator) -> torch.Tensor:
    """Returns the cluster of each item, shape ``[I]``, by k-means of vectors ``[I, d]``; at most ``I`` clusters."""
    import faiss

    values = np.ascontiguousarray(items.detach().cpu().numpy(), dtype=np.float32)
    found = faiss.Kmeans(
        values.shape[1], min(k, len(values)), niter=25, nredo=5, seed=int(generator.integers(2**31 - 1)),
        min_points_per_centroid=1, max_points_per_centroid=max(len(values), 1),
    )  # fmt: skip
    found.train(values)
    _, labels = found.index.search(values, 1)
    return torch.from_numpy(labels[:, 0]).to(items.device)


def distances(towers: Towers, clusters: torch.Tensor, n_users: int) -> torch.Tensor:
    """Returns p, each user's distribution over item clusters, shape ``[n_users, K]``.

    Args:
        towers: Vectors of users and items.
        clusters: Cluster of each item from id 1 on, shape ``[I]``; later items are not read.
        n_users: Users from id 0 on that are asked for.
    """
    users, items = towers[0][:n_users], towers[1][1 : len(clusters) + 1]
    names, at = torch.unique(clusters, return_inverse=True)
    centers = items.new_zeros(len(names), items.size(1)).index_add_(0, at, items)
    centers = centers / torch.bincount(at, minlength=len(names)).unsqueeze(1)
    return torch.softmax(-torch.cdist(users, centers), dim=1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Returns the Jensen-Shannon divergence in bits, in ``[0, 1]``, of the rows of two ``[n, K]``; shape ``[n]``."""
    middle = (p + q) / 2

    def bits(a: torch.Tensor) -> torch.Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, middle)).sum(1)

    return (bits(p) + bits(q)).clamp(min=0) / (2 * float(np.log(2)))
