"""RecBole's transformer layer, its softmax loss and a distillation in fewer and faster operations.

The mathematics, the parameters and the modules are RecBole's; sums may be rounded otherwise. Linear maps and
normalisations are called as the modules they are, so that one that was replaced (an adapter) or hooked is honoured. A
layer that is not RecBole's own, or whose parts are hooked as a whole, is called as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from recbole.model.layers import FeedForward, MultiHeadAttention, TransformerLayer
from torch import nn
from torch.nn import functional as F

ROWS_AT_ONCE = 128
"""Rows whose scores of all items are held at once: they stay in the cache, and memory does not grow with the batch."""

TILE = (256, 1024)
"""Rows and items of a tile: large catalogues are passed through twice, a tile at a time, which the cache holds."""

TILED_FROM = 8192
"""Items from which on tiles are faster, for all their scores being computed twice."""


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Returns ``x`` with each element zeroed with probability ``p`` and the rest scaled up.

    On a CPU the zeros are drawn as small integers, many of them from 64 random bits, several times faster than a float
    an element. The probability is rounded to a multiple of 2^-16, and the scale is that of the rounded one.

    Args:
        x: Any shape.
        p: Probability of a zero.
        training: Without it ``x`` is returned.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu" or p >= 1.0:
        return F.dropout(x, p, True)
    kind, size, values = (torch.int8, 1, 1 << 8) if (p * 256).is_integer() else (torch.int16, 2, 1 << 16)
    cut = round(p * values)
    number = x.numel()
    bits = torch.empty(-(-number * size // 8), dtype=torch.int64).random_(-(1 << 63), None)
    keep = bits.view(kind)[:number].view(x.shape) >= cut - values // 2
    return x * keep.to(x.dtype).mul_(values / (values - cut))


def causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """Returns what is added to attention scores so that nothing later is seen, shape ``[L, L]``; RecBole's constant.

    Padding on the right needs no mask: no input before it sees it.
    """
    return torch.full((length, length), -10000.0, device=device).triu_(1)


def plain(layer: nn.Module) -> bool:
    """Tells whether a layer is RecBole's own, with nothing hooked to the modules that are not called here."""
    if type(layer) is not TransformerLayer:
        return False
    attention: Any = layer.multi_head_attention
    forward: Any = layer.feed_forward
    if type(attention) is not MultiHeadAttention or type(forward) is not FeedForward:
        return False
    parts = (layer, attention, forward, attention.attn_dropout, attention.out_dropout, forward.dropout)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(part, name) for part in parts for name in hooks)


