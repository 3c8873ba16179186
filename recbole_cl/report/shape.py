"""What a ``result.json`` must look like before a page is made of it: a field that is something else is named.

A key that is missing leaves its part of the page out, but for what every run writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recbole_cl.errors import DataError

Check = Callable[[Any, str], None]
REQUIRED = ("stages", "matrix")
"""Keys that every run writes and a page is nothing without."""


def _bad(where: str, value: Any, allowed: str) -> DataError:
    shown = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    if len(shown) > 60:
        shown = f"{shown[:57]}..."
    return DataError(f"{where} is {shown}; it must be {allowed}")


def _number(value: Any, where: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise _bad(where, value, "a number or null")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str | None):
        raise _bad(where, value, "a text or null")


def _scalar(value: Any, where: str) -> None:
    if not isinstance(value, str | int | float | bool | None):
        raise _bad(where, value, "a number, a text or null")


def _anything(value: Any, where: str) -> None:
    """Accepts what the page takes in any shape."""


def _stage(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _bad(where, value, "a stage: its place from 0, or its name")


def _row(value: Any, where: str) -> None:
    """Checks a row of a stratum: the cells of a row, one value, or a record."""
    if isinstance(value, list):
        _list(_number)(value, where)
    elif isinstance(value, Mapping):
        _object({"t": _number, "s": _number, "value": _number})(value, where)
    else:
        _number(value, where)


def _list(inner: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list | None):
            raise _bad(where, value, "a list")
        for number, entry in enumerate(value or ()):
            inner(entry, f"{where}[{number}]")

    return check


def _map(inner: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping | None):
            raise _bad(where, value, "an object")
        for key, entry in (value or {}).items():
            inner(entry, f"{where}.{key}")

    return check


def _object(inner: Mapping[str, Check], required: tuple[str, ...] = (), rest: Check = _anything) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _bad(where, value, "an object")
        for key in required:
            if key not in value:
                raise DataError(f"{where} lacks {key!r}")
        for key, entry in value.items():
            inner.get(key, rest)(entry, f"{where}.{key}")

    return check


def _square(value: Any, where: str) -> None:
    """Checks a matrix: a row and a column a stage."""
    if not isinstance(value, list):
        raise _bad(where, value, "a list of rows")
    for number, row in enumerate(value):
        if not isinstance(row, list):
            raise _bad(f"{where}[{number}]", row, "a list, a row of the matrix")
        if len(row) != len(value):
            raise DataError(
                f"{where}[{number}] has {len(row)} columns, the matrix has {len(value)} rows; it must have a row and a "
                f"column a stage"
            )
        _list(_number)(row, f"{where}[{number}]")


_NAMED = _map(_map(_number))
_POINT = {
    "stage": _stage, "pass": _scalar, "epoch": _number, "targets": _number, "seconds": _number,
    "train_loss": _number, "terms": _map(_number), "valid": _map(_number), "best": _scalar,
}  # fmt: skip
_REPORT = {
    "stage": _stage, "who": _scalar, "numbers": _map(_scalar), "tables": _map(_list(_map(_scalar))),
    "figures": _map(_map(_list(_anything))),
}  # fmt: skip
SHAPE: dict[str, Check] = {
    "name": _text, "output_dir": _text, "primary_metric": _text, "seed": _scalar, "fwt_reference": _text,
    "config": _map(_anything), "versions": _map(_scalar), "given": _list(_text),
    "stages": _list(_object({"name": _scalar, "start": _scalar, "end": _scalar}, rest=_anything)),
    "matrix": _map(_square), "summary": _NAMED, "reasons": _map(_map(_text)), "formulas": _map(_text),
    "smaller_is_better": _map(_scalar), "reference": _map(_list(_number)), "scratch": _map(_list(_number)),
    "curves": _list(_object(_POINT, ("stage",))), "steps_to_95": _list(_number),
    "strata": _map(_map(_list(_row))), "levels": _map(_map(_list(_list(_number)))),
    "disparity": _list(_map(_scalar)), "cost": _list(_map(_scalar)), "cold": _list(_map(_scalar)),
    "reports": _list(_object(_REPORT)), "warnings": _list(_text),
}  # fmt: skip
"""What stands under each key. Others are not looked at: a later version may write more."""


def check_result(result: Any) -> None:
    """Raises a :class:`DataError` that names the field of a result which is not what a run writes."""
    if not isinstance(result, Mapping):
        raise DataError(f"it holds a {type(result).__name__}, not the result of a run")
    for key in REQUIRED:
        if result.get(key) is None:
            raise DataError(f"it lacks {key!r}, which every run writes")
    for key, check in SHAPE.items():
        if key in result:
            check(result[key], key)
    sizes = {f"matrix.{metric}": len(rows) for metric, rows in result["matrix"].items()}
    stages = len(result["stages"])
    for name, size in sizes.items():
        if size != stages:
            raise DataError(f"{name} has {size} rows, but there are {stages} stages")
    for key in ("steps_to_95", "disparity", "cost"):
        if len(result.get(key) or ()) > stages:
            raise DataError(f"{key} has {len(result[key])} entries, but there are {stages} stages")
