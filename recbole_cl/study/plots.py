"""Plots of a study, for what its report asks for with ``plots``; figures are Plotly specifications, as in reports.

- ``curves`` the validation metric by epoch, a panel for each stage
- ``orders`` a task's figure in each order of the tasks, a panel for each task
- ``probe`` what the study's probe found by epoch, and where it ended

They stand in ``plots.html`` beside the tables, and as PNG where Plotly can draw them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_cl.disk import write_atomically
from recbole_cl.report.colours import COLOURS
from recbole_cl.report.figures import Figure, axis, layout, safe
from recbole_cl.report.gallery import gallery
from recbole_cl.report.skeleton import share_script
from recbole_cl.report.text import is_smaller_better
from recbole_cl.study.plan import Cell, Plan
from recbole_cl.study.walk import PROBE, RESULT, state

PANEL, WIDTH, DASHES = 330, 1160, ("solid", "dash", "dot", "dashdot")
BANDS = 4
"""With more lines than this in a panel no ranges over the runs are shaded."""

Group = list[tuple[Cell, dict[str, Any]]]
Series = dict[str, list[np.ndarray]]


def grid(titles: Sequence[str], x: str, y: Sequence[str], columns: int = 3) -> Figure:
    """Returns an empty figure of panels, side by side and below each other, that share one legend.

    Args:
        titles: Title of each panel; panel i has the axes of :func:`axes`.
        x: Title of the x axes.
        y: Title of each panel's y axis.
        columns: Panels in a row at most.
    """
    columns = max(1, min(columns, len(titles)))
    rows = -(-len(titles) // columns)
    look = layout("", "", height=PANEL * rows + 110, showlegend=True)
    del look["xaxis"], look["yaxis"]
    gap, between = 0.08 if columns > 1 else 0.0, 84 / (PANEL * rows)
    wide, high = (1 - gap * (columns - 1)) / columns, (1 - between * (rows - 1)) / rows
    look["annotations"] = []
    for i, title in enumerate(titles):
        left, top = (i % columns) * (wide + gap), 1 - (i // columns) * (high + between)
        names = axes(i)
        look[names["xaxis"].replace("x", "xaxis", 1)] = axis(x, domain=[left, left + wide], anchor=names["yaxis"])
        look[names["yaxis"].replace("y", "yaxis", 1)] = axis(
            safe(y[i]), domain=[max(top - high, 0), min(top, 1)], anchor=names["xaxis"]
        )
        place = {
            "x": left + wide / 2,
            "y": top,
            "xref": "paper",
            "yref": "paper",
            "xanchor": "center",
            "yanchor": "bottom",
        }
        look["annotations"].append({"text": f"<b>{safe(title)}</b>", "showarrow": False, **place})
    look["legend"] |= {"orientation": "h", "y": -90 / (PANEL * rows), "yanchor": "top", "x": 0}
    look["margin"] = {"l": 64, "r": 20, "t": 40, "b": 70}
    return {"data": [], "layout": look}


def axes(panel: int) -> dict[str, str]:
    """Returns the names of a panel's axes, as traces write them."""
    number = "" if panel == 0 else str(panel + 1)
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def add_lines(figure: Figure, panel: int, series: Series, digits: int = 4, order: Sequence[str] = ()) -> None:
    """Adds to a panel the mean over runs of each series, by epoch, with the range of the runs where that is legible.

    Args:
        figure: The figure.
        panel: Number of the panel.
        series: Name to one array a run, all of one length.
        digits: Digits of what is told when one points at it.
        order: Names that have their colours in this order, whether they are here or not.
    """
    known = [trace["name"] for trace in figure["data"] if "legendgroup" in trace]
    names = list(dict.fromkeys([*map(safe, order), *known, *map(safe, series)]))
    for name, runs in series.items():
        values = np.array(runs, dtype=float)
        number = names.index(safe(name))
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        epochs = list(range(1, values.shape[1] + 1))
        if len(values) > 1 and len(series) <= BANDS:
            low, high = values.min(axis=0).tolist(), values.max(axis=0).tolist()
            band = {"x": epochs + epochs[::-1], "y": high + low[::-1], "fill": "toself", "fillcolor": colour}
            look = {"mode": "none", "opacity": 0.15, "hoverinfo": "skip", "showlegend": False, "name": ""}
            figure["data"].append({"type": "scatter", **band, **look, **axes(panel)})
        figure["data"].append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": safe(name),
                "legendgroup": safe(name),
                "showlegend": safe(name) not in known,
                "x": epochs,
                "y": values.mean(axis=0).tolist(),
                "line": {"color": colour, "width": 2, "dash": dash},
                "marker": {"size": 4, "color": colour},
                "hovertemplate": f"{safe(name)}, epoch %{{x}}: <b>%{{y:.{digits}f}}</b><extra></extra>",
                **axes(panel),
            }
        )


