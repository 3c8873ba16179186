"""SASRec trained on all positions."""

from __future__ import annotations

import torch
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec

from recbole_cl.model.all_positions import AllPositions
from recbole_cl.registry import models


@models.register()
class SASRec(AllPositions, RecBoleSASRec):
    """RecBole's SASRec (Kang and McAuley 2018) with one causal pass over all positions of a window.

    Parameters, initialisation, ``predict`` and ``full_sort_predict`` are RecBole's. Without gradients the top layer is
    computed for the last position only, since nothing else of it is read: the same scores up to rounding.
    """

    def encode(self, item_seq: torch.Tensor) -> torch.Tensor:
        """Returns the transformer's output at every position, shape ``[B, L, d]``."""
        hidden = self._embed(item_seq)
        return self.trm_encoder(hidden, self.get_attention_mask(item_seq), output_all_encoded_layers=False)[-1]

    def _embed(self, item_seq: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(item_seq.size(1), device=item_seq.device)
        embedded = self.item_embedding(item_seq) + self.position_embedding(positions)
        return self.dropout(self.LayerNorm(embedded))

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Returns the output after the last item, shape ``[B, d]``; RecBole's own pass where gradients are needed."""
        if self.training or torch.is_grad_enabled():
            return super().forward(item_seq, item_seq_len)
        item_seq = item_seq[:, : int(item_seq_len.max())]  # padding on the right is never attended to
        hidden, mask = self._embed(item_seq), self.get_attention_mask(item_seq)
        *lower, top = self.trm_encoder.layer
        for layer in lower:
            hidden = layer(hidden, mask)
        row = (item_seq_len - 1).view(-1, 1, 1)
        last = hidden.gather(1, row.expand(-1, 1, hidden.size(-1)))
        attention = top.multi_head_attention
        query = attention.transpose_for_scores(attention.query(last)).permute(0, 2, 1, 3)
        key = attention.transpose_for_scores(attention.key(hidden)).permute(0, 2, 3, 1)
        value = attention.transpose_for_scores(attention.value(hidden)).permute(0, 2, 1, 3)
        scores = query @ key / attention.sqrt_attention_head_size
        scores = scores + mask.gather(2, row.unsqueeze(1).expand(-1, 1, 1, mask.size(-1)))
        mixed = (scores.softmax(dim=-1) @ value).permute(0, 2, 1, 3).flatten(2)
        last = attention.LayerNorm(attention.dense(mixed) + last)
        return top.feed_forward(last).squeeze(1)
