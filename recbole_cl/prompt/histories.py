"""What a frozen causal model computes of a history before its prompted items: once, for all targets and epochs.

Prompts change the last t items. Everything before them is the frozen model's own computation, and a causal model never
looks back at it: a target costs t positions instead of L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from recbole_cl.model.fused import after_attention, causal_mask, layer_outputs
from recbole_cl.model.gru4rec import GRU4Rec
from recbole_cl.model.sasrec import SASRec

ROWS_AT_ONCE = 64
"""Histories of a pass, always: then what is computed of a history does not depend on those that stand beside it."""
FEW = 4
"""Up to so many prompted items their attention to each other is a product of elements, not many tiny matrices."""


class TransformerHistories:
    """Keys and values of every layer of a SASRec.

    Args:
        backbone: The frozen model.
    """

    def __init__(self, backbone: SASRec) -> None:
        self.backbone = backbone

    @staticmethod
    def serves(backbone: nn.Module) -> bool:
        """Tells whether a backbone is computed here as it computes itself."""
        return type(backbone) is SASRec and backbone._plain()

    def compute(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        """Returns keys and values of each layer in turn, each ``[W, heads, L, d / heads]``, for ids ``[W, L]``."""
        backbone: Any = self.backbone
        positions = torch.arange(sequence.size(1), device=sequence.device)
        hidden = backbone.LayerNorm(backbone.item_embedding(sequence) + backbone.position_embedding(positions))
        mask = causal_mask(sequence.size(1), sequence.device)
        kept: list[torch.Tensor] = []
        layers = backbone.trm_encoder.layer
        for number, layer in enumerate(layers):
            attention = layer.multi_head_attention
            for part in (attention.key, attention.value):
                kept.append(_heads(part(hidden), attention.num_attention_heads).contiguous())
            if number + 1 < len(layers):
                hidden = layer_outputs(layer, hidden, mask)
        return kept

    def outputs(
        self,
        kept: list[torch.Tensor],
        sequence: torch.Tensor,
        row: torch.Tensor,
        last: torch.Tensor,
        prompts: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the outputs of prompted histories, shape ``[n, d]``.

        Args:
            kept: What :meth:`compute` has returned for the sequences.
            sequence: Item ids, shape ``[W, L]``.
            row: The sequence of each history, shape ``[n]``.
            last: The place of its last item, shape ``[n]``; what comes later is not part of the history.
            prompts: Added to its last t items, shape ``[t, d]``.
        """
        backbone: Any = self.backbone
        first, number, place = _prompted(last, len(prompts))
        embedded = backbone.item_embedding(sequence[row.unsqueeze(1), place]) + _aligned(prompts, number)
        hidden = backbone.LayerNorm(embedded + backbone.position_embedding(place))
        before = torch.arange(kept[0].size(2), device=row.device) < first.unsqueeze(1)
        unseen = torch.zeros(before.shape, device=row.device).masked_fill_(~before, -torch.inf)
        layers = backbone.trm_encoder.layer
        for index, layer in enumerate(layers):
            asked, later = hidden, causal_mask(len(prompts), row.device)
            if index + 1 == len(layers):  # of the top layer the last item's output is asked for
                asked = hidden[torch.arange(len(row), device=row.device), number].unsqueeze(1)
                later = later[number].view(len(row), 1, 1, -1)
            keys, values = (x[row] for x in kept[2 * index : 2 * index + 2])
            hidden = _layer(layer, asked, hidden, keys, values, unseen.view(len(row), 1, 1, -1), later)
        return hidden.squeeze(1)


def _layer(
    layer: Any,
    asked: torch.Tensor,
    hidden: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    unseen: torch.Tensor,
    later: torch.Tensor,
) -> torch.Tensor:
    """Returns a layer's outputs for ``asked``, which sees what is kept and the prompted items.

    Args:
        layer: RecBole's layer.
        asked: Inputs whose outputs are wanted, shape ``[n, s, d]``.
        hidden: Inputs of the prompted items, shape ``[n, t, d]``.
        keys: What is kept, shape ``[n, heads, L, d / heads]``.
        values: The same.
        unseen: Added to the scores of what is kept, broadcast to ``[n, heads, s, L]``.
        later: Added to the scores of the prompted items, broadcast to ``[n, heads, s, t]``.
    """
    attention = layer.multi_head_attention
    query, key, value = (
        _heads(part(x), attention.num_attention_heads)
        for part, x in ((attention.query, asked), (attention.key, hidden), (attention.value, hidden))
    )
    query = query / attention.sqrt_attention_head_size
    scores = torch.cat([query @ keys.transpose(-2, -1) + unseen, _products(query, key) + later], dim=-1)
    old, new = scores.softmax(dim=-1).split([keys.size(2), hidden.size(1)], dim=-1)
    mixed = old @ values + _mixed(new, value)
    return after_attention(layer, mixed.transpose(1, 2).flatten(2), asked)


