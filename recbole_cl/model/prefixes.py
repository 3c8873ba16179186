"""Outputs of a causal model after many histories: one pass over a sequence answers for all its prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recbole_cl.stream.stage import Targets


def prefix_outputs(model: Any, batcher: Any, targets: Targets) -> torch.Tensor:
    """Returns the model's output after each target's history, shape ``[n, d]``.

    ::

        seq   i1 i2 i3 i4 i5 i6 ...        three targets of one user, histories of at most 4 items
        pass  [i1 i2 i3 i4]                the outputs at i3 and i4 answer for two of them
        pass     [i2 i3 i4 i5]             the third is longer: its history has a start of its own

    Histories are those of :meth:`recbole_cl.stream.batch.Batcher.rows` for evaluation: the last ``max_length``
    interactions, without items that the model has no row for. A history without any known item counts as a miss; its
    output means nothing.

    Args:
        model: A model with ``outputs`` (:class:`recbole_cl.model.all_positions.AllPositions`), in eval mode.
        batcher: Knows the table and the model's rows.
        targets: ``n`` targets with a history.
    """
    table, n_items = batcher.table, batcher.n_items
    begin = np.maximum(targets.lo, targets.hi - batcher.max_length)
    start, row = np.unique(begin, return_inverse=True)  # a place in seq belongs to one user
    end = start.copy()
    np.maximum.at(end, row, targets.hi)
    index = start[:, None] + np.arange(max(int((end - start).max()), 1))
    real = index < end[:, None]
    items = np.where(real, table.item[table.seq[np.minimum(index, len(table.seq) - 1)]], 0)
    known = real & (items < n_items)
    column = np.maximum(known.cumsum(axis=1)[row, np.maximum(targets.hi - begin, 1) - 1] - 1, 0)
    if (known != real).any():
        order = np.argsort(~known, axis=1, kind="stable")
        items = np.take_along_axis(np.where(known, items, 0), order, axis=1)
    wanted = np.zeros(items.shape, dtype=bool)
    wanted[row, column] = True
    place = (wanted.cumsum() - 1)[row * items.shape[1] + column]
    device = model.item_embedding.weight.device
    outputs = model.outputs(torch.from_numpy(items).to(device), torch.from_numpy(wanted).to(device))
    found: torch.Tensor = outputs[torch.from_numpy(place).to(device)]
    return found
