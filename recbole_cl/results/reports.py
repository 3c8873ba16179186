"""What models and strategies tell beside the matrix: brought into the shape that ``result.json`` and the page read.

A report has up to three parts::

    numbers   {name: value}                              one value a stage
    tables    {title: [{column: value, ...}, ...]}       a row a dict
    figures   {title: {line: [[x, y], ...], ...}}        lines over a common axis
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recbole_cl.errors import nearest

PARTS = ("numbers", "tables", "figures")


def plain(who: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a report as JSON holds it: numbers of numpy and torch as Python's, None for what is not finite.

    Args:
        who: Who tells, for the message.
        content: The report.

    Raises:
        TypeError: If a part has another name or another shape; the message names the place.
    """
    plain_parts = {}
    for part, inner in content.items():
        if part not in PARTS:
            raise TypeError(
                f"report of {who}: {part!r} is none of {', '.join(PARTS)}{nearest(str(part), PARTS)}; put it into one"
            )
        plain_parts[part] = {
            str(name): _SHAPES[part](f"report of {who}: {part}/{name}", value)
            for name, value in _mapping(f"report of {who}: {part}", inner).items()
        }
    return plain_parts


def _value(where: str, value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; give a number, a text or None")


def _number(where: str, value: Any) -> Any:
    value = _value(where, value)
    if isinstance(value, str):
        raise TypeError(f"{where} is the text {value!r}; give a number or None, or put it into a table")
    return value


def _table(where: str, rows: Any) -> list[dict[str, Any]]:
    return [
        {str(name): _value(f"{where}/{number}/{name}", v) for name, v in _mapping(f"{where}/{number}", row).items()}
        for number, row in enumerate(_listed(where, rows))
    ]


def _figure(where: str, lines: Any) -> dict[str, list[list[Any]]]:
    return {
        str(name): [
            _point(f"{where}/{name}/{number}", p) for number, p in enumerate(_listed(f"{where}/{name}", points))
        ]
        for name, points in _mapping(where, lines).items()
    }


def _point(where: str, point: Any) -> list[Any]:
    point = _listed(where, point)
    if len(point) != 2:
        raise TypeError(f"{where} has {len(point)} numbers; a point is [x, y]")
    return [_value(where, point[0]), _number(where, point[1])]


def _mapping(where: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} is a {type(value).__name__}; give a dict")
    return value


def _listed(where: str, value: Any) -> list[Any]:
    if isinstance(value, np.ndarray | torch.Tensor):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise TypeError(f"{where} is a {type(value).__name__}; give a list")
    return list(value)


_SHAPES = {"numbers": _number, "tables": _table, "figures": _figure}
