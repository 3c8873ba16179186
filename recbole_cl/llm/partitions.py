"""A user's behaviours in partitions that close once and never change.

Behaviours come in the order of the stream. They gather until there are enough of them (``size``) or the first is old
enough (``seconds``); then the partition closes, but only where a behaviour at *another* time follows: at equal times
nobody can say what came first, so a partition never ends inside a run of equal times::

    times       1  2  2  2  3  5  5  6        size 3
    partitions [1  2  2  2][3  5  5] 6        the first closes when 3 comes, the second when 6 comes; 6 waits

A sample sees a partition only if it ends strictly earlier than the sample's own time, and before it in the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recbole_cl.errors import ConfigError


@dataclass(frozen=True)
class Rules:
    """When a partition closes.

    Args:
        size: Behaviours from which on it closes; ``None`` for no such rule.
        seconds: It closes before a behaviour that comes later than so long after its first one, in the unit of the
            times; ``None`` for no such rule.

    Raises:
        ConfigError: If there is no rule, or one that closes nothing.
    """

    size: int | None = 20
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.size is None and self.seconds is None:
            raise ConfigError("liber_partition_size and liber_partition_days are both unset: give one of them")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"property 'liber_partition_size' is {self.size!r}; it must be at least 1")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError("property 'liber_partition_days' must be more than 0")


def cut(times: np.ndarray, rules: Rules, now: float | None = None) -> np.ndarray:
    """Returns where the closed partitions of one user end, exclusive: the first begins at 0, each at the end before.

    Args:
        times: Times of the user's behaviours, in the order of the stream, shape ``[n]``.
        rules: When a partition closes.
        now: A time at which nothing has come, not before the last behaviour's: what is complete by then closes.

    Returns:
        Ends, increasing, shape ``[m]``; what comes after the last one still waits.
    """
    if now is not None:
        times = np.r_[times, now]  # as if something came then: it closes what is complete, and waits itself
    breaks = np.flatnonzero(times[1:] != times[:-1]) + 1
    found: list[int] = []
    begin = 0
    while True:
        ends = []
        if rules.size is not None:
            at = int(np.searchsorted(breaks, begin + rules.size))
            ends += [int(breaks[at])] if at < len(breaks) else []
        if rules.seconds is not None:
            late = np.flatnonzero(times[begin:] > times[begin : begin + 1] + rules.seconds)
            ends += [begin + int(late[0])] if len(late) else []
        if not ends:
            return np.array(found, dtype=np.int64)
        begin = min(ends)
        found.append(begin)


class Partitioner:
    """The short-term memory of one user, fed as behaviours come; the partitions are those of the whole log.

    Args:
        rules: When a partition closes.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._waiting = np.empty(0)
        self._begin = 0

    def feed(self, times: Sequence[float] | np.ndarray, now: float | None = None) -> list[tuple[int, int]]:
        """Takes the next behaviours; returns the partitions that close: half-open ranges of all that was ever fed.

        Args:
            times: Their times.
            now: See :func:`cut`.
        """
        self._waiting = np.concatenate([self._waiting, np.asarray(times, dtype=np.float64)])
        ends = cut(self._waiting, self.rules, now)
        starts = np.r_[0, ends[:-1]] if len(ends) else ends
        found = [(self._begin + int(a), self._begin + int(b)) for a, b in zip(starts, ends, strict=True)]
        if len(ends):
            self._waiting = self._waiting[ends[-1] :]
            self._begin += int(ends[-1])
        return found


@dataclass(frozen=True)
class Partitions:
    """The closed partitions of all users, by user and then by time; columns of equal length ``m``.

    Attributes:
        user: User ids.
        number: Place among the partitions of the user, from 0.
        begin: Start in the users' sequences (``seq``).
        end: End there, exclusive.
        last: Position (in the stream) of the last behaviour.
        first: Position of the first one.
        until: Latest time of the user's behaviours so far; a sample sees the partition if its own time is later.
        closer: Position of the behaviour that closed it.
    """

    user: np.ndarray
    number: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray
    until: np.ndarray
    closer: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, index: np.ndarray) -> Partitions:
        return Partitions(**{name: column[index] for name, column in vars(self).items()})

    @classmethod
    def of(cls, seq: np.ndarray, ptr: np.ndarray, timestamp: np.ndarray, rules: Rules) -> Partitions:
        """Cuts the sequences of all users.

        Args:
            seq: Positions grouped by user, in the order of the stream, shape ``[N]``.
            ptr: The sequence of user ``u`` is ``seq[ptr[u]:ptr[u + 1]]``.
            timestamp: Time of each position, shape ``[N]``.
            rules: When a partition closes.
        """
        columns: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype=np.int64)] for name in cls.__annotations__}
        for user in range(len(ptr) - 1):
            own = seq[ptr[user] : ptr[user + 1]]
            times = timestamp[own]
            ends = cut(times, rules)
            if not len(ends):
                continue
            starts = np.r_[0, ends[:-1]]
            columns["user"].append(np.full(len(ends), user))
            columns["number"].append(np.arange(len(ends)))
            columns["begin"].append(ptr[user] + starts)
            columns["end"].append(ptr[user] + ends)
            columns["first"].append(own[starts])
            columns["last"].append(own[ends - 1])
            columns["until"].append(np.maximum.accumulate(times)[ends - 1])
            columns["closer"].append(own[ends])
        return cls(**{name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()})


def visible(partitions: Partitions, user: np.ndarray, position: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Returns how many of a user's partitions each sample sees, the oldest ones: the guard against leaks.

    Args:
        partitions: Sorted by user and time.
        user: User of each sample, shape ``[n]``.
        position: Its position in the stream, shape ``[n]``.
        time: Its time, in the unit of the log's, shape ``[n]``.

    Returns:
        Counts, shape ``[n]``: all of these partitions lie before the position and end strictly before the time.
    """
    start = np.searchsorted(partitions.user, user, side="left")
    stop = np.searchsorted(partitions.user, user, side="right")
    counts = np.minimum(
        _before(partitions.user, partitions.last, user, position),
        _before(partitions.user, partitions.until, user, time),
    )
    return np.clip(counts - start, 0, stop - start)


def _before(user: np.ndarray, value: np.ndarray, of: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Returns how many pairs (user, value), sorted, come before (of, limit), shape ``[n]``."""
    values, rank = np.unique(np.concatenate([value, limit]), return_inverse=True)
    width = len(values) + 1
    return np.searchsorted(user * width + rank[: len(value)], of * width + rank[len(value) :], side="left")
