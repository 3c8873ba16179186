"""Layers of the fusion that are chosen: attention of partitions to each other, and experts that sources share."""

from __future__ import annotations

import torch
from torch import nn


class CausalMixer(nn.Module):
    """Each partition looks at itself and at those before it: one head of self-attention, without biases.

    ::

        x'_j = x_j + sum over i <= j of softmax(x_j Q (x_i K)' / sqrt(size) + b_(j-i))_i x_i V

    A partition's output does not depend on later ones, so all states of a user share it. V starts at zero: the fusion
    starts as the one without the mixer. Vectors of zeros stay zeros.

    Args:
        size: Numbers of a vector.
        ages: Distances that are told apart; larger ones count as the largest.
    """

    def __init__(self, size: int, ages: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.distance = nn.Parameter(torch.zeros(ages))
        nn.init.zeros_(self.value.weight)

    def forward(self, rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Returns the mixed vectors, shape ``[U, L, size]``.

        Args:
            rows: Vectors of each user's partitions, oldest first, shape ``[U, L, size]``.
            there: Flags of those that are vectors and not padding, shape ``[U, L]``.
        """
        place = torch.arange(rows.size(1), device=rows.device)
        apart = place.unsqueeze(1) - place
        keep = there.unsqueeze(1) & (apart >= 0)
        logits = self.query(rows) @ self.key(rows).transpose(1, 2) * rows.size(2) ** -0.5
        logits = logits + self.distance[apart.clamp(0, len(self.distance) - 1)]
        # A row without a vector before it (a first shift) looks at nothing, of which a softmax is no number.
        logits = logits.masked_fill(~keep, -torch.inf).masked_fill(~keep.any(2, keepdim=True), 0.0)
        return rows + (logits.softmax(2) * keep) @ self.value(rows)


class HybridExperts(nn.Module):
    """Experts that all sources share beside those of each source, mixed by the source's own gate.

    The hybrid-expert adaptor of KAR (Xi et al. 2023, arXiv 2306.10933), with perceptrons without biases, so that a
    vector of zeros gives exactly zero::

        y = sum over shared and own experts of softmax(x G_source)_e relu(x A_e) B_e

    Args:
        sources: Kinds of vectors (summaries, shifts, items).
        experts: Shared experts, and as many of each source.
        size: Numbers of a vector.
        hidden: Width of an expert.
        out: Numbers of its output.
    """

    def __init__(self, sources: int, experts: int, size: int, hidden: int, out: int) -> None:
        super().__init__()
        groups = sources + 1
        self.first = nn.Parameter(torch.randn(groups, experts, size, hidden) * (2 / (size + hidden)) ** 0.5)
        self.last = nn.Parameter(torch.randn(groups, experts, hidden, out) * (2 / (hidden + out)) ** 0.5)
        self.gate = nn.Parameter(torch.randn(sources, size, 2 * experts) * size**-0.5)

    def forward(self, source: int, rows: torch.Tensor) -> torch.Tensor:
        """Returns the mixture ``[n, out]`` for vectors ``[n, size]`` of a source, by its number."""
        first = torch.cat([self.first[0], self.first[source + 1]])
        last = torch.cat([self.last[0], self.last[source + 1]])
        found = torch.relu(torch.einsum("ns,esh->enh", rows, first)) @ last
        return torch.einsum("ne,eno->no", (rows @ self.gate[source]).softmax(1), found)