def curves(group: Group, strategies: Sequence[str] = ()) -> Figure | None:
    """Draws the validation metric by epoch, a panel for each stage, a line for each strategy.

    A line is the mean over the runs, that is over seeds and, where the study has them, orders. A run that stopped early
    keeps the value of its best epoch, with which it goes on. Epochs of a stage's passes are counted together.

    Args:
        group: Finished cells of one log, scheduler and model, and their results.
        strategies: All strategies of the study: each has one colour in all its figures.
    """
    stages: dict[str, str] = {}
    less: dict[str, bool] = {}
    found: dict[str, Series] = {}
    for cell, result in group:
        for index, stage in enumerate(result["stages"]):
            metric = str(stage["primary_metric"]).lower()
            values = []
            for point in result["curves"]:
                valid = (
                    {name.lower(): v for name, v in (point["valid"] or {}).items()} if point["stage"] == index else {}
                )
                values += [float(valid[metric])] if valid.get(metric) is not None else []
            if values:
                stages.setdefault(stage["name"], metric)
                less.setdefault(metric, is_smaller_better(result, metric))
                found.setdefault(stage["name"], {}).setdefault(cell.labels["strategy"], []).append(np.array(values))
    if not found:
        return None
    figure = grid(list(stages), "epoch", [f"validation {metric}" for metric in stages.values()])
    for panel, (name, metric) in enumerate(stages.items()):
        held = {who: _held(runs, less[metric]) for who, runs in found[name].items()}
        add_lines(figure, panel, held, order=strategies)
    return figure


def _held(runs: Sequence[np.ndarray], less: bool) -> list[np.ndarray]:
    best = np.min if less else np.max
    length = max(map(len, runs))
    return [np.r_[run, np.full(length - len(run), best(run))] for run in runs]


def orders(group: Group, strategies: Sequence[str] = ()) -> Figure | None:
    """Draws each task's figure after the last task in every order of the tasks, a panel for each task.

    The colour tells at which place the task came. With several seeds a point is their mean and the bar their range.

    Args:
        group: As in :func:`curves`; its cells have a label ``order``. One strategy is drawn, the first.
        strategies: Not needed here: colours tell places.
    """
    strategy = group[0][0].labels["strategy"]
    found: dict[str, dict[str, list[float]]] = {}
    places: dict[tuple[str, str], int] = {}
    metrics: dict[str, str] = {}
    for cell, result in group:
        if cell.labels["strategy"] != strategy:
            continue
        last = result["matrix"][result["primary_metric"]][-1]
        for place, (stage, value) in enumerate(zip(result["stages"], last, strict=True), 1):
            if value is not None:
                found.setdefault(stage["name"], {}).setdefault(cell.labels["order"], []).append(float(value))
                places[stage["name"], cell.labels["order"]] = place
                metrics[stage["name"]] = stage["primary_metric"]
    names = [name for name in found if len({places[name, order] for order in found[name]}) > 1]
    if not names:
        return None
    figure = grid(names, "", [metrics[name] for name in names], columns=2)
    shown: set[int] = set()
    for panel, name in enumerate(names):
        ticks = sorted(found[name])
        for place in sorted({places[name, order] for order in ticks}):
            own = [order for order in ticks if places[name, order] == place]
            values = [np.array(found[name][order]) for order in own]
            means = [float(v.mean()) for v in values]
            bar = {
                "array": [float(v.max() - v.mean()) for v in values],
                "arrayminus": [float(v.mean() - v.min()) for v in values],
            }
            colour = COLOURS[(place - 1) % len(COLOURS)]
            figure["data"].append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": f"as task {place}",
                    "legendgroup": str(place),
                    "showlegend": place not in shown,
                    "x": own,
                    "y": means,
                    "error_y": {"type": "data", "symmetric": False, "thickness": 1, "width": 0, **bar},
                    "marker": {"size": 8, "color": colour},
                    "hovertemplate": f"{safe(name)}, order %{{x}}: <b>%{{y:.4f}}</b><extra></extra>",
                    **axes(panel),
                }
            )
            shown.add(place)
        look = figure["layout"]["xaxis" + axes(panel)["xaxis"][1:]]
        look |= {"type": "category", "categoryorder": "array", "categoryarray": ticks, "tickangle": -90}
        look["tickfont"] = {**look["tickfont"], "size": 10}
    return figure


