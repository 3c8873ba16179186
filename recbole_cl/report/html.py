"""``report.html``: the sections of a run's page, each a function of the result (``skeleton.py``: the page itself)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from recbole_cl.report import figures, reports, text
from recbole_cl.report.labels import COST, ITEM_DISPARITY, USER_DISPARITY
from recbole_cl.report.skeleton import document, table
from recbole_cl.results.strata import STRATA


def page(result: Mapping[str, Any], script: str | None = None) -> str:
    """Builds the whole page.

    Args:
        result: The run's result, as in ``result.json``; missing keys leave their part out or say so.
        script: Where Plotly's script lies, relative to the page; by default the page holds it.

    Returns:
        The HTML text.
    """
    return _Page(result).build(script)


class _Page:
    """One page under construction: the sections and the figures that they refer to by name."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result = result
        self.metrics = text.metrics_of(result)
        self.names = text.stage_names(result)
        self.figures: dict[str, figures.Figure] = {}

    def build(self, script: str | None = None) -> str:
        """Returns the HTML text; see :func:`page`."""
        sections = [
            ("headline", "Headline numbers", self.headline()),
            ("stages", "Stages", self.stages()),
            ("matrix", "Result matrix", self.matrix()),
            ("forgetting", "Forgetting and transfer", self.forgetting()),
            ("curves", "Learning curves", self.curves()),
            ("strata", "Warm and new users and items", self.strata()),
            ("disparity", "Exposure disparity", self.disparity()),
            ("costs", "Costs", self.costs()),
            ("terms", "Loss terms", self.terms()),
            *(
                [("reports", "Reports", reports_section)]
                if (reports_section := reports.section(self.result, self.figure))
                else []
            ),
            ("warnings", f"Warnings ({len(self.result.get('warnings') or ())})", self.warnings()),
            ("configuration", "Configuration", self.configuration()),
            ("versions", "Versions", self.versions()),
        ]
        body = "".join(
            f'<section id="{key}"><h2>{escape(title)}</h2>{inner}</section>' for key, title, inner in sections
        )
        links = "".join(f'<a href="#{key}">{escape(title.split(" (")[0])}</a>' for key, title, _ in sections)
        name = escape(text.clean(self.result.get("name") or "run"))
        chips = "".join(f"<li><span>{escape(k)}</span><b>{escape(v)}</b></li>" for k, v in text.facts(self.result))
        folder = text.clean(self.result.get("output_dir") or "")
        return document(
            name,
            f'<nav class="bar"><div>{links}{self.choice()}</div></nav><main>'
            f'<header><h1>{name}</h1><ul class="chips">{chips}</ul></header>'
            "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
            f"{body}<footer>RecBole-CL{': ' + escape(folder) if folder else ''}. Stages count from 1.</footer></main>",
            self.figures,
            script,
        )

    # ----------------------------------------------------------------------------------------------------------
    # Parts

    def choice(self) -> str:
        """Returns the switch between metrics, where there is something to switch."""
        if len(self.metrics) < 2:
            return ""
        options = "".join(f'<option value="{escape(m)}">{escape(text.clean(m))}</option>' for m in self.metrics)
        return f'<label>metric <select id="metric" autocomplete="off">{options}</select></label>'

    def per_metric(self, inner: Iterable[tuple[str, str]]) -> str:
        """Wraps one block a metric; all but the primary one are hidden until they are chosen."""
        return "".join(
            f'<div data-metric="{escape(m)}"{"" if m == self.metrics[0] else " hidden"}>{block}</div>'
            for m, block in inner
        )

    def figure(self, key: str, figure: figures.Figure) -> str:
        """Keeps a figure and returns the place where it is drawn."""
        self.figures[key] = figure
        height = figure["layout"]["height"]
        return f'<div class="figure" data-figure="{escape(key)}" style="height:{height:.0f}px"></div>'

    def headline(self) -> str:
        """Returns the cards of the summaries and the table of all metrics."""
        summary, formulas = self.result.get("summary") or {}, self.result.get("formulas") or {}
        reasons, names = self.result.get("reasons") or {}, text.summary_names(self.result)
        if not names or not self.metrics:
            return _none("No summary was recorded.")

        def cards(metric: str) -> str:
            found = []
            for name in names:
                if name in ("plasticity", "stability"):
                    continue  # parts of the H-mean; they stand in the table below
                label, how = text.SUMMARY_LABELS.get(name, (text.clean(name), ""))
                value, reason = text.lookup(summary.get(name), metric), text.lookup(reasons.get(name), metric)
                shown = text.number(value, "")
                said = f'<div class="reason">{escape(text.clean(reason))}</div>' if reason else ""
                short = f" ({escape(name)})" if name in text.SUMMARY_LABELS and name.isupper() else ""
                found.append(
                    f'<div class="card"><div class="what"><b>{escape(label)}{short}</b><br>{escape(how)}</div>'
                    + (f'<div class="value">{shown}</div>' if shown else '<div class="value none">not defined</div>')
                    + f'<div class="formula">{escape(text.clean(formulas.get(name) or ""))}</div>{said}</div>'
                )
            return f'<p class="note">{escape(text.clean(metric))}</p><div class="cards">{"".join(found)}</div>'

        rows = [[m, *(text.number(text.lookup(summary.get(n), m)) for n in names)] for m in self.metrics]
        everything = table(["metric", *names], rows, wide=True)
        return self.per_metric((m, cards(m)) for m in self.metrics) + f"<h3>All metrics</h3>{everything}"

    def stages(self) -> str:
        """Returns the table of the stages."""
        stages = list(self.result.get("stages") or ())
        if not stages:
            return _none("No stages were recorded.")
        keys = [k for k in text.STAGE_COLUMNS if any(stage.get(k) is not None for stage in stages)]
        known = {"name", *text.STAGE_COLUMNS}
        others = [k for k in dict.fromkeys(k for stage in stages for k in stage) if k not in known]
        others = [k for k in others if any(text.finite(stage.get(k)) is not None for stage in stages)]
        # What a stage asks, and what its column of "primary" holds, are told where stages differ in them.
        tasks = {"task": "task", "primary_metric": "metric"}
        tasks = {k: head for k, head in tasks.items() if len({str(stage.get(k) or "") for stage in stages}) > 1}
        rows = [
            [
                str(s + 1),
                text.clean(stage.get("name") or ""),
                *(text.clean(stage.get(k) or "") for k in tasks),
                *((text.moment if k in ("start", "end") else text.count)(stage.get(k)) for k in keys),
                *(text.count(stage.get(k)) for k in others),
            ]
            for s, stage in enumerate(stages)
        ]
        heads = ["#", "name", *tasks.values(), *(text.STAGE_COLUMNS[k] for k in keys)]
        heads += [k.replace("_", " ") for k in others]
        note = "train, valid and test count targets; cold ones are test targets whose user or item is not trained on."
        return f'<p class="note">{note}</p>{table(heads, rows, left=tuple(range(2 + len(tasks))), wide=True)}'

    def matrix(self) -> str:
        """Returns the heat maps, each with its numbers as a table."""
        if not self.metrics or not self.names:
            return _none("No stage was evaluated.")

        def block(metric: str) -> str:
            matrix = text.matrix_of(self.result, metric)
            rows = [[self.names[t], *(text.number(v) for v in row)] for t, row in enumerate(matrix)]
            reference = text.lookup(self.result.get("reference"), metric)
            if reference:
                rows.append(["reference b[s]", *(text.number(v) for v in reference)])
            numbers = table(["trained up to", *self.names[: len(matrix)]], rows)
            return (
                self.figure(f"matrix {metric}", figures.heat_map(self.result, metric))
                + f"<details><summary>The numbers of {escape(text.clean(metric))}</summary>{numbers}</details>"
            )

        note = (
            "R[t, s]: the model trained up to stage t (row) on the test targets of stage s (column). Framed: the stage "
            "just trained. Right of the frame: stages not trained on yet. Grey: not evaluated."
        )
        return f'<p class="note">{note}</p>' + self.per_metric((m, block(m)) for m in self.metrics)

    def forgetting(self) -> str:
        """Returns the forgetting curves."""
        if not self.metrics or not self.names:
            return _none("No stage was evaluated.")
        note = (
            "Each line is one evaluated stage, followed through the models of all stages. Dotted: before it was "
            "trained on (forward transfer). Large marker: right after. A falling solid line is forgetting."
        )
        blocks = ((m, self.figure(f"forgetting {m}", figures.forgetting_curves(self.result, m))) for m in self.metrics)
        return f'<p class="note">{note}</p>' + self.per_metric(blocks)

    def curves(self) -> str:
        """Returns the learning curves and the table of Steps-to-95 %."""
        records = list(self.result.get("curves") or ())
        validated = list(dict.fromkeys(str(m) for r in records for m in r.get("valid") or {}))
        if not validated:
            return _none("No validation was recorded.") + self.steps()

        def block(metric: str) -> str:
            own = next((v for v in validated if v.lower() == metric.lower()), None)
            name = f"{escape(text.clean(metric))} was not validated; these are the metrics that chose the epochs."
            other = "" if own else f'<p class="note">{name}</p>'
            return other + self.figure(f"curves {own or metric}", figures.learning_curves(self.result, own))

        note = "Validation within each stage. A star marks the epoch that was kept."
        inner = self.per_metric((m, block(m)) for m in self.metrics) if self.metrics else block(validated[0])
        return f'<p class="note">{note}</p>{inner}{self.steps()}'

    def steps(self) -> str:
        """Returns the table of Steps-to-95 %."""
        steps = self.result.get("steps_to_95")
        if not steps:
            return ""
        stages = list(self.result.get("stages") or ())
        rows = []
        for s, value in enumerate(steps):
            stage = stages[s] if s < len(stages) else {}
            epochs = {r.get("epoch") for (i, _), rs in figures.passes(self.result).items() if i == s for r in rs}
            train = text.finite(stage.get("n_train"))
            reached = text.finite(value)
            share = reached / train if train and reached is not None else None
            name = self.names[s] if s < len(self.names) else str(s + 1)
            passes = f"{share:.1f}" if share is not None else "-"
            rows.append([name, str(len(epochs)) if epochs else "-", text.count(value), passes])
        note = (
            "Training targets after which the validation first reached 95 % of the best value of its stage; measured "
            "points only, nothing interpolated."
        )
        rows_table = table(["stage", "epochs run", "targets to 95 %", "in passes over the stage"], rows)
        return f'<h3>Steps to 95 %</h3><p class="note">{note}</p>{rows_table}'

    def strata(self) -> str:
        """Returns one table a metric: strata by stages, right after training, and the last model."""
        strata = self.result.get("strata") or {}
        label = [m for m in self.metrics if text.lookup(strata, m)]
        if not label:
            return _none("No strata were recorded.")

        def block(metric: str) -> str:
            found = text.lookup(strata, metric)
            if not found:
                return _none(f"No strata were recorded for {metric}.")
            order = [s for s in STRATA if s in found] + [s for s in found if s not in STRATA]
            rows = []
            for stratum in order:
                diagonal, last = text.diagonal_and_last(found[stratum], len(self.names))
                ends = [text.mean(diagonal), text.mean(last)]
                label = stratum.replace("_", " ")
                what = STRATA.get(stratum, "")
                rows.append([label, *(text.number(v) for v in [*diagonal, *ends]), what])
            heads = ["stratum", *self.names, "mean", "last model", "holds"]
            return table(heads, rows, long=(len(heads) - 1,), wide=True)

        note = (
            "Each stage right after training on it, R[s,s], told for parts of its test targets; the mean over the "
            "stages that have a value; and the mean of the last model over all stages."
        )
        return f'<p class="note">{note}</p>' + self.per_metric((m, block(m)) for m in self.metrics)

    def disparity(self) -> str:
        """Returns the exposure disparity of each stage: two figures, the table, the definitions."""
        found = [d if isinstance(d, Mapping) else {} for d in self.result.get("disparity") or ()]
        if not any(found):
            return _none("No exposure was recorded.")
        names = [self.names[s] if s < len(self.names) else str(s + 1) for s in range(len(found))]

        def series(keys: Mapping[str, str]) -> dict[str, list[float | None]]:
            return {label: [text.finite(d.get(key)) for d in found] for key, label in keys.items()}

        items = series({"exp_head": "Exp head", "exp_tail": "Exp tail", "item_disparity": "disparity"})
        users = series(
            {"exp_active": "Exp hi (active)", "exp_inactive": "Exp lo (inactive)", "user_disparity": "disparity"}
        )
        drawn = (
            '<div class="two"><div><h3>Items: head and tail</h3>'
            + self.figure("disparity items", figures.lines(names, items, "exposure (1 = in proportion)"))
            + "</div><div><h3>Users by activity</h3>"
            + self.figure("disparity users", figures.lines(names, users, "mean of the metric"))
            + "</div></div>"
        )
        known = set(ITEM_DISPARITY) | set(USER_DISPARITY) | {"stage"}
        others = dict.fromkeys(k for d in found for k in d if k not in known and text.finite(d[k]) is not None)
        tables = ""
        for labels in (ITEM_DISPARITY, USER_DISPARITY, {k: k.replace("_", " ") for k in others}):
            keys = [k for k in labels if any(d.get(k) is not None for d in found)]
            rows = [
                [names[s], *((text.count if k.startswith("n_") else text.number)(d.get(k)) for k in keys)]
                for s, d in enumerate(found)
            ]
            tables += table(["stage", *(labels[k] for k in keys)], rows, wide=True) if keys else ""
        definitions = dict.fromkeys(
            (key.removeprefix("definition_"), text.clean(value))
            for d in found
            for key, value in d.items()
            if key.startswith("definition") and value
        )
        said = "".join(
            f'<p class="note"><b>{escape(text.clean(what.replace("_", " ")))}</b> <code>{escape(value)}</code></p>'
            for what, value in definitions
        )
        return drawn + tables + said

    def costs(self) -> str:
        """Returns the bars of seconds and memory and the table of all costs."""
        found = [c if isinstance(c, Mapping) else {} for c in self.result.get("cost") or ()]
        if not any(found):
            return _none("No costs were recorded.")
        names = [self.names[s] if s < len(self.names) else str(s + 1) for s in range(len(found))]

        def values(key: str) -> list[float | None]:
            return [text.finite(c.get(key)) for c in found]

        times = {"training": values("train_seconds"), "evaluation": values("eval_seconds")}
        rest = [
            None if whole is None else max(0.0, whole - sum(v or 0.0 for v in parts))
            for whole, *parts in zip(values("seconds"), *times.values(), strict=True)
        ]
        # What is neither training nor evaluation (importances, exemplars, checkpoints) is a cost of the strategy.
        if any(v and v > 0.005 * (w or 1.0) for v, w in zip(rest, values("seconds"), strict=True)):
            times["the rest"] = rest
        times = {name: column for name, column in times.items() if any(v is not None for v in column)}
        halves = [("Time", self.figure("cost seconds", figures.bars(names, times, "seconds")))] if times else []
        if any(v is not None for v in values("peak_memory_mb")):
            memory = {"peak memory": values("peak_memory_mb")}
            halves.append(("Peak memory", self.figure("cost memory", figures.bars(names, memory, "MB"))))
        drawn = "".join(f"<div><h3>{title}</h3>{figure}</div>" for title, figure in halves)
        keys = [k for k in COST if any(c.get(k) is not None for c in found)]
        others = [k for k in dict.fromkeys(k for c in found for k in c) if k not in COST and k != "stage"]
        others = [k for k in others if any(text.finite(c.get(k)) is not None for c in found)]
        rows = [
            [names[s], *(COST[k][1](c.get(k)) for k in keys), *(text.number(c.get(k)) for k in others)]
            for s, c in enumerate(found)
        ]
        heads = ["stage", *(COST[k][0] for k in keys), *(k.replace("_", " ") for k in others)]
        return f'<div class="two">{drawn}</div>{table(heads, rows, wide=True)}'

    def terms(self) -> str:
        """Returns the loss terms."""
        figure = figures.loss_terms(self.result)
        if not figure["data"]:
            return _none("No loss was recorded.")
        note = "The loss and its terms by name, a point an epoch; dotted lines part the stages."
        return f'<p class="note">{note}</p>' + self.figure("terms", figure)

    def warnings(self) -> str:
        """Returns the list of warnings."""
        warnings = [text.clean(w) for w in self.result.get("warnings") or ()]
        if not warnings:
            return _none("None.")
        return f'<ul class="warnings">{"".join(f"<li>{escape(w)}</li>" for w in warnings)}</ul>'

    def configuration(self) -> str:
        """Returns the tables of the configuration: what was given for this run first."""
        config = dict(self.result.get("config") or {})
        if not config:
            return _none("No configuration was recorded.")
        given = [key for key in self.result.get("given") or () if key in config]
        blocks = [("given for this run", given), ("as the files have it", sorted({*config} - {*given}, key=str))]
        found = []
        for heading, keys in blocks:
            rows = [[str(key), _setting(config[key])] for key in keys]
            if rows:
                shown = table(["property", "value"], rows, left=(0,), long=(1,), wide=True)
                head = f"<h3>{heading}</h3>" if given else ""
                found.append(f'{head}<div class="tall">{shown}</div>')
        return "".join(found)

    def versions(self) -> str:
        """Returns the table of the versions."""
        rows = [[str(k), _setting(v)] for k, v in (self.result.get("versions") or {}).items()]
        return table(["what", "version"], rows, left=(0,), long=(1,)) if rows else _none("No versions were recorded.")


def _none(sentence: str) -> str:
    return f'<p class="none">{escape(text.clean(sentence))}</p>'


def _setting(value: Any) -> str:
    if isinstance(value, str):
        return text.clean(value)
    return text.clean(json.dumps(value, ensure_ascii=False, default=str))
