"""The summary of a run in plain text, at most 110 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_cl.report import text

WIDTH = 110

#: Summaries that stand in the terminal; the page has all of them.
HEADLINE = ("LA", "final_average", "AF", "BWT", "FWT", "next_stage", "h_mean")


def terminal_summary(result: dict[str, Any]) -> str:
    """Tells a run in plain text: stages, matrix of the primary metric, summaries with formulas, costs, warnings.

    Args:
        result: The run's result, as in ``result.json``; missing keys leave their part out.

    Returns:
        Lines of at most 110 columns, without a newline at the end.
    """
    parts = [_head(result), _stages(result)]
    metrics = text.metrics_of(result)
    if metrics:
        parts += [_matrix(result, metrics[0]), _summary(result, metrics[0])]
    parts += [_cost(result), _warnings(result), _where(result)]
    lines = [line for part in parts if part for line in [*part, ""]]
    return "\n".join(text.cut(line.rstrip(), WIDTH) for line in lines).rstrip()


def _head(result: Mapping[str, Any]) -> list[str]:
    facts = "  ".join(f"{what} {value}" for what, value in text.facts(result))
    return [f"RecBole-CL  {text.clean(result.get('name') or 'run')}", *([f"  {facts}"] if facts else [])]


def _stages(result: Mapping[str, Any]) -> list[str]:
    stages = list(result.get("stages") or ())
    if not stages:
        return []
    keys = [key for key in text.STAGE_COLUMNS if any(stage.get(key) is not None for stage in stages)]
    rows = []
    for s, stage in enumerate(stages):
        cells = [text.cut((text.moment if key in ("start", "end") else text.count)(stage.get(key)), 12) for key in keys]
        rows.append([str(s + 1), text.cut(text.clean(stage.get("name") or ""), 16), *cells])
    heads = ["#", "name", *(text.STAGE_COLUMNS[key] for key in keys)]
    # The columns of least use go first where ten of them, with large numbers, are wider than the page.
    for key in ("n_valid", "n_users", "n_items", "start", "n_new_items", "n_new_users"):
        if sum(_widths(heads, rows)) + 2 * len(heads) <= WIDTH:
            break
        if key in keys:
            at = 2 + keys.index(key)
            keys.remove(key)
            heads.pop(at)
            for row in rows:
                row.pop(at)
    return ["Stages", *_table(heads, rows, left=(1,))]


def _matrix(result: Mapping[str, Any], metric: str) -> list[str]:
    matrix = text.matrix_of(result, metric)
    stages = len(matrix)
    cells = [
        [f"[{text.number(v)}]" if t == s and v is not None else f"{text.number(v)} " for s, v in enumerate(row)]
        for t, row in enumerate(matrix)
    ]
    wide = max([7, *(len(cell) for row in cells for cell in row)])
    block = max(1, (WIDTH - 8) // (wide + 1))
    lines = [
        f"{text.clean(metric)} (rows: trained up to, columns: evaluated on, [ ]: just trained on, -: not evaluated)"
    ]
    for first in range(0, stages, block):
        columns = range(first, min(first + block, stages))
        lines.append(" " * 6 + " ".join(f"{s + 1} ".rjust(wide) for s in columns))
        lines += [f"{t + 1:>5} " + " ".join(cells[t][s].rjust(wide) for s in columns) for t in range(stages)]
    return lines


def _summary(result: Mapping[str, Any], metric: str) -> list[str]:
    summary, formulas = result.get("summary") or {}, result.get("formulas") or {}
    reasons = result.get("reasons") or {}
    lines = []
    for name in HEADLINE:
        if name not in summary:
            continue
        value = text.number(text.lookup(summary[name], metric))
        lines += _wrap(f"  {name:<14} {value:>9}   ", text.clean(formulas.get(name) or ""))
        reason = text.lookup(reasons.get(name), metric)
        if reason:
            lines += _wrap(" " * 28, f"({text.clean(reason)})")
    return [f"Summary of {text.clean(metric)}", *lines] if lines else []


def _cost(result: Mapping[str, Any]) -> list[str]:
    costs = [cost for cost in result.get("cost") or () if isinstance(cost, Mapping)]
    if not costs:
        return []

    def total(key: str) -> float | None:
        there = [v for v in (text.finite(cost.get(key)) for cost in costs) if v is not None]
        return sum(there) if there else None

    def largest(key: str) -> float | None:
        return max((v for v in (text.finite(cost.get(key)) for cost in costs) if v is not None), default=None)

    parts = []
    if total("seconds") is not None or total("train_seconds") is not None:
        split = [
            f"{name} {text.seconds(total(key))}"
            for name, key in (("training", "train_seconds"), ("evaluation", "eval_seconds"))
            if total(key) is not None
        ]
        whole = total("seconds")
        parts.append(text.seconds(whole) + (f" ({', '.join(split)})" if split else "") if whole else ", ".join(split))
    if largest("peak_memory_mb") is not None:
        parts.append(f"peak memory {text.size((largest('peak_memory_mb') or 0) * 1e6)}")
    if largest("parameters") is not None:
        trainable = largest("trainable_parameters")
        of = f" ({text.count(trainable)} trainable)" if trainable is not None else ""
        parts.append(f"{text.count(largest('parameters'))} parameters{of}")
    if largest("model_bytes") is not None:
        parts.append(f"model {text.size(largest('model_bytes'))}")
    return _wrap("Cost      ", ", ".join(parts)) if parts else []


def _warnings(result: Mapping[str, Any]) -> list[str]:
    warnings = [text.clean(warning) for warning in result.get("warnings") or ()]
    if not warnings:
        return []
    lines = [f"Warnings  {len(warnings)}"]
    for warning in warnings[:3]:
        lines += _wrap("  - ", text.cut(warning, 2 * (WIDTH - 6)))
    if len(warnings) > 3:
        lines.append(f"  - and {len(warnings) - 3} more, all in report.html")
    return lines


def _where(result: Mapping[str, Any]) -> list[str]:
    # Not wrapped: a path is copied and pasted. One that is longer than the line is cut at its front.
    folder = text.clean(result.get("output_dir") or "")
    if text.width(folder) > WIDTH - 10:
        folder = "…" + folder[-(WIDTH - 11) // 2 :] if text.width(folder) > len(folder) else "…" + folder[11 - WIDTH :]
    return [f"Results   {folder}"] if folder else []


def _wrap(first: str, words: str) -> list[str]:
    """Wraps words behind a heading; later lines stand under the first word."""
    lines = textwrap.wrap(words, WIDTH - text.width(first), break_on_hyphens=False) or [""]
    return [first + lines[0], *(" " * text.width(first) + line for line in lines[1:])]


def _widths(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(text.width(row[c]) for row in [heads, *rows]) for c in range(len(heads))]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    widths = _widths(heads, rows)

    def line(row: Sequence[str]) -> str:
        padded = []
        for c, cell in enumerate(row):
            blank = " " * (widths[c] - text.width(cell))
            padded.append(cell + blank if c in left else blank + cell)
        return "  " + "  ".join(padded)

    return [line(heads), *(line(row) for row in rows)]
