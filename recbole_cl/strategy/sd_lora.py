"""Adapters of all stages as directions whose magnitudes are learnt (SD-LoRA, Wu et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.generative.lora import Factors, direction_factors
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import require
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.cumulative import Cumulative


@strategies.register()
class SDLoRA(Cumulative):
    """``W0 + sum_{i<t} alpha_i B^_i A^_i + B_t A_t``: past directions are fixed, every alpha is learnt (eq. 5 of PESO).

    A magnitude is one number a layer and past adapter. It goes on from stage to stage; a new one starts at ``init``
    (1 in PESO's paper; SD-LoRA's own code has 0.8, shares it among layers and puts one on the current term, too).
    """

    prefix = "sd_lora"
    defaults = {"adapters": "all", "inherit": False, "scaled": False, "init": 1.0}
    why_not_neutral = "the adapter of a past stage is always added"

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.magnitudes: dict[str, nn.Parameter] = {}  # of a layer, shape [len(used)]
        self._directions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._scaling = 1.0

    def prepare_model(self, ctx: StageContext) -> None:
        super().prepare_model(ctx)
        self._scaling = self.scaling(ctx)

    def begin_stage(self, ctx: StageContext) -> None:
        before = dict(zip(self.used, range(len(self.used)), strict=True))
        super().begin_stage(ctx)
        if not self.used:
            return
        for name, (a, _) in ctx.model.adapters().items():
            fresh = torch.full((len(self.used),), float(self.params["init"]), device=a.device)
            for place, index in enumerate(self.used):
                if index in before and name in self.magnitudes:
                    fresh[place] = self.magnitudes[name].detach()[before[index]]
            self.magnitudes[name] = nn.Parameter(fresh)

    def past_changed(self) -> None:
        self._directions = {}

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.magnitudes[name] for name in sorted(self.magnitudes)]

    def beside(self, name: str, like: torch.Tensor) -> list[Factors]:
        scale = self._scaling if self.params["scaled"] else 1.0
        weights = scale * self.magnitudes[name].detach().to(like.device)
        pairs = map(direction_factors, self.of_layer(name, like))
        return [(a, weight * b) for weight, (a, b) in zip(weights, pairs, strict=True)]

    def output(self, name: str, inputs: torch.Tensor, base: nn.Linear) -> torch.Tensor:
        if name not in self._directions or self._directions[name][0].device != base.weight.device:
            pairs = [direction_factors(pair) for pair in self.of_layer(name, base.weight)]
            self._directions[name] = (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        a, b = self._directions[name]
        magnitudes = self.magnitudes[name]
        if magnitudes.device != a.device:  # a state that was put back lies on the CPU
            magnitudes.data = magnitudes.data.to(a.device)
        each = magnitudes.repeat_interleave(len(a) // len(magnitudes))
        scale = self._scaling if self.params["scaled"] else 1.0
        added = ((inputs.to(a.dtype) @ a.T) * (scale * each)) @ b.T  # a checkpoint may be of bfloat16
        return nn.functional.linear(inputs, base.weight, base.bias) + added.to(base.weight.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "magnitudes": {name: p.detach() for name, p in self.magnitudes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        require(state, "magnitudes")
        found = state["magnitudes"]
        for name in [name for name in self.magnitudes if name not in found]:
            del self.magnitudes[name]
        for name, value in found.items():  # the optimiser holds the parameters themselves
            if name in self.magnitudes and self.magnitudes[name].shape == value.shape:
                self.magnitudes[name].data.copy_(value)
            else:
                self.magnitudes[name] = nn.Parameter(value.detach().clone())
