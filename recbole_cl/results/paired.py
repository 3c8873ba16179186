"""Two runs over the same targets, compared user by user: the mean difference of a metric and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_cl.errors import DataError


def read_rows(folder: Path) -> pd.DataFrame:
    """Returns the rows of a run that was made with ``own_metric_rows: True``: ``t``, ``s``, ``user`` and metrics.

    Raises:
        DataError: If it has none.
    """
    file = folder / "rows.csv"
    if not file.is_file():
        raise DataError(f"{str(folder)!r} has no rows.csv; run it with own_metric_rows: True")
    return pd.read_csv(file)


def paired(
    one: Sequence[pd.DataFrame], other: Sequence[pd.DataFrame], metric: str, stages: Sequence[int] | None = None
) -> dict[str, float]:
    """Returns how much more of a metric one method has than another, judged right after each stage's own training.

    Runs are paired by their place (seed by seed), targets by stage and user. A user is one observation: the mean of the
    differences over its targets, stages and seeds, since those are not independent of each other.

    Args:
        one: Rows of a method's runs, a frame a seed.
        other: Rows of the other method's runs, of the same seeds.
        metric: Name of the metric.
        stages: Stages that count, from 0; default all.

    Returns:
        ``mean``, the bounds ``low`` and ``high`` of its 95 % t interval over users, and the number of ``users``.

    Raises:
        DataError: If the runs have other targets.
    """
    from scipy.stats import t as student

    parts = []
    for mine, theirs in zip(one, other, strict=True):
        own = [_own(frame, metric, stages) for frame in (mine, theirs)]
        if not own[0].index.equals(own[1].index):
            raise DataError("the runs have other targets: their stages, users or candidates differ")
        parts.append(own[0] - own[1])
    by_user = pd.concat(parts).groupby("user").mean().to_numpy()
    n, mean = len(by_user), float(by_user.mean())
    half = float(student.ppf(0.975, n - 1) * by_user.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half, "users": n}


def _own(rows: pd.DataFrame, metric: str, stages: Sequence[int] | None) -> pd.Series:
    """Returns the diagonal's values by stage, user and the number of the user's target."""
    if metric not in rows:
        raise DataError(f"rows.csv has no metric {metric!r}; it has {', '.join(rows.columns[3:])}")
    kept = rows[(rows.t == rows.s) & (rows.s.isin(stages) if stages is not None else True)]
    number = kept.groupby(["s", "user"]).cumcount()
    return kept.assign(number=number).set_index(["s", "user", "number"])[metric].sort_index()
