"""Pulls of an adapter to where it was: the proximal terms of PESO (Yoo et al. 2026) and of its figure 2.

An adapter is a list of groups; a group is what one softmax runs over, a flat vector. PESO's groups are the modules, A
and B together. For v the adapter now, u the one before and d = v - u, the softmax-KL is, per group::

    KL(softmax(v) || softmax(u)) = sum q_i (d_i - log Z),   p = softmax(u),  Z = sum p_i e^{d_i},  q_i = p_i e^{d_i} / Z

Near u that is half the p-weighted variance of d, some 1e-7 of the numbers that plain logarithms subtract: in float32 a
plain log-softmax is off by more than its value. With d centred by its p-mean,

    S0 = sum p (e^d - 1 - d),   S1 = sum p d (e^d - 1),   KL = S1 / (1 + S0) - log1p(S0)

every term is of the size of the result, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

SERIES = 0.5
"""Below it ``e^d - 1 - d`` is summed as a series, whose ten terms are exact to the last bit of a float32."""


class Groups:
    """Tensors as one matrix, a group a row, and back.

    Args:
        groups: The tensors of each group; they do not change their shapes.
    """

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        self.sizes = [sum(t.numel() for t in group) for group in groups]
        self.shapes = [[t.shape for t in group] for group in groups]
        widest = max(self.sizes, default=0)
        device = groups[0][0].device if groups else torch.device("cpu")
        sizes = torch.tensor(self.sizes, device=device)
        self.filled = torch.arange(widest, device=device) < sizes.unsqueeze(1)
        self.numel = sizes

    def matrix(self, groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Returns the groups as rows, padded with 0, float32 or float64, shape ``[G, widest]``."""
        flat = torch.cat([t.reshape(-1) for group in groups for t in group])
        flat = flat if flat.dtype == torch.float64 else flat.float()
        out = flat.new_zeros(self.filled.shape)
        return out.masked_scatter(self.filled, flat)

    def tensors(self, matrix: torch.Tensor) -> list[list[torch.Tensor]]:
        """Returns the rows of a matrix as tensors of the groups' shapes."""
        out = []
        for row, shapes in zip(matrix, self.shapes, strict=True):
            parts, start = [], 0
            for shape in shapes:
                parts.append(row[start : start + shape.numel()].view(shape))
                start += shape.numel()
            out.append(parts)
        return out


class Pull(NamedTuple):
    """A proximal term of each group and its derivative.

    Attributes:
        value: Shape ``[G]``.
        gradient: With respect to the adapter now, shape ``[G, widest]``.
    """

    value: torch.Tensor
    gradient: torch.Tensor


def probabilities(before: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Returns ``p = softmax(u)`` of each group, 0 where it is padded, shape ``[G, widest]``."""
    return torch.softmax(before.masked_fill(~filled, -torch.inf), dim=1)


def softmax_kl(now: torch.Tensor, before: torch.Tensor, p: torch.Tensor) -> Pull:
    """Returns ``KL(softmax(now) || softmax(before))`` of each group, and its gradient ``q (log(q / p) - KL)``.

    Args:
        now: Shape ``[G, widest]``.
        before: Shape ``[G, widest]``.
        p: From :func:`probabilities` of ``before``.
    """
    d = now - before
    d = d - (p * d).sum(1, keepdim=True)
    rise = torch.expm1(d)
    s0 = (p * _beyond_linear(d, rise)).sum(1, keepdim=True)
    s1 = (p * d * rise).sum(1, keepdim=True)
    log_z = torch.log1p(s0)
    value = s1 / (1 + s0) - log_z
    q = p * (1 + rise) / (1 + s0)
    return Pull(value.squeeze(1), q * (d - log_z - value))


def _beyond_linear(d: torch.Tensor, rise: torch.Tensor) -> torch.Tensor:
    """Returns ``e^d - 1 - d`` without its cancellation near 0."""
    small = d.clamp(-SERIES, SERIES)
    series = torch.ones_like(d)
    for n in range(18 if d.dtype == torch.float64 else 11, 2, -1):
        series = 1 + series * small / n
    return torch.where(d.abs() < SERIES, 0.5 * small * small * series, rise - d)


def l2(now: torch.Tensor, before: torch.Tensor, squared: bool = True) -> Pull:
    """Returns ``|now - before|^2 / 2`` of each group, or the unsquared norm, and its gradient."""
    d = now - before
    if squared:
        return Pull(0.5 * (d * d).sum(1), d)
    norm = d.norm(dim=1, keepdim=True)
    return Pull(norm.squeeze(1), d / norm.clamp(min=torch.finfo(d.dtype).tiny))


def orthogonality(a: torch.Tensor, b: torch.Tensor, a_before: torch.Tensor, b_before: torch.Tensor) -> torch.Tensor:
    """Returns ``|A A'^T|_F^2 + |B^T B'|_F^2``: how much an adapter lies in the span of the one before.

    Args:
        a: Shape ``[r, in]``.
        b: Shape ``[out, r]``.
        a_before: As ``a``.
        b_before: As ``b``.
    """
    return (a @ a_before.T).square().sum() + (b.T @ b_before).square().sum()


def rank_groups(a: torch.Tensor, b: torch.Tensor) -> list[list[torch.Tensor]]:
    """Returns the groups of a per-rank KL: row k of A with column k of B, for each rank k."""
    return [[row, column] for row, column in zip(a.unbind(0), b.unbind(1), strict=True)]
