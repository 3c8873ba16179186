"""From a user's closed partitions to one vector, and the ways that it goes into a backbone."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import ContextRecommender
from torch import nn
from torch.nn import functional as F

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
    """

    def __init__(self, size: int, hidden: int, out: int, zero: bool) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, size) * size**-0.5)
        self.age = nn.Parameter(torch.zeros(2, AGES))
        self.first = nn.Linear(2 * size, hidden, bias=False)
        self.last = nn.Linear(hidden, out, bias=False)
        nn.init.xavier_normal_(self.first.weight)
        nn.init.zeros_(self.last.weight) if zero else nn.init.xavier_normal_(self.last.weight)

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
        fused: torch.Tensor = self.last(F.relu(self.first(torch.cat(parts, dim=1))))
        return fused if query is not None else fused.index_select(0, inverse)

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
    """One more field, of embedding size, in front of RecBole's class of context-aware models.

    A class made of (backbone, this one) has it below the backbone's own methods: the backbone's constructor sees one
    field more, and whatever reads :meth:`concat_embed_input_fields` reads the field.
    """

    injected: torch.Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.num_feature_field += 1

    def concat_embed_input_fields(self, interaction: Interaction) -> torch.Tensor:
        """Returns the embeddings of all fields, the knowledge's last, shape ``[B, fields + 1, embedding_size]``."""
        fields: torch.Tensor = super().concat_embed_input_fields(interaction)
        return torch.cat([fields, self.injected.unsqueeze(1)], dim=1)


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
