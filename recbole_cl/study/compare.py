"""Methods side by side with statistics: which is best, which differs from a reference, what each costs.

Runs are paired by seed (and order of tasks) within one log, scheduler and model. Every column of such a table is a
family of tests: each method against the reference, corrected for their number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_cl.disk import explained, write_atomically
from recbole_cl.errors import ConfigError, nearest
from recbole_cl.results.matrix import smaller_is_better
from recbole_cl.study.plan import Plan
from recbole_cl.study.statistics import CORRECTIONS, TESTS, Paired, adjusted, paired
from recbole_cl.study.table import columns_of, mean_and_interval, rows
from recbole_cl.study.walk import RESULT, state

COSTS = {"train_seconds": "training, s", "eval_seconds": "evaluation, s", "peak_memory_mb": "peak, MB"}
BETTER, WORSE = "+", "-"
ALWAYS_SMALLER, ALWAYS_LARGER = ("AF",), ("BWT", "FWT")
"""Summaries whose sign means the same whatever the metric."""


@dataclass(frozen=True)
class Asked:
    """How methods are compared.

    Args:
        against: Label of the reference; ``None`` for FineTune, or the first method where that is not there.
        test: One of :data:`recbole_cl.study.statistics.TESTS`.
        correction: One of :data:`recbole_cl.study.statistics.CORRECTIONS`.
        alpha: Level of significance.
    """

    against: str | None = None
    test: str = "t"
    correction: str = "holm"
    alpha: float = 0.05

    def __post_init__(self) -> None:
        for name, known in (("test", TESTS), ("correction", CORRECTIONS)):
            value = getattr(self, name)
            if value not in known:
                hint = nearest(value, known) or "."
                raise ConfigError(f"--{name}={value}: there is no such{hint} Use {', '.join(known)}")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"--alpha={self.alpha:g}: give a level between 0 and 1, such as 0.05")


@dataclass(frozen=True)
class Entry:
    """One method in one column.

    Attributes:
        mean: Mean over the runs; NaN where there is none.
        half: Half-width of the 95 % t interval; NaN for one run.
        best: It has the best mean of the column.
        pair: Against the reference; ``None`` for the reference itself.
        p: Corrected p value; NaN where there is none.
        mark: ``+`` significantly better than the reference, ``-`` significantly worse, or empty.
    """

    mean: float
    half: float
    best: bool
    pair: Paired | None
    p: float
    mark: str


@dataclass(frozen=True)
class Table:
    """The methods of one log, scheduler and model.

    Attributes:
        labels: Dataset, scheduler, model.
        reference: The method that the others are tested against.
        smaller: Column to whether smaller is better.
        runs: Method to its number of runs.
        entries: Column to method to entry.
        costs: Method to cost to (mean, that mean over the reference's); NaN where unknown.
    """

    labels: tuple[str, str, str]
    reference: str
    smaller: Mapping[str, bool]
    runs: Mapping[str, int]
    entries: Mapping[str, Mapping[str, Entry]]
    costs: Mapping[str, Mapping[str, tuple[float, float]]]


def tables_of(plan: Plan, folder: Path, asked: Asked) -> list[Table]:
    """Returns the comparisons of what is done of a study, one for each dataset, scheduler and model.

    Raises:
        ConfigError: If the reference is no method of the study.
    """
    frame = rows(plan, folder)
    known = list(dict.fromkeys(frame["strategy"]))
    if asked.against is not None and asked.against not in known:
        hint = nearest(asked.against, known)
        raise ConfigError(f"--against={asked.against}: no method of the study{hint} It has {', '.join(known)}")
    smaller_is = directions(plan, folder)
    found = []
    for labels, group in frame.groupby(["dataset", "scheduler", "model"], sort=False):
        done = group[group["state"] == "done"]
        if len(done):
            found.append(_table(tuple(labels), done, columns_of(group, plan.report), smaller_is, asked))
    return found


def directions(plan: Plan, folder: Path) -> dict[str, bool]:
    """Returns of every metric that the finished runs have whether smaller is better."""
    found: dict[str, bool] = {}
    for cell in plan.cells:
        if state(cell, folder) == "done":
            result = json.loads((folder / cell.folder / RESULT).read_text(encoding="utf-8"))
            found.update(result.get("smaller_is_better") or {})
    return found


def column_is_smaller(column: str, primary: str, declared: Mapping[str, bool]) -> bool:
    """Tells whether smaller is better in a column such as ``AF:ndcg@10`` or ``last:stage 1``."""
    name, _, metric = column.partition(":")
    if name in ALWAYS_SMALLER or name in ALWAYS_LARGER:
        return name in ALWAYS_SMALLER
    metric = primary if name == "last" else metric
    return bool(declared.get(metric, smaller_is_better(metric)))


def _table(
    labels: tuple[Any, ...], done: pd.DataFrame, columns: list[str], declared: Mapping[str, bool], asked: Asked
) -> Table:
    methods = list(dict.fromkeys(done["strategy"]))
    reference = asked.against or ("FineTune" if "FineTune" in methods else methods[0])
    keys = [key for key in ("order", "seed") if key in done]
    own = {method: done[done["strategy"] == method].set_index(keys) for method in methods}
    smaller = {name: column_is_smaller(name, str(done["primary"].iloc[0]), declared) for name in columns}
    entries: dict[str, dict[str, Entry]] = {}
    for name in columns:
        values = {method: frame[name].astype(float) for method, frame in own.items()}
        means = {method: mean_and_interval(v) for method, v in values.items()}
        pairs: dict[str, Paired] = {}
        for method in methods:
            if method != reference and reference in own:
                a, b = values[method].align(values[reference], join="inner")
                pairs[method] = paired(a.to_numpy(), b.to_numpy(), asked.test)
        p = dict(zip(pairs, adjusted([pair.p for pair in pairs.values()], asked.correction), strict=True))
        there = {method: m for method, (m, _) in means.items() if not math.isnan(m)}
        best = (min if smaller[name] else max)(there.values(), default=math.nan)
        entries[name] = {}
        for method in methods:
            pair, corrected = pairs.get(method), p.get(method, math.nan)
            mark = ""
            if pair is not None and corrected < asked.alpha:
                mark = BETTER if (pair.difference < 0) == smaller[name] else WORSE
            mean, half = means[method]
            entries[name][method] = Entry(mean, half, mean == best, pair, corrected, mark)
    costs: dict[str, dict[str, tuple[float, float]]] = {}
    for method, frame in own.items():
        costs[method] = {}
        for name in COSTS:
            mean = float(frame[name].astype(float).mean())
            base = float(own[reference][name].astype(float).mean()) if reference in own else math.nan
            costs[method][name] = (mean, mean / base if base else math.nan)
    runs = {method: len(frame) for method, frame in own.items()}
    return Table((labels[0], labels[1], labels[2]), reference, smaller, runs, entries, costs)


# -- words --------------------------------------------------------------------------------------------------------


def label_of(column: str) -> str:
    """Returns the heading of a column."""
    return column.removeprefix("last:").replace(":", " ")


def note(asked: Asked) -> str:
    """Returns how the marks of a table came about, in a paragraph."""
    text = (
        f"Mean ± half-width of the 95 % t interval over seeds; the best mean of a column is bold. {BETTER} and "
        f"{WORSE}: significantly better and worse than the reference ({TESTS[asked.test]} test over seeds, two-sided, "
        f"{CORRECTIONS[asked.correction]} correction over the methods of a column, level {asked.alpha:g}). A factor "
        f"in brackets is over the reference's. Seeds say how far training repeats; they do not make one log "
        "into several."
    )
    if asked.test == "wilcoxon":
        text += " With fewer than six seeds this test cannot reach 0.05."
    return text


def markdown(tables: Sequence[Table], asked: Asked, scale: float = 1.0) -> str:
    """Returns the tables as Markdown."""
    lines: list[str] = []
    for table in tables:
        dataset, scheduler, model = table.labels
        arrows = [f"{label_of(name)} {'↓' if less else '↑'}" for name, less in table.smaller.items()]
        head = ["strategy", "seeds", *arrows, *COSTS.values()]
        lines += [f"### {model} on {dataset}, {scheduler}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for method, n in table.runs.items():
            cells = []
            for name in table.entries:
                entry = table.entries[name][method]
                text = number(entry, scale)
                text = f"**{text}**" if entry.best else text
                cells.append(f"{text} {entry.mark}".rstrip())
            cells += [_cost(*cost) for cost in table.costs[method].values()]
            name = f"{method} (reference)" if method == table.reference else method
            lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, note(asked)]) + "\n"


def number(entry: Entry, scale: float) -> str:
    """Returns mean and interval in the scale of the report."""
    if math.isnan(entry.mean):
        return "n/a"
    digits = 4 if scale == 1 else 2
    half = "" if math.isnan(entry.half) else f" ± {entry.half * scale:.{digits}f}"
    return f"{entry.mean * scale:.{digits}f}{half}"


def _cost(mean: float, ratio: float) -> str:
    if math.isnan(mean):
        return "n/a"
    return f"{mean:,.0f}" + ("" if math.isnan(ratio) else f" ({ratio:.2f}x)")


_LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


def latex(text: str) -> str:
    """Returns text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def latex_tables(tables: Sequence[Table], asked: Asked, scale: float = 1.0) -> str:
    """Returns the tables as LaTeX: one ``table`` each, with the rules of ``booktabs``; no other package is needed."""
    lines = [r"% needs \usepackage{booktabs}"]
    for table in tables:
        dataset, scheduler, model = map(latex, table.labels)
        arrows = {True: r"$\downarrow$", False: r"$\uparrow$"}
        head = [f"{latex(label_of(name))} {arrows[less]}" for name, less in table.smaller.items()]
        lines += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{model} on {dataset}, {scheduler}. {latex_note(asked)}}}",
        ]
        lines += [rf"\begin{{tabular}}{{lr{'r' * (len(head) + len(COSTS))}}}", r"\toprule"]
        lines += [" & ".join(["strategy", "seeds", *head, *map(latex, COSTS.values())]) + r" \\", r"\midrule"]
        for method, n in table.runs.items():
            cells = []
            for name in table.entries:
                entry = table.entries[name][method]
                text = number(entry, scale).replace("±", r"$\pm$")
                text = rf"\textbf{{{text}}}" if entry.best else text
                cells.append(text + (f"$^{{{entry.mark}}}$" if entry.mark else ""))
            cells += [_cost(*cost).replace("x)", r"$\times$)") for cost in table.costs[method].values()]
            lines.append(" & ".join([latex(method), str(n), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def latex_note(asked: Asked) -> str:
    """Returns :func:`note` for LaTeX."""
    text = latex(note(asked)).replace("±", r"$\pm$")
    return text.replace(f"{BETTER} and {WORSE}:", f"$^{{{BETTER}}}$ and $^{{{WORSE}}}$:")


def pairs_frame(tables: Sequence[Table], asked: Asked) -> pd.DataFrame:
    """Returns one row a test: table, column, methods, pairs, difference, its interval, p, corrected p, effect."""
    out = []
    for table in tables:
        for name, entries in table.entries.items():
            for method, entry in entries.items():
                if entry.pair is None:
                    continue
                place = dict(zip(("dataset", "scheduler", "model"), table.labels, strict=True))
                pair = entry.pair
                out.append(
                    {**place, "column": name, "strategy": method, "reference": table.reference, "pairs": pair.n}
                    | {"difference": pair.difference, "half_width": pair.half, "effect": pair.effect, "p": pair.p}
                    | {"p_corrected": entry.p, "mark": entry.mark, "test": asked.test, "correction": asked.correction}
                )
    return pd.DataFrame(out)


def write_comparison(plan: Plan, folder: Path, asked: Asked) -> str:
    """Writes ``compare.md``, ``compare.tex`` and ``compare.csv`` beside a study's tables; returns the Markdown.

    Raises:
        ConfigError: If the reference is no method of the study.
    """
    tables, scale = tables_of(plan, folder, asked), float(plan.report.get("scale", 1))
    text = markdown(tables, asked, scale)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "compare.md", f"# {plan.name}, {plan.preset}\n\n{text}")
        write_atomically(folder / "compare.tex", latex_tables(tables, asked, scale))
        write_atomically(folder / "compare.csv", pairs_frame(tables, asked).to_csv(index=False))
    return text
