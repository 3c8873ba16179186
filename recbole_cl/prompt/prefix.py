"""Soft tokens of each row before its history, in one causal pass of a frozen SASRec.

The tokens enter behind the model's input LayerNorm, without positions: item i keeps its own position embedding. Every
item sees all tokens and the items up to itself, tokens see tokens, as in :class:`recbole_cl.model.adapters.Prompt`,
whose tokens are the same for all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MASKED = -10000.0
"""What RecBole adds to attention scores that must not count."""

Layer = Callable[..., torch.Tensor]
"""``layer(part, hidden, mask, at)``: the outputs of one transformer layer, at some positions or at all."""
First = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``first(prompts, mask)``: the outputs ``[B, P + L, d]`` of the lowest layer, which has seen the histories before."""


def prefix_mask(tokens: int, length: int, device: torch.device) -> torch.Tensor:
    """Returns what is added to attention scores, shape ``[P + L, P + L]``."""
    mask = torch.full((tokens + length, tokens + length), MASKED, device=device)
    mask[:, :tokens] = 0.0
    mask[tokens:, tokens:].triu_(1)
    return mask


def prompted_outputs(
    layers: Any,
    embedded: torch.Tensor,
    prompts: torch.Tensor,
    layer: Layer,
    wanted: torch.Tensor,
    first: First | None = None,
) -> torch.Tensor:
    """Returns the outputs behind prompts; the top layer is asked for few positions alone.

    Args:
        layers: The transformer's layers.
        embedded: Embedded histories, right-padded, shape ``[B, L, d]``.
        prompts: The tokens of each row, shape ``[B, P, d]``.
        layer: Computes a layer.
        wanted: Flags of the positions of the histories whose outputs are wanted, shape ``[B, L]``.
        first: Computes the lowest of several layers, where its part of the histories is kept.

    Returns:
        Shape ``[n, d]``, row by row.
    """
    tokens, length = prompts.size(1), embedded.size(1)
    mask = prefix_mask(tokens, length, prompts.device)
    *lower, top = layers
    if first is not None and lower:
        hidden, lower = first(prompts, mask), lower[1:]
    else:
        hidden = torch.cat([prompts, embedded], dim=1)
    for part in lower:
        hidden = layer(part, hidden, mask, None)
    counts = wanted.sum(dim=1)
    at = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, : max(int(counts.max()), 1)]
    filled = torch.arange(at.size(1), device=at.device) < counts.unsqueeze(1)
    return layer(top, hidden, mask, at + tokens)[filled]


def without(sequence: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns sequences closed up over dropped items, and where each item that is left ended before the next began.

    Args:
        sequence: Item ids, right-padded with 0, shape ``[B, L]``.
        dropped: Flags, shape ``[B, L]``.

    Returns:
        Item ids ``[B, L]``; and for each of them the place, in the given sequence, of the last item before the next one
        that is left, ``[B, L]``: a target after that place comes next after this item.
    """
    length = sequence.size(1)
    kept = (sequence > 0) & ~dropped
    order = (~kept).byte().argsort(dim=1, stable=True)
    left = torch.where(kept.gather(1, order), sequence.gather(1, order), 0)
    ends = (sequence > 0).sum(dim=1, keepdim=True)
    places = torch.where(kept.gather(1, order), order, ends)
    following = torch.cat([places[:, 1:], ends], dim=1)
    return left, (following - 1).clamp(0, length - 1)
