"""What a scheduler is: the assignment of interactions to stages.

A scheduler is one file with a class that derives from :class:`Scheduler`, decorated with
``@schedulers.register()``, and a properties file ``properties/stream/<Name>.yaml``. Most schedulers only write
:meth:`Scheduler.assign`. One whose stages are not slices of the log (a sequence of tasks over the same users)
overrides :meth:`Scheduler.stages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from recbole_cl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from recbole_cl.stream.dataset import StreamDatasetMixin
    from recbole_cl.stream.stage import Stage
    from recbole_cl.stream.table import InteractionTable


LARGEST = 1e11
"""Seconds, in the year 5138, from which a number of a log with a faster clock counts its ticks."""


@dataclass
class Log:
    """The log as a scheduler sees it, before ids are given.

    Args:
        user: A code for each row's user, shape ``[N]``; codes carry no order.
        item: A code for each row's item, shape ``[N]``.
        time: Timestamps in seconds, float64, shape ``[N]``; all finite.
        frame: All columns of the interaction file; for stages that a column names.
        ticks: Of the log's own clock in a second: 1000 where the file has milliseconds.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    frame: pd.DataFrame
    ticks: float = 1.0

    def __len__(self) -> int:
        return len(self.user)

    @property
    def order(self) -> np.ndarray:
        """Rows in time order; equal times keep the file's order."""
        return np.argsort(self.time, kind="stable")


@dataclass
class Slices:
    """The answer of a scheduler.

    Args:
        stage: Stage of each row of the log, shape ``[N]``; -1 leaves a row out.
        names: Names of the stages, in order.
    """

    stage: np.ndarray
    names: list[str]


class Scheduler:
    """Cuts a log into stages.

    Args:
        config: The run's configuration.

    Attributes:
        time_ordered: Every interaction of a stage precedes every one of the next. Where it is not so,
            ``history: stage`` is this scheduler's default, so that no target sees a later interaction.
        remedy: What a person can do about an empty stage, for the message.
    """

    time_ordered = True
    remedy = "lower n_stages"

    def __init__(self, config: Any) -> None:
        self.config = config
        self.n_stages: int = config["n_stages"]

    @property
    def n_slices(self) -> int:
        """Number of slices to cut: one more than the stages where a stage is tested on the next slice."""
        return self.n_stages + (self.config["stage_split"] == "next_stage")

    def assign(self, log: Log) -> Slices:
        """Returns the stage of each row.

        Raises:
            DataError: If the log cannot be cut so; the message names the field, the value and the remedy.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement assign(log)")

    def late_items(self, item: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Returns which rows hold an item that the first stage shall not know, although it is in the stage's log.

        Args:
            item: Token of each row's item, rows in stream order, shape ``[N]``.
            known: Rows that training knows, shape ``[N]``.
        """
        return np.zeros(len(item), dtype=bool)

    def stages(self, table: InteractionTable, roles: np.ndarray, dataset: StreamDatasetMixin) -> list[Stage] | None:
        """Returns the stages over the sorted table, or ``None``: one a slice, with the roles that the split gave."""
        return None

    def require_rows(self, log: Log) -> None:
        """Raises a :class:`DataError` where there are fewer interactions than slices."""
        if len(log) < self.n_slices:
            raise DataError(
                f"n_stages: {self.n_slices} slices were asked of {len(log)} interactions; "
                f"lower n_stages to at most {max(len(log) // 10, 1)}"
            )


def by_count(order: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Returns a slice for each row such that slice k holds ``shares[k]`` of the rows, in the given order.

    Args:
        order: Row indices in stream order, shape ``[N]``.
        shares: Shares that sum to 1, shape ``[K]``. The cut of slice k lies at ``round(cumsum(shares)[k] * N)``.
    """
    n = len(order)
    cuts = np.rint(np.cumsum(shares)[:-1] * n).astype(np.int64)
    stage = np.empty(n, dtype=np.int64)
    stage[order] = np.searchsorted(cuts, np.arange(n), side="right")
    return stage


def keep_ties_together(stage: np.ndarray, time: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Moves rows that share a timestamp with the row before a cut into the earlier slice.

    A tie at a boundary goes to the earlier stage: no interaction of a stage has the time of one of an earlier
    stage, so "before" and "known" mean the same on both sides of the cut.
    """
    sorted_time, sorted_stage = time[order], stage[order].copy()
    first = np.ones(len(order), dtype=bool)
    first[1:] = sorted_time[1:] != sorted_time[:-1]
    group = np.cumsum(first) - 1
    sorted_stage = sorted_stage[np.flatnonzero(first)][group]
    moved = np.empty_like(stage)
    moved[order] = sorted_stage
    return moved


def parse_time(value: Any, field: str, ticks: float = 1.0) -> float:
    """Returns seconds since 1970 (UTC) of a number or an ISO date.

    Args:
        value: What was written.
        field: Property that it was written for.
        ticks: Of the log's clock in a second; a number too large for seconds is one of these ticks, too.

    Raises:
        ConfigError: If it is neither; the message names ``field``.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
        return float(value) / (ticks if abs(value) >= LARGEST else 1.0)
    try:
        stamp = pd.Timestamp(value) if isinstance(value, str) else pd.NaT
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{field}: {value!r} is neither a timestamp nor an ISO date such as 2011-06-01") from error
    if stamp is pd.NaT:
        raise ConfigError(f"{field}: {value!r} is neither a timestamp nor an ISO date such as 2011-06-01")
    stamp = stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp
    return float(stamp.timestamp())
