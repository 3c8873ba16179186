"""Means and intervals over seeds, as Markdown for people and CSV for everything else."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from recbole_cl.disk import explained, write_atomically
from recbole_cl.study.by_stage import OWN, by_stage_table
from recbole_cl.study.orders import degradation_table
from recbole_cl.study.plan import Plan
from recbole_cl.study.plots import write_plots
from recbole_cl.study.walk import PROBE, REFUSED, RESULT, state

SUMMARIES = ("final_average", "LA", "AF", "BWT", "FWT")
"""Columns where a study does not name its own."""
COSTS = {"train_seconds": "training, s", "peak_memory_mb": "peak, MB"}
COUNTS = {
    "backbones": "#B",
    "objectives": "#F",
    "trainable_parameters": "trainable parameters",
    "bytes_per_task": "bytes per task",
}
"""What models of several tasks cost at the last task, told where they say how many backbones are kept."""


def mean_and_interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Returns mean and half-width of Student's t interval; NaN half-width for a single value.

    Args:
        values: Numbers, one a seed; NaN are left out.
        confidence: Coverage of the interval.
    """
    found = np.asarray([v for v in values if v is not None and not math.isnan(v)], dtype=float)
    if not len(found):
        return math.nan, math.nan
    if len(found) == 1:
        return float(found[0]), math.nan
    error = found.std(ddof=1) / math.sqrt(len(found))
    return float(found.mean()), float(stats.t.ppf((1 + confidence) / 2, len(found) - 1) * error)


def rows(plan: Plan, folder: Path) -> pd.DataFrame:
    """Returns one row a cell: labels, seed, state, reason, summaries of each metric, the matrix's last row, costs."""
    out: list[dict[str, Any]] = []
    for cell in plan.cells:
        own = folder / cell.folder
        row: dict[str, Any] = {**cell.labels, "seed": cell.seed, "state": state(cell, folder), "reason": None}
        if row["state"] == "refused":
            row["reason"] = json.loads((own / REFUSED).read_text(encoding="utf-8"))["reason"]
        if row["state"] == "done":
            result = json.loads((own / RESULT).read_text(encoding="utf-8"))
            row["primary"] = result["primary_metric"]
            for name, by_metric in result["summary"].items():
                row |= {f"{name}:{metric}": value for metric, value in by_metric.items()}
            last = result["matrix"].get(result["primary_metric"], [[]])[-1]
            row |= {f"last:{s['name']}": value for s, value in zip(result["stages"], last, strict=False)}
            row |= {f"constant:{s['name']}": s["constant_answer"] for s in result["stages"] if "constant_answer" in s}
            if plan.report.get("by_stage"):
                metric = plan.report["by_stage"]["metric"].lower()
                matrix = result["matrix"].get(metric, [])  # one that the runs do not have is told in its place
                row |= {f"{OWN}{index + 1}": scores[index] for index, scores in enumerate(matrix)}
            for stratum in plan.report.get("strata") or ():
                within = result["strata"].get(result["primary_metric"], {}).get(stratum, [[]])[-1]
                named = list(zip(result["stages"], within, strict=False))[1:]  # all is new to the first stage
                row |= {f"last:{s['name']}, {stratum}": value for s, value in named}
            row["train_seconds"] = sum(c["train_seconds"] for c in result["cost"])
            row["eval_seconds"] = sum(c["eval_seconds"] for c in result["cost"])
            row["peak_memory_mb"] = max(c["peak_memory_mb"] for c in result["cost"])
            costs = result["cost"][-1]
            row |= {name: costs[name] for name in COUNTS if name in costs}
        out.append(row)
    return pd.DataFrame(out)


def comparison(plan: Plan, folder: Path) -> str:
    """Returns the study's tables as Markdown: one for each dataset, scheduler and model, a row for each strategy."""
    frame = rows(plan, folder)
    report = plan.report
    scale = float(report.get("scale", 1))
    lines: list[str] = []
    done = int((frame["state"] == "done").sum())
    for (dataset, scheduler, model), group in frame.groupby(["dataset", "scheduler", "model"], sort=False):
        columns = columns_of(group, report)
        if not columns:
            continue
        lines += [f"### {model} on {dataset}, {scheduler}", ""]
        headings = [name.removeprefix("last:").replace(":", " ") for name in columns]
        costs = {**COSTS, **(COUNTS if "backbones" in group and group["backbones"].notna().any() else {})}
        lines.append("| strategy | seeds | " + " | ".join([*headings, *costs.values()]) + " |")
        lines.append("|---" * (2 + len(columns) + len(costs)) + "|")
        for keys, own in group.groupby(["strategy", *(["order"] if "order" in group else [])], sort=False):
            strategy = ", ".join(keys)
            if (own["state"] == "refused").any():
                lines.append(f"| {strategy} | - | refused" + " |" * (len(columns) + len(costs)))
                continue
            finished = own[own["state"] == "done"]
            if not len(finished):
                continue
            cells = [_told(finished[name], scale) for name in columns]
            cells += [_count(finished, name) for name in costs]
            lines.append(f"| {strategy} | {len(finished)} | " + " | ".join(cells) + " |")
        lines += _constant_row(group, columns, scale, len(costs))
        for strategy, figures in (report.get("published") or {}).items():
            cells = [f"{figures[name]:g}" if name in figures else "" for name in columns] + [""] * len(costs)
            lines.append(f"| *{strategy}, published* | | " + " | ".join(cells) + " |")
        lines.append("")
        if "orders" in (report.get("plots") or ()):
            lines += degradation_table(group[group["state"] == "done"], scale)
        lines += by_stage_table(group[group["state"] == "done"], report)
    lines += probe_table(plan, folder)
    reasons = sorted({f"{r.model}, {r.strategy}: {r.reason}" for r in frame.itertuples() if r.state == "refused"})
    lines += [f"- {reason}" for reason in reasons] + ([""] if reasons else [])
    left = len(frame) - done - int((frame["state"] == "refused").sum())
    lines.append(f"{done} runs{f', {left} not run yet' if left else ''}. {_machine()}")
    if report.get("source"):
        lines.append(f"Published figures: {report['source']}")
    return "\n".join(lines) + "\n"


