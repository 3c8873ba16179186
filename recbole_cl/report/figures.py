"""The figures as plain Plotly specifications: the page draws them in the browser, ``picture.py`` draws them to PNG.

No figure library is imported to write a page.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_cl.report import text
from recbole_cl.report.colours import COLOURS, HEAT, heat_colour, legible_on, ramp

Figure = dict[str, Any]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, GRID, PALE = "#1f2933", "#52606d", "#e4e9ee", "#f4f6f8"


def safe(value: Any) -> str:
    """Escapes text for a figure: Plotly reads some HTML in titles and names."""
    return html.escape(text.clean(value), quote=False)


def layout(x: str, y: str, height: int = 380, **more: Any) -> dict[str, Any]:
    """Returns the layout that all figures share.

    Args:
        x: Title of the x axis.
        y: Title of the y axis.
        height: Height in pixels.
        more: Other keys of a Plotly layout, over these.
    """
    return {
        "height": height,
        "margin": {"l": 64, "r": 20, "t": 34, "b": 52},
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hoverlabel": {"font": {"family": FONT}},
        "legend": {"title": {"text": ""}, "font": {"size": 12}, "tracegroupgap": 4},
        "xaxis": axis(x),
        "yaxis": axis(y),
        **more,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Returns an axis with the shared look."""
    look = {
        "title": {"text": title, "standoff": 8, "font": {"color": MUTED, "size": 13}},
        "gridcolor": GRID,
        "linecolor": "#9aa5b1",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"color": MUTED},
    }
    return {**look, **more}


def stage_axis(title: str, names: Sequence[str], upright: bool = False, **more: Any) -> dict[str, Any]:
    """Returns an axis with one tick a stage; the positions count from 0.

    Args:
        title: Title of the axis.
        names: Names of the stages, each beginning with its number.
        upright: True for a y axis, where long names have room; on an x axis only their numbers stay.
        more: Other keys of a Plotly axis.
    """
    crowded = not upright and len(names) * max((text.width(n) for n in names), default=0) > 56
    labels = [n.split()[0] for n in names] if crowded else names
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [safe(n) for n in labels]}
    return axis(title, **ticks, range=[-0.5, len(names) - 0.5], **more)


def heat_map(result: Mapping[str, Any], metric: str) -> Figure:
    """Draws R[t, s]: rows trained, columns evaluated, the diagonal framed, null cells grey.

    Args:
        result: The run's result.
        metric: The metric.
    """
    matrix, names = text.matrix_of(result, metric), text.stage_names(result)
    stages = len(matrix)
    names = names[:stages]
    small, reverse = stages <= 12, text.is_smaller_better(result, metric)
    there = [v for row in matrix for v in row if v is not None]
    low, high = (min(there), max(there)) if there else (0.0, 0.0)
    trace = {
        "type": "heatmap",
        "z": matrix,
        "x": list(range(stages)),
        "y": list(range(stages)),
        "customdata": [[text.number(v) for v in row] for row in matrix],
        "hovertemplate": "trained up to %{y}, evaluated on %{x}: <b>%{customdata}</b><extra></extra>",
        "hoverongaps": False,
        "colorscale": [list(point) for point in HEAT],
        "reversescale": reverse,
        "colorbar": {"thickness": 12, "outlinewidth": 0, "tickfont": {"color": MUTED, "size": 11}},
        "xgap": 2,
        "ygap": 2,
    }
    frames = [
        {"type": "rect", "x0": s - 0.48, "x1": s + 0.48, "y0": s - 0.48, "y1": s + 0.48}
        | {"line": {"color": INK, "width": 2 if small else 1}}
        for s in range(stages)
    ]
    # The numbers are annotations, each in a colour that is legible on its cell; Plotly's own choice is not everywhere.
    numbers = []
    for t, s in itertools.product(range(stages), range(stages)) if small else ():
        value = matrix[t][s]
        if value is None:
            font: dict[str, Any] = {"color": MUTED}
        else:
            share = (value - low) / (high - low) if high > low else 0.5
            size = 14 if stages <= 6 else 12 if stages <= 9 else 10
            font = {"color": legible_on(heat_colour(1 - share if reverse else share)), "size": size}
        numbers.append({"x": s, "y": t, "text": text.number(value), "showarrow": False, "font": font})
    if high > low:
        trace |= {"zmin": low, "zmax": high}
    look = layout("evaluated on stage", "trained up to stage", height=min(700, max(280, 130 + 58 * stages)))
    look["xaxis"] = stage_axis("evaluated on stage", names, side="top", showgrid=False, ticks="")
    look["yaxis"] = stage_axis("trained up to stage", names, upright=True, showgrid=False, ticks="")
    look["yaxis"]["range"] = [stages - 0.5, -0.5]
    look |= {"shapes": frames, "annotations": numbers, "plot_bgcolor": PALE}
    look["margin"] = {"l": 64, "r": 20, "t": 60, "b": 20}
    return {"data": [trace], "layout": look}


