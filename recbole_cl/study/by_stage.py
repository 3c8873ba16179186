"""A study's runs stage by stage: what each model scores on its own stage, right after it was trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from recbole_cl.errors import nearest

OWN, AVERAGE = "own:", "final_average:"
"""Columns of a study's rows: a figure by stage, and one that every run has of each of its metrics."""


def by_stage_table(rows: pd.DataFrame, report: Any) -> list[str]:
    """Returns the lines of a table with a column for each stage, as Markdown; none where the report asks for none.

    Args:
        rows: One row a finished run with ``strategy`` and the matrix's diagonal, ``own:1`` and on.
        report: Its ``by_stage`` names the metric, and under ``published`` a list of figures by strategy.

    Returns:
        Means over the seeds in the report's scale. Where the runs do not have the metric, a line says so.
    """
    asked = report.get("by_stage")
    if asked is None or not len(rows):
        return []
    metric, stages = asked["metric"].lower(), [name for name in rows if name.startswith(OWN)]
    if not stages:
        known = sorted(name.removeprefix(AVERAGE) for name in rows if name.startswith(AVERAGE))
        return [f"by_stage: no run has {metric!r}{nearest(metric, known)} They have {', '.join(known)}.", ""]
    scale, published = float(report.get("scale", 1)), asked.get("published", {})
    head = [f"{metric} by stage", *(name.removeprefix(OWN) for name in stages), "mean"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for strategy, own in rows.groupby("strategy", sort=False):
        lines.append(_line(str(strategy), own[stages].astype(float).mean() * scale, scale))
        if strategy in published:
            figures = [*published[strategy], *[math.nan] * len(stages)][: len(stages)]
            lines.append(_line(f"*{strategy}, published*", figures, scale))
    return [*lines, ""]


def _line(name: str, figures: Iterable[float], scale: float) -> str:
    values = [*figures]
    values.append(sum(values) / len(values))  # of all stages, or of none
    return f"| {' | '.join([name, *(_told(value, scale) for value in values)])} |"


def _told(value: float, scale: float) -> str:
    return "-" if math.isnan(value) else f"{value:.{4 if scale == 1 else 1}f}"
