"""Finished runs of any origin as the cells of a study, so that its tables, plots and tests can be made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.report.text import short
from recbole_cl.study.plan import AXES, Cell, Plan

_OWN = frozenset({
    "seed", "output_dir", "data_path", "resume", "device", "gpu_id", "use_gpu", "show_progress", "checkpoint_keep",
    "checkpoint_steps", "checkpoint_dir", "base_run", "keep_base", "state", "saved", "text_cache", "worker",
    "local_rank",
})  # fmt: skip
"""Properties in which runs of one method may differ: where and how they ran."""


@dataclass(frozen=True)
class FoundRun(Cell):
    """A finished run.

    Args:
        place: Its folder, below the one that was searched.
    """

    place: str = "."

    @property
    def folder(self) -> str:
        return self.place


def found_plan(folder: str | Path) -> Plan:
    """Returns the finished runs below a folder as a study.

    A run is a folder with ``result.json``; earlier results that were moved aside, and runs of a study that are not
    done, are left out. Its strategy is named by its class. Runs of one dataset, scheduler, model, strategy and seed are
    told apart by the properties in which they differ, or else by their folders.

    Args:
        folder: Where to look, at any depth.

    Raises:
        ConfigError: If there is no such folder, or no finished run in it.
        DataError: If a ``result.json`` cannot be read.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{root}: there is no such folder; give one with finished runs, or the name of a study")
    runs: list[tuple[str, dict[str, Any]]] = []
    for file in sorted(root.rglob("result.json")):
        place = file.parent.relative_to(root)
        if any(part.startswith("earlier-") for part in place.parts) or not _done(file.parent):
            continue
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            runs.append((place.as_posix(), {key: result[key] for key in ("config", "seed")}))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: it is no result of a run ({error}); remove it or its folder") from error
    if not runs:
        raise ConfigError(f"{root}: it holds no finished run (no result.json at any depth); give the folder of runs")
    names = _labels(runs)
    cells = []
    for (own, run), labels in zip(runs, names, strict=True):
        cells.append(FoundRun(labels, int(run["seed"]), run["config"], place=own))
    return Plan(root.resolve().name, "found", f"{len(cells)} finished runs.", tuple(cells))


def _done(own: Path) -> bool:
    note = own / "cell.json"
    return not note.is_file() or bool(json.loads(note.read_text(encoding="utf-8")).get("done"))


def _labels(runs: list[tuple[str, dict[str, Any]]]) -> list[dict[str, str]]:
    axes = list(AXES.values())
    bare = [{axis: short(run["config"].get(axis)) for axis in axes} for _, run in runs]
    together: dict[tuple[str, ...], list[int]] = {}
    for index, labels in enumerate(bare):
        together.setdefault(tuple(labels.values()), []).append(index)
    for indices in together.values():
        seeds = [runs[i][1]["seed"] for i in indices]
        flat = [_flat(runs[i][1]["config"]) for i in indices]
        differ = sorted({key for one in flat for key in one if any(f.get(key) != one[key] for f in flat)})
        names = [", ".join(f"{key} {_short(one.get(key))}" for key in differ) for one in flat]
        if len(set(zip(names, seeds, strict=True))) < len(indices):
            names = [runs[i][0] for i in indices]  # the same settings and seed: only where they lie tells them apart
        for i, text in zip(indices, names, strict=True):
            bare[i]["strategy"] += f" ({text})" if text else ""
    return bare


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in config.items() if key not in (*_OWN, "strategy") and key not in AXES.values()}
    for entry in config.get("strategy") or []:
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], Mapping):
            out |= {f"{entry[0]}.{key}": value for key, value in entry[1].items()}
    return out


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else text[:21] + "..."
