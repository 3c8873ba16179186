"""Negative items for training and for sampled evaluation, drawn in whole arrays."""

from __future__ import annotations

import numpy as np

from recbole_cl.errors import DataError

MAX_ROUNDS = 20
"""Rounds of drawing again before what is left is drawn from the exact set of allowed items."""
REMEDY = "leave such users out with user_inter_num_interval, use distribution: uniform, or a loss without negatives"


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
        inside = item < n_items  # a larger id would read as an item of the next user
        user, item = user[inside], item[inside]
        self.used = np.unique(user.astype(np.int64) * n_items + item)
        self.cumulative: np.ndarray | None = None
        if distribution == "popularity":
            counts = np.bincount(item, minlength=n_items)[1:].astype(np.float64)
            self.cumulative = np.cumsum(np.where(counts > 0, counts**alpha, 0.0))

    def _draw(self, size: int) -> np.ndarray:
        if self.pool is not None:
            return self.pool[self.generator.integers(0, len(self.pool), size=size)]
        if self.cumulative is None:
            return self.generator.integers(1, self.n_items, size=size)
        drawn = np.searchsorted(self.cumulative, self.generator.random(size) * self.cumulative[-1], side="right")
        return 1 + np.minimum(drawn, self.n_items - 2)

    def _is_used(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        key = user.astype(np.int64) * self.n_items + item
        at = np.minimum(np.searchsorted(self.used, key), max(len(self.used) - 1, 0))
        return self.used[at] == key if len(self.used) else np.zeros(len(key), dtype=bool)

    def sample(self, user: np.ndarray, num: int, positive: np.ndarray | None = None) -> np.ndarray:
        """Returns ``num`` negatives for each user.

        Args:
            user: User ids, shape ``[n]``.
            num: Negatives a row.
            positive: Items to exclude besides the used ones (the row's own target), shape ``[n]``.

        Returns:
            Item ids, shape ``[num * n]``; the i-th block of ``n`` is the i-th negative of every row, as in RecBole.

        Raises:
            DataError: If a user has interacted with every item that could be drawn.
        """
        return self._sample(np.tile(user, num), None if positive is None else np.tile(positive, num))

    def sample_repeatable(self, num: int, positive: np.ndarray) -> np.ndarray:
        """Returns ``num`` negatives a row that differ from the row's target only (sequential models in RecBole).

        Raises:
            DataError: If a row's target is the only item that could be drawn.
        """
        return self._sample(None, np.tile(positive, num))

    def _sample(self, users: np.ndarray | None, positives: np.ndarray | None) -> np.ndarray:
        size = len(users) if users is not None else len(positives) if positives is not None else 0
        out = np.empty(size, dtype=np.int64)
        redo = np.arange(size)
        for _ in range(MAX_ROUNDS):
            if not len(redo):
                return out
            out[redo] = self._draw(len(redo))
            bad = np.zeros(len(redo), dtype=bool)
            if users is not None:
                bad |= self._is_used(users[redo], out[redo])
            if positives is not None:
                bad |= out[redo] == positives[redo]
            redo = redo[bad]
        for row in redo:
            out[row] = self._draw_one(
                None if users is None else users[row], None if positives is None else positives[row]
            )
        return out

    def _weights(self) -> np.ndarray:
        """Returns the weight of each id, shape ``[n_items]``; 0 where it is never drawn."""
        weight = np.zeros(self.n_items)
        if self.pool is not None:
            np.add.at(weight, self.pool, 1.0)
        else:
            weight[1:] = 1.0 if self.cumulative is None else np.diff(self.cumulative, prepend=0.0)
        return weight

    def exhausted(self, user: np.ndarray) -> np.ndarray:
        """Returns those of the given users, each once, who have interacted with every item that could be drawn."""
        chance = self._weights() > 0
        owner, item = self.used // self.n_items, self.used % self.n_items
        users = np.unique(user)
        counts = np.bincount(owner[chance[item]], minlength=int(users.max(initial=0)) + 1)
        return users[counts[users] >= chance.sum()]

    def _draw_one(self, user: int | None, positive: int | None) -> int:
        """Draws from the exact set of allowed items, for rows that have few of them."""
        weight = self._weights()
        if user is not None:
            start, end = np.searchsorted(self.used, [user * self.n_items, (user + 1) * self.n_items])
            weight[self.used[start:end] - user * self.n_items] = 0.0
        if positive is not None:
            weight[positive] = 0.0
        reached = np.cumsum(weight)
        if not reached[-1] > 0:
            whose = f"user id {user}" if user is not None else f"the target {positive}"
            raise DataError(
                f"negative sampling: no item can be drawn for {whose}: of the {self.n_items - 1} known items every one "
                f"that has a chance is excluded; {REMEDY}"
            )
        return int(np.searchsorted(reached, self.generator.random() * reached[-1], side="right"))
