"""Stages that a column of the log names, in their own order."""

from __future__ import annotations

import numpy as np
import pandas as pd

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.registry import schedulers
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices


def column(log: Log, field: str | None, scheduler: str) -> pd.Series:
    """Returns the interaction column that ``period_field`` names.

    Raises:
        ConfigError: If it is not set or not loaded.
        DataError: If it has missing values.
    """
    if not field:
        raise ConfigError(f"period_field: the scheduler {scheduler} needs the column that names the stage")
    if field not in log.frame:
        raise ConfigError(
            f"period_field: {field!r} is no column of the interactions ({', '.join(map(str, log.frame.columns))}); "
            f"add it to load_col: {{inter: [...]}}"
        )
    values = log.frame[field]
    missing = int(values.isna().sum())
    if missing:
        raise DataError(f"period_field: {missing} interactions have no {field!r}; fill or remove them")
    return values


@schedulers.register()
class Periods(Scheduler):
    """One stage a value of ``period_field``, in increasing order (the weeks of DIGINETICA).

    ::

        period   0        1        2       ...      16
        |  stage 0  | stage 1  | stage 2  | ... | (tested only)      stage_split: next_stage

    Numbers are ordered as numbers, words as words. ``n_stages`` keeps the first so many (all where the log has fewer);
    set ``n_stages: ~`` for all.
    """

    time_ordered = True

    def assign(self, log: Log) -> Slices:
        values = column(log, self.config["period_field"], "Periods")
        numeric = pd.to_numeric(values, errors="coerce")
        keys = numeric if not numeric.isna().any() else values.astype(str)
        names, stage = np.unique(keys.to_numpy(), return_inverse=True)
        wanted = len(names) if self.n_stages is None else self.n_slices
        stage = np.where(stage < wanted, stage, -1)
        return Slices(stage, [f"period {name:g}" if numeric is keys else str(name) for name in names[:wanted]])