class RecurrentHistories:
    """States of a GRU4Rec of one layer after every item.

    Args:
        backbone: The frozen model.
    """

    def __init__(self, backbone: GRU4Rec) -> None:
        self.backbone = backbone

    @staticmethod
    def serves(backbone: nn.Module) -> bool:
        """Tells whether a backbone is computed here as it computes itself."""
        return type(backbone) is GRU4Rec and backbone.gru_layers.num_layers == 1

    def compute(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        """Returns the states ``[W, L, h]``, for ids ``[W, L]``."""
        backbone: Any = self.backbone
        return [backbone.gru_layers(backbone.item_embedding(sequence))[0]]

    def outputs(
        self,
        kept: list[torch.Tensor],
        sequence: torch.Tensor,
        row: torch.Tensor,
        last: torch.Tensor,
        prompts: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the outputs of prompted histories, shape ``[n, d]``; see :class:`TransformerHistories`."""
        backbone: Any = self.backbone
        first, number, place = _prompted(last, len(prompts))
        embedded = backbone.item_embedding(sequence[row.unsqueeze(1), place]) + _aligned(prompts, number)
        state = kept[0][row, (first - 1).clamp(min=0)] * (first > 0).unsqueeze(1)
        states = backbone.gru_layers(embedded, state.unsqueeze(0))[0]
        return backbone.dense(states[torch.arange(len(row), device=row.device), number])  # type: ignore[no-any-return]


def _prompted(last: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the place of the first prompted item ``[n]``, the last one's number ``[n]``, and all places ``[n, t]``.

    A history of fewer than t items has its places on the left; the rest repeats its last one, where nobody looks.
    """
    first = (last - t + 1).clamp(min=0)
    place = first.unsqueeze(1) + torch.arange(t, device=last.device)
    return first, last - first, torch.minimum(place, last.unsqueeze(1))


def _aligned(prompts: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Returns the prompts of each history's prompted items, ``[n, t, d]``: the last item gets the last prompt."""
    t = len(prompts)
    index = t - 1 - number.unsqueeze(1) + torch.arange(t, device=prompts.device)
    return F.embedding(index.clamp(max=t - 1), prompts)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    if key.size(-2) > FEW:
        return query @ key.transpose(-2, -1)
    return (query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)


def _mixed(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.size(-2) > FEW:
        return weight @ value
    return (weight.unsqueeze(-1) * value.unsqueeze(-3)).sum(-2)


class KeptHistories:
    """Tensors computed of sequences, kept by the items of the sequence.

    Nothing here is part of a model's state: what is missing is computed again, with the same bits.

    Args:
        compute: Returns tensors whose first dimension is that of the sequences it is given.
        length: Longest sequence L.
        limit: Bytes that may be kept.
    """

    def __init__(self, compute: Callable[[torch.Tensor], list[torch.Tensor]], length: int, limit: int) -> None:
        self.compute, self.length, self.limit = compute, length, limit
        self.number: dict[bytes, int] = {}
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def of(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        """Returns what is computed of each sequence, for ids ``[W, l]``; its tensors have L places."""
        sequence = F.pad(sequence, (0, self.length - sequence.size(1)))
        keys = [row.tobytes() for row in sequence.cpu().numpy()]
        missing = [index for index, key in enumerate(keys) if key not in self.number]
        if not missing:
            return self._kept([self.number[key] for key in keys])
        fresh = self._computed(sequence[missing])
        size = sum(x[0].numel() * x.element_size() for x in fresh)
        room = max(self.limit // size - len(self.number), 0)
        self._keep([keys[index] for index in missing], fresh, room)
        if len(missing) == len(keys):
            return fresh
        known = [index for index in range(len(keys)) if index not in set(missing)]
        out = [x.new_empty(len(keys), *x.shape[1:]) for x in fresh]
        for whole, new, old in zip(out, fresh, self._kept([self.number[keys[i]] for i in known]), strict=True):
            whole[missing], whole[known] = new, old
        return out

    def _computed(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        blocks = []
        for part in sequence.split(ROWS_AT_ONCE):
            block = self.compute(F.pad(part, (0, 0, 0, ROWS_AT_ONCE - len(part))))
            blocks.append([x[: len(part)] for x in block])
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]

    def _keep(self, keys: list[bytes], fresh: list[torch.Tensor], room: int) -> None:
        new = {key: index for index, key in enumerate(keys)}  # one that occurs twice is kept once
        chosen = list(new.items())[:room]
        if not chosen:
            return
        begin, end = len(self.number), len(self.number) + len(chosen)
        if not self.kept or end > len(self.kept[0]):
            grown = [x.new_empty(max(end, 2 * begin), *x.shape[1:]) for x in fresh]
            for wide, narrow in zip(grown, self.kept, strict=False):
                wide[:begin] = narrow[:begin]
            self.kept = grown
        for store, x in zip(self.kept, fresh, strict=True):
            store[begin:end] = x[[index for _, index in chosen]]
        self.number.update({key: begin + place for place, (key, _) in enumerate(chosen)})

    def _kept(self, numbers: list[int]) -> list[torch.Tensor]:
        index = torch.tensor(numbers, device=self.kept[0].device)
        return [store.index_select(0, index) for store in self.kept]
