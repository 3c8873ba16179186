"""SASRec trained on all positions."""

from __future__ import annotations

import torch
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec

from recbole_cl.model.all_positions import AllPositions
from recbole_cl.registry import models


@models.register()
class SASRec(AllPositions, RecBoleSASRec):
    """RecBole's SASRec (Kang and McAuley 2018) with one causal pass over all positions of a window.

    Parameters, initialisation, ``predict`` and ``full_sort_predict`` are RecBole's.
    """

    def encode(self, item_seq: torch.Tensor) -> torch.Tensor:
        """Returns the transformer's output at every position, shape ``[B, L, d]``."""
        positions = torch.arange(item_seq.size(1), device=item_seq.device)
        embedded = self.item_embedding(item_seq) + self.position_embedding(positions)
        embedded = self.dropout(self.LayerNorm(embedded))
        return self.trm_encoder(embedded, self.get_attention_mask(item_seq), output_all_encoded_layers=False)[-1]
