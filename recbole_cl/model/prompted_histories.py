"""What a frozen causal model computes of a history before its prompted items: once, for all targets and epochs.

Prompts change the last t items. Everything before them is the frozen model's own computation, and a causal model never
looks back at it: a target costs t positions instead of L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from recbole_cl.model.fused import after_attention, causal_mask, layer_outputs
from recbole_cl.model.gru4rec import GRU4Rec
from recbole_cl.model.sasrec import SASRec

ROWS_AT_ONCE = {"cpu": 16, "cuda": 512}
"""Histories of a pass, always: then what is computed of a history does not depend on those that stand beside it."""
FEW = 4
"""Up to so many prompted items their attention to each other is a product of elements, not many tiny matrices."""

Added = Callable[[torch.Tensor], torch.Tensor]
"""Gives what is added to the embeddings of item ids, ``[..., d]`` for ids of any shape."""


class Computed(NamedTuple):
    """What a model has computed of some sequences.

    Attributes:
        stores: Tensors whose first dimension is that of all sequences that are kept.
        number: The place of each sequence among them, shape ``[W]``.
    """

    stores: list[torch.Tensor]
    number: torch.Tensor

    def of(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        """Returns the stores of some sequences, for indices ``[g]``.

        Without gradients they are read in place where they stand side by side; a graph would hold what is written to.
        """
        number = self.number[sequence]
        if len(number) and not torch.is_grad_enabled():
            begin, end = int(number[0]), int(number[0]) + len(number)
            if torch.equal(number, torch.arange(begin, end, device=number.device)):
                return [store[begin:end] for store in self.stores]
        return [store.index_select(0, number) for store in self.stores]


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
        computed: list[torch.Tensor] = []
        layers = backbone.trm_encoder.layer
        for number, layer in enumerate(layers):
            attention = layer.multi_head_attention
            for part in (attention.key, attention.value):
                computed.append(_heads(part(hidden), attention.num_attention_heads))
            if number + 1 < len(layers):
                hidden = layer_outputs(layer, hidden, mask)
        return computed

    def outputs(
        self,
        computed: Computed,
        sequence: torch.Tensor,
        row: torch.Tensor,
        last: torch.Tensor,
        prompts: torch.Tensor,
        added: Added | None = None,
    ) -> torch.Tensor:
        """Returns the outputs of prompted histories, shape ``[n, d]``.

        Args:
            computed: What :meth:`compute` has returned for the sequences.
            sequence: Item ids, shape ``[W, L]``.
            row: The sequence of each history, shape ``[n]``, in rising order.
            last: The place of its last item, shape ``[n]``; what comes later is not part of the history.
            prompts: Added to its last t items, shape ``[t, d]``.
            added: What else is added to them.
        """
        backbone: Any = self.backbone
        first, number, place = _prompted(last, len(prompts))
        embedded = _embedded(backbone, sequence[row.unsqueeze(1), place], prompts, number, added)
        hidden = backbone.LayerNorm(embedded + backbone.position_embedding(place))
        before = torch.arange(computed.stores[0].size(2), device=row.device) < first.unsqueeze(1)
        unseen = torch.zeros(before.shape, device=row.device).masked_fill_(~before, -torch.inf)
        groups = Groups(row, computed.stores[0].size(1))
        stores = computed.of(groups.sequence)
        layers = backbone.trm_encoder.layer
        for index, layer in enumerate(layers):
            asked, later = hidden, causal_mask(len(prompts), row.device)
            if index + 1 == len(layers) and len(prompts) > 1:  # of the top layer the last item's output is asked for
                asked = hidden[torch.arange(len(row), device=row.device), number].unsqueeze(1)
                later = later[number].view(len(row), 1, 1, -1)
            keys, values = stores[2 * index : 2 * index + 2]
            hidden = _layer(layer, asked, hidden, keys, values, groups, unseen.view(len(row), 1, 1, -1), later)
        return hidden.squeeze(1)


def _layer(
    layer: Any,
    asked: torch.Tensor,
    hidden: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: Groups,
    unseen: torch.Tensor,
    later: torch.Tensor,
) -> torch.Tensor:
    """Returns a layer's outputs for ``asked``, which sees what is kept and the prompted items.

    Args:
        layer: RecBole's layer.
        asked: Inputs whose outputs are wanted, shape ``[n, s, d]``.
        hidden: Inputs of the prompted items, shape ``[n, t, d]``.
        keys: What is kept of each group's sequence, shape ``[g, heads, L, d / heads]``.
        values: The same.
        groups: The groups that the n histories are in.
        unseen: Added to the scores of what is kept, broadcast to ``[n, heads, s, L]``.
        later: Added to the scores of the prompted items, broadcast to ``[n, heads, s, t]``.
    """
    attention = layer.multi_head_attention
    query, key, value = (
        _heads(part(x), attention.num_attention_heads)
        for part, x in ((attention.query, asked), (attention.key, hidden), (attention.value, hidden))
    )
    query = query / attention.sqrt_attention_head_size
    scores = torch.cat([groups.times(query, keys.transpose(-2, -1)) + unseen, _products(query, key) + later], dim=-1)
    old, new = scores.softmax(dim=-1).split([keys.size(2), hidden.size(1)], dim=-1)
    mixed = groups.times(old, values) + _mixed(new, value)
    return after_attention(layer, mixed.transpose(1, 2).flatten(2), asked)


class Groups:
    """Histories of the same sequence, in groups of at most m: what is kept of the sequence is read once for a group.

    m is the mean number of histories of a sequence, so the groups hold few empty places, however uneven they are.

    Args:
        row: The sequence of each history, shape ``[n]``, in rising order.
        heads: Heads of what is kept; each has the places of a group side by side, so that only rows are moved.

    Attributes:
        sequence: The sequence of each group, shape ``[g]``.
    """

    def __init__(self, row: torch.Tensor, heads: int) -> None:
        sequence, inverse, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
        self.m = max(-(-len(row) // max(len(sequence), 1)), 1)
        number = -(-counts // self.m)  # groups of each sequence
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[inverse]
        group = (number.cumsum(0) - number)[inverse] + place // self.m
        head = torch.arange(heads, device=row.device)
        self.slot = ((group.unsqueeze(1) * heads + head) * self.m + (place % self.m).unsqueeze(1)).flatten()
        self.sequence = sequence.repeat_interleave(number)
        self.alone = self.m == 1  # then a group is a history, and nothing has to be moved

    def times(self, rows: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Returns the product of each history's rows with what is kept of its group.

        Args:
            rows: Shape ``[n, heads, s, k]``.
            group: Shape ``[g, heads, k, j]``.

        Returns:
            Shape ``[n, heads, s, j]``.
        """
        if self.alone:
            return rows @ group
        (n, heads, s, k), (groups, j) = rows.shape, (len(group), group.size(-1))
        places = rows.new_zeros(groups * heads * self.m, s * k).index_copy(0, self.slot, rows.reshape(-1, s * k))
        product = places.view(groups, heads, self.m * s, k) @ group
        return product.view(-1, s * j).index_select(0, self.slot).view(n, heads, s, j)


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
        computed: Computed,
        sequence: torch.Tensor,
        row: torch.Tensor,
        last: torch.Tensor,
        prompts: torch.Tensor,
        added: Added | None = None,
    ) -> torch.Tensor:
        """Returns the outputs of prompted histories, shape ``[n, d]``; see :class:`TransformerHistories`."""
        backbone: Any = self.backbone
        first, number, place = _prompted(last, len(prompts))
        embedded = _embedded(backbone, sequence[row.unsqueeze(1), place], prompts, number, added)
        state = computed.stores[0][computed.number[row], (first - 1).clamp(min=0)] * (first > 0).unsqueeze(1)
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
    if t == 1:
        return prompts.expand(len(number), 1, -1)
    index = t - 1 - number.unsqueeze(1) + torch.arange(t, device=prompts.device)
    return F.embedding(index.clamp(max=t - 1), prompts)


