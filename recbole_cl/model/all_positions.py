"""Training a causal sequential model on all positions of a window in one pass.

RecBole trains every prefix of a sequence as a sequence of its own: n targets cost n passes over up to n inputs. A
causal model gives the same n outputs in one pass. A subclass puts :class:`AllPositions` in front of RecBole's model
and writes :meth:`AllPositions.encode`.
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn import functional as F

from recbole_cl.stream.batch import TARGETS


class AllPositions:
    """Mixin of models that can be trained on all positions (``train_positions: all``).

    The loss is the mean over the supervised positions; for a sequence within the window it equals the mean of
    RecBole's losses over its prefixes (dropout aside). Batches without all-position targets take RecBole's own path,
    bit for bit.
    """

    trains_all_positions = True
    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    NEG_ITEM_ID: str
    loss_type: str
    item_embedding: nn.Embedding
    config_neg_prefix: str = "neg_"

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)  # type: ignore[call-arg]
        self.config_neg_prefix = config["NEG_PREFIX"]

    def encode(self, item_seq: torch.Tensor) -> torch.Tensor:
        """Returns the output at every position.

        Args:
            item_seq: Item ids, right-padded with 0, shape ``[B, L]``.

        Returns:
            Outputs whose product with an item's embedding is its score, shape ``[B, L, d]``.
        """
        raise NotImplementedError

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Returns the mean loss over the supervised positions, or RecBole's loss of single targets."""
        if TARGETS not in interaction:
            return super().calculate_loss(interaction)  # type: ignore[misc]
        targets = interaction[TARGETS]
        hidden = self.encode(interaction[self.ITEM_SEQ])
        supervised = targets > 0
        outputs, items = hidden[supervised], targets[supervised]
        if self.loss_type == "CE":
            return F.cross_entropy(outputs @ self.item_embedding.weight.T, items)
        negatives = interaction[self.config_neg_prefix + TARGETS][supervised]
        positive = (outputs * self.item_embedding(items)).sum(-1)
        negative = (outputs * self.item_embedding(negatives)).sum(-1)
        return self.loss_fct(positive, negative)  # type: ignore[attr-defined, no-any-return]

    def per_sample_loss(self, interaction: Interaction) -> torch.Tensor:
        """Returns each row's loss, shape ``[B]``: a window's mean over supervised positions, or a single target's."""
        if TARGETS not in interaction:
            targets = interaction[self.POS_ITEM_ID]  # type: ignore[attr-defined]
            hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])  # type: ignore[attr-defined]
            negatives = interaction[self.NEG_ITEM_ID] if self.loss_type != "CE" else None
            return self._losses(hidden, targets, negatives)
        targets = interaction[TARGETS]
        negatives = interaction[self.config_neg_prefix + TARGETS] if self.loss_type != "CE" else None
        losses = self._losses(self.encode(interaction[self.ITEM_SEQ]), targets, negatives)
        weight = (targets > 0).to(losses.dtype)
        return (losses * weight).sum(-1) / weight.sum(-1).clamp(min=1)

    def _losses(self, hidden: torch.Tensor, items: torch.Tensor, negatives: torch.Tensor | None) -> torch.Tensor:
        table = self.item_embedding.weight
        if negatives is None:
            logits = hidden @ table.T
            chosen = torch.gather(logits, -1, items.unsqueeze(-1)).squeeze(-1)
            return torch.logsumexp(logits, -1) - chosen
        gap = (hidden * (table[items] - table[negatives])).sum(-1)
        return -torch.log(1e-10 + torch.sigmoid(gap))  # RecBole's BPRLoss, before its mean

    def user_representation(self, interaction: Interaction) -> torch.Tensor:
        """Returns the output after the last item of each history, shape ``[B, d]``."""
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])  # type: ignore[attr-defined, no-any-return]

    def scores(self, interaction: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Returns scores of given items, shape ``[B, C]`` for ``items`` of shape ``[B, C]``."""
        hidden = self.user_representation(interaction)
        return (hidden.unsqueeze(1) * self.item_embedding(items)).sum(-1)
