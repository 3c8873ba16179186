"""GRU4Rec trained on all positions."""

from __future__ import annotations

import torch
from recbole.model.sequential_recommender.gru4rec import GRU4Rec as RecBoleGRU4Rec

from recbole_cl.model.all_positions import AllPositions, last_items, pick
from recbole_cl.model.fused import dropout
from recbole_cl.registry import models


@models.register()
class GRU4Rec(AllPositions, RecBoleGRU4Rec):
    """RecBole's GRU4Rec (Hidasi et al. 2016; Tan et al. 2016) with one pass over all positions of a window.

    Parameters, initialisation, ``predict`` and ``full_sort_predict`` are RecBole's; passes over all positions and
    passes without gradients do little work on padding.
    """

    def encode(self, item_seq: torch.Tensor) -> torch.Tensor:
        """Returns the recurrent output at every position, shape ``[B, L, d]``."""
        return self.dense(self._recur(item_seq))

    def outputs_at(self, item_seq: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the outputs at some positions, shape ``[n, d]``."""
        return self.dense(pick(self._recur(item_seq), wanted))

    def _recur(self, item_seq: torch.Tensor) -> torch.Tensor:
        embedded = dropout(self.item_embedding(item_seq), self.emb_dropout.p, self.emb_dropout.training)
        return self.gru_layers(embedded)[0]

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Returns the output after the last item, shape ``[B, d]``; RecBole's own pass where gradients are needed."""
        if self.training or torch.is_grad_enabled():
            return super().forward(item_seq, item_seq_len)
        return self.outputs(item_seq, last_items(item_seq_len, item_seq.size(1)))
