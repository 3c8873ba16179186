"""What a model answers: scores of all items or of given pairs, the best of them, and the area under the curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.model.contract import offers

PAIRS_AT_ONCE = 1 << 15
BLOCK = 32
"""Columns of a wide row of scores whose maximum is looked at first."""
CACHES = ("restore_user_e", "restore_item_e", "restore_entity_e", "restore_user_emb", "restore_item_emb")


def clear_caches(model: nn.Module) -> None:
    """Empties the propagated embeddings that RecBole's graph models keep: any change of weights makes them stale."""
    for module in model.modules():
        for name in CACHES:
            if getattr(module, name, None) is not None:  # RecBole's own attributes, of models and of their parts
                setattr(module, name, None)


def full_scores(model: Any, batch: Interaction, batcher: Any) -> torch.Tensor:
    """Returns scores of all items, shape ``[B, n_items]``; models without ``full_sort_predict`` score pair by pair."""
    if offers(model, "full_sort_predict"):
        return model.full_sort_predict(batch).view(len(batch), -1)[:, : batcher.n_items]
    return pair_scores(model, batch, torch.arange(batcher.n_items).expand(len(batch), -1), batcher)


def pair_scores(model: Any, batch: Interaction, items: torch.Tensor, batcher: Any) -> torch.Tensor:
    """Returns ``model.predict`` of given pairs, -inf where the item is padding.

    Args:
        model: The model.
        batch: One row a user or target, ``B`` of them, on the model's device.
        items: Item ids, shape ``[B, C]``.
        batcher: Adds the items' features (:class:`recbole_cl.stream.batch.Batcher`).

    Returns:
        Scores, shape ``[B, C]``.
    """
    device = batch[batcher.uid].device
    rows, columns = torch.nonzero(items.cpu() > 0, as_tuple=True)
    ids = items.cpu()[rows, columns]
    batch = batch.to("cpu")
    out = torch.full(items.shape, -torch.inf, device=device)
    size = max(int(batcher.config["eval_batch_size"]), PAIRS_AT_ONCE)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        pairs = Interaction({name: column[rows[part]] for name, column in batch.interaction.items()})
        pairs.interaction[batcher.iid] = ids[part]
        scores = model.predict(batcher.join(pairs).to(device)).flatten()
        out[rows[part].to(device), columns[part].to(device)] = scores.to(out.dtype)
    return out


def best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ``k`` largest scores of each row and their columns, falling, shape ``[B, k]`` each.

    In a wide row on a CPU the maxima of blocks say which blocks can hold one of them.
    """
    width, blocks = scores.size(1), scores.size(1) // BLOCK
    if scores.device.type != "cpu" or blocks < 16 * k:
        found = torch.topk(scores, k, dim=1)
        return found.values, found.indices
    peaks = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(dim=2)
    chosen = torch.topk(peaks, k, dim=1).indices.sort(dim=1).values
    columns = (chosen.unsqueeze(2) * BLOCK + torch.arange(BLOCK)).flatten(1)
    rest = torch.arange(blocks * BLOCK, width).expand(len(scores), -1)
    columns = torch.cat([columns, rest], dim=1)
    found = torch.topk(scores.gather(1, columns), k, dim=1)
    return found.values, columns.gather(1, found.indices)


def auc_of_rows(scores: torch.Tensor, row: np.ndarray, item: np.ndarray, n_items: int) -> np.ndarray:
    """Area under the ROC curve of each row over its finite candidates; an unscored positive ranks last."""
    positive = torch.zeros_like(scores, dtype=torch.bool)
    fits = item < n_items
    positive[row[fits], item[fits]] = True
    out = np.zeros(len(scores))
    for i in range(len(scores)):
        finite = torch.isfinite(scores[i])
        negatives = scores[i][finite & ~positive[i]].sort().values
        chosen = scores[i][finite & positive[i]]
        total = int((row == i).sum())
        if not len(negatives) or not total:
            continue
        below = torch.searchsorted(negatives, chosen, side="left")
        upto = torch.searchsorted(negatives, chosen, side="right")
        out[i] = float((below + upto).double().sum() / 2 / (len(negatives) * total))
    return out
