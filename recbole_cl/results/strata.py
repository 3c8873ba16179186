"""Warm and new users and items, known and cold targets: who a metric is told for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["STRATA", "StratumMean", "mean_by_stratum", "strata_masks"]

#: Names of the strata and what they hold, in the order in which they are told.
STRATA: dict[str, str] = {
    "all": "all test targets",
    "warm_user": "users with an interaction in an earlier stage",
    "new_user": "users who first appear in the evaluated stage",
    "warm_item": "targets whose item appeared in an earlier stage",
    "new_item": "targets whose item first appears in the evaluated stage",
    "known": "targets whose user and item the model was trained on",
    "cold": "targets whose user or item the model was never trained on (a miss)",
}


class StratumMean(NamedTuple):
    """Mean of a metric over one stratum.

    Attributes:
        value: The mean, or None where the stratum has no evaluated target.
        n: Number of targets in the mean.
    """

    value: float | None
    n: int


def strata_masks(user_new: ArrayLike, item_new: ArrayLike, cold: ArrayLike) -> dict[str, NDArray[np.bool_]]:
    """Cuts a stage's targets into strata.

    Three splits in two of the same targets (warm | new user, warm | new item, known | cold), and all of them. A cold
    target is one that *the trained model* cannot know; new is a property of the stage. They differ off the diagonal.

    Args:
        user_new: bool [n], the target's user first appears in the evaluated stage.
        item_new: bool [n], the target's item first appears in the evaluated stage.
        cold: bool [n], the model was never trained on the target's user or item.

    Returns:
        ``{name: bool [n]}`` with the names and order of :data:`STRATA`.

    Raises:
        ValueError: The three are not one-dimensional or differ in length.
    """
    users, items, misses = (np.asarray(a, dtype=bool) for a in (user_new, item_new, cold))
    if users.ndim != 1 or users.shape != items.shape or users.shape != misses.shape:
        raise ValueError(
            "user_new, item_new and cold are one flag a target each, "
            f"not of shapes {list(users.shape)}, {list(items.shape)} and {list(misses.shape)}"
        )
    return {
        "all": np.ones_like(users),
        "warm_user": ~users,
        "new_user": users,
        "warm_item": ~items,
        "new_item": items,
        "known": ~misses,
        "cold": misses,
    }


def mean_by_stratum(values: ArrayLike, masks: Mapping[str, NDArray[np.bool_]]) -> dict[str, StratumMean]:
    """Means a metric over each stratum.

    mean_g = (1 / |g|) sum_{i in g} v_i over the targets i of stratum g whose value is not NaN.

    Args:
        values: float [n], the metric of each target, NaN = not evaluated.
        masks: ``{name: bool [n]}``, as from :func:`strata_masks`.

    Returns:
        ``{name: StratumMean(value, n)}``; the value of an empty stratum is None.

    Raises:
        ValueError: A mask has another length than ``values``.
    """
    numbers = np.asarray(values, dtype=np.float64)
    means: dict[str, StratumMean] = {}
    for name, mask in masks.items():
        chosen = np.asarray(mask, dtype=bool)
        if chosen.shape != numbers.shape:
            raise ValueError(f"stratum {name!r} has shape {list(chosen.shape)}, the values {list(numbers.shape)}")
        part = numbers[chosen & ~np.isnan(numbers)]
        means[name] = StratumMean(float(part.mean()) if len(part) else None, len(part))
    return means
