"""Figures of a comparison for a paper, drawn by matplotlib (the extra ``plots``) as PDF, SVG or PNG.

- ``plane`` stability and plasticity of each method, with the 95 % t intervals of both
- ``ranks`` mean ranks with Nemenyi's critical difference (Demšar 2006, figure 1): methods under one bar do not differ
"""

from __future__ import annotations

import importlib.util
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_cl.disk import explained, write_atomically
from recbole_cl.errors import ConfigError
from recbole_cl.report.colours import COLOURS
from recbole_cl.study.compare import Asked, column_is_smaller, directions
from recbole_cl.study.plan import Plan
from recbole_cl.study.statistics import Ranks, ranks
from recbole_cl.study.table import columns_of, mean_and_interval, rows

FORMATS = ("pdf", "svg", "png")
MARKERS = "osD^vP*Xph<>"
BLOCKS = 3
"""With fewer tables than this, seeds of each are blocks of their own, and the figure says so."""


def drawable() -> bool:
    """Tells whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(width: float, height: float) -> tuple[Any, Any]:
    """Returns an empty matplotlib figure and its axes, without a window; sizes in inches."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its cache of fonts
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots()


def plane(group: pd.DataFrame, metric: str, smaller: bool, title: str) -> Any | None:
    """Draws stability against plasticity, a point for each method; ``None`` where the runs have neither.

    Args:
        group: Finished runs of one log, scheduler and model, as :func:`recbole_cl.study.table.rows` gives them.
        metric: The metric.
        smaller: Smaller is better: both axes are turned round, so that up and right are good.
        title: Title.
    """
    names = [f"{axis}:{metric}" for axis in ("plasticity", "stability")]
    if any(name not in group or group[name].isna().all() for name in names):
        return None
    made, axes = figure(6.4, 4.2)
    for number, (method, own) in enumerate(group.groupby("strategy", sort=False)):
        (x, dx), (y, dy) = (mean_and_interval(own[name].astype(float)) for name in names)
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": "none"}
        bars = {"xerr": np.nan_to_num(dx), "yerr": np.nan_to_num(dy), "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(x, y, **look, **bars, markersize=6, label=str(method))
    axes.set(xlabel=f"plasticity, {metric} →", ylabel=f"stability, {metric} →", title=title)
    if smaller:
        axes.invert_xaxis()
        axes.invert_yaxis()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return made


def blocks(frame: pd.DataFrame, column: str) -> tuple[list[str], np.ndarray, str]:
    """Returns methods, scores ``[n, k]`` and what the blocks are; methods without a score in some block are left out.

    Args:
        frame: Finished runs.
        column: What is ranked.
    """
    place = ["dataset", "scheduler", "model"]
    by_table = frame.pivot_table(index=place, columns="strategy", values=column, aggfunc="mean", sort=False)
    n_tables = len(by_table)
    heading = f"{n_tables} tables (log, scheduler, model), means over seeds"
    if len(by_table) < BLOCKS:
        keys = [*place, *(key for key in ("order", "seed") if key in frame)]
        by_table = frame.pivot_table(index=keys, columns="strategy", values=column, aggfunc="mean", sort=False)
        heading = f"{len(by_table)} seeds of {n_tables} table{'s' if n_tables > 1 else ''}"
    whole = by_table.dropna(axis="columns")
    order = [name for name in dict.fromkeys(frame["strategy"]) if name in whole]
    return order, whole[order].to_numpy(dtype=float), heading


def critical_difference(found: Ranks, title: str) -> Any:
    """Draws mean ranks on a line, the best at the left, a bar over methods that do not differ, and the distance itself.

    Args:
        found: The ranks.
        title: Title.
    """
    k, groups = len(found.names), found.groups()
    half = (k + 1) // 2
    made, axes = figure(7.2, 1.7 + 0.26 * half + 0.12 * len(groups))
    axes.set_axis_off()
    low, high = 1.0, float(k)
    wide = max(high - low, 1e-9)
    axes.plot([low, high], [0, 0], color="black", linewidth=1)
    for tick in range(1, k + 1):
        axes.plot([tick, tick], [0, 0.12], color="black", linewidth=1)
        axes.text(tick, 0.2, str(tick), ha="center", va="bottom", fontsize=9)
    top = 0.85
    reach = min(found.critical, wide)
    axes.plot([low, low + reach], [top, top], color="black", linewidth=1.5)
    over = "" if found.critical <= wide else ", wider than the scale"
    axes.text(low, top + 0.08, f"CD = {found.critical:.2f}{over}", ha="left", va="bottom", fontsize=9)
    for number, (first, last) in enumerate(groups):
        y = -0.22 - 0.22 * number
        axes.plot([found.mean[first] - 0.03, found.mean[last] + 0.03], [y, y], color="black", linewidth=3.5)
    below = -0.22 * (len(groups) + 1) - 0.2
    for place, (name, mean) in enumerate(zip(found.names, found.mean, strict=True)):
        left = place < half
        y = below - 0.42 * (place if left else k - 1 - place)
        edge = low - 0.06 * wide if left else high + 0.06 * wide
        axes.plot([mean, mean, edge], [0, y, y], color="#555555", linewidth=0.8)
        text = f"{name}  {mean:.2f}"
        axes.text(edge, y, f"{text} " if left else f" {text}", ha="right" if left else "left", va="center", fontsize=9)
    axes.set_xlim(low - 0.55 * wide, high + 0.55 * wide)
    axes.set_ylim(below - 0.42 * half, top + 0.5)
    axes.set_title(title, fontsize=9, pad=10)
    return made


def write_pictures(plan: Plan, folder: Path, asked: Asked, formats: Sequence[str] = ("pdf", "svg")) -> list[Path]:
    """Writes the figures of a comparison into the study's folder and returns their files.

    Args:
        plan: The study.
        folder: Its folder.
        asked: How methods are compared; its level is that of the ranks.
        formats: Some of :data:`FORMATS`.

    Raises:
        ConfigError: If a format is none, or matplotlib is not installed.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"--formats: {name!r} is none; use {', '.join(FORMATS)}")
    if not drawable():
        raise ConfigError("--formats: drawing needs matplotlib; pip install 'recbole-cl[plots]', or leave it out")
    frame = rows(plan, folder)
    done, declared = frame[frame["state"] == "done"], directions(plan, folder)
    made: dict[str, Any] = {}
    tables = list(done.groupby(["dataset", "scheduler", "model"], sort=False))
    for labels, group in tables:
        metric = str(group["primary"].iloc[0])
        drawn = plane(
            group, metric, column_is_smaller(metric, metric, declared), f"{labels[2]} on {labels[0]}, {labels[1]}"
        )
        if drawn is not None:
            made["-".join(["plane", *(map(str, labels) if len(tables) > 1 else ())])] = drawn
    for column in columns_of(done, plan.report) if len(done) else []:
        if done[column].isna().all():
            continue
        methods, scores, what = blocks(done, column)
        if len(methods) < 3 or len(scores) < 2:
            continue
        smaller = column_is_smaller(column, str(done["primary"].iloc[0]), declared)
        found = ranks(methods, scores, smaller, asked.alpha)
        title = (
            f"{column.replace(':', ' ')}: mean ranks over {what};\nFriedman p = {found.p:.2g}, level {asked.alpha:g}"
        )
        made[f"ranks-{column.replace(':', '-')}"] = critical_difference(found, title)
    files = []
    with explained(folder):
        for name, drawn in made.items():
            for ending in formats:
                path = folder / (re.sub(r"[^\w.+-]+", "_", name) + f".{ending}")
                image = io.BytesIO()
                drawn.savefig(image, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
                write_atomically(path, image.getvalue())
                files.append(path)
    return files
