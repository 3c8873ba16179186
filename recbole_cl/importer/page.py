"""The data-health page: what a log is like and how it changes, as one HTML file in the style of a run's report."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_cl import checkpoint
from recbole_cl.importer.drift import DAY, drift, suggested_stages, worth_trying
from recbole_cl.importer.health import health, health_lines
from recbole_cl.importer.read import ITEM, TIME, USER
from recbole_cl.report.colours import COLOURS
from recbole_cl.report.figures import Figure, layout, lines
from recbole_cl.report.skeleton import document
from recbole_cl.stream.quality import date

GAPS = 5


def gaps(frame: pd.DataFrame, n: int = GAPS) -> list[tuple[float, float]]:
    """Returns the n longest stretches without a row as (begin, end) in seconds, the longest first."""
    times = np.unique(frame[TIME].to_numpy(dtype=float))
    width = np.diff(times)
    return [(float(times[i]), float(times[i + 1])) for i in np.argsort(-width, kind="stable")[:n]]


def rows_over_time(frame: pd.DataFrame, bins: int = 60) -> Figure:
    """Returns the number of rows by time."""
    count, edges = np.histogram(frame[TIME].to_numpy(dtype=float), bins=bins)
    middle = [date(float(t)) for t in (edges[:-1] + edges[1:]) / 2]
    look = layout("", "rows", height=300)
    return {
        "data": [{"type": "bar", "x": middle, "y": count.tolist(), "marker": {"color": COLOURS[0]}}],
        "layout": look,
    }


def long_tail(frame: pd.DataFrame) -> Figure:
    """Returns rows an item and rows a user, ranked, both axes logarithmic."""
    figure: Figure = {"data": [], "layout": layout("rank", "rows", height=320, showlegend=True)}
    for number, (name, column) in enumerate((("items", ITEM), ("users", USER))):
        count = frame[column].value_counts().to_numpy()
        kept = np.unique(np.geomspace(1, len(count), 200).astype(int)) - 1
        figure["data"].append(
            {"type": "scatter", "mode": "lines", "name": name, "x": (kept + 1).tolist(), "y": count[kept].tolist()}
            | {"line": {"color": COLOURS[number], "width": 2}}
        )
    for name in ("xaxis", "yaxis"):
        figure["layout"][name] |= {"type": "log", "dtick": 1}
    return figure


def health_page(name: str, frame: pd.DataFrame, n: int | None = None, vectors: Any = None) -> str:
    """Returns the page.

    Args:
        name: Name of the log.
        frame: As :func:`recbole_cl.importer.read.read_log` gives it.
        n: Slices that are compared; default the suggested number of stages.
        vectors: As in :func:`recbole_cl.importer.drift.drift`.
    """
    numbers, (advised, why) = health(frame), suggested_stages(frame)
    n = advised if n is None else n
    found = drift(frame, n, vectors)
    names = [str(i) for i in range(1, n + 1)]
    new = {"new users": "new_users", "new items": "new_items", "rows of new items": "rows_of_new_items",
           "users of the slice before": "returning_users", "repeated": "repeat"}  # fmt: skip
    moved = {"popularity shift": "popularity_shift", "by chance alone": "shift_by_chance"}
    if vectors is not None:
        moved["embedding shift"] = "embedding_shift"
    figures = {
        "time": rows_over_time(frame),
        "tail": long_tail(frame),
        "new": lines(names, {title: [e[key] for e in found] for title, key in new.items()}, "share"),
        "moved": lines(names, {title: [e[key] for e in found] for title, key in moved.items()}, "distance"),
    }
    cards = "".join(f"<li><span>{escape(line[:14].strip())}</span><b>{escape(line[14:])}</b></li>"
                    for line in health_lines(numbers))  # fmt: skip
    holes = "".join(
        f"<li>{(end - begin) / DAY:,.2f} days without a row: {date(begin)} to {date(end)}</li>"
        for begin, end in gaps(frame)
    )
    head = "".join(f"<th>{escape(title)}</th>" for title in ("slice", "from", "to", "rows", "users", "items", *new))
    body = "".join(
        f"<tr><td>{number}</td><td>{date(e['start'])}</td><td>{date(e['end'])}</td><td>{e['rows']:,}</td>"
        f"<td>{e['users']:,}</td><td>{e['items']:,}</td>"
        + "".join(f"<td>{'-' if e[key] is None else f'{e[key]:.1%}'}</td>" for key in new.values())
        + "</tr>"
        for number, e in enumerate(found, 1)
    )
    tries = "".join(f"<li><b>{escape(what)}</b>: {escape(reason)}</li>" for what, reason in worth_trying(found))
    sections = [
        ("Figures", f'<ul class="chips">{cards}</ul>'),
        ("Rows over time", _figure("time", figures) + (f"<p>The longest gaps:</p><ul>{holes}</ul>" if holes else "")),
        ("Long tail", _figure("tail", figures)),
        ("What is new in each slice", _figure("new", figures)
         + f'<div class="scroll"><table class="wide"><thead><tr>{head}</tr></thead>'
           f"<tbody>{body}</tbody></table></div>"),
        ("What moves", "<p class='note'>Total variation distance between the item popularities of a slice and of the "
         "one before, and what random halves of both would give.</p>" + _figure("moved", figures)),
        ("Stages", f"<p>Suggested: <code>--n_stages={advised}</code> ({escape(why)}).</p>"),
        ("Worth trying", "<p class='note'>Rules of thumb over the figures above; no run stands behind them.</p>"
         f"<ul>{tries}</ul>"),
    ]  # fmt: skip
    inside = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections)
    title = escape(f"{name}: the log")
    return document(title, f"<main><header><h1>{title}</h1></header>{inside}</main>", figures)


def _figure(name: str, figures: dict[str, Figure]) -> str:
    height = figures[name]["layout"]["height"]
    return f'<div class="figure" data-figure="{name}" style="height:{height:.0f}px"></div>'


def write_health_page(path: Path, name: str, frame: pd.DataFrame, n: int | None = None, vectors: Any = None) -> Path:
    """Writes the page and returns its path."""
    checkpoint.write_atomically(path, health_page(name, frame, n, vectors))
    return path
