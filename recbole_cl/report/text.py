"""How numbers, times and names are told, the same in the terminal and on the page; and how a result is read."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_cl.results.matrix import smaller_is_better

#: Summaries: short name -> (what it is, how to read it).
SUMMARY_LABELS: dict[str, tuple[str, str]] = {
    "LA": ("Learning accuracy", "right after training on a stage"),
    "final_average": ("Final average", "the last model on all stages"),
    "AF": ("Average forgetting", "positive = forgotten"),
    "BWT": ("Backward transfer", "positive = later stages helped"),
    "FWT": ("Forward transfer", "positive = ahead of the reference"),
    "next_stage": ("Next stage", "each model on the stage that comes next"),
    "average_over_time": ("Average over time", "each model on the stages so far"),
    "stability": ("Stability", "the last model on the stages before"),
    "plasticity": ("Plasticity", "the same number as LA"),
    "h_mean": ("H-mean", "harmonic mean of stability and plasticity"),
}

#: Columns of the stages table: key -> heading.
STAGE_COLUMNS = {
    "start": "from",
    "end": "to",
    "n_train": "train",
    "n_valid": "valid",
    "n_test": "test",
    "n_users": "users",
    "n_new_users": "new users",
    "n_items": "items",
    "n_new_items": "new items",
    "n_cold_targets": "cold",
}


def finite(value: Any) -> float | None:
    """Returns a finite float, or None for null, NaN, infinity and anything that is no number."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def number(value: Any, none: str = "-") -> str:
    """Writes a score: four decimals, or four digits where it is very large or very small."""
    v = finite(value)
    if v is None:
        return none
    if v == 0:
        return "0.0000"
    return f"{v:.4f}" if 5e-4 <= abs(v) < 1000 else f"{v:.2e}" if abs(v) < 5e-4 else f"{v:.4g}"


def count(value: Any, none: str = "-") -> str:
    """Writes a whole number with separators of thousands."""
    v = finite(value)
    if v is None:
        return none
    return f"{v:,.0f}" if abs(v) < 1e15 else f"{v:.3g}"


def seconds(value: Any, none: str = "-") -> str:
    """Writes a duration in the unit that suits it."""
    v = finite(value)
    if v is None:
        return none
    if v < 60:
        return f"{v:.2f} s" if v < 10 else f"{v:.1f} s"
    if v < 5400:
        return f"{v / 60:.1f} min"
    return f"{v / 3600:,.1f} h"


def size(value: Any, none: str = "-") -> str:
    """Writes a number of bytes."""
    v = finite(value)
    if v is None:
        return none
    for unit in ("B", "KB", "MB", "GB"):
        if abs(v) < 1000:
            return f"{v:.0f} {unit}" if unit == "B" else f"{v:.1f} {unit}"
        v /= 1000
    return f"{v:,.1f} TB"


def moment(value: Any, none: str = "-") -> str:
    """Writes a boundary of a stage: seconds since 1970 as a date, small numbers (toy streams) and text as they are."""
    if isinstance(value, str):
        return clean(value)[:10] if _is_iso(value) else clean(value)
    v = finite(value)
    if v is None:
        return none
    if 1e8 <= abs(v) < 1e11:
        with contextlib.suppress(OverflowError):  # before the year 1
            moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=v)
            return moment.strftime("%Y-%m-%d")
    return f"{v:g}" if abs(v) < 1e6 else f"{v:.0f}" if abs(v) < 1e15 else f"{v:.3g}"


def _is_iso(value: str) -> bool:
    try:
        datetime.datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def clean(value: Any) -> str:
    """Returns text in one line without control characters: a name from a data file must not steer a terminal."""
    # Categories C* are control characters and the like, Zl and Zp break a line.
    return "".join(" " if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in str(value)).strip()


