"""All tasks at once: the upper bounds of a stream of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.bounds import only_last_row
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.parts.mgda import gram_matrix, min_norm_weights
from recbole_cl.stream.stage import Targets

STARTS, WEIGHTS = ("fresh", "previous"), ("equal", "mgda")


@strategies.register()
class MTL(Strategy):
    """Trains on the targets of all tasks so far at once; each step has a batch of every task.

    With equal weights (Caruana 1997) the losses are summed. With ``mgda`` the gradients of the K tasks on the
    parameters that more than one of them reaches are combined to the point of least norm in their convex hull (Sener
    and Koltun 2018, "Multi-task learning as multi-objective optimization", algorithm 2; see
    :mod:`recbole_cl.strategy.parts.mgda`)::

        g = sum_k a_k g_k,    a = argmin || sum_k a_k g_k ||^2 over the simplex

    while a parameter of one task alone follows its own gradient. On a shared bottom this is MTL and MTL+, on a mixture
    of experts (:class:`recbole_cl.model.multi_task.MMOE`) MMOE and MMOE+ of arXiv 2502.19628, table 1. At stage t the
    tasks 0..t count, so the last row of the matrix is the bound over all tasks. The longest task has batches of
    ``train_batch_size``, the others are spread over as many steps: an epoch sees each target once, and a step has the
    mean losses of a batch of every task. Training stops early by the geometric mean of the tasks' primary metrics,
    which are of different sizes. Under ``matrix_cells: last_row`` fresh weights are trained at the last stage only.
    """

    prefix = "mtl"
    plans_passes = True
    why_not_neutral = "a bound has no strength that could be zero"
    kind = "bound"
    priority = 0  # its gradients are those of the data: nobody's penalty may be in them yet

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self._losses: dict[int, torch.Tensor] = {}  # lives from loss_terms to add_gradients: no state

    @property
    def begins_anew(self) -> bool:
        return bool(self.params["start"] == "fresh")

    def check(self, config: Any, model: nn.Module) -> None:
        for key, allowed in (("weights", WEIGHTS), ("start", STARTS)):
            if self.params[key] not in allowed:
                raise ConfigError(f"mtl_{key}: {self.params[key]!r} is none of {', '.join(allowed)}")

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        if self.params["start"] == "fresh" and only_last_row(ctx):
            return []
        targets = Targets.concat([stage.train for stage in ctx.stream.stages[: ctx.index + 1]])
        init = self.params["start"] if ctx.index else "previous"
        return [Pass("all_tasks", init=init, data=targets, mix_tasks=True)]

    def stage_costs(self, ctx: StageContext) -> dict[str, Any]:
        return {"objectives": ctx.index + 1}

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        losses = {index: ctx.model.calculate_loss(other.to(ctx.device)) for index, other in ctx.loader.others.items()}
        if self.params["weights"] == "mgda":
            self._losses, losses = losses, {index: loss.detach() for index, loss in losses.items()}
        return {f"MTL/task {index + 1}": loss for index, loss in losses.items()}

    def add_gradients(self, ctx: StageContext) -> None:
        if not self._losses:
            return
        parameters = ctx.parameters()
        held = list(parameters.values())
        gradients: list[list[torch.Tensor | None]] = [
            list(torch.autograd.grad(loss, held, allow_unused=True)) for loss in self._losses.values()
        ]
        gradients.append([p.grad for p in held])  # of the trainer's own batch
        self._losses = {}
        for g in gradients:  # zeros tell the same as None: this task does not use the parameter
            g[:] = [value if value is not None and bool(value.any()) else None for value in g]
        shared = [i for i in range(len(held)) if sum(g[i] is not None for g in gradients) > 1]
        weights = min_norm_weights(gram_matrix([[g[i] for i in shared] for g in gradients]))
        for number, weight in enumerate(weights):
            ctx.log(f"MTL/weight {number + 1}", weight)
        for i, p in enumerate(held):
            found = [(value, float(w)) for g, w in zip(gradients, weights, strict=True) if (value := g[i]) is not None]
            if len(found) == 1:
                p.grad = found[0][0]
            elif found:
                p.grad = torch.stack([w * value for value, w in found]).sum(0)
