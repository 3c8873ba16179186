"""A softmax-KL of each rank of an adapter (PESO's figure 2)."""

from __future__ import annotations

import torch

from recbole_cl.generative.proximal import Groups, Pull, probabilities, rank_groups, softmax_kl
from recbole_cl.registry import strategies
from recbole_cl.strategy.parts.adapter_pull import Adapter, GroupPull


@strategies.register()
class PerRankKL(GroupPull):
    """``lambda * sum_g sum_k KL``, a softmax over row k of A and column k of B of each module g."""

    prefix = "per_rank_kl"
    defaults = {"lambda": 2.0}
    neutral = {"lambda": 0.0}

    def groups(self, adapter: Adapter) -> list[list[torch.Tensor]]:
        return [group for a, b in adapter.values() for group in rank_groups(a, b)]

    def of_groups(self, now: torch.Tensor, before: torch.Tensor, groups: Groups) -> Pull:
        return softmax_kl(now, before, probabilities(before, groups.filled))

    def ungrouped(self, gradients: list[list[torch.Tensor]], now: Adapter) -> list[torch.Tensor]:
        out, start = [], 0
        for a, b in now.values():
            ranks = gradients[start : start + len(a)]
            start += len(a)
            out += [torch.stack([row for row, _ in ranks]).to(a.dtype)]
            out += [torch.stack([column for _, column in ranks], dim=1).to(b.dtype)]
        return out
