"""SASRec trained on all positions."""

from __future__ import annotations

import torch
from recbole.model.layers import TransformerEncoder
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec

from recbole_cl.model.all_positions import AllPositions, last_items, pick
from recbole_cl.model.fused import causal_mask, dropout, layer_outputs, plain
from recbole_cl.registry import models


@models.register()
class SASRec(AllPositions, RecBoleSASRec):
    """RecBole's SASRec (Kang and McAuley 2018) with one causal pass over all positions of a window.

    Parameters, initialisation, ``predict`` and ``full_sort_predict`` are RecBole's. Passes over all positions and
    passes without gradients use fewer operations (:mod:`recbole_cl.model.fused`) and leave out of the top layer what
    is not read: the same outputs up to rounding.
    """

    def encode(self, item_seq: torch.Tensor) -> torch.Tensor:
        """Returns the transformer's output at every position, shape ``[B, L, d]``."""
        hidden = self._embed(item_seq)
        if not self._plain():
            return self.trm_encoder(hidden, self.get_attention_mask(item_seq), output_all_encoded_layers=False)[-1]
        mask = causal_mask(item_seq.size(1), item_seq.device)
        for layer in self.trm_encoder.layer:
            hidden = layer_outputs(layer, hidden, mask)
        return hidden

    def outputs_at(self, item_seq: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the outputs at some positions, shape ``[n, d]``; the top layer asks for few of them alone."""
        counts = wanted.sum(dim=1)
        most, width = int(counts.max()), item_seq.size(1)
        if not 0 < 2 * most <= width or not self._plain():
            return pick(self.encode(item_seq), wanted)
        hidden, mask = self._embed(item_seq), causal_mask(width, item_seq.device)
        *lower, top = self.trm_encoder.layer
        for layer in lower:
            hidden = layer_outputs(layer, hidden, mask)
        at = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        filled = torch.arange(most, device=at.device) < counts.unsqueeze(1)
        return pick(layer_outputs(top, hidden, mask, at), filled)

    def _embed(self, item_seq: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(item_seq.size(1), device=item_seq.device)
        embedded = self.item_embedding(item_seq) + self.position_embedding(positions)
        return dropout(self.LayerNorm(embedded), self.dropout.p, self.dropout.training)

    def _plain(self) -> bool:
        encoder = self.trm_encoder
        hooked = type(encoder) is not TransformerEncoder or encoder._forward_hooks or encoder._forward_pre_hooks
        return not hooked and len(encoder.layer) > 0 and all(plain(layer) for layer in encoder.layer)

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Returns the output after the last item, shape ``[B, d]``; RecBole's own pass where gradients are needed."""
        if self.training or torch.is_grad_enabled():
            return super().forward(item_seq, item_seq_len)
        return self.outputs(item_seq, last_items(item_seq_len, item_seq.size(1)))
