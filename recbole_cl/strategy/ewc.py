"""Elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import StageContext, Strategy, require
from recbole_cl.strategy.importance import check_loss, stage_importance
from recbole_cl.stream.vocabulary import Growth


@strategies.register()
class EWC(Strategy):
    """Pulls every parameter back to where it was after each stage, as hard as that stage's data hold it there.

    Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", eq. 3, one anchor a stage::

        L(theta) + lambda / 2 * sum_t sum_i F_t,i (theta_i - theta_t,i)^2

    ``F_t`` is the mean over the stage's training samples of *per-sample* squared gradients at the stage's best weights
    (:mod:`recbole_cl.strategy.importance`). The anchors collapse exactly into two tensors and a number, for any number
    of stages::

        sum_t F_t (theta - theta_t)^2 = A (theta - M)^2 + R      A = sum F_t,  M = sum F_t theta_t / A = B / A

    and the gradient ``lambda (A theta - B) = lambda A (theta - M)`` is added in closed form after the backward pass.
    M is kept rather than B, because ``A theta - B`` cancels in float32 once theta is near its anchor. R does not
    depend on theta. Rows of new users and items have A = 0: nothing holds them.

    Known mistakes elsewhere: squared gradients of batch means (lambda then depends on the batch size), a Fisher in
    train mode (dropout noise is taken for importance), anchors looped over at every step.
    """

    prefix = "ewc"
    defaults = {"lambda": 100.0, "samples": 2000}
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.importance: dict[str, torch.Tensor] = {}
        self.anchor: dict[str, torch.Tensor] = {}
        self.residual = 0.0

    def check(self, config: Any, model: nn.Module) -> None:
        check_loss(self.name, config, model)
        samples = self.params["samples"]
        if samples is not None and samples < 1:
            raise ConfigError(f"ewc_samples: {samples} is too small; it must be at least 1, or ~ for all")

    def add_gradients(self, ctx: StageContext) -> None:
        strength = float(self.params["lambda"])
        for name, p in ctx.parameters().items():
            if name not in self.importance:
                continue
            if p.grad is None:
                if not strength:  # a gradient of zeros would make the optimiser decay what FineTune leaves alone
                    continue
                p.grad = torch.zeros_like(p)
            p.grad.addcmul_(self.importance[name], p.detach() - self.anchor[name], value=strength)
        if f"{self.name}/penalty" not in ctx.terms:  # once an epoch
            ctx.log(f"{self.name}/penalty", self.penalty(ctx))

    def penalty(self, ctx: StageContext) -> torch.Tensor:
        total = torch.tensor(self.residual, dtype=torch.float64)
        for name, p in ctx.parameters().items():
            if name in self.importance:
                drift = p.detach().double() - self.anchor[name]
                total += (self.importance[name] * drift.square()).sum().cpu()
        return float(self.params["lambda"]) / 2 * total

    def end_stage(self, ctx: StageContext) -> None:
        fisher = stage_importance(ctx, self.name, self.params["samples"])
        for name, p in ctx.parameters().items():
            self._add_anchor(name, fisher[name], p.detach())

    def _add_anchor(self, name: str, fisher: torch.Tensor, theta: torch.Tensor) -> None:
        """Moves the mean anchor towards ``theta`` by its share of the importance."""
        if name not in self.importance:
            self.importance[name], self.anchor[name] = torch.zeros_like(theta), theta.clone()
        total = self.importance[name] + fisher
        share = torch.where(total > 0, fisher / total, 0.0)
        gap = theta - self.anchor[name]
        self.residual += float((self.importance[name] * share).double().mul(gap.double().square()).sum())
        self.anchor[name] = self.anchor[name] + share * gap
        self.importance[name] = total

    def grow(self, growth: Growth) -> None:
        for state in (self.importance, self.anchor):
            for name in state:
                state[name] = growth.expand(name, state[name])

    def state_dict(self) -> dict[str, Any]:
        return {"importance": dict(self.importance), "anchor": dict(self.anchor), "residual": self.residual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "importance", "anchor", "residual")
        self.importance, self.anchor = dict(state["importance"]), dict(state["anchor"])
        self.residual = float(state["residual"])
