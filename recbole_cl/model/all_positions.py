"""Training a causal sequential model on all positions of a window in one pass.

RecBole trains every prefix of a sequence as a sequence of its own: n targets cost n passes over up to n inputs. A
causal model gives the same n outputs in one pass. A subclass puts :class:`AllPositions` in front of RecBole's model
and writes :meth:`AllPositions.encode`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.model.contract import ContinualModel
from recbole_cl.model.fused import softmax_loss
from recbole_cl.stream.batch import TARGETS

PASS_OVERHEAD = {True: 256, False: 64}
"""What one more pass with or without gradients costs, in inputs: rows are parted where that saves more padding."""
INPUTS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 18}
"""Inputs of a pass without gradients. On a CPU its activations then stay in the cache."""


class AllPositions(ContinualModel):
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

    def outputs_at(self, item_seq: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the outputs at some positions; a model that can leave out the others overrides it.

        Args:
            item_seq: Item ids, right-padded with 0, shape ``[B, L]``.
            wanted: Flags, shape ``[B, L]``.

        Returns:
            Shape ``[n, d]``, row by row.
        """
        return pick(self.encode(item_seq), wanted)

    def outputs(self, item_seq: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the outputs at some positions with little work on padding: rows of similar length share a pass.

        Args:
            item_seq: Item ids, right-padded with 0, shape ``[B, L]``.
            wanted: Flags, shape ``[B, L]``.

        Returns:
            Shape ``[n, d]``, row by row.
        """
        groups = passes(wanted)
        if len(groups) == 1 and len(groups[0][0]) == len(wanted):
            width = groups[0][1]
            return self.outputs_at(item_seq[:, :width], wanted[:, :width])
        number = (wanted.flatten().cumsum(0) - 1).view_as(wanted)
        parts, places = [], []
        for rows, width in groups:
            flags = wanted[rows, :width]
            parts.append(self.outputs_at(item_seq[rows, :width], flags))
            places.append(number[rows, :width][flags])
        place = torch.cat(places)
        inverse = torch.empty_like(place)
        inverse[place] = torch.arange(len(place), device=place.device)
        return torch.cat(parts).index_select(0, inverse)

    def item_scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Returns the scores of all items, shape ``[n, n_items]``, for outputs of shape ``[n, d]``."""
        return outputs @ self.item_embedding.weight.T

    def shares_prefixes(self) -> bool:
        """Tells whether one pass over a sequence scores all its prefixes as ``full_sort_predict`` would.

        It does unless a subclass has given :meth:`forward` or ``full_sort_predict`` another meaning.
        """
        order = type(self).__mro__
        place = {
            name: next(i for i, kind in enumerate(order) if name in vars(kind))
            for name in ("forward", "full_sort_predict", "outputs_at")
        }
        own = vars(self)
        return min(place.values()) == place["outputs_at"] and not any(name in own for name in place)

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Returns the mean loss over the supervised positions, or RecBole's loss of single targets.

        The outputs at the supervised positions ``[n, d]``, with their graph, become the batch's attribute ``outputs``.
        """
        if TARGETS not in interaction:
            return super().calculate_loss(interaction)  # type: ignore[misc]
        targets = interaction[TARGETS]
        supervised = targets > 0
        outputs, items = self.outputs(interaction[self.ITEM_SEQ], supervised), targets[supervised]
        interaction.outputs = outputs  # it lives as long as the batch: strategies that distil need no second pass
        if self.loss_type == "CE":
            return softmax_loss(outputs, self.item_embedding.weight, items)
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


def last_items(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the flags ``[B, width]`` of the last item of each history, for lengths ``[B]``; none for length 0."""
    return torch.arange(width, device=lengths.device) == lengths.view(-1, 1) - 1


def pick(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns the rows ``[n, d]`` of ``hidden`` of shape ``[B, L, d]`` whose flag of shape ``[B, L]`` is set."""
    index = wanted.flatten().nonzero().squeeze(1)
    flat = hidden.flatten(0, 1)
    return flat if len(index) == len(flat) else flat.index_select(0, index)


def passes(wanted: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Parts rows into passes of similar length.

    Args:
        wanted: Flags of the positions that are wanted, shape ``[B, L]``; a row needs its inputs up to the last.

    Returns:
        Rows and width of each pass, rows without a wanted position left out; a single pass over all rows has them in
        their order. Without gradients passes are small, and rows of which one position is wanted are kept apart, since
        a model may do less for them.
    """
    size, width = wanted.shape
    grown, device = torch.is_grad_enabled(), wanted.device
    most = INPUTS_AT_ONCE.get(device.type, 1 << 18)
    everything = [(torch.arange(size, device=device), width)]
    if device.type != "cpu" and (grown or size * width <= most):
        return everything
    flags = wanted.cpu().numpy()
    number, lengths = flags.sum(axis=1), width - flags[:, ::-1].argmax(axis=1)
    if not number.any():
        return everything
    kinds = [np.flatnonzero(number)] if grown else [np.flatnonzero(number == 1), np.flatnonzero(number > 1)]
    found: list[tuple[np.ndarray, int]] = []
    for rows in kinds:
        order = rows[np.argsort(-lengths[rows], kind="stable")]
        for part in np.split(order, _cuts(lengths[order], PASS_OVERHEAD[grown])):
            if len(part):
                longest = int(lengths[part[0]])
                step = len(part) if grown else max(1, most // longest)
                found += [(part[i : i + step], longest) for i in range(0, len(part), step)]
    if len(found) == 1 and len(found[0][0]) == size:
        return [(everything[0][0], found[0][1])]
    return [(torch.from_numpy(rows).to(device), longest) for rows, longest in found]


def _cuts(lengths: np.ndarray, overhead: int) -> np.ndarray:
    """Returns where to cut falling lengths so that padding and an overhead for each pass cost least in all."""
    if not len(lengths):
        return np.empty(0, dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, lengths[1:] != lengths[:-1]])
    ends = np.r_[starts[1:], len(lengths)]
    best, before = np.zeros(len(starts) + 1), np.zeros(len(starts), dtype=np.int64)
    for j, end in enumerate(ends):  # the last pass holds the lengths i .. j, each as long as the longest of them
        costs = best[: j + 1] + lengths[starts[: j + 1]] * (end - starts[: j + 1]) + overhead
        before[j] = costs.argmin()
        best[j + 1] = costs[before[j]]
    cuts, j = [], len(starts) - 1
    while j >= 0:
        cuts.append(int(starts[before[j]]))
        j = int(before[j]) - 1
    return np.array(cuts[::-1][1:], dtype=np.int64)
