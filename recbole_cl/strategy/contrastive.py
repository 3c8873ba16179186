"""Contrastive distillation of the old graph's neighbourhoods, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.registry import strategies
from recbole_cl.rng import numpy_generator
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_number, check_strength
from recbole_cl.strategy.parts.neighbours import draw_neighbours, past_pairs
from recbole_cl.strategy.parts.outputs import Towers, check_layers, layers


@strategies.register()
class Contrastive(Strategy):
    """Keeps the new vectors of a node's old neighbours close to the node's old vector, and those of others away.

    Wang, Zhang and Coates 2021, "Graph structure aware contrastive knowledge distillation for incremental learning in
    recommender systems" (LWC-KD). With old vectors ``o`` (frozen) and new ones ``z`` of a layer, the old neighbours
    ``N(u)`` and the items ``C`` that the old model knows::

        l_u = - mean_{i in N(u)} log [ exp(o_u z_i / tau) / sum_{j in C + i} exp(o_u z_j / tau) ]
        L(theta) + lambda * mean over layers of ( mean_u l_u + mean_i l_i )

    and ``l_i`` the same with users and items exchanged. The anchors are the different users and items of a batch that
    the old model knows and that have an old neighbour. BPR has one layer, its tables; LightGCN has its tables and each
    propagation, old vectors over the old graph. Old neighbours are the pairs of all earlier stages, ``positives`` of
    them a node, drawn anew each epoch. ``C`` is drawn anew each step where ``negatives`` is less than all.

    The paper's text was not at hand. Read were its abstract and the re-implementation as a part of the public code of
    CCD (Gyu-Seok0/CCD_KDD24, Models/LWCKD.py), which has products and not cosines, and the positives in the sum. Left
    out from there: the same loss between users and between items, over thresholded co-occurrence.

    Known mistakes elsewhere: a softmax by exp and division, which overflows; new items among the negatives, so that
    they are pushed away from every old user.
    """

    prefix = "contrastive"
    base_is_finetune = True
    defaults = {"lambda": 0.1, "temperature": 1.0, "positives": 15, "negatives": 1000}
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient", "batch_rows", "pairwise"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self._old: tuple[nn.Module, list[Towers]] | None = None  # of the stage, computed again where it is missing
        self._neighbours: tuple[Any, tuple[torch.Tensor, torch.Tensor]] | None = None  # of the epoch, likewise

    def check(self, config: Any, model: nn.Module) -> None:
        check_layers(self.name, config, model)
        check_strength(self)
        check_number(self, "temperature", "the default is 1.0", above=0)
        check_number(self, "positives", "the default is 15", least=1)
        check_number(self, "negatives", "~ takes all that the old model knows", least=1, optional=True)

    def old_layers(self, teacher: nn.Module) -> list[Towers]:
        """Returns the layers of the frozen old model, propagated once a stage."""
        if self._old is None or self._old[0] is not teacher:
            with torch.no_grad():
                self._old = teacher, layers(teacher)
        return self._old[1]

    def neighbours(self, ctx: StageContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns old items of each user ``[n_users, P]`` and old users of each item ``[n_items, P]``, 0 for none.

        A function of seed, stage and epoch: it needs no place in a checkpoint.
        """
        key = (ctx.index, ctx.pass_.name, ctx.epoch)
        if self._neighbours is None or self._neighbours[0] != key:
            users, items = past_pairs(ctx)
            generator = numpy_generator(ctx.config["seed"], ctx.index, f"{self.name}/neighbours/{key[1]}/{key[2]}")
            before, size = ctx.stream.stages[ctx.index - 1], int(self.params["positives"])
            of_users = draw_neighbours(users, items, before.n_users, size, generator)
            of_items = draw_neighbours(items, users, before.n_items, size, generator)
            self._neighbours = key, (of_users.to(ctx.device), of_items.to(ctx.device))
        return self._neighbours[1]

    def candidates(self, ctx: StageContext, kind: str, n: int) -> torch.Tensor:
        """Returns the ids from 1 to ``n - 1``, or ``negatives`` of them drawn without replacement."""
        wanted = self.params["negatives"]
        if wanted is None or wanted >= n - 1:
            return torch.arange(1, n, device=ctx.device)
        drawn = ctx.generator(f"{self.name}/{kind}").choice(n - 1, size=int(wanted), replace=False, shuffle=False)
        return torch.from_numpy(drawn + 1).to(ctx.device)

    def contrast(
        self, old: torch.Tensor, positives: torch.Tensor, new: torch.Tensor, candidates: torch.Tensor
    ) -> torch.Tensor:
        """Returns l of each anchor, shape ``[A]``.

        Args:
            old: Old vectors of the anchors, shape ``[A, d]``.
            positives: Old neighbours, shape ``[A, P]``, 0 where there is none; each anchor has one.
            new: New vectors of the other side, shape ``[N, d]``.
            candidates: Ids of C, shape ``[n]``.
        """
        t = float(self.params["temperature"])
        total = torch.logsumexp(old @ new[candidates].T / t, dim=1, keepdim=True)
        scores = (old.unsqueeze(1) * new[positives]).sum(-1) / t
        inside = torch.zeros(len(new), dtype=torch.bool, device=new.device)
        inside[candidates] = True
        total = torch.where(inside[positives], total, torch.logaddexp(total, scores))
        real = (positives > 0).to(scores.dtype)
        return ((total - scores) * real).sum(1) / real.sum(1)

    def weigh(self, ctx: StageContext, users: torch.Tensor, new: list[Towers], old: list[Towers]) -> torch.Tensor:
        """Returns the weights of the users' losses, shape ``[U]``, with mean 1."""
        return torch.ones(len(users), device=users.device)

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        return {} if ctx.previous_model is None else self.distil(ctx, batch, layers(ctx.model), ctx.previous_model)

    def distil(
        self, ctx: StageContext, batch: Interaction, new: list[Towers], teacher: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Returns the term, of the new model's layers; nothing where no anchor of the batch has an old neighbour."""
        old = self.old_layers(teacher)
        parts: list[torch.Tensor] = []
        for side, (kind, field) in enumerate((("users", ctx.batcher.uid), ("items", ctx.batcher.iid))):
            table = self.neighbours(ctx)[side]
            anchors = torch.unique(batch[field])
            anchors = anchors[anchors < len(table)]
            anchors = anchors[table[anchors, 0] > 0]
            if not len(anchors):
                continue
            others = self.candidates(ctx, kind, len(old[0][1 - side]))
            weights = self.weigh(ctx, anchors, new, old) if kind == "users" else 1.0
            for before, now in zip(old, new, strict=True):
                each = self.contrast(before[side][anchors], table[anchors], now[1 - side], others)
                parts.append((weights * each).mean() / len(new))
        if not parts:
            return {}
        return {f"{self.name}/distillation": float(self.params["lambda"]) * torch.stack(parts).sum()}
