"""Checks of timestamps before anything is cut by them, and of labels before anything is learnt from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from recbole_cl.config.models import configured_classes
from recbole_cl.config.recbole_properties import labels_are_idle, labels_are_learnt
from recbole_cl.errors import DataError

# A timestamp is far outside the bulk when it lies this many bulk spans (1st to 99th percentile) beyond it.
OUTLIER_SPANS = 2.0


def check_timestamps(
    frame: pd.DataFrame, field: str | None, line: np.ndarray | None = None
) -> tuple[np.ndarray, list[str]]:
    """Returns the timestamps of a log and warnings about them.

    Args:
        frame: The interactions.
        field: ``TIME_FIELD``.
        line: Line of the .inter file of each row, for messages; default: no row was filtered out.

    Returns:
        Seconds, float64, shape ``[N]``, and the warnings, each with a count and a remedy. Milliseconds and smaller
        units are recognised by their size: as seconds they would lie beyond the year 5138.

    Raises:
        DataError: If the field is missing, not a number, NaN, infinite, or the same everywhere.
    """
    if not field or field not in frame:
        raise DataError(
            f"TIME_FIELD: {field!r} is no column of the interactions ({', '.join(map(str, frame.columns))}); "
            f"set TIME_FIELD to the column of timestamps and add it to load_col: {{inter: [...]}}"
        )
    time = pd.to_numeric(frame[field], errors="coerce").to_numpy(dtype=np.float64)
    for name, bad in (("NaN or not a number", np.isnan(time)), ("infinite", np.isinf(time))):
        if bad.any():
            lines = np.arange(len(time)) + 2 if line is None else line
            first = ", ".join(map(str, lines[bad][:3]))
            raise DataError(
                f"TIME_FIELD: {int(bad.sum())} values of {field!r} are {name} (first at line {first} of the .inter "
                f"file); remove these rows or give them a time in seconds"
            )
    if len(time) > 1 and time.min() == time.max():
        raise DataError(
            f"TIME_FIELD: all {len(time)} values of {field!r} equal {time[0]:g}: there is no order to cut a stream "
            f"from; choose another TIME_FIELD (and set normalize_all: False)"
        )
    unit, name = clock(time)
    time = time / unit
    warnings = (
        []
        if unit == 1
        else [
            f"TIME_FIELD: the values of {field!r} are taken for {name} since 1970, from {date(time.min())} to "
            f"{date(time.max())}; divide them by {unit:,.0f} in the file if they are others"
        ]
    )
    return time, warnings + _warnings(time, field)


UNITS = ((1e11, 1e14, 1e3, "milliseconds"), (1e14, 1e17, 1e6, "microseconds"), (1e17, 1e19, 1e9, "nanoseconds"))
"""Clocks that count faster than seconds: smallest and largest value, ticks a second, name."""


def clock(time: np.ndarray) -> tuple[float, str]:
    """Returns the ticks of a clock in a second, and their name, by the median of the values."""
    typical = float(np.median(time)) if len(time) else 0.0
    return next(((ticks, name) for low, high, ticks, name in UNITS if low <= typical < high), (1.0, "seconds"))


def _warnings(time: np.ndarray, field: str) -> list[str]:
    found = []
    low, high = np.quantile(time, [0.01, 0.99])
    span = max(high - low, np.finfo(float).tiny)
    far = (time < low - OUTLIER_SPANS * span) | (time > high + OUTLIER_SPANS * span)
    if far.any():
        bulk = time[~far]
        found.append(
            f"TIME_FIELD: {int(far.sum())} of {len(time)} timestamps lie far outside the bulk "
            f"[{date(bulk.min())}, {date(bulk.max())}]: {date(time[far].min())} to {date(time[far].max())}; they are "
            f"kept where their order puts them; time_range: [{number(bulk.min())}, {number(bulk.max())}] leaves "
            f"them out"
        )
    negative = time < 0
    if negative.any():
        found.append(
            f"TIME_FIELD: {int(negative.sum())} of {len(time)} values of {field!r} are negative (before 1970); "
            f"time_range can leave them out"
        )
    ties = len(time) - len(np.unique(time))
    if ties > 0.9 * len(time):
        found.append(
            f"TIME_FIELD: {ties} of {len(time)} interactions share their timestamp with an earlier one (coarse "
            f"clock); equal times keep the file's order and stay in one stage"
        )
    return found


def number(seconds: float) -> str:
    """Returns the shortest text that reads back as the same number."""
    return str(int(seconds)) if seconds == int(seconds) else repr(float(seconds))


def date(seconds: float) -> str:
    """Returns an ISO date and time (UTC) of seconds since 1970, or the number where that is no date."""
    try:
        return pd.Timestamp(seconds, unit="s").strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, pd.errors.OutOfBoundsDatetime):
        return f"{seconds:g}"


LABELLED_METRICS = ("auc", "gauc", "logloss")
"""Metrics of labels that are 0 or 1."""


def check_labels(config: Any, labels: np.ndarray | None) -> None:
    """Checks that labels are what the model's loss and the metrics take them for.

    Args:
        config: The run's configuration.
        labels: Labels of the interactions, ``None`` where no column and no threshold gives any.

    Raises:
        DataError: If RecBole's cross-entropy would learn from labels outside [0, 1] or from none at all, or a metric of
            0 and 1 would judge others.
    """
    field, model = config["LABEL_FIELD"], config["model"]
    learnt = labels_are_learnt(config)
    remedy = "set threshold: {rating: 4}, with the column and the value from which a label is 1"
    if labels is None:
        if learnt:
            raise DataError(
                f"LABEL_FIELD: {field!r} is no column of the interactions, and {model} learns from labels; {remedy}, "
                f"or train_neg_sample_args: {{distribution: uniform, sample_num: 1}}"
            )
        return
    low, high = (labels.min(), labels.max()) if len(labels) else (0.0, 0.0)
    if learnt and not (low >= 0 and high <= 1):
        raise DataError(
            f"LABEL_FIELD: {field!r} holds {number(low)} to {number(high)}, but {model} learns by cross-entropy, for "
            f"which a label is 0 or 1; {remedy}"
        )
    asked = [name for name in config["metrics"] if name.lower() in LABELLED_METRICS]
    judged = "labeled" in config["eval_args"]["mode"].values() and not np.isin(labels, (0, 1)).all()
    if asked and judged:
        raise DataError(
            f"metrics: {', '.join(asked)} judge labels that are 0 or 1, but {field!r} holds {number(low)} to "
            f"{number(high)}; {remedy}, or metrics: [RMSE, MAE]"
        )


def idle_labels(config: Any, labels: np.ndarray | None) -> list[str]:
    """Returns a warning where rows of label 0 are taken for positives, as training does whose model reads no labels.

    Args:
        config: The run's configuration.
        labels: Labels of the interactions, ``None`` where no column and no threshold gives any.
    """
    zeros = 0 if labels is None else int((labels <= 0).sum())
    if labels is None or not zeros or not labels_are_idle(config, list(configured_classes(config))):
        return []
    field = config["LABEL_FIELD"]
    column, least = next(iter((config["threshold"] or {field: 1}).items()))
    return [
        f"LABEL_FIELD: {zeros} of {len(labels)} interactions have the label 0 ({field}), but {config['model']} takes "
        f"every interaction for a positive; set val_interval: {{{column}: '[{number(least)},inf)'}} to leave them out"
    ]
