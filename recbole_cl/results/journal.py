"""What a run has found out so far, and the results made of it.

The journal is filled while the stream is walked and is part of every checkpoint; ``result.json``, ``records.csv`` and
the report are functions of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recbole_cl import checkpoint, disk
from recbole_cl.evaluation.metrics import constant_answer
from recbole_cl.evaluation.outcome import Outcome
from recbole_cl.results.exposure import exposure_disparity, head_mask
from recbole_cl.results.matrix import smaller_is_better, summarise_all
from recbole_cl.results.records import REFERENCE, Records
from recbole_cl.results.reports import plain
from recbole_cl.results.steps import stage_curve, steps_to_95
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage

LOGGER = logging.getLogger("recbole_cl")
PRIMARY = "primary"
"""Name of the matrix whose columns each hold their task's own primary metric, where those differ."""
RESULTS = ("result.json", "records.csv", "rows.csv", "report.html")
"""What a run that is complete has found out."""
OWN = (*RESULTS, "checkpoints", "versions", "store", "base", "frozen")
"""All that a run writes into its folder."""
PACKAGES = ("recbole-cl", "recbole", "torch", "numpy", "pandas", "scipy", "peft", "transformers", "faiss-cpu")


class Journal:
    """Records, curves, costs and warnings of one run.

    Args:
        config: The run's configuration.
        stream: The stream.

    Attributes:
        records: Every result of an evaluation.
        curves: One point an epoch: stage, pass, targets, losses, validation.
        costs: One entry a stage: seconds, memory, parameters.
        disparity: One entry a stage: exposure of items, quality for users.
        cold: One entry an evaluation: targets, and those that the model never trained on.
        scratch: Scores on each stage of a model trained on it alone, by metric.
        reports: One entry a stage and teller (the model, a strategy): numbers, tables and figures of its own.
        warnings: What went on in spite of something.
        listeners: Functions that are told every point of a curve.
    """

    KEYS = ("curves", "costs", "disparity", "cold", "scratch", "reports", "warnings")

    def __init__(self, config: Any, stream: Stream) -> None:
        self.config, self.stream = config, stream
        self.records = Records()
        self.curves: list[dict[str, Any]] = []
        self.costs: list[dict[str, Any]] = []
        self.disparity: list[dict[str, Any]] = []
        self.cold: list[dict[str, Any]] = []
        self.scratch: dict[str, list[float | None]] = {}
        self.reports: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.rows: list[dict[str, Any]] = []  # own metrics of each target: arrays, under own_metric_rows
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    # -- writing into it ------------------------------------------------------------------------------------------

    def warn(self, message: str) -> None:
        """Logs a warning and keeps it for the report."""
        LOGGER.warning(message)
        self.warnings.append(message)

    def add_point(self, point: dict[str, Any]) -> None:
        """Adds a point of the learning curves, at the end of an epoch."""
        self.curves.append(point)
        for listener in self.listeners:
            listener(point)

    def add_report(self, stage: Stage, report: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds what the model or the strategies tell at the end of a stage.

        Args:
            stage: The stage.
            report: Who tells to ``{"numbers": ..., "tables": ..., "figures": ...}``, each of them optional.
        """
        for who, content in report.items():
            if content:
                self.reports.append({"stage": stage.index, "who": who, **plain(who, content)})

    def primary(self, stage: Stage) -> str:
        """Returns the primary metric of a stage: its task's, or ``valid_metric``."""
        return stage.task.primary_metric(str(self.config["valid_metric"]))

    def bigger(self, stage: Stage) -> bool:
        """Tells whether more of the stage's primary metric is better."""
        primary, valid_metric = self.primary(stage), str(self.config["valid_metric"]).lower()
        return bool(self.config["valid_metric_bigger"]) if primary == valid_metric else not self._smaller(primary)

    def _smaller(self, metric: str) -> bool:
        """Tells whether less of a metric, RecBole's or the model's own, is better."""
        bigger = self.config.own_metrics.get(metric)
        return smaller_is_better(metric) if bigger is None else not bigger

    def worst(self, stage: Stage) -> float:
        """Returns what every value of the stage's primary metric is better than."""
        return -math.inf if self.bigger(stage) else math.inf

    def record(self, outcome: Outcome, t: int, stage: Stage, mode: str) -> None:
        """Adds cell (t, s), over all targets and by stratum, for items and for the coarser levels of them."""
        for level, stratum, metrics, n in outcome.parts():
            keys: dict[str, Any] = {"t": t, "s": stage.index, "n": n, "stratum": stratum, "level": level}
            for metric, value in self._with_primary(metrics, stage).items():
                # The columns of "primary" differ in how they were scored; as a matrix they are one.
                self.records.add(metric=metric, value=value, mode=PRIMARY if metric == PRIMARY else mode, **keys)
        self.cold.append({"t": t, "s": stage.index, "n": outcome.n, "n_cold": outcome.n_cold})
        if outcome.rows:
            self.rows.append({"t": t, "s": stage.index, **outcome.rows})

    def record_reference(self, outcome: Outcome, stage: Stage) -> None:
        """Adds b[s] of an untrained model."""
        for metric, value in self._with_primary(outcome.metrics, stage).items():
            self.records.add(metric=metric, t=-1, s=stage.index, value=value, n=outcome.n, mode=REFERENCE)

    def record_scratch(self, outcome: Outcome, stage: Stage) -> None:
        """Adds the scores of a model that was trained on the stage alone."""
        for metric, value in self._with_primary(outcome.metrics, stage).items():
            self.scratch.setdefault(metric, [None] * len(self.stream))[stage.index] = value

    def record_exposure(self, outcome: Outcome, stage: Stage) -> None:
        """Adds the disparity of exposure right after a stage was trained; head and active are counted so far."""
        if outcome.recommended is None or outcome.users is None:
            return
        table, ratio = self.stream.table, self.config["head_ratio"]
        past = np.concatenate([s.train.position for s in self.stream.stages[: stage.index + 1]])
        counts = np.bincount(table.item[past], minlength=table.n_items)
        active = head_mask(np.bincount(table.user[past], minlength=table.n_users), ratio)
        catalogue = np.arange(table.n_items) > 0
        if self.config["candidates"] == "seen":
            catalogue[stage.catalogue :] = False
        entry = exposure_disparity(
            outcome.recommended,
            head_mask(counts, ratio),
            catalogue,
            outcome.utility,
            active[outcome.users] if outcome.utility is not None else None,
            np.unique(outcome.users, return_inverse=True)[1],
        )
        self.disparity.append({"stage": stage.index, **entry})

    def _with_primary(self, metrics: dict[str, float], stage: Stage) -> dict[str, float]:
        """Adds the column's primary metric under one name where the stream's tasks differ in theirs.

        There is no such matrix where less is better in some column: its summaries would have no direction.
        """
        names = {self.primary(s) for s in self.stream.stages}
        if len(names) == 1 or any(self._smaller(name) for name in names):
            return metrics
        value = metrics.get(self.primary(stage))
        return metrics if value is None else {**metrics, PRIMARY: value}

    def row(self, stage: Stage) -> str:
        """Returns row t of the stage's primary metric as words for the log."""
        metric = self.primary(stage)
        if metric not in self.records.metrics():
            return f"{metric}: not evaluated"
        values = self.records.matrix(metric, n_stages=len(self.stream))[stage.index]
        numbers = " ".join("-" if np.isnan(v) else f"{v:.4f}" for v in values)
        return f"{metric} on stages 1..{len(self.stream)}: {numbers}"

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns everything in it."""
        own = {"rows": self.rows} if self.rows else {}
        return {"records": self.records.state_dict(), **{key: getattr(self, key) for key in self.KEYS}, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts everything back; warnings of this process stay."""
        self.records.load_state_dict(state["records"])
        fresh = self.warnings
        for key in self.KEYS:
            setattr(self, key, state[key])
        self.rows = list(state.get("rows", []))
        self.warnings = list(dict.fromkeys([*state["warnings"], *fresh]))

    # -- results --------------------------------------------------------------------------------------------------

    def result(self, folder: Path) -> dict[str, Any]:
        """Returns what ``result.json`` holds."""
        size, names = len(self.stream), self.records.metrics()
        matrices = {m: self.records.matrix(m, n_stages=size) for m in names}
        reference = self._reference(names)
        strata = [name for name in self.records.strata() if name != "all"]
        levels = {
            level: {m: _lists(self.records.matrix(m, level=level, n_stages=size)) for m in self.records.metrics(level)}
            for level in self.records.levels()
        }
        return {
            "name": f"{self.config['model']} on {self.config['dataset']}: {self.config.strategy_name}",
            "config": settings(self.config),
            "given": sorted({*getattr(self.config, "external_config_dict", ())} & {*settings(self.config)}),
            "versions": versions(),
            "seed": self.config["seed"],
            "output_dir": str(folder),
            "primary_metric": PRIMARY if PRIMARY in names else self.primary(self.stream.stages[0]),
            "stages": [self._stage_row(stage) for stage in self.stream.stages],
            "matrix": {m: _lists(v) for m, v in matrices.items()},
            **summarise_all(matrices, reference, self._smaller),
            "smaller_is_better": {m: self._smaller(m) for m in names},
            "fwt_reference": self.config["fwt_reference"],
            "reference": {m: None if v is None else _list(v) for m, v in reference.items()},
            "scratch": self.scratch or None,
            "curves": self.curves,
            "steps_to_95": [
                steps_to_95(self._last_pass(s), smaller_is_better=not self.bigger(s)) for s in self.stream.stages
            ],
            "strata": {
                m: {name: _lists(self.records.matrix(m, stratum=name, n_stages=size)) for name in strata} for m in names
            },
            **({"levels": levels} if levels else {}),
            "disparity": self.disparity,
            "cold": self.cold,
            "cost": self.costs,
            "reports": self.reports,
            "warnings": list(dict.fromkeys([*self.config.warnings, *self.stream.warnings, *self.warnings])),
        }

    def _reference(self, names: list[str]) -> dict[str, np.ndarray | None]:
        if self.config["fwt_reference"] == "untrained":
            return {m: self.records.reference(m, n_stages=len(self.stream)) for m in names}
        found = {m: np.array([np.nan if v is None else v for v in row]) for m, row in self.scratch.items()}
        return {m: found.get(m) for m in names}

    def _stage_row(self, stage: Stage) -> dict[str, Any]:
        own = [c["n_cold"] for c in self.cold if c["t"] == stage.index == c["s"]]
        more = {"n_cold_targets": own[0] if own else None, "primary_metric": self.primary(stage)}
        constant = constant_answer(self.primary(stage), stage)
        return {**stage.describe(), **more, **({} if constant is None else {"constant_answer": constant})}

    def _last_pass(self, stage: Stage) -> list[tuple[int, float | None]]:
        own = [c["pass"] for c in self.curves if c["stage"] == stage.index]
        return stage_curve(self.curves, stage.index, self.primary(stage), own[-1]) if own else []

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes ``result.json`` and ``records.csv`` and returns the result."""
        result = self.result(folder)
        with checkpoint.explained(folder):
            checkpoint.write_atomically(folder / "result.json", json.dumps(result, indent=1, allow_nan=False))
            self.records.to_csv(folder / "records.csv")
            if self.rows:
                frame = pd.concat([pd.DataFrame(cell) for cell in self.rows], ignore_index=True)
                disk.write_atomically(folder / "rows.csv", frame.to_csv(index=False))
        return result


def settings(config: Any) -> dict[str, Any]:
    """Returns the effective settings as they look when read back from JSON."""
    read: dict[str, Any] = json.loads(json.dumps(config.fingerprint()))
    return read


def versions() -> dict[str, str]:
    """Returns the versions that a number depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["threads"] = str(torch.get_num_threads())
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was not installed
            continue
    return found


def open_folder(folder: Path) -> None:
    """Makes sure before any work that the folder can be written; what lies there from an earlier run stays.

    Raises:
        OutputError: If it cannot be written, or something that a run writes is a link there.
    """
    with checkpoint.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        disk.refuse_links(folder, OWN)
        probe = folder / ".probe"
        with open(disk.create(probe), "wb") as file:
            file.write(b"0" * 4096)
        probe.unlink()


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Moves what an earlier run left in a folder to ``earlier-1``, ``earlier-2``, ...: just before it would be lost.

    Args:
        folder: The run's folder.
        names: What is about to be written.

    Raises:
        OutputError: If the folder cannot be written.
    """
    with checkpoint.explained(folder):
        old = [name for name in names if (folder / name).exists()]
        if not old:
            return
        number = 1
        while os.path.lexists(folder / f"earlier-{number}"):
            number += 1
        aside = folder / f"earlier-{number}"
        aside.mkdir()
        for name in old:
            (folder / name).rename(aside / name)
        LOGGER.warning("output_dir: the results of an earlier run were moved to %s", aside)


def _list(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]


def _lists(values: np.ndarray) -> list[list[float | None]]:
    return [_list(row) for row in values]
