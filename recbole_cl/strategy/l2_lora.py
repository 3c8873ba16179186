"""An adapter held near the one before by squared distance (PESO's figure 2)."""

from __future__ import annotations

import torch

from recbole_cl.generative.proximal import Groups, Pull, l2
from recbole_cl.registry import strategies
from recbole_cl.strategy.parts.adapter_pull import GroupPull


@strategies.register()
class L2LoRA(GroupPull):
    """``lambda * sum_g |v_t^g - v_{t-1}^g|^2 / 2``; ``squared: False`` is the norm itself, as in PESO's code."""

    prefix = "l2_lora"
    defaults = {"lambda": 0.01, "squared": True}
    neutral = {"lambda": 0.0}

    def of_groups(self, now: torch.Tensor, before: torch.Tensor, groups: Groups) -> Pull:
        return l2(now, before, bool(self.params["squared"]))
