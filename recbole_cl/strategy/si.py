"""Synaptic intelligence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.registry import strategies
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_number, check_strength
from recbole_cl.strategy.parts.quadratic import QuadraticPenalty


@strategies.register()
class SI(QuadraticPenalty):
    """Holds parameters by how much moving them lowered the loss, measured along the path of training.

    Zenke, Poole and Ganguli 2017, "Continual learning through synaptic intelligence", eq. 3 to 5. At every step, with
    the gradient ``g`` of the data loss alone and the optimiser's step ``d theta``, and at the end of a stage::

        omega -= g * d theta
        Omega  = relu(Omega + omega / ((theta - theta_start)^2 + xi)),      anchor = theta
        L(theta) + c * sum_i Omega_i (theta_i - anchor_i)^2

    The relu is in the authors' code (ganguli-lab/pathint, protocols.py), not in the paper: with noisy gradients omega
    can be negative, and a negative Omega would push a parameter away without bound. ``g`` is taken before clipping.
    A pass that starts anew (``fresh``, ``stage_start``) starts the path anew.

    Known mistakes elsewhere: the weights before the step kept as a view of the parameter, so that ``d theta`` is
    always zero and so is Omega (on a CPU); ``g`` with the penalty's own gradient in it.
    """

    prefix = "si"
    defaults = {"c": 0.1, "xi": 0.1}
    neutral = {"c": 0.0}
    wants_data_gradients = True
    state = ("path", "start", "importance", "anchor")
    path: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self._before: dict[str, torch.Tensor] = {}  # lives from add_gradients to after_step: no state

    def check(self, config: Any, model: nn.Module) -> None:
        check_strength(self, "c")
        check_number(self, "xi", "it bounds Omega where a parameter did not move; the default is 0.1", above=0)

    def _begin_path(self, ctx: StageContext) -> None:
        self.start = {name: p.detach().clone() for name, p in ctx.parameters().items()}
        self.path = {name: torch.zeros_like(p) for name, p in self.start.items()}

    def begin_stage(self, ctx: StageContext) -> None:
        self._begin_path(ctx)

    def first_step(self, ctx: StageContext) -> None:
        if ctx.pass_.init != "previous":
            self._begin_path(ctx)

    def add_gradients(self, ctx: StageContext) -> None:
        # A copy: the step changes a parameter in place.
        self._before = {name: p.detach().clone() for name, p in ctx.parameters().items()}
        super().add_gradients(ctx)

    def after_step(self, ctx: StageContext) -> None:
        for name, p in ctx.parameters().items():
            gradient = ctx.data_gradients.get(name)
            if gradient is not None:
                self.path[name].addcmul_(gradient, p.detach() - self._before[name], value=-1.0)
        self._before = {}

    def weight(self) -> float:
        return float(self.params["c"])

    def end_stage(self, ctx: StageContext) -> None:
        for name, p in ctx.parameters().items():
            self.bring(name, p)
            moved = (p.detach() - self.start[name]).square()
            total = self.importance.get(name, 0.0) + self.path[name] / (moved + float(self.params["xi"]))
            self.importance[name] = total.clamp(min=0.0)
            self.anchor[name] = p.detach().clone()
            self.path[name] = torch.zeros_like(p)

    def state_dict(self) -> dict[str, Any]:
        # The path changes in place, so a snapshot needs a copy of its own.
        return {**super().state_dict(), "path": {name: value.clone() for name, value in self.path.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.path = {name: value.clone() for name, value in self.path.items()}
