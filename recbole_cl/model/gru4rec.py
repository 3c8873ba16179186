"""GRU4Rec trained on all positions."""

from __future__ import annotations

import torch
from recbole.model.sequential_recommender.gru4rec import GRU4Rec as RecBoleGRU4Rec

from recbole_cl.model.all_positions import AllPositions
from recbole_cl.registry import models


@models.register()
class GRU4Rec(AllPositions, RecBoleGRU4Rec):
    """RecBole's GRU4Rec (Hidasi et al. 2016; Tan et al. 2016) with one pass over all positions of a window.

    Parameters, initialisation, ``predict`` and ``full_sort_predict`` are RecBole's; without gradients the padding
    behind the longest history is cut off first.
    """

    def encode(self, item_seq: torch.Tensor) -> torch.Tensor:
        """Returns the recurrent output at every position, shape ``[B, L, d]``."""
        embedded = self.emb_dropout(self.item_embedding(item_seq))
        return self.dense(self.gru_layers(embedded)[0])

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Returns the output after the last item, shape ``[B, d]``."""
        if not torch.is_grad_enabled():
            item_seq = item_seq[:, : int(item_seq_len.max())]
        return super().forward(item_seq, item_seq_len)