def width(text: str) -> int:
    """Returns the number of terminal columns of a text; East Asian wide characters take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, columns: int) -> str:
    """Shortens a text to so many terminal columns, the end marked by an ellipsis."""
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 1:
        text = text[:-1]
    return text + "…"


# --------------------------------------------------------------------------------------------------------------
# Reading a result


def lookup(mapping: Mapping[str, Any] | None, name: str) -> Any:
    """Returns the value of a metric, ignoring case (RecBole says ``NDCG@10`` in and ``ndcg@10`` out), or None."""
    if not mapping:
        return None
    if name in mapping:
        return mapping[name]
    return next((value for key, value in mapping.items() if str(key).lower() == name.lower()), None)


def metrics_of(result: Mapping[str, Any]) -> list[str]:
    """Returns the metrics of the matrix, the primary one first."""
    names = [str(name) for name in result.get("matrix") or {}]
    primary = str(result.get("primary_metric") or "").lower()
    return sorted(names, key=lambda name: name.lower() != primary)


def matrix_of(result: Mapping[str, Any], metric: str) -> list[list[float | None]]:
    """Returns the square matrix of a metric; missing cells are None."""
    rows = [list(row or ()) for row in lookup(result.get("matrix"), metric) or ()]
    stages = max([len(rows), *(len(row) for row in rows)], default=0)
    return [
        [finite(rows[t][s]) if t < len(rows) and s < len(rows[t]) else None for s in range(stages)]
        for t in range(stages)
    ]


def stage_count(result: Mapping[str, Any]) -> int:
    """Returns the number of stages that the result knows of."""
    matrices = [len(matrix_of(result, metric)) for metric in result.get("matrix") or {}]
    return max([len(result.get("stages") or ()), *matrices], default=0)


def stage_names(result: Mapping[str, Any], longest: int = 18) -> list[str]:
    """Returns one short name a stage: its number, and its own name where that says more."""
    stages = list(result.get("stages") or ())
    names = []
    for s in range(stage_count(result)):
        name = clean(stages[s].get("name") or "") if s < len(stages) else ""
        plain = re.sub("stage|slice", "", name.lower()).strip(" _-#")
        # Names that only count ("stage 0", "3") would stand beside our own count from 1 and contradict it.
        names.append(str(s + 1) if not plain or plain.isdigit() else cut(f"{s + 1} {name}", longest))
    return names


def stage_index(result: Mapping[str, Any], stage: Any) -> int | None:
    """Returns the position of a stage that a record names by position (from 0) or by name."""
    if isinstance(stage, int) and not isinstance(stage, bool):
        return stage if stage >= 0 else None
    names = [s.get("name") for s in result.get("stages") or ()]
    return names.index(stage) if stage in names else None


def is_smaller_better(result: Mapping[str, Any], metric: str) -> bool:
    """Tells the direction of a metric: what the result says of it, else what RecBole says."""
    declared = (
        lookup(result.get("smaller_is_better"), metric) if isinstance(result.get("smaller_is_better"), dict) else None
    )
    return smaller_is_better(metric) if declared is None else bool(declared)


def summary_names(result: Mapping[str, Any]) -> list[str]:
    """Returns the summaries of the result, the known ones in the order in which they are told."""
    there = list(result.get("summary") or {})
    return [name for name in SUMMARY_LABELS if name in there] + [name for name in there if name not in SUMMARY_LABELS]


def short(value: Any) -> str:
    """Writes the value of a setting: a strategy or the like by name, anything else as it is."""
    if isinstance(value, Mapping):
        return " + ".join(clean(key) for key in value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Mapping):
            return clean(value[0])  # a strategy and its own parameters, as result.json writes them
        return " + ".join(short(part) for part in value)
    return clean(value)


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what a run is about, as (what, value)."""
    config = result.get("config") or {}
    found = [(key, short(config[key])) for key in ("model", "dataset", "strategy", "scheduler") if config.get(key)]
    seed = result.get("seed", config.get("seed"))
    if seed is not None:
        found.append(("seed", clean(seed)))
    return found


def diagonal_and_last(rows: Any, stages: int) -> tuple[list[float | None], list[float | None]]:
    """Reads a stratum's rows: a matrix [T, T], one value a stage, or records with ``t``, ``s`` and ``value``.

    Args:
        rows: The rows.
        stages: T.

    Returns:
        The diagonal R[s,s] and the last row R[T,s], None where there is no value.
    """
    diagonal: list[float | None] = [None] * stages
    last: list[float | None] = [None] * stages
    rows = list(rows or ())
    for t, row in enumerate(rows):
        if isinstance(row, Mapping):
            trained, s, value = row.get("t", row.get("s")), row.get("s"), finite(row.get("value"))
            cells = [(trained, s, value)]
        elif isinstance(row, Sequence):
            cells = [(t, s, finite(value)) for s, value in enumerate(row)]
        else:
            cells = [(t, t, finite(row))]
        for trained, s, value in cells:
            if isinstance(s, int) and 0 <= s < stages:
                if trained == s:
                    diagonal[s] = value
                if trained == stages - 1 and not (isinstance(row, float | int) or row is None):
                    last[s] = value
    return diagonal, last


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean of what is there, or None."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None
