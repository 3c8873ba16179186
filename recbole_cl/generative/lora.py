"""The arithmetic of adapters of several stages: what is added to a frozen weight.

========== ==========================================================================================
SumLoRA    ``W0 + sum_{i<t} B^_i A^_i + B_t A_t``, hats divided by their Frobenius norms
SDLoRA     ``W0 + sum_{i<t} alpha_i B^_i A^_i + B_t A_t``, every alpha learnt (eq. 5 of PESO; it starts at 1)
InfLoRA    ``A_t`` from the inputs' covariance outside (or inside) the span of past inputs, frozen; ``B_t`` learnt
========== ==========================================================================================

Every sum is scaled by LoRA's ``alpha / r``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Factors = tuple[torch.Tensor, torch.Tensor]
"""A, shape ``[r, in]``, and B, shape ``[out, r]``."""


def product(factors: Factors) -> torch.Tensor:
    """Returns ``B A``, shape ``[out, in]``."""
    a, b = factors
    return b @ a


def direction_factors(factors: Factors) -> Factors:
    """Returns A^ and B^, each factor divided by its Frobenius norm; zeros where one of them is zero.

    A factor that is zero has no direction (B of an adapter that was never trained): nothing is added for it.
    """
    a, b = factors
    if not a.norm() * b.norm():
        return torch.zeros_like(a), torch.zeros_like(b)
    return a / a.norm(), b / b.norm()


def sum_of_directions(past: Sequence[Factors], weights: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``sum_i w_i B^_i A^_i``, shape ``[out, in]``.

    Args:
        past: Adapters, at least one.
        weights: Shape ``[len(past)]``; 1 by default.
    """
    directions = torch.stack([product(direction_factors(factors)) for factors in past])
    return directions.sum(0) if weights is None else torch.einsum("i,ioj->oj", weights, directions)


def leading_inputs(
    covariance: torch.Tensor, rank: int, span: torch.Tensor | None, inside: bool = False
) -> torch.Tensor:
    """Returns InfLoRA's A: the leading directions of a layer's inputs, outside the span of past ones, ``[rank, in]``.

    Args:
        covariance: ``sum x x^T`` of the layer's inputs, shape ``[in, in]``.
        rank: Rows of A.
        span: Orthonormal columns of the past inputs' span M, shape ``[in, m]``, or ``None`` at the first stage.
        inside: Take the part inside the span in place of the part outside.
    """
    wanted = covariance
    if span is not None and span.size(1):
        keep = span @ (span.T @ covariance)
        wanted = keep if inside else covariance - keep
    u, _, _ = torch.linalg.svd(wanted)
    return u[:, :rank].T.contiguous()


def grow_span(span: torch.Tensor | None, covariance: torch.Tensor, share: float) -> torch.Tensor:
    """Returns DualGPM's span with the directions that new inputs need, orthonormal columns, shape ``[in, m]``.

    Directions of the inputs outside the span are added, strongest first, until the span holds a share of their energy.

    Args:
        span: Orthonormal columns so far, or ``None``.
        covariance: ``sum x x^T`` of the layer's inputs, shape ``[in, in]``.
        share: Share of the inputs' energy, the trace of their covariance, that the span holds at least.
    """
    total = covariance.trace()
    held = torch.zeros((), dtype=covariance.dtype, device=covariance.device)
    outside = covariance
    if span is not None and span.size(1):
        held = (span.T @ covariance @ span).trace()
        away = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device) - span @ span.T
        outside = away @ covariance @ away
    if held >= share * total:
        return span if span is not None else covariance.new_zeros((len(covariance), 0))
    values, vectors = torch.linalg.eigh(outside)
    order = torch.argsort(values, descending=True)
    needed = int((held + values[order].cumsum(0) < share * total).sum()) + 1
    new = vectors[:, order[:needed]]
    joined = new if span is None else torch.cat([span, new], dim=1)
    # Rows behind each other, as a checkpoint gives them back: products of other strides have other last bits.
    return torch.linalg.qr(joined).Q.contiguous()
