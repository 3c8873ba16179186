"""Task-related attributes: what is known about the items of a history joins their frozen embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ItemAttribute(nn.Module):
    """The mean embedding of an item's values of one column (its genres), trained by one task.

    Args:
        dataset: RecBole's dataset of the whole log.
        field: Column of the item file.
        n_items: Items that the model has rows for.
        width: Width d of the item embeddings.
    """

    of_item: torch.Tensor

    def __init__(self, dataset: Any, field: str, n_items: int, width: int) -> None:
        super().__init__()
        values = dataset.item_feat[field][:n_items].long()
        # A table of the log, not learnt: checkpoints need not hold it.
        self.register_buffer("of_item", values if values.dim() > 1 else values.unsqueeze(1), persistent=False)
        self.table = nn.Embedding(dataset.num(field), width, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.02)
        with torch.no_grad():
            self.table.weight[0].zero_()

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Returns the embedding of each item's values, shape ``[B, L, d]`` for ids ``[B, L]``; 0 for padding."""
        values = self.of_item[sequence]
        known = (values > 0).unsqueeze(-1)
        return self.table(values).sum(dim=2) / known.sum(dim=2).clamp(min=1)
