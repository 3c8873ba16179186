"""What models and strategies tell of themselves, as a section of a run's page: numbers, tables and lines.

The key ``reports`` of a result holds one entry a stage and teller (:mod:`recbole_cl.results.reports`). The section puts
the stages of one teller together: a table of its numbers, one table a title, one figure a title.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from recbole_cl.report import figures, text
from recbole_cl.report.colours import COLOURS, ramp
from recbole_cl.report.skeleton import table

Place = Callable[[str, figures.Figure], str]
"""Keeps a figure under a name and returns where it is drawn."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

TALL = 15
"""Rows of a table from which on it scrolls by itself."""


def section(result: Mapping[str, Any], place: Place) -> str:
    """Returns the section, or an empty text where nobody tells anything.

    Args:
        result: The run's result.
        place: Takes the figures.
    """
    found = [entry for entry in result.get("reports") or () if isinstance(entry, Mapping)]
    names = text.stage_names(result)
    tellers = list(dict.fromkeys(str(entry.get("who")) for entry in found))
    return "".join(
        _of_one(who, [entry for entry in found if str(entry.get("who")) == who], names, place, f"reports {number}")
        for number, who in enumerate(tellers)
    )


def _of_one(who: str, entries: list[Mapping[str, Any]], names: list[str], place: Place, key: str) -> str:
    """Returns what one teller tells, or an empty text."""
    stages = [(_stage(entry, names), entry) for entry in entries]
    inner = _titled(who, _numbers([(stage, _dict(entry.get("numbers"))) for stage, entry in stages]))
    for title in _keys(_dict(entry.get("tables")) for entry in entries):
        found = [(stage, _listed(_dict(entry.get("tables")).get(title))) for stage, entry in stages]
        inner += _titled(f"{who}: {title}", _rows([(stage, _dict(row)) for stage, rows in found for row in rows]))
    for number, title in enumerate(_keys(_dict(entry.get("figures")) for entry in entries)):
        figure, note = _lines([(stage, _dict(_dict(entry.get("figures")).get(title))) for stage, entry in stages])
        inner += _titled(f"{who}: {title}", note + place(f"{key}/{number}", figure)) if figure["data"] else ""
    return inner


def _stage(entry: Mapping[str, Any], names: list[str]) -> str:
    stage = entry.get("stage")
    return names[stage] if isinstance(stage, int) and 0 <= stage < len(names) else text.clean(stage)


def _titled(title: str, inner: str) -> str:
    return f"<h3>{escape(text.clean(title))}</h3>{inner}" if inner else ""


def _numbers(stages: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Returns the table of the numbers: a row a stage, or, where there are many, a row a number."""
    names = _keys(numbers for _, numbers in stages)
    if not names:
        return ""
    if len(names) > 8:
        rows = [[name, *(_cell(numbers.get(name)) for _, numbers in stages)] for name in names]
        return table(["", *(stage for stage, _ in stages)], rows)
    return table(
        ["stage", *names], [[stage, *(_cell(numbers.get(name)) for name in names)] for stage, numbers in stages]
    )


def _rows(rows: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Returns the table of one title over all stages."""
    columns = _keys(row for _, row in rows)
    if not columns:
        return ""
    words = [n for n, name in enumerate(columns, 1) if any(isinstance(row.get(name), str) for _, row in rows)]
    long = [n for n in words if any(len(str(row.get(columns[n - 1]) or "")) > 40 for _, row in rows)]
    cells = [[stage, *(_cell(row.get(name)) for name in columns)] for stage, row in rows]
    made = table(["stage", *columns], cells, left=(0, *words), long=tuple(long), wide=bool(long))
    return f'<div class="tall">{made}</div>' if len(rows) > TALL else made


def _lines(stages: list[tuple[str, Mapping[str, Any]]]) -> tuple[figures.Figure, str]:
    """Draws the lines of one title: a colour a stage and a dash a line, or, where there is one stage, a colour a line.

    Returns:
        The figure, and a note on its dashes.
    """
    drawn = [(stage, lines) for stage, lines in stages if lines]
    several, names = len(drawn) > 1, _keys(lines for _, lines in drawn)
    colours = ramp(len(drawn)) if several else list(COLOURS)
    traces: list[dict[str, Any]] = []
    for at, (stage, lines) in enumerate(drawn):
        for name, points in lines.items():
            pairs = [pair for pair in _listed(points) if isinstance(pair, list | tuple) and len(pair) == 2]
            if not pairs:
                continue
            number = names.index(name)
            label = figures.safe(f"stage {stage}" if several else name)
            full = f"{label}, {figures.safe(name)}" if several and len(names) > 1 else label
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(pairs) <= 60 else "lines",
                    "name": label,
                    "legendgroup": str(at if several else number),
                    "showlegend": not several or all(trace["legendgroup"] != str(at) for trace in traces),
                    "x": [figures.safe(x) if isinstance(x, str) else text.finite(x) for x, _ in pairs],
                    "y": [text.finite(y) for _, y in pairs],
                    "line": {
                        "color": colours[at] if several else colours[number % len(colours)],
                        "width": 2,
                        "dash": DASHES[number % len(DASHES)] if several else "solid",
                    },
                    "marker": {"size": 5},
                    "hovertemplate": f"{full} at %{{x}}: <b>%{{y:.4g}}</b><extra></extra>",
                }
            )
    look = figures.layout("", figures.safe(names[0]) if len(names) == 1 else "", height=320)
    look |= {"showlegend": len(traces) > 1, "margin": {"l": 64, "r": 12, "t": 58, "b": 40}}
    look["legend"] |= {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    legend = "; ".join(f"{DASHES[n % len(DASHES)]}: {text.clean(name)}" for n, name in enumerate(names))
    note = f'<p class="note">{escape(legend)}</p>' if several and len(names) > 1 else ""
    return {"data": traces, "layout": look}, note


def _cell(value: Any) -> str:
    """Writes a cell: whole numbers as such, others as scores, text as it is."""
    if isinstance(value, bool | str):
        return text.clean(value)
    return text.count(value) if isinstance(value, int) else text.number(value)


def _keys(dicts: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(key) for found in dicts for key in found))


def _dict(value: Any) -> Mapping[str, Any]:
    return {str(key): inner for key, inner in value.items()} if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
