"""A softmax-KL of what an adapter adds to its layers' outputs (PESO's figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recbole_cl.registry import strategies
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.adapter_pull import Adapter, AdapterPull, by_autograd


@strategies.register()
class OutputKL(AdapterPull):
    """``lambda * sum_g mean_x KL(softmax(B_t A_t x) || softmax(B_{t-1} A_{t-1} x))`` over a step's inputs x of layer g.

    The inputs are those of the step, held fixed: the pull does not flow on into the layers below. At most ``inputs`` of
    a layer's are taken, evenly spaced.
    """

    prefix = "output_kl"
    defaults = {"lambda": 2.0, "inputs": 512}
    neutral = {"lambda": 0.0}

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._handles: list[Any] = []

    def begin_pass(self, ctx: StageContext) -> None:
        self._inputs = {}
        for name, layer in ctx.model.adapted_layers().items() if ctx.index else ():

            def note(module: Any, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                if module.training and torch.is_grad_enabled():
                    self._inputs.setdefault(name, []).append(inputs[0].detach().flatten(0, -2))

            self._handles.append(layer.register_forward_pre_hook(note))

    def end_pass(self, ctx: StageContext) -> None:
        super().end_pass(ctx)
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs = [], {}

    def pull(self, now: Adapter) -> tuple[torch.Tensor, list[torch.Tensor]]:
        before = self.anchor
        assert before is not None
        inputs = {name: self._taken(torch.cat(parts)) for name, parts in self._inputs.items()}

        def value_of(adapter: Adapter) -> torch.Tensor:
            total = torch.stack([0 * (a.sum() + b.sum()) for a, b in adapter.values()]).sum()
            for name, x in inputs.items():
                (a, b), (a_before, b_before) = adapter[name], before[name]
                x = x.to(a.dtype)  # a checkpoint may be of bfloat16
                mine = torch.log_softmax((x @ a.T @ b.T).float(), dim=-1)
                theirs = torch.log_softmax((x @ a_before.T @ b_before.T).float(), dim=-1)
                total = total + (mine.exp() * (mine - theirs)).sum(-1).mean()
            return total

        return by_autograd(now, value_of)

    def add_gradients(self, ctx: StageContext) -> None:
        super().add_gradients(ctx)
        self._inputs = {}

    def _taken(self, x: torch.Tensor) -> torch.Tensor:
        return x[:: max(1, -(-len(x) // int(self.params["inputs"])))]
