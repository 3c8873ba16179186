"""What strategies have in common that keep the adapters of past stages beside the one that is trained.

A part for strategies, not a strategy. The base's weights stay as they are, byte for byte; the past is added where an
adapted layer calls its base layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.generative.lora import Factors
from recbole_cl.model.capabilities import capabilities
from recbole_cl.rng import torch_generator
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.composite import PARTS
from recbole_cl.strategy.context import StageContext

Past = list[dict[str, Factors]]
"""The adapters of past stages, A and B by the adapted layer's name, oldest first."""


def start_anew(ctx: StageContext, who: str) -> None:
    """Starts the adapter in training anew: A at random as peft does, B zero.

    Args:
        ctx: The stage; its number and the run's seed are what A is drawn from.
        who: The strategy's name.
    """
    generator = torch_generator(ctx.config["seed"], ctx.index, f"{who}/adapter")
    with torch.no_grad():
        for a, b in ctx.model.adapters().values():
            fresh = torch.empty(a.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            a.copy_(fresh)
            b.zero_()


class Cumulative(Strategy):
    """``W0 + what past adapters add + B_t A_t``; the adapter of a stage joins the past when the next one begins.

    Parameters ``adapters`` (``all`` past ones, or the ``latest``) and ``inherit`` (B_t A_t starts where the stage
    before ended, or anew) are those of the variants in PESO's table 1.

    Attributes:
        past: The adapters of stages that have ended.
        used: Which of them the running stage adds.
    """

    base_is_finetune = True
    needs = frozenset({"continual_lora"})
    kind = PARTS

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.past: Past = []
        self.used: list[int] = []

    def check(self, config: Any, model: nn.Module) -> None:
        if self.params["adapters"] not in ("all", "latest"):
            raise ConfigError(
                f"property '{self.prefix}_adapters' is {self.params['adapters']!r}; it must be 'all' or 'latest'"
            )

    # -- what subclasses say --------------------------------------------------------------------------------------

    def output(self, name: str, inputs: torch.Tensor, base: nn.Linear) -> torch.Tensor:
        """Returns what an adapted layer's base and the past answer; only asked while something is ``used``."""
        raise NotImplementedError(f"{type(self).__name__} must implement output(name, inputs, base)")

    def beside(self, name: str, like: torch.Tensor) -> list[Factors]:
        """Returns factors A, B whose products are what the used past adds to a layer's weight.

        Args:
            name: The adapted layer.
            like: A tensor on the device that is wanted.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement beside(name, like)")

    def past_changed(self) -> None:
        """Forgets what was computed from the past."""

    def scaling(self, ctx: StageContext) -> float:
        """Returns LoRA's alpha / r; 1 for a model without."""
        if not self.needs <= capabilities(ctx.model):
            return 1.0
        return float(ctx.config["lora_alpha"]) / float(ctx.config["lora_rank"])

    # -- hooks ----------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: StageContext) -> None:
        if not self.needs <= capabilities(ctx.model):
            return  # refused by name right after
        for name, layer in ctx.model.adapted_layers().items():
            base = layer.base_layer
            base.forward = functools.partial(self._forward, name, base, type(base).forward)

    def _forward(self, name: str, base: nn.Linear, plain: Any, inputs: torch.Tensor) -> torch.Tensor:
        return self.output(name, inputs, base) if self.used else plain(base, inputs)

    def begin_stage(self, ctx: StageContext) -> None:
        self.used = list(range(len(self.past)))
        if self.params["adapters"] == "latest":
            self.used = self.used[-1:]
        self.past_changed()
        if ctx.index > 0 and not self.params.get("inherit", False):
            self.anew(ctx)

    def anew(self, ctx: StageContext) -> None:
        """Starts the adapter anew: A at random as peft does, B zero."""
        start_anew(ctx, self.name)

    def own_weight(self, name: str) -> float:
        """Returns what the adapter in training is multiplied by in a layer."""
        return 1.0

    def end_stage(self, ctx: StageContext) -> None:
        self.past.append(
            {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in ctx.model.adapters().items()}
        )

    def state_dict(self) -> dict[str, Any]:
        past = [{name: {"a": a, "b": b} for name, (a, b) in adapter.items()} for adapter in self.past]
        return {"past": past, "used": list(self.used)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "past", "used")
        self.past = [{name: (pair["a"], pair["b"]) for name, pair in adapter.items()} for adapter in state["past"]]
        self.used = [int(index) for index in state["used"]]
        self.past_changed()

    def of_layer(self, name: str, like: torch.Tensor) -> list[Factors]:
        """Returns the used past factors of a layer, on the device of ``like``."""
        chosen = [self.past[index][name] for index in self.used]
        return [(a.to(like.device), b.to(like.device)) for a, b in chosen]


class Folded(Cumulative):
    """A past that is fixed: it is added to the base's weights once a stage, and costs nothing in a step."""

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self._weights: dict[str, torch.Tensor] = {}
        self._scaling = 1.0

    def added(self, past: list[Factors]) -> torch.Tensor:
        """Returns what a layer's past adds to its weight, shape ``[out, in]``."""
        raise NotImplementedError(f"{type(self).__name__} must implement added(past)")

    def prepare_model(self, ctx: StageContext) -> None:
        super().prepare_model(ctx)
        self._scaling = self.scaling(ctx)

    def past_changed(self) -> None:
        self._weights = {}

    def output(self, name: str, inputs: torch.Tensor, base: nn.Linear) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None or weight.device != base.weight.device:
            past = self.of_layer(name, base.weight)
            weight = self._weights[name] = base.weight.detach() + self.added(past).to(base.weight.dtype)
        return nn.functional.linear(inputs, weight, base.bias)
