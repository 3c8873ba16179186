"""What a study compares: a YAML file with presets, read into a list of cells.

::

    about: Every strategy on two logs.
    report: {metric: ndcg@10, summaries: [final_average, AF, BWT], plots: [curves]}
    presets:
      laptop:
        datasets: [lastfm-tags, {online-retail: {time_range: [2011-06-01, 2011-12-31]}}]
        schedulers: [TimeSlices]
        models: [BPR, {SASRec: {MAX_ITEM_LIST_LENGTH: 20}}]
        strategies: [FineTune, EWC, {EWC weak: {strategy: EWC, ewc_lambda: 1}}]
        seeds: [2020, 2021, 2022]
        settings: {n_stages: 5, epochs: 5}

An entry of an axis is a name, or a name with the properties that come with it; the properties of later axes win, in the
order datasets, schedulers, models, strategies. A study of tasks may have the axis ``orders``
(:mod:`recbole_cl.study.orders`), and any study a ``probe`` of its finished models (:mod:`recbole_cl.study.probes`).
Under ``share_base: True`` methods that differ after the first stage alone train that stage once a seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recbole_cl.config import find_dataset, properties_dir, read_properties
from recbole_cl.config.strategies import asked_strategies
from recbole_cl.disk import check_name
from recbole_cl.errors import ConfigError, nearest
from recbole_cl.registry import strategies
from recbole_cl.results.strata import STRATA
from recbole_cl.study.orders import order_name, task_orders
from recbole_cl.study.probes import read_probe

AXES = {"datasets": "dataset", "schedulers": "scheduler", "models": "model", "strategies": "strategy"}
"""Axes of a preset in the order in which their properties win, and the property that a bare name sets."""
PLOTS = {"curves": "", "orders": "orders", "probe": "probe"}
"""Kinds of plots, and the key that a preset needs for them."""
LABEL = "it names a folder of the study, so give another one, without '/', '\\\\' and NUL, and neither '.' nor '..'"
_PRESET_KEYS = (*AXES, "orders", "seeds", "settings", "probe", "about", "share_base", "report")
_PLAN_KEYS = ("about", "report", "presets", "logs")
_REPORT_KEYS = ("metric", "summaries", "strata", "scale", "published", "source", "plots", "by_stage")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        labels: Label on each axis: dataset, scheduler, model, strategy, and order where the study has that axis.
        seed: Seed.
        settings: Properties of the run, ``model`` and ``dataset`` among them.
        probe: What is measured of the finished model, with all its parameters; ``None`` for nothing.
        base: Folder, below the study's, of the cell whose first stage this one takes over (its own: it keeps it for
            others); ``None`` where every cell trains its own.
    """

    labels: Mapping[str, str]
    seed: int
    settings: Mapping[str, Any]
    probe: Mapping[str, Any] | None = None
    base: str | None = None

    @property
    def folder(self) -> str:
        """Folder of the run below the study's."""
        parts = [re.sub(r"[^\w.+-]+", "_", label) for label in self.labels.values()]  # checked to be names before
        return "/".join((*parts, f"seed{self.seed}"))

    @property
    def digest(self) -> str:
        """Hash of the settings: a finished run counts only for the settings that it was made with."""
        asked = dict(self.settings) if self.probe is None else {"settings": self.settings, "probe": self.probe}
        encoded = json.dumps(asked, sort_keys=True, default=str)
        return hashlib.blake2b(encoded.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A preset of a study.

    Args:
        name: Name of the study.
        preset: Name of the preset.
        about: What the preset is, in a sentence.
        cells: Its runs.
        report: What the tables tell: ``metric``, ``summaries``, ``strata`` (beside the last model's figures), ``scale``
            (100 for per cent), ``published`` (strategy to {column: figure}) and ``source`` of those, ``by_stage`` (a
            ``metric`` told for each stage, and ``published`` figures, one a stage); and the ``plots``.
        logs: Dataset to where it is to be had and what to call it, told where it is missing.
    """

    name: str
    preset: str
    about: str
    cells: tuple[Cell, ...]
    report: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, str] = field(default_factory=dict)

    def check_logs(self) -> None:
        """Raises a :class:`ConfigError` that says where a log is to be had, if one is missing."""
        for name, source in self.logs.items():
            cells = [cell for cell in self.cells if cell.settings["dataset"] == name]
            if not cells:
                continue
            try:
                find_dataset(name, cells[0].settings.get("data_path"))
            except ConfigError as error:
                told_of = " ".join(source.split())
                raise ConfigError(f"{error}. Where it is to be had, and what to call it: {told_of}") from error


def list_papers() -> list[str]:
    """Returns the protocols of papers that come with the package, one for each of their tables."""
    return sorted(file.stem for file in (properties_dir() / "paper").glob("*.yaml"))


def list_studies() -> list[str]:
    """Returns the names of the studies that come with the package."""
    return sorted(file.stem for file in (properties_dir() / "study").glob("*.yaml"))


def read_plan(study: str | Path, preset: str) -> Plan:
    """Reads one preset of a study.

    Args:
        study: Name of a study of the package, or a YAML file.
        preset: Name of the preset.

    Raises:
        ConfigError: If there is no such study or preset, a key of the file is unknown, or a label is no name of a
            folder; the message names it.
    """
    path = Path(study)
    if path.suffix not in (".yaml", ".yml"):
        folder = "paper" if str(study) in list_papers() else "study"
        path = properties_dir() / folder / f"{study}.yaml"
        if not path.is_file():
            known = [*list_studies(), *list_papers()]
            raise ConfigError(
                f"unknown study {str(study)!r}{nearest(str(study), known)} Known: {', '.join(known)}; or give a .yaml "
                f"file"
            )
    content = read_properties(path)
    _only(content, _PLAN_KEYS, str(path))
    presets = content.get("presets") or {}
    if preset not in presets:
        raise ConfigError(f"{path.name}: no preset {preset!r}{nearest(preset, presets)} It has {', '.join(presets)}")
    check_name(preset, f"{path.name}: the preset", LABEL)
    check_name(path.stem, "the study", "rename the file: the study's folder is called after it")
    asked = presets[preset]
    where = f"{path.name}, preset {preset}"
    _only(asked, _PRESET_KEYS, where)
    report = {**(content.get("report") or {}), **(asked.get("report") or {})}
    _check_report(report, asked, f"{path.name}, report")
    about = " ".join(str(text) for text in (content.get("about"), asked.get("about")) if text)
    return Plan(path.stem, preset, about, tuple(_cells(asked, where)), report, content.get("logs") or {})


def _only(given: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {given!r} is no mapping")
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), known)} Known: {', '.join(known)}")


def _check_report(report: Any, preset: Mapping[str, Any], where: str) -> None:
    _only(report, _REPORT_KEYS, where)
    for key, known in (("plots", PLOTS), ("strata", STRATA)):
        named = report.get(key) or []
        if not isinstance(named, list):
            raise ConfigError(f"{where}: {key} is {named!r}; give a list of {', '.join(known)}")
        for name in named:
            if name not in known:
                raise ConfigError(
                    f"{where}: {key} holds {name!r}, which is none of {', '.join(known)}{nearest(str(name), known)}"
                )
    by_stage = report.get("by_stage")
    if by_stage is not None and not _is_by_stage(by_stage):
        raise ConfigError(
            f"{where}: by_stage is {by_stage!r}; give {{metric: recall@20}}, and published: {{FineTune: [46.3, 48.0]}} "
            f"where there are figures of a paper, one a stage"
        )
    for name in report.get("plots") or []:
        if PLOTS[name] and preset.get(PLOTS[name]) is None:
            raise ConfigError(f"{where}: the plot {name!r} draws what the preset has no {PLOTS[name]!r} for; add it")


def _is_by_stage(asked: Any) -> bool:
    if not isinstance(asked, Mapping) or not isinstance(asked.get("metric"), str):
        return False
    published = asked.get("published", {})
    lists = isinstance(published, Mapping) and all(isinstance(figures, list) for figures in published.values())
    return lists and all(isinstance(x, (int, float)) for figures in published.values() for x in figures)


def _cells(asked: Mapping[str, Any], where: str) -> list[Cell]:
    axes = [_axis(asked, key, where) for key in AXES]
    seeds = asked.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ConfigError(f"{where}: seeds is {seeds!r}; give a list of whole numbers, such as [2020, 2021, 2022]")
    general, probe = asked.get("settings") or {}, read_probe(asked.get("probe"), where)
    cells = []
    for entries in itertools.product(*axes):
        settings: dict[str, Any] = dict(general)
        for _, more in entries:
            settings.update(more)
        labels = {name: label for name, (label, _) in zip(AXES.values(), entries, strict=True)}
        variants: list[tuple[dict[str, str], dict[str, Any]]] = [({}, {})]
        if asked.get("orders") is not None:
            orders = task_orders(asked["orders"], settings, where)
            variants = [({"order": order_name(order)}, {"task_order": order}) for order in orders]
        for (label, more), seed in itertools.product(variants, seeds):
            cells.append(Cell({**labels, **label}, seed, {**settings, **more, "seed": seed}, probe))
    twice = [folder for folder, n in _count(cell.folder for cell in cells).items() if n > 1]
    if twice:
        raise ConfigError(f"{where}: two runs are called {twice[0]!r}; give an entry another label")
    return _with_bases(cells) if asked.get("share_base") else cells


def _with_bases(cells: Sequence[Cell]) -> list[Cell]:
    """Names the cell whose first stage each takes over: the first one that differs in its strategy alone.

    Strategies that take part in the first stage, and cells with other general properties, train their own.
    """
    bases: dict[str, Cell] = {}
    found = []
    for cell in cells:
        names = [name for name, _ in asked_strategies(cell.settings["strategy"])]
        classes = [strategies.get(name) for name in names]
        own = tuple(f"{cls.prefix}_" for cls in classes if cls.prefix)
        general = {k: v for k, v in cell.settings.items() if k != "strategy" and not k.startswith(own or ("\0",))}
        place = {axis: label for axis, label in cell.labels.items() if axis != "strategy"}
        if all(cls.base_is_finetune for cls in classes):
            cell = replace(cell, base=bases.setdefault(json.dumps([place, general], default=str), cell).folder)
        found.append(cell)
    return found


def _axis(asked: Mapping[str, Any], key: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    entries = asked.get(key)
    if entries is None and key == "schedulers":
        entries = ["TimeSlices"]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: {key} is {entries!r}; give a list of names")
    out: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        more: Mapping[str, Any] = {}
        if isinstance(entry, str):
            label = entry
        elif isinstance(entry, Mapping) and len(entry) == 1 and isinstance(next(iter(entry.values())), Mapping):
            label, more = next(iter(entry.items()))
        else:
            raise ConfigError(f"{where}: {key} holds {entry!r}; give a name, or {{name: {{property: value}}}}")
        check_name(str(label), f"{where}: {key}: the label", LABEL)
        out.append((str(label), {AXES[key]: str(label), **more}))
    return out


def _count(names: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found
