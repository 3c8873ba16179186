"""The one interaction table that all stages share.

Rows are sorted by (stage, time); equal times keep the file's order. A row's index is its *position*: the identity
of an interaction for leak guards, replay and influence. Nothing is copied per stage: a user's sequence is a slice
of :attr:`InteractionTable.seq`, the history of a target is a half-open interval ``[lo, hi)`` of that array.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

NONE, TRAIN, VALID, TEST = -1, 0, 1, 2


@dataclass
class InteractionTable:
    """Positions, users, items, times and stages of a log, with every user's sequence.

    Args:
        user: User id of each position, shape ``[N]``, int64; 0 is padding and does not occur.
        item: Item id of each position, shape ``[N]``, int64.
        timestamp: Time of each position, shape ``[N]``, int64, in units of ``1 / time_scale`` seconds.
        stage: Stage (slice) of each position, shape ``[N]``, not decreasing.
        n_users: Number of user ids of the whole stream, padding included.
        n_items: Number of item ids of the whole stream, padding included.
        time_scale: 1 for whole seconds, 1000000 where the log has fractions.

    Attributes:
        seq: Positions grouped by user, in stream order, shape ``[N]``; longer where :meth:`sequences_of` added some.
        ptr: The sequence of user ``u`` is ``seq[ptr[u]:ptr[u + 1]]``.
        at: Index of each position in ``seq``: ``seq[at[p]] == p``.
        stage_lo: Index in ``seq`` of the first interaction of the same user and stage, by position.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    stage: np.ndarray
    n_users: int
    n_items: int
    time_scale: int = 1
    seq: np.ndarray = field(init=False, repr=False)
    ptr: np.ndarray = field(init=False, repr=False)
    at: np.ndarray = field(init=False, repr=False)
    stage_lo: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.stage) and (np.diff(self.stage) < 0).any():
            raise ValueError("stage: positions must be sorted by stage")
        n = len(self.user)
        self.seq = np.argsort(self.user, kind="stable")
        self.ptr = np.zeros(self.n_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(self.user, minlength=self.n_users), out=self.ptr[1:])
        self.at = np.empty(n, dtype=np.int64)
        self.at[self.seq] = np.arange(n)
        in_user, in_stage = self.user[self.seq], self.stage[self.seq]
        starts = np.ones(n, dtype=bool)
        starts[1:] = (in_user[1:] != in_user[:-1]) | (in_stage[1:] != in_stage[:-1])
        first = np.maximum.accumulate(np.where(starts, np.arange(n), 0))
        self.stage_lo = np.empty(n, dtype=np.int64)
        self.stage_lo[self.seq] = first

    def __len__(self) -> int:
        return len(self.user)

    def history(self, positions: np.ndarray, scope: str = "all") -> tuple[np.ndarray, np.ndarray]:
        """Returns the half-open intervals of ``seq`` that precede each position.

        Args:
            positions: Target positions, shape ``[n]``.
            scope: ``all`` (everything of the user before it) or ``stage`` (the part inside its stage).

        Returns:
            ``lo`` and ``hi``, shape ``[n]`` each; an empty history has ``lo == hi``.
        """
        hi = self.at[positions]
        lo = self.ptr[self.user[positions]] if scope == "all" else self.stage_lo[positions]
        return lo, hi

    def sequences_of(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Appends to ``seq`` every user's sequence of some interactions only: histories in which the others never were.

        Args:
            keep: Which positions the sequences hold, shape ``[N]``.

        Returns:
            Start of the user's new sequence and place in it, by position, shape ``[N]`` each: the history of a kept
            position is ``[lo, hi)`` of ``seq`` as ever. Positions that are not kept have -1.
        """
        own = self.seq[: len(self)]
        own = own[keep[own]]
        at, start = np.full(len(self), -1), np.full(len(self), -1)
        at[own] = len(self.seq) + np.arange(len(own))
        counts = np.bincount(self.user[own], minlength=self.n_users)
        start[own] = (len(self.seq) + np.cumsum(counts) - counts)[self.user[own]]
        self.seq = np.concatenate([self.seq, own])
        return start, at

    def fingerprint(self) -> str:
        """Returns a hash of the rows; a checkpoint is refused on another log."""
        digest = hashlib.sha256()
        for column in (self.user, self.item, self.timestamp, self.stage):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
        return digest.hexdigest()
