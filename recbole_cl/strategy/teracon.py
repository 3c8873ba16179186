"""TERACON: masks of tasks that are annealed, and old heads that keep answering as they did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import StageContext

START_RHO = 0.9
"""Share of a batch that the first step of a stage distils on, before masks have been compared."""
SHARPNESS = 6.0


@strategies.register()
class TERACON(Strategy):
    """Trains soft masks of tasks and distils every old head on a share of the new task's users.

    Kim, Lee, Kim, Yang and Park 2023, "Task relation-aware continual user representation learning", eq. 14 to 19. The
    model is :class:`recbole_cl.model.multi_task.SoftMask`. Task k trains on::

        L_k + alpha * sum_{i < k} rho_i / (sum_j rho_j) * MSE(f_i(theta; U_i), f_i(theta_{k-1}; U_i))
        rho_i = 1 - mean over layers of sigmoid(6 cos(mask_i of theta_{k-1}, mask_k of theta))

    where U_i is a share rho_i of the batch (one row at least), drawn anew at each step, and f_i gives the logits of
    task i for the new task's histories: the less task i's mask looks like the new one, the more users it is kept on.
    The scale s of the masks grows within each epoch from ``1 / scale`` to ``scale``, linearly over its steps; answers
    are given at ``scale``.

    As in the authors' code (Sein-Kim/TERACON): rho starts at 0.9 in each stage and is one step old; teacher and student
    are read at the same s; the embeddings behind the masks are kept within [-6, 6]. The teacher is in eval mode.
    """

    prefix = "teracon"
    defaults = {"alpha": 0.7}
    why_not_neutral = "its masks are annealed and clamped: with alpha = 0, too, it trains otherwise than FineTune"
    needs = frozenset({"task_masks", "gradient"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.rhos: list[float] = []  # rho, by old task
        self.epoch = [-1, 0]  # the running epoch, and the step at which it began

    def check(self, config: Any, model: nn.Module) -> None:
        if self.params["alpha"] < 0:
            raise ConfigError(f"teracon_alpha: {self.params['alpha']!r} must be at least 0")

    def begin_stage(self, ctx: StageContext) -> None:
        self.rhos, self.epoch = [START_RHO] * ctx.index, [-1, 0]

    def augment_batch(self, ctx: StageContext, batch: Interaction) -> Interaction:
        """Sets the scale of this step; the batch stays as it is."""
        if self.epoch[0] != ctx.epoch:
            self.epoch = [ctx.epoch, ctx.step]
        most = float(ctx.config["soft_mask_scale"])
        ctx.model.train_scale = annealed(most, ctx.step - self.epoch[1], len(ctx.loader))
        return batch

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        teacher: Any = ctx.previous_model
        if teacher is None:
            return {}
        scale = ctx.model.train_scale
        known = ctx.stream.stages[ctx.index - 1].n_items  # where tables grow: histories that the teacher can read
        readable = torch.nonzero((batch[ctx.model.ITEM_SEQ] < known).all(dim=1)).flatten()
        generator, terms = ctx.generator("TERACON/users"), []
        for task, share in enumerate(self.rhos if len(readable) else ()):
            drawn = generator.permutation(len(readable))[: max(int(len(readable) * share), 1)]
            rows = readable[torch.from_numpy(drawn).to(ctx.device)]
            users = Interaction({name: column[rows] for name, column in batch.interaction.items()})
            with torch.no_grad(), teacher.answering_at(scale):
                old = teacher.answers(users, task)
            new = ctx.model.answers(users, task)[:, : old.shape[1]]  # items that the teacher did not know are left out
            terms.append(share / sum(self.rhos) * F.mse_loss(new, old))
        with torch.no_grad(), teacher.answering_at(scale):
            mine = ctx.model.task_masks(ctx.index)
            masks = [teacher.task_masks(task) for task in range(ctx.index)]
        for task, mask in enumerate(masks):
            self.rhos[task] = mask_overlap(mask, mine)
            ctx.log(f"TERACON/rho of task {task + 1}", self.rhos[task])
        return {"TERACON/retention": float(self.params["alpha"]) * torch.stack(terms).sum()} if terms else {}

    def after_step(self, ctx: StageContext) -> None:
        masks = ctx.model.masks
        masks.embedding.data.clamp_(-masks.LIMIT, masks.LIMIT)

    def state_dict(self) -> dict[str, Any]:
        return {"rhos": list(self.rhos), "epoch": list(self.epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "rhos", "epoch")
        self.rhos, self.epoch = [float(v) for v in state["rhos"]], [int(v) for v in state["epoch"]]


def annealed(most: float, step: int, steps: int) -> float:
    """Returns s: from ``1 / most`` at step 0 of an epoch to ``most`` at its last, linearly; one step takes ``most``."""
    if steps < 2:
        return most
    return 1 / most + (most - 1 / most) * min(step / (steps - 1), 1.0)


def mask_overlap(old: torch.Tensor, new: torch.Tensor) -> float:
    """Returns rho: one minus the mean over layers of ``sigmoid(6 cos)`` of two masks, shape ``[layers, d]``."""
    return 1 - float(torch.sigmoid(SHARPNESS * F.cosine_similarity(old, new, dim=1, eps=1e-6)).mean())
