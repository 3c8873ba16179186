"""Whose partitions a row sees, and how many of them."""

from __future__ import annotations

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_cl.model.liber_texts import History
from recbole_cl.stream.batch import HI, LO, POSITION, TARGETS, Batcher
from recbole_cl.stream.stage import Targets

USER, COUNT = "_liber_user", "_liber_count"
"""Fields of rows: whose partitions are seen, and how many of them, the oldest; ``[B]``, or ``[B, L]`` of windows."""


def with_partitions(history: History, batcher: Batcher, rows: Interaction, targets: Targets) -> Interaction:
    """Returns rows with whose partitions each sees and how many; of a window, at each of its positions.

    A target sees what ended strictly before it. A request of a served run comes after all that the log holds of its
    user, so it sees every partition that has closed; one with a history and no user sees none.

    Args:
        history: The partitions of the stream.
        batcher: Who made the rows.
        rows: The rows.
        targets: Their targets.
    """
    table, seen = batcher.stream.table, history.seen
    if batcher.table is not table:
        user = targets.user
        count = np.bincount(history.partitions.user, minlength=table.n_users)[user]
    else:
        if TARGETS in rows:
            lo, last = rows[LO].numpy(), rows[HI].numpy()
            at = np.minimum(lo[:, None] + np.arange(rows[TARGETS].size(1)), last[:, None] - 1) + 1
            position = table.seq[at]
            user = np.broadcast_to(targets.user[:, None], position.shape)
            whole = np.broadcast_to(last[:, None] < len(table), position.shape)
        else:
            position, user = rows[POSITION].numpy(), targets.user
            # Histories in which some interactions never were (streams of tasks) lie behind the log's own sequences.
            whole = targets.hi <= len(table)
        count = np.where(whole & (table.user[position] == user), seen[position], 0)
    if batcher.stream.history == "stage":  # histories are cut off where the stage begins
        count = np.zeros_like(count)
    rows.interaction[USER] = torch.from_numpy(np.ascontiguousarray(user))
    rows.interaction[COUNT] = torch.from_numpy(count)
    return rows
