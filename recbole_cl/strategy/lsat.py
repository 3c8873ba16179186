"""A long-term and a short-term adapter, averaged factor by factor (LSAT, Shi et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.composite import PARTS
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.cumulative import start_anew

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A ``[r, in]`` and B ``[out, r]`` by the name of the adapted layer."""


@strategies.register()
class LSAT(Strategy):
    """Answers with ``A = w A_l + (1 - w) A_s`` and ``B = w B_l + (1 - w) B_s`` in every layer.

    The long-term adapter is the one of the base stage, trained on abundant history once and kept; the short-term one is
    trained on each stage alone, from nothing or (``inherit``) from the short-term one before, which at stage 2 is the
    long-term one. It is validated by itself; the average takes its place as the stage ends. With ``share`` 0 and
    ``inherit`` it is a single evolving LoRA.

    Known trap: A and B of adapters that were initialised apart have no common basis, so their factor-wise average is
    not the average of what they add; ``inherit`` keeps them in one.

    Args:
        parameters: ``share``, the weight w of the long-term adapter; ``inherit``.
    """

    prefix = "lsat"
    defaults = {"share": 0.5, "inherit": False}
    neutral = {"share": 0.0, "inherit": True}
    needs = frozenset({"continual_lora"})
    base_is_finetune = True
    kind = PARTS

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.long: Adapter | None = None
        self.short: Adapter | None = None

    def check(self, config: Any, model: nn.Module) -> None:
        if not 0 <= self.params["share"] <= 1:
            raise ConfigError(f"property 'lsat_share' is {self.params['share']!r}; it must be between 0 and 1")

    def begin_stage(self, ctx: StageContext) -> None:
        if ctx.index == 0:
            return
        if not self.params["inherit"]:
            start_anew(ctx, self.name)
        elif self.short is not None:
            _put(ctx.model, self.short)

    def end_stage(self, ctx: StageContext) -> None:
        now = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in ctx.model.adapters().items()}
        self.short = now
        if ctx.index == 0:
            self.long = now
        elif self.long is not None:
            w = float(self.params["share"])
            mixed = {}
            for name, (a, b) in now.items():
                long_a, long_b = (t.to(a.device) for t in self.long[name])
                mixed[name] = (w * long_a + (1 - w) * a, w * long_b + (1 - w) * b) if w else (a, b)
            _put(ctx.model, mixed)

    def state_dict(self) -> dict[str, Any]:
        return {"long": _told(self.long), "short": _told(self.short)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "long", "short")
        self.long, self.short = _read(state["long"]), _read(state["short"])


def _told(adapter: Adapter | None) -> dict[str, Any] | None:
    return None if adapter is None else {name: {"a": a, "b": b} for name, (a, b) in adapter.items()}


def _read(state: Mapping[str, Any] | None) -> Adapter | None:
    return None if state is None else {name: (pair["a"], pair["b"]) for name, pair in state.items()}


@torch.no_grad()
def _put(model: Any, adapter: Adapter) -> None:
    for name, (a, b) in model.adapters().items():
        a.copy_(adapter[name][0])
        b.copy_(adapter[name][1])
