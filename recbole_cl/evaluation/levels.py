"""Rankings of coarser identities: items that share a group (a semantic id) are one and the same there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recbole_cl.errors import TrainingError
from recbole_cl.evaluation.rows import Rows


def checked_levels(model: Any, levels: Mapping[str, np.ndarray], n_items: int) -> dict[str, np.ndarray]:
    """Returns the levels that a model tells (``item_levels``).

    Args:
        model: The model.
        levels: Name to the group of each item.
        n_items: Items that the model has rows for.

    Raises:
        TrainingError: If a level is no group id of each item, or has the name of the level of items.
    """
    found = {}
    for name, given in levels.items():
        groups = np.asarray(given)
        where = f"model: item_levels() of {type(model).__name__}: level {name!r}"
        if name == "item":
            raise TrainingError(f"{where} is the name of the items themselves; call it something else")
        if groups.shape != (n_items,) or groups.dtype.kind not in "iu" or groups.min(initial=0) < 0:
            raise TrainingError(
                f"{where} has the shape {list(groups.shape)} and type {groups.dtype}; it is one group id of at least 0 "
                f"for each of the {n_items} items, 0 for none"
            )
        found[str(name)] = groups.astype(np.int64)
    return found


def at_level(rows: Rows, top: np.ndarray, cold: np.ndarray, groups: np.ndarray) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Returns what was ranked and the lists with each item replaced by its group.

    ::

        list        i4 i9 i2 i7        groups of i4 and i2: g1, of i9: g2; i7 has none
        as groups   g1 g2 i7  -        the second g1 is dropped, the order kept; an item without a group is its own

    Args:
        rows: What was ranked.
        top: Recommended items, 0 for an empty slot, shape ``[n, K]``.
        cold: Which positives of ``rows`` the model cannot score.
        groups: Group of each item that the model has a row for, 0 for none, shape ``[n_items]``.

    Returns:
        Rows whose positives are groups, each once a row; the lists; and which of those positives stand for cold
        items alone.
    """
    first = int(groups.max(initial=0)) + 1  # ids of items without a group begin here
    identity = first + np.arange(max(len(groups), int(rows.item.max(initial=0)) + 1))
    identity[: len(groups)] = np.where(groups > 0, groups, identity[: len(groups)])
    identity[0] = 0
    lists = identity[top]
    for column in range(1, lists.shape[1]):
        seen = (lists[:, :column] == lists[:, column : column + 1]).any(axis=1)
        lists[seen, column] = 0
    lists = np.take_along_axis(lists, np.argsort(lists == 0, axis=1, kind="stable"), axis=1)
    key, place = np.unique((rows.row << 32) + identity[rows.item], return_inverse=True)
    alone = np.ones(len(key), dtype=bool)
    np.logical_and.at(alone, place, cold)
    none = np.empty(0, dtype=np.int64)
    return Rows(rows.targets, key >> 32, key & ((1 << 32) - 1), none, none, None), lists, alone