def layer_outputs(layer: Any, hidden: torch.Tensor, mask: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the outputs of a plain transformer layer.

    Args:
        layer: RecBole's layer.
        hidden: Inputs, shape ``[B, L, d]``.
        mask: Added to the attention scores, shape ``[L, L]``.
        at: Positions whose outputs are wanted, shape ``[B, M]``; ``None`` for all.

    Returns:
        Shape ``[B, M, d]``, or ``[B, L, d]``.
    """
    attention = layer.multi_head_attention
    asked = hidden
    if at is not None:
        asked = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
        mask = mask[at].unsqueeze(1)
    heads = attention.num_attention_heads
    query, key, value = (
        part(x).view(*x.shape[:-1], heads, -1).transpose(1, 2)
        for part, x in ((attention.query, asked), (attention.key, hidden), (attention.value, hidden))
    )
    dropped = attention.attn_dropout
    if dropped.training and dropped.p > 0:
        scores = (query / attention.sqrt_attention_head_size) @ key.transpose(-2, -1)
        mixed = dropout((scores + mask).softmax(dim=-1), dropped.p, True) @ value
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return after_attention(layer, mixed.transpose(1, 2).flatten(2), asked)


def projections(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries, keys and values of a plain layer for its inputs, shape ``[B, L, d]`` each."""
    attention = layer.multi_head_attention
    return attention.query(hidden), attention.key(hidden), attention.value(hidden)


def layer_outputs_behind(
    layer: Any,
    prefix: torch.Tensor,
    hidden: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """Returns the outputs of a plain layer in eval mode, for a prefix before inputs whose projections are known.

    Where the prefix alone is trained, nothing of the rest is computed or differentiated twice.

    Args:
        layer: RecBole's layer.
        prefix: Shape ``[B, P, d]``.
        hidden: Inputs behind it, shape ``[B, L, d]``.
        kept: What :func:`projections` gives for them.
        mask: Added to the attention scores, shape ``[P + L, P + L]``.

    Returns:
        Shape ``[B, P + L, d]``.
    """
    heads = layer.multi_head_attention.num_attention_heads
    query, key, value = (
        torch.cat([new, old], dim=1).unflatten(-1, (heads, -1)).transpose(1, 2)
        for new, old in zip(projections(layer, prefix), kept, strict=True)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return after_attention(layer, mixed.transpose(1, 2).flatten(2), torch.cat([prefix, hidden], dim=1))


def after_attention(layer: Any, mixed: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Returns the outputs of a plain transformer layer, given what its heads have mixed.

    Args:
        layer: RecBole's layer.
        mixed: Shape ``[B, M, d]``.
        asked: The layer's inputs at these positions, shape ``[B, M, d]``.
    """
    attention = layer.multi_head_attention
    mixed = attention.dense(mixed)
    mixed = attention.LayerNorm(dropout(mixed, attention.out_dropout.p, attention.out_dropout.training) + asked)
    part = layer.feed_forward
    inner = part.dense_1(mixed)
    composed = getattr(part.intermediate_act_fn, "__func__", None) is FeedForward.gelu
    inner = part.dense_2(F.gelu(inner) if composed else part.intermediate_act_fn(inner))
    return part.LayerNorm(dropout(inner, part.dropout.p, part.dropout.training) + mixed)


def _tiles(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _tile(rows: torch.Tensor, items: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Returns the scores ``[r, i]`` of a tile, in the buffer's memory."""
    return torch.mm(rows, items.t(), out=buffer[: len(rows) * len(items)].view(len(rows), len(items)))


def _log_normaliser(outputs: torch.Tensor, table: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Returns ``log sum_i exp(outputs . table_i)``, shape ``[n, 1]``, by a running maximum and sum over the tiles."""
    largest, total = outputs.new_full((len(outputs), 1), -torch.inf), outputs.new_zeros(len(outputs), 1)
    for items in _tiles(len(table), TILE[1]):
        for part in _tiles(len(outputs), TILE[0]):
            scores = _tile(outputs[part], table[items], buffer)
            new = torch.maximum(largest[part], scores.amax(1, keepdim=True))
            total[part] *= torch.exp(largest[part] - new)
            total[part] += scores.sub_(new).exp_().sum(1, keepdim=True)
            largest[part] = new
    return largest + total.log_()


def _tiled_softmax(
    outputs: torch.Tensor, table: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the sum of the losses and its gradients on outputs and table."""
    buffer = outputs.new_empty(TILE[0] * TILE[1])
    normaliser = _log_normaliser(outputs, table, buffer)
    grad_outputs, grad_table = torch.zeros_like(outputs), torch.zeros_like(table)
    for items in _tiles(len(table), TILE[1]):
        for part in _tiles(len(outputs), TILE[0]):
            slope = _tile(outputs[part], table[items], buffer).sub_(normaliser[part]).exp_()
            grad_outputs[part].addmm_(slope, table[items])
            grad_table[items].addmm_(slope.t(), outputs[part])
    right = table[chosen]
    grad_outputs -= right
    grad_table.index_add_(0, chosen, outputs, alpha=-1)
    return normaliser.sum() - (outputs * right).sum(), grad_outputs, grad_table


def _tiled_divergence(
    outputs: torch.Tensor, table: torch.Tensor, old: torch.Tensor, old_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the sum over rows of ``KL(softmax(z_old) || softmax(z))``, and its gradients on outputs and table."""
    buffers = outputs.new_empty(2, TILE[0] * TILE[1])
    normaliser = _log_normaliser(outputs, table, buffers[0])
    old_normaliser = _log_normaliser(old, old_table, buffers[1])
    grad_outputs, grad_table = torch.zeros_like(outputs), torch.zeros_like(table)
    likely, total = outputs.new_empty(TILE[0] * TILE[1]), outputs.new_zeros(())
    for items in _tiles(len(table), TILE[1]):
        for part in _tiles(len(outputs), TILE[0]):
            new = _tile(outputs[part], table[items], buffers[0]).sub_(normaliser[part])
            gap = _tile(old[part], old_table[items], buffers[1]).sub_(old_normaliser[part])
            share = torch.exp(gap, out=likely[: gap.numel()].view_as(gap))
            total += torch.dot(share.view(-1), gap.sub_(new).view(-1))
            slope = new.exp_().sub_(share)
            grad_outputs[part].addmm_(slope, table[items])
            grad_table[items].addmm_(slope.t(), outputs[part])
    return total, grad_outputs, grad_table


class _SoftmaxLoss(torch.autograd.Function):
    """The gradients of a softmax over all items are computed with the loss, a few rows or a tile at a time."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, table: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        if len(table) >= TILED_FROM:
            total, grad_outputs, grad_table = _tiled_softmax(outputs, table, items)
            ctx.save_for_backward(outputs, table, items, grad_outputs, grad_table)
            return total / len(outputs)
        grad_outputs, grad_table = torch.empty_like(outputs), torch.zeros_like(table)
        buffer = outputs.new_empty(min(ROWS_AT_ONCE, len(outputs)), len(table))
        total = outputs.new_zeros(())
        for start in range(0, len(outputs), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows, chosen = outputs[part], items[part].unsqueeze(1)
            logits = torch.mm(rows, table.t(), out=buffer[: len(rows)])
            logs = torch.log_softmax(logits, 1)
            total -= logs.gather(1, chosen).sum()
            slope = torch.exp(logs, out=logits)
            slope.scatter_add_(1, chosen, slope.new_full(chosen.shape, -1.0))
            torch.mm(slope, table, out=grad_outputs[part])
            grad_table.addmm_(slope.t(), rows)
        ctx.save_for_backward(outputs, table, items, grad_outputs, grad_table)
        return total / len(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        outputs, table, items, grad_outputs, grad_table = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient of the gradient is wanted
            loss = F.cross_entropy(outputs @ table.t(), items)
            return (*torch.autograd.grad(loss, (outputs, table), gradient, create_graph=True), None)
        scale = gradient / len(outputs)
        return grad_outputs * scale, grad_table * scale, None


def _fuses(outputs: torch.Tensor, table: torch.Tensor) -> bool:
    small = outputs.device.type == "cpu" and outputs.dtype == table.dtype == torch.float32
    both = outputs.requires_grad and table.requires_grad and torch.is_grad_enabled()
    inside = torch.is_autocast_enabled("cpu") or torch._C._functorch.maybe_current_level() is not None
    return small and both and len(outputs) > 0 and not inside


def softmax_loss(outputs: torch.Tensor, table: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of a softmax over all items.

    Args:
        outputs: Shape ``[n, d]``.
        table: Item embeddings, shape ``[n_items, d]``.
        items: The right items, shape ``[n]``.
    """
    if _fuses(outputs, table):
        return _SoftmaxLoss.apply(outputs, table, items)  # type: ignore[no-any-return,no-untyped-call]
    return F.cross_entropy(outputs @ table.t(), items)


def divergence(new: torch.Tensor, old: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(softmax(old / T) || softmax(new / T))``, the mean over rows of logits ``[n, n_items]``."""
    logs = F.log_softmax(new / temperature, -1), F.log_softmax(old / temperature, -1)
    return temperature**2 * F.kl_div(*logs, reduction="batchmean", log_target=True)


class _Distillation(torch.autograd.Function):
    """The gradients of a divergence from a teacher's softmax, computed with it, a few rows or a tile at a time."""

    @staticmethod
    def forward(
        ctx: Any, outputs: torch.Tensor, table: torch.Tensor, old: torch.Tensor, old_table: torch.Tensor, t: float
    ) -> torch.Tensor:
        ctx.temperature = t
        if len(table) >= TILED_FROM:
            total, grad_outputs, grad_table = _tiled_divergence(outputs, table / t, old, old_table / t)
            # The gradient on outputs was taken with table / t: once more than the rows below take it.
            ctx.save_for_backward(outputs, table, old, old_table, grad_outputs.mul_(t), grad_table)
            return total * (t * t / len(outputs))
        grad_outputs, grad_table = torch.empty_like(outputs), torch.zeros_like(table)
        buffers = outputs.new_empty(3, min(ROWS_AT_ONCE, len(outputs)), len(table))
        columns, old_columns = (table / t).t(), (old_table / t).t()
        total = outputs.new_zeros(())
        for start in range(0, len(outputs), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows = outputs[part]
            new, gap, likely = buffers[:, : len(rows)]
            torch.log_softmax(torch.mm(rows, columns, out=new), 1, out=new)
            torch.log_softmax(torch.mm(old[part], old_columns, out=gap), 1, out=gap)
            torch.exp(gap, out=likely)
            total += torch.dot(likely.view(-1), gap.sub_(new).view(-1))
            slope = new.exp_().sub_(likely)
            torch.mm(slope, table, out=grad_outputs[part])
            grad_table.addmm_(slope.t(), rows)
        ctx.save_for_backward(outputs, table, old, old_table, grad_outputs, grad_table)
        return total * (t * t / len(outputs))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), t = gradients, ctx.temperature
        outputs, table, old, old_table, grad_outputs, grad_table = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient of the gradient is wanted
            loss = divergence(outputs @ table.t(), old @ old_table.t(), t)
            return (*torch.autograd.grad(loss, (outputs, table), gradient, create_graph=True), None, None, None)
        scale = gradient * (t / len(outputs))
        return grad_outputs * scale, grad_table * scale, None, None, None


def distillation(
    outputs: torch.Tensor, table: torch.Tensor, old: torch.Tensor, old_table: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Returns the mean over rows of ``T^2 KL(softmax(z_old / T) || softmax(z / T))`` over items; the old is constant.

    Args:
        outputs: The new model's, shape ``[n, d]``, n > 0.
        table: Its item embeddings, shape ``[n_items, d]``.
        old: The old model's outputs, shape ``[n, e]``.
        old_table: Its embeddings of the same items, shape ``[n_items, e]``.
        temperature: T.
    """
    old, old_table = old.detach(), old_table.detach()
    if _fuses(outputs, table) and old.dtype == old_table.dtype == outputs.dtype:
        found: torch.Tensor = _Distillation.apply(outputs, table, old, old_table, temperature)  # type: ignore[no-untyped-call]
        return found
    return divergence(outputs @ table.t(), old @ old_table.t(), temperature)
