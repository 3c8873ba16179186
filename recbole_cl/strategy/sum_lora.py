"""Adapters of all stages, added up as directions (SumLoRA of PESO's paper)."""

from __future__ import annotations

import torch

from recbole_cl.generative.lora import Factors, direction_factors, sum_of_directions
from recbole_cl.registry import strategies
from recbole_cl.strategy.parts.cumulative import Folded


@strategies.register()
class SumLoRA(Folded):
    """``W0 + sum_{i<t} B^_i A^_i + B_t A_t``, hats divided by their Frobenius norms and fixed.

    The past is a fixed sum, so it is folded into the weights once a stage. ``scaled`` gives hats LoRA's alpha / r, too,
    as the authors' code does.
    """

    prefix = "sum_lora"
    defaults = {"adapters": "all", "inherit": False, "scaled": False}
    why_not_neutral = "the adapter of a past stage is always added"

    def beside(self, name: str, like: torch.Tensor) -> list[Factors]:
        scale = self._scaling if self.params["scaled"] else 1.0
        return [(a, scale * b) for a, b in map(direction_factors, self.of_layer(name, like))]

    def added(self, past: list[Factors]) -> torch.Tensor:
        return (self._scaling if self.params["scaled"] else 1.0) * sum_of_directions(past)