def forgetting_curves(result: Mapping[str, Any], metric: str) -> Figure:
    """Draws, for each evaluated stage s, R[t, s] over t: dashed before the stage was trained on, solid from there on.

    Args:
        result: The run's result.
        metric: The metric.
    """
    matrix, names = text.matrix_of(result, metric), text.stage_names(result)
    stages = len(matrix)
    names, colours = names[:stages], ramp(stages)
    traces: list[dict[str, Any]] = []
    for s in range(stages):
        column = [matrix[t][s] for t in range(stages)]
        if all(v is None for v in column):
            continue
        shared = {
            "type": "scatter",
            "legendgroup": str(s),
            "name": f"stage {safe(names[s])}",
            "hovertemplate": f"stage {safe(names[s])} after %{{x}}: <b>%{{y:.4f}}</b><extra></extra>",
        }
        size = [11 if t == s else 6 for t in range(s, stages)]
        solid = {
            **shared,
            "x": list(range(s, stages)),
            "y": column[s:],
            "mode": "lines+markers",
            "line": {"color": colours[s], "width": 2.5},
            "marker": {"color": colours[s], "size": size, "opacity": 1},
        }
        dashed = {
            **shared,
            "x": list(range(s + 1)),
            "y": column[: s + 1],
            "mode": "lines+markers",
            "showlegend": False,
            "line": {"color": colours[s], "width": 1.5, "dash": "dot"},
            "marker": {"color": colours[s], "size": 4},
            "opacity": 0.75,
        }
        traces += [dashed, solid] if s else [solid]
    look = layout("trained up to stage", safe(metric), height=400)
    look["xaxis"] = stage_axis("trained up to stage", names)
    return {"data": traces, "layout": look}


def learning_curves(result: Mapping[str, Any], metric: str | None) -> Figure:
    """Draws the validation metric over the training targets seen within each stage; the kept epoch has a star.

    Args:
        result: The run's result.
        metric: A metric of the validation; ``None`` draws of each stage the one that chose its epoch.
    """
    names = text.stage_names(result)
    told_stages = list(result.get("stages") or ())
    traces: list[dict[str, Any]] = []
    colours = ramp(max(len(names), 1))
    for (stage, name), records in passes(result).items():
        own = told_stages[stage].get("primary_metric") if stage < len(told_stages) else None
        shown = str(own or result.get("primary_metric")) if metric is None else metric
        # The last improvement is kept; a pass that nothing chose an epoch of keeps its last one.
        kept = next((r for r in reversed(records) if r.get("best")), records[-1])
        points = [
            (targets, value, r is kept, r.get("epoch"))
            for r in records
            if (targets := text.finite(r.get("targets"))) is not None
            and (value := text.finite(text.lookup(r.get("valid"), shown))) is not None
        ]
        if not points:
            continue
        label = f"stage {safe(names[stage])}" if stage < len(names) else f"stage {stage + 1}"
        several = len([key for key in passes(result) if key[0] == stage]) > 1
        colour = colours[min(stage, len(colours) - 1)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"{label}, {safe(name)}" if several else label,
                "x": [p[0] for p in points],
                "y": [p[1] for p in points],
                "customdata": ["" if p[3] is None else str(p[3]) for p in points],
                "line": {"color": colour, "width": 2, "dash": "solid" if _first_pass(result, stage, name) else "dash"},
                "marker": {
                    "color": colour,
                    "size": [13 if p[2] else 5 for p in points],
                    "symbol": ["star" if p[2] else "circle" for p in points],
                    "opacity": 1,
                },
                "hovertemplate": f"{label}, epoch %{{customdata}}, %{{x:,}} targets: <b>%{{y:.4f}}</b><extra></extra>",
            }
        )
    look = layout("training targets seen within the stage", f"validation {safe(metric or 'metric')}", height=400)
    ends = [max(trace["x"]) for trace in traces]
    starts = [min(trace["x"]) for trace in traces]
    # A base stage is often ten times as long as the others, which a linear axis presses into its left edge. A curve
    # that begins at 0 targets, with the model as the stage found it, has no place on a logarithmic one.
    log = bool(ends) and min(starts) > 0 and max(ends) > 4 * min(ends)
    look["xaxis"] |= {"type": "log" if log else "linear", "dtick": "D2" if log else None}
    if ends and min(starts) > 0:
        look["updatemenus"] = [
            {
                "type": "buttons",
                "direction": "right",
                "active": int(log),
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "pad": {"t": 0, "b": 2},
                # Plotly draws the pressed one pale on any page, so that the others are, too, also on a dark one.
                "font": {"size": 11, "color": "#3e4c59"},
                "bgcolor": "#dde4ea",
                "bordercolor": GRID,
                "showactive": True,
                "buttons": [
                    {"label": kind, "method": "relayout", "args": [{"xaxis.type": kind, "xaxis.dtick": tick}]}
                    for kind, tick in (("linear", None), ("log", "D2"))
                ],
            }
        ]
    return {"data": traces, "layout": look}