def probe(group: Group, strategies: Sequence[str] = ()) -> Figure | None:
    """Draws the curves of a probe's variants and what each came to, mean and range over the runs.

    Args:
        group: As in :func:`curves`.
        strategies: Not needed here: colours tell variants.
    """
    found: Series = {}
    ends: dict[str, list[float]] = {}
    metric = task = ""
    several = len({cell.labels["strategy"] for cell, _ in group}) > 1
    for cell, result in group:
        own = result["probe"]
        metric, task = own["metric"], own["task"]
        for name, values in own["variants"].items():
            curve_name = f"{cell.labels['strategy']}: {name}" if several else name
            found.setdefault(curve_name, []).append(np.array(values["curve"], dtype=float))
            ends.setdefault(curve_name, []).append(float(values[metric]))
    titles = [f"{task}, by epoch", f"{task}, chosen epoch"]
    figure = grid(titles, "epoch", [f"validation {metric}", f"test {metric}"], columns=2)
    add_lines(figure, 0, found)
    for number, (name, values) in enumerate(ends.items()):
        mean = float(np.mean(values))
        bar = {"array": [max(values) - mean], "arrayminus": [mean - min(values)], "type": "data", "symmetric": False}
        figure["data"].append(
            {"type": "bar", "name": safe(name), "legendgroup": safe(name), "showlegend": False, "x": [safe(name)]}
            | {"y": [mean], "error_y": bar, "marker": {"color": COLOURS[number % len(COLOURS)]}, **axes(1)}
        )
    figure["layout"]["xaxis2"] |= {"type": "category", "title": {"text": ""}}
    return figure


KINDS: dict[str, tuple[str, Callable[[Group, Sequence[str]], Figure | None]]] = {
    "curves": ("Learning curves", curves),
    "orders": ("Orders of the tasks", orders),
    "probe": ("Fixed vectors", probe),
}


def figures_of(plan: Plan, folder: Path) -> dict[str, tuple[str, Figure]]:
    """Returns what the report asks for, by the name of its file: heading and figure; open cells are left out."""
    found: dict[str, tuple[str, Figure]] = {}
    kinds = plan.report.get("plots") or ()
    strategies = list(dict.fromkeys(cell.labels["strategy"] for cell in plan.cells))
    groups = list(_groups(plan, folder)) if kinds else []
    for kind in kinds:
        heading, draw = KINDS[kind]
        for labels, group in groups:
            figure = draw(group, strategies)
            if figure is not None:
                parts = [kind, *(labels if len(groups) > 1 else ())]
                name = re.sub(r"[^\w.+-]+", "_", "-".join(parts))
                found[name] = (f"{heading}: {labels[2]} on {labels[0]}, {labels[1]}", figure)
    return found


def _groups(plan: Plan, folder: Path) -> Iterator[tuple[tuple[str, ...], Group]]:
    groups: dict[tuple[str, ...], Group] = {}
    for cell in plan.cells:
        if state(cell, folder) != "done":
            continue
        own = folder / cell.folder
        result = json.loads((own / RESULT).read_text(encoding="utf-8"))
        if cell.probe is not None:
            result["probe"] = json.loads((own / PROBE).read_text(encoding="utf-8"))
        labels = tuple(cell.labels[name] for name in ("dataset", "scheduler", "model"))
        groups.setdefault(labels, []).append((cell, result))
    yield from groups.items()


def write_plots(plan: Plan, folder: Path) -> list[Path]:
    """Writes ``plots.html``, and a PNG of each figure where Plotly can draw it; returns the files."""
    drawn = figures_of(plan, folder)
    if not drawn:
        return []
    page = folder / "plots.html"
    script = share_script(folder).name
    write_atomically(page, gallery(f"{plan.name}, {plan.preset}", plan.about, drawn, script))
    return [page, *(path for name, (_, figure) in drawn.items() if (path := _png(figure, folder / f"{name}.png")))]


def _png(figure: Mapping[str, Any], path: Path) -> Path | None:
    for name in ("kaleido", "choreographer"):  # they tell of every browser that they open and close
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import plotly.graph_objects as go

        drawn = go.Figure(figure).to_image(format="png", scale=2, width=WIDTH)
    except Exception:  # kaleido, its browser and their versions fail in many ways; a study must not fail for a picture
        return None
    write_atomically(path, drawn)
    return path
