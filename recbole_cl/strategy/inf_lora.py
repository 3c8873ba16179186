"""Adapters that do not touch what past inputs span (InfLoRA, Liang and Li 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.generative.lora import Factors, grow_span, leading_inputs, product
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import require
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.cumulative import Folded
from recbole_cl.stream.loader import make_loader
from recbole_cl.tree import answering


@strategies.register()
class InfLoRA(Folded):
    """``W0 + sum_{i<t} B_i A_i + B_t A_t``; A_t is fixed before the stage is trained, and B_t alone is learnt.

    A_t's rows are the leading directions of the layer's inputs on the stage's data, the span M of past inputs taken
    away (``side: outside``) or kept (``inside``). So an update outside M leaves the answers to past inputs as they are.
    M grows by DualGPM's rule until it holds ``share`` of the energy of a stage's inputs. The base stage is trained as
    any, and gives M its first directions.
    """

    prefix = "inf_lora"
    defaults = {"adapters": "all", "inherit": False, "side": "outside", "share": 0.95, "batches": 20}
    why_not_neutral = "A is fixed"

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.span: dict[str, torch.Tensor] = {}

    def check(self, config: Any, model: nn.Module) -> None:
        super().check(config, model)
        if self.params["inherit"]:
            raise ConfigError(
                "property 'inf_lora_inherit' is True, but A is fixed anew at every stage, so there is no B to go on "
                "from; leave it out"
            )
        if self.params["side"] not in ("outside", "inside"):
            raise ConfigError(f"property 'inf_lora_side' is {self.params['side']!r}; it must be 'outside' or 'inside'")

    def beside(self, name: str, like: torch.Tensor) -> list[Factors]:
        return [(a, self._scaling * b) for a, b in self.of_layer(name, like)]

    def added(self, past: list[Factors]) -> torch.Tensor:
        return self._scaling * torch.stack([product(factors) for factors in past]).sum(0)

    def anew(self, ctx: StageContext) -> None:
        covariances = self.inputs(ctx)
        inside = self.params["side"] == "inside"
        with torch.no_grad():
            for name, (a, b) in ctx.model.adapters().items():
                span = self.span.get(name)
                span = None if span is None else span.to(a.device)
                a.copy_(leading_inputs(covariances[name], len(a), span, inside).to(a.dtype))
                b.zero_()

    def mask_gradients(self, ctx: StageContext) -> None:
        if ctx.index > 0:
            for a, _ in ctx.model.adapters().values():
                a.grad = None

    def end_stage(self, ctx: StageContext) -> None:
        for name, covariance in self.inputs(ctx).items():
            span = self.span.get(name)
            span = None if span is None else span.to(covariance.device)
            self.span[name] = grow_span(span, covariance, float(self.params["share"]))
        super().end_stage(ctx)

    @torch.no_grad()
    def inputs(self, ctx: StageContext) -> dict[str, torch.Tensor]:
        """Returns ``sum x x^T`` of each layer's inputs on the stage's training data, at most ``batches``, float64."""
        found: dict[str, torch.Tensor] = {}
        handles = []
        for name, layer in ctx.model.adapted_layers().items():

            def note(module: Any, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                x = inputs[0].flatten(0, -2).double()
                found[name] = found.get(name, 0) + x.T @ x

            handles.append(layer.register_forward_pre_hook(note))
        try:
            with answering(ctx.model):
                for number, batch in enumerate(make_loader(ctx, ctx.stage.train, f"{self.name}/inputs")):
                    if number == int(self.params["batches"]):
                        break
                    ctx.model.calculate_loss(batch.to(ctx.device))
        finally:
            for handle in handles:
                handle.remove()
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "span": dict(self.span)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        require(state, "span")
        self.span = dict(state["span"])