def loss_terms(result: Mapping[str, Any]) -> Figure:
    """Draws the loss and each of its terms by name over the training targets of the whole stream.

    Args:
        result: The run's result.
    """
    lines: dict[str, tuple[list[float | None], list[float | None]]] = {}
    borders, offset, before = [], 0.0, None
    stage_end = 0.0
    for (stage, _), records in passes(result).items():
        if before is not None and stage != before:
            offset, stage_end = offset + stage_end, 0.0
            borders.append(offset)
        if before != stage:
            # A gap between stages: the optimiser and the data are others, a line would suggest a step.
            for xs, ys in lines.values():
                xs.append(None)
                ys.append(None)
        before = stage
        for record in records:
            at = text.finite(record.get("targets"))
            if at is None:
                continue
            stage_end = max(stage_end, at)
            values = {"loss": record.get("train_loss"), **(record.get("terms") or {})}
            for name, value in values.items():
                if text.finite(value) is not None:
                    xs, ys = lines.setdefault(str(name), ([], []))
                    xs.append(offset + at)
                    ys.append(text.finite(value))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": safe(name),
            "x": xs,
            "y": ys,
            "line": {"color": COLOURS[i % len(COLOURS)], "width": 2, "dash": "dash" if name == "loss" else "solid"},
            "marker": {"size": 4},
            "hovertemplate": f"{safe(name)} at %{{x:,}} targets: <b>%{{y:.4g}}</b><extra></extra>",
        }
        for i, (name, (xs, ys)) in enumerate(lines.items())
    ]
    there = [y for _, ys in lines.values() for y in ys if y is not None]
    look = layout("training targets seen over the whole stream", "mean over the epoch", height=360)
    if there and min(there) > 0 and max(there) / min(there) > 200:
        look["yaxis"] |= {"type": "log", "exponentformat": "power"}
    look["shapes"] = [
        {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
        | {"line": {"color": "#9aa5b1", "width": 1, "dash": "dot"}}
        for x in borders
    ]
    return {"data": traces, "layout": look}


def bars(names: Sequence[str], series: Mapping[str, Sequence[float | None]], y: str) -> Figure:
    """Draws stacked bars, one a stage.

    Args:
        names: Names of the stages.
        series: ``{name: value of each stage}``.
        y: Title of the y axis.
    """
    traces = [
        {
            "type": "bar",
            "name": safe(name),
            "x": list(range(len(names))),
            "y": list(values),
            "marker": {"color": COLOURS[i % len(COLOURS)]},
            "hovertemplate": f"{safe(name)}, stage %{{x}}: <b>%{{y:,.4g}}</b><extra></extra>",
        }
        for i, (name, values) in enumerate(series.items())
    ]
    look = layout("stage", y, height=320, barmode="stack", bargap=0.45)
    look["xaxis"] = stage_axis("stage", names, showgrid=False)
    look["yaxis"]["rangemode"] = "tozero"
    look |= {"showlegend": len(traces) > 1}
    look["legend"] |= {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    look["margin"] = {"l": 64, "r": 12, "t": 58, "b": 52}
    return {"data": traces, "layout": look}


def lines(names: Sequence[str], series: Mapping[str, Sequence[float | None]], y: str) -> Figure:
    """Draws one line a series over the stages.

    Args:
        names: Names of the stages.
        series: ``{name: value of each stage}``.
        y: Title of the y axis.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": safe(name),
            "x": list(range(len(names))),
            "y": list(values),
            "line": {"color": COLOURS[i % len(COLOURS)], "width": 2},
            "marker": {"size": 7},
            "hovertemplate": f"{safe(name)}, stage %{{x}}: <b>%{{y:.4f}}</b><extra></extra>",
        }
        for i, (name, values) in enumerate(series.items())
    ]
    look = layout("stage", y, height=320)
    look["xaxis"] = stage_axis("stage", names)
    look["yaxis"]["rangemode"] = "tozero"
    look["legend"] |= {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    look["margin"] = {"l": 64, "r": 12, "t": 58, "b": 52}
    return {"data": traces, "layout": look}


def passes(result: Mapping[str, Any]) -> dict[tuple[int, str], list[Mapping[str, Any]]]:
    """Groups the curves by (stage, pass), stages in order, passes as they came."""
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for record in result.get("curves") or ():
        stage = text.stage_index(result, record.get("stage"))
        if stage is not None:
            found.setdefault((stage, str(record.get("pass") or "")), []).append(record)
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def _first_pass(result: Mapping[str, Any], stage: int, name: str) -> bool:
    return next((key for key in passes(result) if key[0] == stage), None) == (stage, name)
