"""An adapter kept away from the span of the one before (PESO's figure 2; O-LoRA, Wang et al. 2023)."""

from __future__ import annotations

import torch

from recbole_cl.generative.proximal import orthogonality
from recbole_cl.registry import strategies
from recbole_cl.strategy.parts.adapter_pull import Adapter, AdapterPull, by_autograd


@strategies.register()
class OrthogonalLoRA(AdapterPull):
    """``lambda * sum_g |A_t A_{t-1}^T|_F^2 + |B_t^T B_{t-1}|_F^2``; it does not vanish where the adapter starts."""

    prefix = "orthogonal_lora"
    defaults = {"lambda": 0.01}
    neutral = {"lambda": 0.0}

    def pull(self, now: Adapter) -> tuple[torch.Tensor, list[torch.Tensor]]:
        before = self.anchor
        assert before is not None

        def value_of(adapter: Adapter) -> torch.Tensor:
            terms = [orthogonality(a, b, *before[name]) for name, (a, b) in adapter.items()]
            return torch.stack(terms).sum()

        return by_autograd(now, value_of)
