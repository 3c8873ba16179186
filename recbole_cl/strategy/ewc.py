"""Elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.registry import strategies
from recbole_cl.strategy.base import require
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_loss, check_samples, check_strength
from recbole_cl.strategy.parts.importance import stage_importance
from recbole_cl.strategy.parts.quadratic import QuadraticPenalty


@strategies.register()
class EWC(QuadraticPenalty):
    """Pulls every parameter back to where it was after each stage, as hard as that stage's data hold it there.

    Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", eq. 3, one anchor a stage::

        L(theta) + lambda / 2 * sum_t sum_i F_t,i (theta_i - theta_t,i)^2

    ``F_t`` is the mean over the stage's training samples of *per-sample* squared gradients at the stage's best weights
    (:mod:`recbole_cl.strategy.parts.importance`). The anchors collapse exactly into two tensors and a number, for any
    number of stages::

        sum_t F_t (theta - theta_t)^2 = A (theta - M)^2 + R      A = sum F_t,  M = sum F_t theta_t / A = B / A

    and the gradient ``lambda (A theta - B) = lambda A (theta - M)`` is added in closed form after the backward pass.
    M is kept rather than B, because ``A theta - B`` cancels in float32 once theta is near its anchor. R does not
    depend on theta. Rows of new users and items have A = 0: nothing holds them.

    Known mistakes elsewhere: squared gradients of batch means (lambda then depends on the batch size), a Fisher in
    train mode (dropout noise is taken for importance), anchors looped over at every step.
    """

    prefix = "ewc"
    base_is_finetune = True
    defaults = {"lambda": 100.0, "samples": 2000}
    neutral = {"lambda": 0.0}

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.residual = 0.0

    def check(self, config: Any, model: nn.Module) -> None:
        check_loss(self.name, config, model)
        check_strength(self)
        check_samples(self)

    def weight(self) -> float:
        return float(self.params["lambda"]) / 2

    def penalty(self, ctx: StageContext) -> torch.Tensor:
        return super().penalty(ctx) + self.weight() * self.residual

    def end_stage(self, ctx: StageContext) -> None:
        fisher = stage_importance(ctx, self.name, self.params["samples"])
        for name, p in ctx.parameters().items():
            self._add_anchor(name, fisher[name], p.detach())

    def _add_anchor(self, name: str, fisher: torch.Tensor, theta: torch.Tensor) -> None:
        """Moves the mean anchor towards ``theta`` by its share of the importance."""
        if name not in self.importance:
            self.importance[name], self.anchor[name] = torch.zeros_like(theta), theta.clone()
        self.bring(name, theta)
        total = self.importance[name] + fisher
        share = torch.where(total > 0, fisher / total, 0.0)
        gap = theta - self.anchor[name]
        self.residual += float((self.importance[name] * share).double().mul(gap.double().square()).sum())
        self.anchor[name] = self.anchor[name] + share * gap
        self.importance[name] = total

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "residual": self.residual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        require(state, "residual")
        self.residual = float(state["residual"])
