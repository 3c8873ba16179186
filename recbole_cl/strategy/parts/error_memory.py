"""A memory of errors with constant time to write and to read: hashed buckets of a user's and an item's vectors.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import torch

from recbole_cl.rng import torch_generator


class ErrorMemory:
    """K arrays of 2^L buckets, each with the sum and the number of the errors that fell into it.

    SimHash (Charikar 2002): a bit is the side of a random plane on which a vector lies, so vectors at a small angle
    share buckets. Half of the L planes look at the user's vector, half at the item's: two vectors share an array's
    bucket with probability ``(1 - angle_u / pi)^(L/2) (1 - angle_i / pi)^(L/2)``, and the codes of users and of items
    are computed once each, not for every pair.

    Args:
        arrays: K.
        bits: L, at least 2.
    """

    def __init__(self, arrays: int, bits: int) -> None:
        self.bits = {"user": bits // 2, "item": bits - bits // 2}
        shape = (arrays, 2 ** self.bits["user"], 2 ** self.bits["item"])
        self.sums, self.counts = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def clear(self) -> None:
        """Forgets everything."""
        self.sums.zero_()
        self.counts.zero_()

    def codes(self, vectors: torch.Tensor, side: str, seed: int) -> torch.Tensor:
        """Returns the half buckets of vectors ``[N, d]`` of one side (``user`` or ``item``), shape ``[N, K]``."""
        shape = (self.sums.size(0), self.bits[side], vectors.size(1))
        planes = torch.randn(shape, generator=torch_generator(seed, 0, f"planes/{side}/{shape[2]}"))
        above = torch.einsum("nd,kld->nkl", vectors.detach().float().cpu(), planes) > 0
        found: torch.Tensor = (above * 2 ** torch.arange(self.bits[side])).sum(-1)
        return found

    def _flat(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        k, n_users, n_items = self.sums.shape
        return (torch.arange(k) * n_users + users) * n_items + items

    def write(self, users: torch.Tensor, items: torch.Tensor, errors: torch.Tensor) -> None:
        """Adds the errors of pairs: codes ``[N, K]`` of their users and items, errors ``[N]``."""
        at = self._flat(users, items)
        each = errors.double().cpu().unsqueeze(1).expand_as(at)
        self.sums.view(-1).index_add_(0, at.flatten(), each.flatten())
        self.counts.view(-1).index_add_(0, at.flatten(), torch.ones_like(each).flatten())

    def write_grid(self, users: torch.Tensor, items: torch.Tensor, errors: torch.Tensor) -> None:
        """Adds the errors ``[B, I]`` of all pairs of users (codes ``[B, K]``) with items (codes ``[I, K]``)."""
        errors = errors.double().cpu()
        for k, (sums, counts) in enumerate(zip(self.sums, self.counts, strict=True)):
            by_item = errors.new_zeros(len(errors), sums.size(1)).index_add_(1, items[:, k], errors)
            sums.index_add_(0, users[:, k], by_item)
            numbers = (torch.bincount(c[:, k], minlength=n) for c, n in zip((users, items), sums.shape, strict=True))
            counts += torch.outer(*numbers)

    def _means(self) -> torch.Tensor:
        return self.sums / self.counts.clamp(min=1)

    def read(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Returns the mean error over arrays, shape ``[N]``; 0 where a bucket is empty."""
        return self._means().view(-1)[self._flat(users, items)].mean(dim=1)

    def read_grid(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Returns the mean errors of all pairs of users ``[B, K]`` with items ``[I, K]``, shape ``[B, I]``."""
        total = torch.zeros(len(users), len(items))
        for k, means in enumerate(self._means().float()):
            total += means[users[:, k]][:, items[:, k]]
        return total / len(self.sums)
