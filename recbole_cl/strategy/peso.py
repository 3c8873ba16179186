"""PESO: one adapter that evolves, held near the one before by a softmax-KL of each module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.generative.proximal import Groups, Pull, probabilities, softmax_kl
from recbole_cl.registry import strategies
from recbole_cl.strategy.parts.adapter_pull import Adapter, GroupPull

CHOICES = {"reduction": ("sum", "mean"), "scale": ("none", "numel"), "groups": ("module", "factor")}


@strategies.register()
class PESO(GroupPull):
    """Proximally regularised single evolving LoRA (Yoo et al. 2026), eq. 12::

        L_ce + lambda * sum_g KL(softmax(v_t^g) || softmax(v_{t-1}^g)),      v_t starts at v_{t-1}

    v^g are the numbers of module g's A and B. Near v_{t-1} the KL is half the variance of the drift, weighted by
    p = softmax(v_{t-1}^g), which is about 1 / n for a module of n small numbers. So its gradient is some 1e-3 of the
    cross-entropy's at the paper's lambda of 2, and a meter tells how much it is.

    Known mistakes elsewhere: in bfloat16 the released formula overestimates the KL some 300 times; a plain log-softmax
    in float32 is off by more than the KL itself. See :mod:`recbole_cl.generative.proximal`.

    Args:
        parameters: ``lambda``; ``reduction``: ``sum`` over modules (paper) or ``mean`` (authors' code); ``groups``: one
            softmax a ``module`` (paper) or a ``factor``, A and B apart (authors' code); ``scale``: ``numel`` multiplies
            each KL by its group's size, so that a number is held as an L2 pull would hold it.
    """

    prefix = "peso"
    defaults = {"lambda": 2.0, "reduction": "sum", "groups": "module", "scale": "none"}
    neutral = {"lambda": 0.0}

    def check(self, config: Any, model: nn.Module) -> None:
        super().check(config, model)
        for key, allowed in CHOICES.items():
            if self.params[key] not in allowed:
                raise ConfigError(
                    f"property 'peso_{key}' is {self.params[key]!r}; it must be one of {', '.join(allowed)}"
                )

    def groups(self, adapter: Adapter) -> list[list[torch.Tensor]]:
        if self.params["groups"] == "module":
            return super().groups(adapter)
        return [[factor] for pair in adapter.values() for factor in pair]

    def of_groups(self, now: torch.Tensor, before: torch.Tensor, groups: Groups) -> Pull:
        return softmax_kl(now, before, probabilities(before, groups.filled))

    def weights(self, groups: Groups) -> torch.Tensor:
        weights = groups.numel.float() if self.params["scale"] == "numel" else super().weights(groups)
        if self.params["reduction"] == "sum":
            return weights
        # The code adds the KLs of A and B and takes the mean over modules.
        return weights / (len(weights) // (2 if self.params["groups"] == "factor" else 1))
