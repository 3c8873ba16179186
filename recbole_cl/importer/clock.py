"""Clocks: seconds, milliseconds, microseconds, nanoseconds since 1970, or ISO dates, as seconds."""

from __future__ import annotations

from datetime import date, datetime

import numpy as np
import pandas as pd

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
LATEST = 1e11
"""Seconds of the year 5138: a clock that says more counts something finer."""


def seconds(column: pd.Series, unit: str | None = None) -> tuple[pd.Series, str]:
    """Returns times in seconds since 1970 (UTC), float64, and the unit that they were in.

    Without a unit, numbers are taken for seconds, milliseconds, microseconds or nanoseconds by the size of their
    median, text for ISO dates. Dates without a time zone are UTC.

    Args:
        column: Numbers, text or dates; the index is the line of each.
        unit: One of :data:`UNITS` or ``iso``; ``None`` to find out.

    Raises:
        ValueError: With the line and the value of the first time that cannot be read.
    """
    if pd.api.types.is_datetime64_any_dtype(column):
        return _dates(column), "iso"
    text = column.map(lambda value: value.isoformat() if isinstance(value, date | datetime | pd.Timestamp) else value)
    numbers = pd.to_numeric(text, errors="coerce").astype(np.float64)
    finite = np.isfinite(numbers.to_numpy())
    if unit is None:
        unit = "iso" if not finite.any() else _unit(float(np.median(np.abs(numbers[finite]))))
    if unit == "iso":
        return _dates(text), unit
    if not finite.all():
        raise ValueError(int(column.index[~finite][0]), column[~finite].iloc[0])
    return numbers / UNITS[unit], unit


def _unit(size: float) -> str:
    for unit, per_second in UNITS.items():
        if size / per_second < LATEST:
            return unit
    return "ns"


def _dates(column: pd.Series) -> pd.Series:
    moments = pd.to_datetime(column, errors="coerce", utc=True, format=None if column.dtype != object else "ISO8601")
    bad = moments.isna().to_numpy()
    if bad.any():
        raise ValueError(int(column.index[bad][0]), column[bad].iloc[0])
    whole = moments.dt.tz_convert("UTC").dt.tz_localize(None).astype("datetime64[us]").astype(np.int64)
    return (whole / 1e6).astype(np.float64)
