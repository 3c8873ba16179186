"""The quadratic pull to an anchor that EWC, OnlineEWC, MAS and SI have in common.

A part for strategies, not a strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.vocabulary import Growth


class QuadraticPenalty(Strategy):
    """``weight * sum_i Omega_i (theta_i - anchor_i)^2``, its gradient added in closed form after the backward pass.

    No graph is built, and a step costs three passes over the parameters whatever the number of stages behind it. Rows
    of new users and items have ``Omega`` = 0: nothing holds them.

    Attributes:
        importance: ``Omega`` by parameter name; a subclass fills it when a stage ends.
        anchor: The weights to stay near to.
        state: Names of the attributes, tensors by parameter name, that grow and are checkpointed.
    """

    needs = frozenset({"gradient"})
    state: ClassVar[tuple[str, ...]] = ("importance", "anchor")

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        for name in self.state:
            setattr(self, name, {})

    importance: dict[str, torch.Tensor]
    anchor: dict[str, torch.Tensor]

    def weight(self) -> float:
        """Returns the factor of the sum."""
        raise NotImplementedError

    def bring(self, name: str, p: torch.Tensor) -> None:
        """Moves the tensors of a parameter to its device: a state that was put back lies on the CPU.

        Where they are there already, as in every step but the first after that, nothing is copied.
        """
        for attribute in self.state:
            tensors = getattr(self, attribute)
            if name in tensors and tensors[name].device != p.device:
                tensors[name] = tensors[name].to(p.device)

    def add_gradients(self, ctx: StageContext) -> None:
        strength = 2 * self.weight()
        for name, p in ctx.parameters().items():
            self.bring(name, p)
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
        total = torch.zeros((), dtype=torch.float64)
        for name, p in ctx.parameters().items():
            self.bring(name, p)
            if name in self.importance:
                drift = p.detach().double() - self.anchor[name]
                total += (self.importance[name] * drift.square()).sum().cpu()
        return self.weight() * total

    def grow(self, growth: Growth) -> None:
        for attribute in self.state:
            tensors = getattr(self, attribute)
            for name in tensors:
                tensors[name] = growth.expand(name, tensors[name])

    def state_dict(self) -> dict[str, Any]:
        return {attribute: dict(getattr(self, attribute)) for attribute in self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, *self.state)
        for attribute in self.state:
            setattr(self, attribute, dict(state[attribute]))
