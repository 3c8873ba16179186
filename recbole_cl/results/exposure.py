"""Exposure disparity: who is recommended, and for whom the recommendations are good.

ProtoFed-SP, section 4.1.2 (iv), tracks Disp_item = |Exp_head - Exp_tail| over items and Disp_user = |Exp_hi - Exp_lo|
over users at every stage, and leaves Exp and the groups open. What is computed here is in the ``definition_*`` strings
that every result carries, so that a report can print it beside the numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["DEFINITION_ITEMS", "DEFINITION_USERS", "exposure_disparity", "head_mask"]

DEFINITION_ITEMS = (
    "|Exp_head - Exp_tail|; Exp_g = (share of the recommended slots that hold an item of group g) / "
    "(share of the catalogue that is in g); 1 = exposed in proportion to its size; empty slots count nowhere"
)
DEFINITION_USERS = "|Exp_hi - Exp_lo|; Exp_g = mean of the metric over the users of group g, each user counted once"


def head_mask(counts: ArrayLike, head_ratio: float = 0.2) -> NDArray[np.bool_]:
    """Marks the head: the most frequent share of those that occur at all.

    The head is the first ceil(head_ratio * m) of the m ids with a count above 0, by falling count, ties to the smaller
    id. Counts must come from data up to the evaluated stage only, or the groups leak the future.

    Args:
        counts: int [N], interactions of each item (or user), indexed by id. RecBole's padding id 0 has count 0.
        head_ratio: Share that counts as head, in (0, 1).

    Returns:
        bool [N], True for the head.

    Raises:
        ValueError: ``head_ratio`` is outside (0, 1).
    """
    if not 0.0 < head_ratio < 1.0:
        raise ValueError(f"head_ratio is in (0, 1), not {head_ratio}")
    numbers = np.asarray(counts)
    order = np.argsort(-numbers, kind="stable")
    occurring = int((numbers > 0).sum())
    mask = np.zeros(numbers.shape, dtype=bool)
    # A float product like 0.2 * 15 = 3.0000000000000004 must not put a fourth item in the head.
    mask[order[: math.ceil(round(head_ratio * occurring, 9))]] = True
    return mask


def exposure_disparity(
    recommended: ArrayLike,
    head_items: ArrayLike,
    catalogue: ArrayLike | None = None,
    user_values: ArrayLike | None = None,
    active_users: ArrayLike | None = None,
    users: ArrayLike | None = None,
) -> dict[str, Any]:
    """Computes the disparity of exposure over items and of quality over users for one stage.

    Items: Disp_item = |Exp_head - Exp_tail|, Exp_g = (slots in g / recommended slots) / (|g| / |catalogue|).
    The raw shares of slots are returned, too: the normalised ones tell over-exposure, the raw ones who fills lists.

    Users: Disp_user = |Exp_hi - Exp_lo|, Exp_g = mean over the users of g of their mean metric value.

    Args:
        recommended: int [n, k], item ids of each recommendation list, 0 = empty slot.
        head_items: bool [n_items], True for head items, indexed by item id; id 0 is the padding.
        catalogue: bool [n_items], the items that could be recommended at this stage. Default: all but id 0.
        user_values: float [n], metric of each row, NaN = not evaluated. None: no user part.
        active_users: bool [n], True where the row's user is an active one. Needed with ``user_values``.
        users: int [n], the row's user, so that a user with many targets counts once. Default: every row its own user.

    Returns:
        Flat, JSON-able: ``item_disparity``, ``exp_head``, ``exp_tail``, ``share_head``, ``share_tail`` (raw shares of
        slots), ``n_head_items``, ``n_tail_items``, ``n_recommendations``; ``user_disparity``, ``exp_active``,
        ``exp_inactive``, ``n_active_users``, ``n_inactive_users``; ``definition_items``, ``definition_users``. A
        number that has nothing to be computed from (an empty group, no recommendations) is None.

    Raises:
        ValueError: Shapes do not fit, a recommended id is not in the catalogue, or a user is in both groups.
    """
    return {
        **_item_part(np.asarray(recommended), np.asarray(head_items, dtype=bool), catalogue),
        **_user_part(user_values, active_users, users),
        "definition_items": DEFINITION_ITEMS,
        "definition_users": DEFINITION_USERS,
    }


def _item_part(recommended: NDArray[Any], head: NDArray[np.bool_], catalogue: ArrayLike | None) -> dict[str, Any]:
    if head.ndim != 1:
        raise ValueError(f"head_items is one flag an item, not of shape {list(head.shape)}")
    known = np.ones_like(head) if catalogue is None else np.asarray(catalogue, dtype=bool).copy()
    if known.shape != head.shape:
        raise ValueError(f"catalogue has shape {list(known.shape)}, head_items {list(head.shape)}")
    known[:1] = False
    slots = recommended[recommended != 0].astype(np.int64)
    if len(slots) and (slots.min() < 0 or slots.max() >= len(head) or not known[slots].all()):
        outside = next(int(i) for i in slots if i < 0 or i >= len(head) or not known[i])
        raise ValueError(f"item {outside} is recommended but not in the catalogue of {int(known.sum())} items")
    n_items, n_head = int(known.sum()), int((head & known).sum())
    found: dict[str, Any] = {
        "n_head_items": n_head,
        "n_tail_items": n_items - n_head,
        "n_recommendations": len(slots),
    }
    on_head = int(head[slots].sum())
    for name, hits, size in (("head", on_head, n_head), ("tail", len(slots) - on_head, n_items - n_head)):
        share = hits / len(slots) if len(slots) else None
        found[f"share_{name}"] = share
        found[f"exp_{name}"] = share / (size / n_items) if share is not None and size else None
    found["item_disparity"] = _distance(found["exp_head"], found["exp_tail"])
    return found


def _user_part(user_values: ArrayLike | None, active: ArrayLike | None, users: ArrayLike | None) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(("user_disparity", "exp_active", "exp_inactive"))
    found |= {"n_active_users": 0, "n_inactive_users": 0}
    if user_values is None:
        return found
    if active is None:
        raise ValueError("user_values needs active_users, the group of each row's user")
    values, is_active = np.asarray(user_values, dtype=np.float64), np.asarray(active, dtype=bool)
    ids = np.arange(len(values)) if users is None else np.asarray(users)
    if values.ndim != 1 or values.shape != is_active.shape or values.shape != ids.shape:
        shapes = [list(a.shape) for a in (values, is_active, ids)]
        raise ValueError(f"user_values, active_users and users are one value a row each, not of shapes {shapes}")
    there = ~np.isnan(values)
    values, is_active, ids = values[there], is_active[there], ids[there]
    if not len(values):
        return found
    _, first, row_user = np.unique(ids, return_index=True, return_inverse=True)
    group = is_active[first]
    if (group[row_user] != is_active).any():
        user = ids[group[row_user] != is_active][0]
        raise ValueError(f"user {user} is both active and inactive")
    means = np.bincount(row_user, weights=values) / np.bincount(row_user)
    for name, mask in (("active", group), ("inactive", ~group)):
        found[f"n_{name}_users"] = int(mask.sum())
        found[f"exp_{name}"] = float(means[mask].mean()) if mask.any() else None
    found["user_disparity"] = _distance(found["exp_active"], found["exp_inactive"])
    return found


def _distance(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else abs(a - b)
