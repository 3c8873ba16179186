"""From a user's closed partitions to one vector, and the ways that it goes into a backbone."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import ContextRecommender
from torch import nn
from torch.nn import functional as F

from recbole_cl.model.liber_layers import CausalMixer, HybridExperts

AGES = 32
"""Ages, counted in partitions, that attention tells apart; older ones count as the oldest."""


class InterestFusion(nn.Module):
    """Attention over partitions, of summaries and of shifts each, and a perceptron without biases.

    Without a partition, and for vectors of zeros, it gives exactly zero. Users with the same partitions in a batch are
    fused once (with a learned query).

    Args:
        size: Numbers of a vector.
        hidden: Width of the hidden layer.
        out: Numbers of what is given to the backbone.
        zero: The last layer starts at zero, so that the backbone starts as it is without knowledge.
        mixes: Partitions look at those before them first (:class:`~recbole_cl.model.liber_layers.CausalMixer`).
        experts: Experts in place of the hidden layer (:class:`~recbole_cl.model.liber_layers.HybridExperts`); 0: none.
        items: Items have vectors, too (:meth:`of_items`).
    """

    def __init__(
        self, size: int, hidden: int, out: int, zero: bool, mixes: bool = False, experts: int = 0, items: bool = False
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, size) * size**-0.5)
        self.age = nn.Parameter(torch.zeros(2, AGES))
        self.experts = HybridExperts(2 + items, experts, size, hidden, max(hidden // 2, 1)) if experts else None
        wide = 2 * max(hidden // 2, 1) if experts else hidden
        self.first: Any = None if experts else nn.Linear(2 * size, hidden, bias=False)
        self.last = nn.Linear(wide, out, bias=False)
        if self.first is not None:
            nn.init.xavier_normal_(self.first.weight)
        nn.init.zeros_(self.last.weight) if zero else nn.init.xavier_normal_(self.last.weight)
        self.mixers = nn.ModuleList(CausalMixer(size, AGES) for _ in range(2)) if mixes else None
        if items:
            self.first_item: Any = None if experts else nn.Linear(size, hidden, bias=False)
            self.last_item = nn.Linear(wide // 2 if experts else hidden, out, bias=False)
            for layer in (self.first_item, self.last_item):
                if layer is not None:
                    nn.init.xavier_normal_(layer.weight)

    def forward(
        self, tables: tuple[torch.Tensor, torch.Tensor], start: torch.Tensor, count: torch.Tensor,
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Returns the vector of each row, shape ``[B, out]``.

        Args:
            tables: Vectors of summaries and of shifts, shape ``[P, size]`` each, rows of a user together.
            start: First row of the user, shape ``[B]``.
            count: Rows that are seen, shape ``[B]``.
            query: What each row asks for, shape ``[B, size]``; ``None`` takes the learned queries alone.
        """
        if query is None:
            states, inverse = torch.unique(start * (1 << 24) + count, return_inverse=True)
            start, count = states >> 24, states & ((1 << 24) - 1)
        if self.mixers is not None:
            tables, start = self._mixed(tables, start, count)
        total = int(count.sum())
        row = torch.repeat_interleave(torch.arange(len(start), device=start.device), count, output_size=total)
        offset = count.cumsum(0) - count
        place = torch.arange(total, device=start.device) - offset.index_select(0, row)
        flat = start.index_select(0, row) + place
        age = (count.index_select(0, row) - 1 - place).clamp(max=AGES - 1)
        if query is not None:
            query = query.index_select(0, row)
        # A user's first partition has no shift.
        parts = [self._attend(i, tables[i], flat, row, offset, age, query, place > 0 if i else None) for i in (0, 1)]
        if self.experts is not None:
            hidden = torch.cat([self.experts(i, part) for i, part in enumerate(parts)], dim=1)
        else:
            hidden = F.relu(self.first(torch.cat(parts, dim=1)))
        fused: torch.Tensor = self.last(hidden)
        return fused if query is not None else fused.index_select(0, inverse)

    def of_items(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns what the vectors of items ``[B, size]`` give to the backbone, shape ``[B, out]``."""
        hidden = self.experts(2, vectors) if self.experts is not None else F.relu(self.first_item(vectors))
        found: torch.Tensor = self.last_item(hidden)
        return found

    def _mixed(
        self, tables: tuple[torch.Tensor, torch.Tensor], start: torch.Tensor, count: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Returns tables of the mixed vectors of these users' partitions, and where each row's begin in them."""
        users, of = torch.unique(start, return_inverse=True)
        counts = torch.zeros_like(users).scatter_reduce(0, of, count, "amax")
        place = torch.arange(int(counts.max()), device=start.device)
        there = place < counts.unsqueeze(1)
        at = (users.unsqueeze(1) + place) * there
        assert self.mixers is not None
        mixed = []
        for which, (mixer, table) in enumerate(zip(self.mixers, tables, strict=True)):
            valid = there & (place > 0) if which else there  # a user's first partition has no shift
            rows = (table[at] if len(table) else table.new_zeros(*at.shape, table.size(1))) * valid.unsqueeze(2)
            mixed.append(mixer(rows, valid)[there])
        return (mixed[0], mixed[1]), (counts.cumsum(0) - counts)[of]

    def _attend(
        self, which: int, table: torch.Tensor, flat: torch.Tensor, row: torch.Tensor, offset: torch.Tensor,
        age: torch.Tensor, query: torch.Tensor | None, keep: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Returns the weighted means of the table's rows, shape ``[n, size]``.

        Args:
            which: 0 for summaries, 1 for shifts.
            table: Shape ``[P, size]``.
            flat: The table's rows that are seen, those of a user one after the other, shape ``[T]``.
            row: Whose they are, from 0, shape ``[T]``.
            offset: Where each user's begin, shape ``[n]``.
            age: How many newer ones the user has, shape ``[T]``.
            query: What is asked for, shape ``[T, size]``, or ``None``.
            keep: Which of them count, shape ``[T]``; ``None`` for all.
        """
        if not len(flat):
            return table.new_zeros(len(offset), table.size(1))
        # index_select, not [...]: its gradient is a plain sum, several times faster.
        logits = (table @ self.query[which]).index_select(0, flat) + self.age[which].index_select(0, age)
        if query is not None:
            logits = logits + (table.index_select(0, flat) * query).sum(1) * table.size(1) ** -0.5
        fixed = logits.detach()
        top = fixed.new_full((len(offset),), -torch.inf).scatter_reduce(0, row, fixed, "amax")
        weight = (logits - top.index_select(0, row)).exp()
        if keep is not None:
            weight = weight * keep
        total = weight.new_zeros(len(offset)).index_add(0, row, weight)
        weight = weight / torch.where(total > 0, total, 1.0).index_select(0, row)
        return F.embedding_bag(flat, table, offset, mode="sum", per_sample_weights=weight)


class KnowledgeField(ContextRecommender):
    """A field more, or two, of embedding size, in front of RecBole's class of context-aware models.

    A class made of (backbone, this one) has it below the backbone's own methods: the backbone's constructor sees what
    comes more, and whatever reads :meth:`concat_embed_input_fields` reads it.
    """

    injected: torch.Tensor
    """Shape ``[B, more, embedding_size]``."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.num_feature_field += 2 if config["liber_item_field"] else 1

    def concat_embed_input_fields(self, interaction: Interaction) -> torch.Tensor:
        """Returns the embeddings of all fields, the knowledge's last, shape ``[B, fields + more, embedding_size]``."""
        fields: torch.Tensor = super().concat_embed_input_fields(interaction)
        return torch.cat([fields, self.injected], dim=1)


class KnowledgeAdded:
    """What a sequential model knows of a user, with the knowledge added: a mixin in front of the model."""

    injected: torch.Tensor
    windows = False

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the output after the last item, shape ``[B, d]``."""
        found: torch.Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return found if self.windows else found + self.injected

    def outputs(self, item_seq: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the outputs at some positions of windows, shape ``[n, d]``."""
        found: torch.Tensor = super().outputs(item_seq, wanted)  # type: ignore[misc]
        return found + self.injected if self.windows else found
