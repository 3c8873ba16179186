"""What strategies have in common that hold an adapter near where it was: the anchor, the step, and a meter.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.generative.proximal import Groups, Pull
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.composite import PARTS
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_strength

LOGGER = logging.getLogger("recbole_cl")

WEAK = 1e-3
"""A pull whose gradient is less than this share of the data's does practically nothing."""

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A ``[r, in]`` and B ``[out, r]`` by the name of the adapted layer."""


class AdapterPull(Strategy):
    """``lambda * sum_g D(adapter_g, adapter before_g)``, its gradient added in closed form after the backward pass.

    The adapter before is the one with which the stage began; the base stage has none. The meter is the norm of this
    gradient over that of what the data (and strategies before this one) left in the adapter: its mean over an epoch is
    in the curves (``<name>/ratio``), the last epoch's in the report, and a warning tells where the pull is too weak to
    matter.

    Attributes:
        anchor: The adapter as the stage began, ``None`` in the base stage.
        ratio: The meter's mean over the last epoch of the last pass.
    """

    needs = frozenset({"continual_lora"})
    base_is_finetune = True
    kind = PARTS

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.anchor: Adapter | None = None
        self.ratio: float | None = None
        self._at_anchor: Any = None  # what subclasses compute once from the anchor

    def check(self, config: Any, model: nn.Module) -> None:
        check_strength(self)

    def pull(self, now: Adapter) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the unweighted pull at an adapter, and its gradients in the order A, B of each layer.

        Args:
            now: The adapter; its tensors need no gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement pull(now)")

    def begin_stage(self, ctx: StageContext) -> None:
        self.anchor, self.ratio, self._at_anchor = None, None, None
        if ctx.index > 0:
            self.anchor = {
                name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in ctx.model.adapters().items()
            }

    def add_gradients(self, ctx: StageContext) -> None:
        if self.anchor is None:
            return
        adapter = ctx.model.adapters()
        parameters = [p for pair in adapter.values() for p in pair]
        if not all(p.requires_grad for p in parameters):
            return  # a pass that trains something else
        self._bring(parameters[0].device)
        value, gradients = self.pull({name: (a.detach(), b.detach()) for name, (a, b) in adapter.items()})
        strength = float(self.params["lambda"])
        data = torch.stack([p.grad.norm() for p in parameters if p.grad is not None] or [torch.zeros(())]).norm()
        mine = strength * torch.stack([g.norm() for g in gradients]).norm()
        for p, gradient in zip(parameters, gradients, strict=True):
            if strength:
                p.grad = strength * gradient if p.grad is None else p.grad.add_(gradient, alpha=strength)
        ctx.log(f"{self.name}/penalty", strength * value)
        ctx.log(f"{self.name}/ratio", mine / data.clamp(min=torch.finfo(torch.float32).tiny))

    def _bring(self, device: torch.device) -> None:
        """Moves the anchor to the adapter's device: a state that was put back lies on the CPU."""
        assert self.anchor is not None
        if next(iter(self.anchor.values()))[0].device != device:
            self.anchor = {name: (a.to(device), b.to(device)) for name, (a, b) in self.anchor.items()}

    def penalty(self, ctx: StageContext) -> torch.Tensor:
        if self.anchor is None:
            return torch.zeros(())
        value, _ = self.pull({name: (a.detach(), b.detach()) for name, (a, b) in ctx.model.adapters().items()})
        return float(self.params["lambda"]) * value

    def end_pass(self, ctx: StageContext) -> None:
        total, count = ctx.terms.get(f"{self.name}/ratio", (0.0, 0.0))
        if not count:
            return
        self.ratio = total / count
        if self.params["lambda"] and self.ratio < WEAK:
            LOGGER.warning(
                "stage %d: the gradient of %s is %.1e of the data's, less than %g: it does practically nothing; raise "
                "%s_lambda",
                ctx.index + 1, self.name, self.ratio, WEAK, self.prefix,
            )  # fmt: skip

    def report(self, ctx: StageContext) -> dict[str, Any]:
        if self.ratio is None:
            return {}
        return {"numbers": {f"gradient of {self.name} over that of the data, last epoch": self.ratio}}

    def state_dict(self) -> dict[str, Any]:
        anchor = None if self.anchor is None else {name: {"a": a, "b": b} for name, (a, b) in self.anchor.items()}
        return {"anchor": anchor, "ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "anchor", "ratio")
        found = state["anchor"]
        self.anchor = None if found is None else {name: (pair["a"], pair["b"]) for name, pair in found.items()}
        self.ratio, self._at_anchor = state["ratio"], None


class GroupPull(AdapterPull):
    """A pull over groups of an adapter's numbers, by a closed form for all groups at once."""

    def groups(self, adapter: Adapter) -> list[list[torch.Tensor]]:
        """Returns the tensors of each group: those of a layer, A and B, are one."""
        return [list(pair) for pair in adapter.values()]

    def of_groups(self, now: torch.Tensor, before: torch.Tensor, groups: Groups) -> Pull:
        """Returns value and gradient of each group, see :mod:`recbole_cl.generative.proximal`."""
        raise NotImplementedError(f"{type(self).__name__} must implement of_groups(now, before, groups)")

    def weights(self, groups: Groups) -> torch.Tensor:
        """Returns the weight of each group in the sum, shape ``[G]``."""
        return torch.ones_like(groups.numel, dtype=torch.float32)

    def pull(self, now: Adapter) -> tuple[torch.Tensor, list[torch.Tensor]]:
        assert self.anchor is not None
        if self._at_anchor is None:
            tensors = self.groups(self.anchor)
            groups = Groups(tensors)
            self._at_anchor = (groups, groups.matrix(tensors))
        groups, before = self._at_anchor
        found = self.of_groups(groups.matrix(self.groups(now)), before, groups)
        weights = self.weights(groups)
        gradients = groups.tensors(weights.unsqueeze(1) * found.gradient)
        return (weights * found.value).sum(), self.ungrouped(gradients, now)

    def ungrouped(self, gradients: list[list[torch.Tensor]], now: Adapter) -> list[torch.Tensor]:
        """Returns gradients of groups as A, B of each layer."""
        flat = [gradient for group in gradients for gradient in group]
        return [gradient.to(p.dtype) for gradient, p in zip(flat, _tensors(now), strict=True)]


def _tensors(adapter: Adapter) -> list[torch.Tensor]:
    return [factor for pair in adapter.values() for factor in pair]


def by_autograd(now: Adapter, value_of: Callable[[Adapter], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns a pull and its gradients in the order A, B of each layer, from a function of the adapter."""
    with torch.enable_grad():
        leaves = {name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in now.items()}
        value = value_of(leaves)
        gradients = torch.autograd.grad(value, _tensors(leaves))
    return value.detach(), list(gradients)