def _count(finished: pd.DataFrame, name: str) -> str:
    return "-" if finished[name].isna().all() else f"{finished[name].mean():,.0f}"


def _constant_row(group: pd.DataFrame, columns: list[str], scale: float, more: int) -> list[str]:
    """Returns a row of what the most frequent class scores, where a column is a classification."""
    names = [f"constant:{name.removeprefix('last:')}" for name in columns]
    if not any(name in group for name in names):
        return []
    seeds = group[group["state"] == "done"].drop_duplicates("seed")
    cells = [_told(seeds[name], scale) if name in group else "" for name in names] + [""] * more
    return [f"| *most frequent class* | {len(seeds)} | " + " | ".join(cells) + " |"]


def probe_rows(plan: Plan, folder: Path) -> pd.DataFrame:
    """Returns one row a finished cell and variant of its probe: labels, seed, variant, its numbers and its curve."""
    out: list[dict[str, Any]] = []
    for cell in plan.cells:
        if cell.probe is not None and state(cell, folder) == "done":
            found = json.loads((folder / cell.folder / PROBE).read_text(encoding="utf-8"))
            more = {"metric": found["metric"], "task": found["task"]}
            out += [{**cell.labels, **more, "variant": name, **own} for name, own in found["variants"].items()]
    return pd.DataFrame(out)


def probe_table(plan: Plan, folder: Path) -> list[str]:
    """Returns means and intervals of a probe's numbers as lines of Markdown: a row for each variant."""
    frame = probe_rows(plan, folder)
    if not len(frame):
        return []
    labels = [*plan.cells[0].labels]
    numbers = [name for name in frame if name not in (*labels, "metric", "task", "variant", "curve")]
    lines = ["### " + ", ".join(dict.fromkeys(frame["task"])) + ", from fixed vectors", ""]
    lines.append("| model | strategy | vectors | runs | " + " | ".join(n.replace("_", " ") for n in numbers) + " |")
    lines.append("|---" * (4 + len(numbers)) + "|")
    for (model, strategy, variant), own in frame.groupby(["model", "strategy", "variant"], sort=False):
        cells = []
        for name in numbers:
            mean, half = mean_and_interval(own[name].astype(float))
            digits = 4 if own[name].dropna().abs().max() <= 1 else 1
            never = f" ({int(own[name].isna().sum())} never)" if own[name].isna().any() else ""
            half_told = "" if math.isnan(half) or half == 0 else f" ± {half:.{digits}f}"
            cells.append(("-" if math.isnan(mean) else f"{mean:.{digits}f}{half_told}") + never)
        lines.append(f"| {model} | {strategy} | {variant} | {len(own)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def columns_of(group: pd.DataFrame, report: Any) -> list[str]:
    """Returns the columns of figures that a report asks for, those that the runs of a group have."""
    if report.get("summaries") == ["last"]:  # the last model on each stage: the tables of task streams
        found = [name for name in group if name.startswith("last:") and group[name].notna().any()]
        strata = tuple(f", {stratum}" for stratum in report.get("strata") or ())
        return sorted(found, key=lambda name: bool(strata) and name.endswith(strata))
    asked = report.get("metric")
    if asked is None:
        found = list(group["primary"].dropna()) if "primary" in group else []
        if not found:
            return []
        asked = found[0]
    metrics = [asked] if isinstance(asked, str) else list(asked)
    names = [f"{s}:{m.lower()}" for m in metrics for s in report.get("summaries", SUMMARIES)]
    return [name for name in names if name in group]


def _told(values: pd.Series, scale: float) -> str:
    mean, half = mean_and_interval([None if v is None else v * scale for v in values])
    digits = 4 if scale == 1 else 2
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def _machine() -> str:
    return (
        f"Mean ± half-width of the 95 % t interval over seeds. {os.cpu_count()} cores ({platform.machine()}), Python "
        f"{platform.python_version()}, torch {version('torch')}, {datetime.date.today().isoformat()}."
    )


def write_tables(plan: Plan, folder: Path) -> str:
    """Writes ``table.md``, ``table.csv`` and the plots into the study's folder and returns the Markdown."""
    text = f"# {plan.name}, {plan.preset}\n\n{plan.about}\n\n" if plan.about else f"# {plan.name}, {plan.preset}\n\n"
    text += comparison(plan, folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "table.md", text)
        write_atomically(folder / "table.csv", rows(plan, folder).to_csv(index=False))
        write_plots(plan, folder)
    return text
