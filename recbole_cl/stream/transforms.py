"""RecBole's transforms of batches, and its draws that would not end where a history holds every item."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from recbole.data.transform import construct_transform

from recbole_cl.errors import DataError

TRIES = 1000
"""Draws, as RecBole makes them, before the items that are left are looked up."""


def transform_of(config: Any) -> Any:
    """Returns RecBole's transform of the configured model, which always ends.

    Args:
        config: The run's configuration.
    """
    transform = construct_transform(config)
    if hasattr(transform, "_neg_sample"):
        # Under cross-entropy nobody reads the negatives of masked items.
        let_end(transform, None, needed=config["loss_type"] != "CE")
    return transform


def let_end(owner: Any, n_items: int | None, needed: bool) -> None:
    """Puts a draw that ends in place of ``_neg_sample`` of an object of RecBole's, which draws until it succeeds.

    Where RecBole's would find an item within :data:`TRIES` draws, the same one is found.

    Args:
        owner: A transform, or a model with a method of that name (S3Rec).
        n_items: Items of a model; a transform is told them when it is called.
        needed: A negative must be none of the history; else one of them, 0, stands in where there is no other.
    """

    def draw(history: Collection[int], known: int | None = n_items) -> int:
        assert known is not None
        for _ in range(TRIES):
            item = random.randint(1, known - 1)
            if item not in history:
                return item
        left = sorted({*range(1, known)} - {*history})
        if left:
            return random.choice(left)
        if not needed:
            return 0
        raise DataError(
            f"a history holds all {known - 1} items that are known, so there is no negative for its items; set "
            f"loss_type: CE where the model has it, a smaller MAX_ITEM_LIST_LENGTH, or make the first stage larger"
        )

    owner._neg_sample = draw
