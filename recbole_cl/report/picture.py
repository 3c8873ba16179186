"""A picture of a run: PNG, drawn by the Python side of Plotly and a browser, where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_cl.disk import write_atomically
from recbole_cl.report import text
from recbole_cl.report.figures import forgetting_curves, heat_map, safe


def picture(result: dict[str, Any], path: str | Path, width: int = 1200, height: int = 480) -> Path | None:
    """Draws the heat map and the forgetting curves of the primary metric into one PNG.

    Args:
        result: The run's result.
        path: The file.
        width: Width in CSS pixels; the file has twice as many.
        height: Height in CSS pixels.

    Returns:
        The file, or None where it cannot be drawn: no matrix, kaleido or its browser is not installed.

    Raises:
        OutputError: It cannot be written, or a link stands in its place.
    """
    metrics = text.metrics_of(result)
    if not metrics:
        return None
    left, right = heat_map(result, metrics[0]), forgetting_curves(result, metrics[0])
    look = left["layout"]
    look |= {"height": height, "width": width, "margin": {"l": 70, "r": 20, "t": 100, "b": 56}}
    facts = ", ".join(f"{value}" for what, value in text.facts(result) if what != "seed")
    title = f"<b>{safe(result.get('name') or 'run')}</b>  {safe(facts)}  ({safe(metrics[0])})"
    look["title"] = {"text": title, "x": 0.01, "y": 0.97, "font": {"size": 16}}
    look["xaxis"] |= {"domain": [0.0, 0.46]}
    look["xaxis2"] = {**right["layout"]["xaxis"], "domain": [0.55, 1.0], "anchor": "y2"}
    look["yaxis2"] = {**right["layout"]["yaxis"], "anchor": "x2"}
    left["data"][0]["showscale"] = False  # the cells hold their numbers
    traces = left["data"] + [{**trace, "xaxis": "x2", "yaxis": "y2"} for trace in right["data"]]
    if all(v is not None for row in left["data"][0]["z"] for v in row):
        look["plot_bgcolor"] = "#ffffff"  # grey stands for a null cell; without one it would only tint the curves
    try:
        import plotly.graph_objects as go

        drawn = go.Figure({"data": traces, "layout": look}).to_image(format="png", scale=2)
    except Exception:  # kaleido, its browser and their versions fail in many ways; a run must not fail for a picture
        return None
    write_atomically(Path(path), drawn)
    return Path(path)
