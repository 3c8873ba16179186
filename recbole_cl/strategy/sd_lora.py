"""Adapters of all stages as directions whose magnitudes are learnt (SD-LoRA, Wu et al. 2025)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.generative.lora import Factors, direction_factors
from recbole_cl.model.capabilities import capabilities
from recbole_cl.model.small_llama import ADAPTER
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import require
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.cumulative import Cumulative

SHARED = "all layers"
"""Name of the magnitudes where layers share them."""


@strategies.register()
class SDLoRA(Cumulative):
    """``W0 + sum_{i<t} alpha_i B^_i A^_i + B_t A_t``: past directions are fixed, every alpha is learnt (eq. 5 of PESO).

    A magnitude is one number a layer and past adapter. It goes on from stage to stage; a new one starts at ``init``, 1
    in PESO's paper. SD-LoRA's own form is ``init: 0.8``, ``shared`` (a number a stage for all layers) and ``current``
    (``alpha_t B_t A_t``, too; it goes on with its adapter into the past).
    """

    prefix = "sd_lora"
    defaults = {"adapters": "all", "inherit": False, "scaled": False, "init": 1.0, "shared": False, "current": False}
    why_not_neutral = "the adapter of a past stage is always added"

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.magnitudes: dict[str, nn.Parameter] = {}  # of a layer, or SHARED, shape [len(used) + current]
        self._layers: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # by their base layers
        self._directions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._scaling = 1.0

    def prepare_model(self, ctx: StageContext) -> None:
        super().prepare_model(ctx)
        self._scaling = self.scaling(ctx)
        if self.needs <= capabilities(ctx.model):
            for layer in ctx.model.adapted_layers().values():
                self._layers[layer.base_layer] = weakref.ref(layer)

    def begin_stage(self, ctx: StageContext) -> None:
        current = bool(self.params["current"])
        before = {index: place for place, index in enumerate(self.used)}
        if current and self.used:  # the newest of the past was the current one
            before[len(self.past) - 1] = len(self.used)
        super().begin_stage(ctx)
        if not self.used:
            return
        for name in [SHARED] if self.params["shared"] else ctx.model.adapters():
            fresh = torch.full((len(self.used) + current,), float(self.params["init"]), device=ctx.device)
            for place, index in enumerate(self.used):
                if index in before and name in self.magnitudes:
                    fresh[place] = self.magnitudes[name].detach()[before[index]]
            self.magnitudes[name] = nn.Parameter(fresh)

    def end_pass(self, ctx: StageContext) -> None:
        if self.params["current"]:  # no graph of the last step stays in the model
            for layer in ctx.model.adapted_layers().values():
                layer.scaling[ADAPTER] = self._scaling

    def past_changed(self) -> None:
        self._directions = {}

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.magnitudes[name] for name in sorted(self.magnitudes)]

    def beside(self, name: str, like: torch.Tensor) -> list[Factors]:
        scale = self._scaling if self.params["scaled"] else 1.0
        weights = scale * self.of(name).detach()[: len(self.used)].to(like.device)
        pairs = map(direction_factors, self.of_layer(name, like))
        return [(a, weight * b) for weight, (a, b) in zip(weights, pairs, strict=True)]

    def of(self, name: str) -> nn.Parameter:
        """Returns a layer's magnitudes."""
        return self.magnitudes[SHARED if self.params["shared"] else name]

    def own_weight(self, name: str) -> float:
        return float(self.of(name)[-1]) if self.params["current"] and self.used else 1.0

    def output(self, name: str, inputs: torch.Tensor, base: nn.Linear) -> torch.Tensor:
        if name not in self._directions or self._directions[name][0].device != base.weight.device:
            pairs = [direction_factors(pair) for pair in self.of_layer(name, base.weight)]
            self._directions[name] = (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        a, b = self._directions[name]
        magnitudes = self.of(name)
        if magnitudes.device != a.device:  # a state that was put back lies on the CPU
            magnitudes.data = magnitudes.data.to(a.device)
        if self.params["current"]:  # peft multiplies by it what the adapter adds, right behind this base layer
            self._layers[base]().scaling[ADAPTER] = self._scaling * magnitudes[-1]
        each = magnitudes[: len(self.used)].repeat_interleave(len(a) // len(self.used))
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
