"""Negative items for training and for sampled evaluation, drawn in whole arrays."""

from __future__ import annotations

import numpy as np

from recbole_cl.errors import DataError

MAX_ROUNDS = 200


class NegativeSampler:
    """Draws items a user has not interacted with, among those known at a stage.

    Unlike RecBole's sampler it excludes only interactions of the past (training targets so far), never positives of
    the future, and draws no item that is first seen later.

    Args:
        user: Users of the excluded interactions, shape ``[n]``.
        item: Items of the excluded interactions, shape ``[n]``.
        n_items: Ids from 1 to ``n_items - 1`` are drawn.
        distribution: ``uniform`` or ``popularity`` (of the given interactions, to the power ``alpha``).
        alpha: Power of popularity.
        generator: The sampler's own generator.
        pool: Ids to draw from instead of all from 1 on, for uniform sampling.
    """

    def __init__(
        self,
        user: np.ndarray,
        item: np.ndarray,
        n_items: int,
        generator: np.random.Generator,
        distribution: str = "uniform",
        alpha: float = 1.0,
        pool: np.ndarray | None = None,
    ) -> None:
        if n_items < 3:
            raise DataError(f"negative sampling needs at least two known items, there are {n_items - 1}")
        self.n_items = n_items
        self.pool = pool
        self.generator = generator
        self.used = np.unique(user.astype(np.int64) * n_items + item)
        self.cumulative: np.ndarray | None = None
        if distribution == "popularity":
            weight = np.bincount(item, minlength=n_items)[1:n_items].astype(np.float64) ** alpha
            weight[np.bincount(item, minlength=n_items)[1:n_items] == 0] = 0.0
            self.cumulative = np.cumsum(weight / weight.sum())
        counts = np.bincount(self.used // n_items)
        if len(counts) and counts.max() >= n_items - 1:
            raise DataError(
                f"{int((counts >= n_items - 1).sum())} users have interacted with every known item, so no negative "
                f"can be drawn for them; leave them out with user_inter_num_interval or use a loss without negatives"
            )

    def _draw(self, size: int) -> np.ndarray:
        if self.pool is not None:
            return self.pool[self.generator.integers(0, len(self.pool), size=size)]
        if self.cumulative is None:
            return self.generator.integers(1, self.n_items, size=size)
        return 1 + np.minimum(np.searchsorted(self.cumulative, self.generator.random(size)), self.n_items - 2)

    def _is_used(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        key = user.astype(np.int64) * self.n_items + item
        at = np.minimum(np.searchsorted(self.used, key), max(len(self.used) - 1, 0))
        return self.used[at] == key if len(self.used) else np.zeros(len(key), dtype=bool)

    def sample(self, user: np.ndarray, num: int, positive: np.ndarray | None = None) -> np.ndarray:
        """Returns ``num`` negatives for each user.

        Args:
            user: User ids, shape ``[n]``.
            num: Negatives a row.
            positive: Items to exclude besides the used ones (the row's own target), shape ``[n]``; with it alone a
                repeatable scene is sampled (see :meth:`sample_repeatable`).

        Returns:
            Item ids, shape ``[num * n]``; the i-th block of ``n`` is the i-th negative of every row, as in RecBole.
        """
        users = np.tile(user, num)
        positives = None if positive is None else np.tile(positive, num)
        out = self._draw(len(users))
        bad = self._is_used(users, out)
        if positives is not None:
            bad |= out == positives
        rounds = 0
        redo = np.flatnonzero(bad)
        while len(redo):
            rounds += 1
            if rounds > MAX_ROUNDS:
                raise DataError(
                    f"no negative found for {len(redo)} rows in {MAX_ROUNDS} rounds: under popularity sampling some "
                    f"users know every popular item; use distribution: uniform"
                )
            out[redo] = self._draw(len(redo))
            bad = self._is_used(users[redo], out[redo])
            if positives is not None:
                bad |= out[redo] == positives[redo]
            redo = redo[bad]
        return out

    def sample_repeatable(self, num: int, positive: np.ndarray) -> np.ndarray:
        """Returns ``num`` negatives a row that differ from the row's target only (sequential models in RecBole)."""
        positives = np.tile(positive, num)
        out = self._draw(len(positives))
        redo = np.flatnonzero(out == positives)
        while len(redo):
            out[redo] = self._draw(len(redo))
            redo = redo[out[redo] == positives[redo]]
        return out
