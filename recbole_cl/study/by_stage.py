"""A study's runs stage by stage: what each model scores on its own stage, right after it was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from recbole_cl.errors import nearest
from recbole_cl.study.plan import Plan
from recbole_cl.study.walk import RESULT, state


def table(plan: Plan, folder: Path) -> list[str]:
    """Returns lines of Markdown: for each dataset, scheduler and model a table with a column for each stage.

    A figure is the mean over the seeds of the matrix's diagonal, in the report's scale. Where the runs do not have the
    metric, a line says so.
    """
    asked = plan.report.get("by_stage")
    if asked is None:
        return []
    metric = str(asked["metric"]).lower()
    found: dict[tuple[str, ...], dict[str, list[list[float | None]]]] = {}
    for cell in plan.cells:
        if state(cell, folder) == "done":
            result = json.loads((folder / cell.folder / RESULT).read_text(encoding="utf-8"))
            matrix = result["matrix"].get(metric)
            if matrix is None:
                known = sorted(result["matrix"])
                return [f"by_stage: no run has {metric!r}{nearest(metric, known)} They have {', '.join(known)}.", ""]
            of_model = found.setdefault(tuple(cell.labels[name] for name in ("dataset", "scheduler", "model")), {})
            own = of_model.setdefault(cell.labels["strategy"], [])
            own.append([row[index] if index < len(row) else None for index, row in enumerate(matrix)])
    scale, lines = float(plan.report.get("scale", 1)), []
    for (dataset, scheduler, model), of_strategy in found.items():
        n = max(len(diagonal) for runs in of_strategy.values() for diagonal in runs)
        lines += [f"### {metric} by stage, {model} on {dataset}, {scheduler}", ""]
        lines += ["| strategy | " + " | ".join([*(str(index + 1) for index in range(n)), "mean"]) + " |"]
        lines += ["|---" * (n + 2) + "|"]
        for strategy, runs in of_strategy.items():
            means = np.array([[math.nan if x is None else x for x in run] for run in runs]).mean(axis=0) * scale
            lines.append(_line(strategy, means, scale))
            if strategy in asked.get("published", {}):
                lines.append(_line(f"*{strategy}, published*", asked["published"][strategy][:n], scale))
        lines.append("")
    return lines


def _line(name: str, figures: Iterable[float], scale: float) -> str:
    values = [*figures]
    known = [value for value in values if not math.isnan(value)]
    digits = 4 if scale == 1 else 1
    told = ["-" if math.isnan(x) else f"{x:.{digits}f}" for x in (*values, np.mean(known) if known else math.nan)]
    return f"| {name} | " + " | ".join(told) + " |"