def _embedded(
    backbone: Any, ids: torch.Tensor, prompts: torch.Tensor, number: torch.Tensor, added: Added | None
) -> torch.Tensor:
    """Returns the embeddings of prompted items ``[n, t, d]``, with the prompts and what else is added to them."""
    embedded = backbone.item_embedding(ids) + _aligned(prompts, number)
    return embedded if added is None else embedded + added(ids)  # type: ignore[no-any-return]


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


class HistoryCache:
    """Tensors computed of sequences, kept by the items of the sequence.

    Nothing here is part of a model's state: what is missing is computed again, with the same bits.

    Args:
        compute: Returns tensors ``[W, ..., l, e]`` for sequences ``[W, l]``, a place for each item.
        length: Longest sequence L.
        limit: Bytes that may be kept. The room for them is asked for at once; a system that gives memory out as it is
            written to (Linux, on a CPU) gives no more than is used.
    """

    def __init__(self, compute: Callable[[torch.Tensor], list[torch.Tensor]], length: int, limit: int) -> None:
        self.compute, self.length, self.limit = compute, length, limit
        self.number: dict[bytes, int] = {}
        self.stores: list[torch.Tensor] = []

    def begin(self, compute: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        """Forgets everything, for weights have changed; the room stays."""
        self.compute = compute
        self.number.clear()

    @torch.no_grad()
    def of(self, sequence: torch.Tensor) -> Computed:
        """Returns what is computed of each sequence, for ids ``[W, l]``; its tensors have L places.

        New sequences are kept side by side in the order given, so that a batch that comes again as it is (validation)
        is read in place.
        """
        ids = F.pad(sequence, (0, self.length - sequence.size(1))).cpu()
        keys = [row.tobytes() for row in ids.numpy()]
        missing: dict[bytes, int] = {}  # one that occurs twice is computed once
        for index, key in enumerate(keys):
            if key not in self.number:
                missing.setdefault(key, index)
        number = {key: len(self.number) + place for place, key in enumerate(missing)}
        blocks: list[tuple[list[int], list[torch.Tensor]]] = []
        size = ROWS_AT_ONCE.get(sequence.device.type, 512)
        for rows, width in self._blocks(ids, list(missing.values()), size):
            part = F.pad(ids[rows, :width], (0, 0, 0, size - len(rows))).to(sequence.device)
            block = [F.pad(x[: len(rows)], (0, 0, 0, self.length - width)) for x in self.compute(part)]
            self._write([number[keys[index]] for index in rows], block)
            blocks.append((rows, block))
        room = self.room
        self.number.update((key, place) for key, place in number.items() if place < room)
        if all(key in self.number for key in keys):
            return Computed(self.stores, self._numbers(keys))
        return self._joined(keys, blocks)

    def _blocks(self, ids: torch.Tensor, chosen: list[int], size: int) -> Iterator[tuple[list[int], int]]:
        """Yields at most ``size`` rows and the width of the pass that computes them, which their own lengths decide."""
        if not chosen:
            return
        lengths = (self.length - (ids[chosen].flip(1) != 0).byte().argmax(dim=1)).tolist()
        widths = [self.length, -(-self.length // 2), -(-self.length // 4)]
        of_width: dict[int, list[int]] = {}
        for index, length in zip(chosen, lengths, strict=True):
            of_width.setdefault(min(width for width in widths if width >= length), []).append(index)
        for width, rows in of_width.items():
            for start in range(0, len(rows), size):
                yield rows[start : start + size], width

    def _joined(self, keys: list[bytes], blocks: list[tuple[list[int], list[torch.Tensor]]]) -> Computed:
        """Returns what has just been computed and what was kept before, side by side."""
        computed = [keys[index] for rows, _ in blocks for index in rows]
        new = set(computed)
        known = [key for key in dict.fromkeys(keys) if key not in new]
        stores = [torch.cat(parts) for parts in zip(*(block for _, block in blocks), strict=True)]
        if known:
            numbers = self._numbers(known)
            stores = [torch.cat([x, store[numbers]]) for x, store in zip(stores, self.stores, strict=True)]
        place = {key: index for index, key in enumerate([*computed, *known])}
        return Computed(stores, torch.tensor([place[key] for key in keys], device=stores[0].device))

    @property
    def room(self) -> int:
        """How many sequences can be kept; 0 before the first one."""
        return len(self.stores[0]) if self.stores else 0

    def _write(self, places: list[int], block: list[torch.Tensor]) -> None:
        if not self.stores:
            room = self.limit // sum(x[0].numel() * x.element_size() for x in block)
            self.stores = [x.new_empty(room, *x.shape[1:]) for x in block]
        rows = [row for row, place in enumerate(places) if place < self.room]
        if not rows:
            return
        begin, end = places[rows[0]], places[rows[-1]] + 1
        together = end - begin == len(rows)  # places rise
        at = slice(begin, end) if together else torch.tensor([places[row] for row in rows], device=block[0].device)
        for store, x in zip(self.stores, block, strict=True):
            store[at] = x if len(rows) == len(x) else x[rows]

    def _numbers(self, keys: list[bytes]) -> torch.Tensor:
        return torch.tensor([self.number[key] for key in keys], device=self.stores[0].device)
