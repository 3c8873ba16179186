"""The result of one evaluation: metrics over all targets and by stratum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recbole_cl.evaluation.levels import at_level
from recbole_cl.evaluation.metrics import (
    asked_metrics,
    by_row,
    class_metrics,
    one_by_row,
    ranking_metrics,
    value_metrics,
)
from recbole_cl.evaluation.rows import Rows
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets

Measured = tuple[dict[str, float], int]
"""Metric to value, and over how many rows."""
Flags = Mapping[str, np.ndarray]
"""Stratum to the flag of each row, shape ``[n]``."""


@dataclass
class Outcome:
    """Result of one evaluation.

    Args:
        metrics: Metric to value, over all targets.
        strata: Stratum to (metrics, number of rows).
        n: Rows evaluated.
        n_cold: Targets that the model never trained on (item or user).
        users: User of each row, shape ``[n]``.
        recommended: Item ids of the lists, 0 for an empty slot, shape ``[n, K]``; ``None`` for value tasks.
        utility: The primary metric of each row, shape ``[n]``, where it is a mean over rows.
        levels: Coarser level of items to its strata, ``all`` among them.
        measured: Stratum, ``all`` among them, to the rows that the model's own metrics are means over.
        own: Names of the model's own metrics.
    """

    metrics: dict[str, float]
    strata: dict[str, Measured] = field(default_factory=dict)
    n: int = 0
    n_cold: int = 0
    users: np.ndarray | None = None
    recommended: np.ndarray | None = None
    utility: np.ndarray | None = None
    levels: dict[str, dict[str, Measured]] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    own: frozenset[str] = frozenset()

    def parts(self) -> Iterator[tuple[str, str, dict[str, float], int]]:
        """Yields level, stratum, metrics and the number of rows that they are taken over."""
        for stratum, (metrics, n) in {"all": (self.metrics, self.n), **self.strata}.items():
            yield "item", stratum, {name: v for name, v in metrics.items() if name not in self.own}, n
            mine = {name: v for name, v in metrics.items() if name in self.own}
            if mine:
                yield "item", stratum, mine, self.measured[stratum]
        for level, strata in self.levels.items():
            for stratum, (metrics, n) in strata.items():
                yield level, stratum, metrics, n

    def round(self, places: int) -> None:
        """Rounds every metric (RecBole's ``metric_decimal_place``)."""
        for metrics in (self.metrics, *(m for m, _ in self.strata.values())):
            metrics.update({name: round(value, places) for name, value in metrics.items()})
        for strata in self.levels.values():
            for metrics, _ in strata.values():
                metrics.update({name: round(value, places) for name, value in metrics.items()})

    def add_own(self, stage: Stage, targets: Targets, values: Mapping[str, np.ndarray], more: Flags) -> None:
        """Adds the model's own metrics, means over targets.

        Args:
            stage: The evaluated stage.
            targets: Those that were measured, ``n`` of them.
            values: Metric to the value of each target, shape ``[n]``.
            more: Further strata of the targets.
        """
        self.own = frozenset(values)
        flags = {"all": np.ones(len(targets), dtype=bool), **_flags(stage, targets.user, more)}
        if stage.task.kind != "classification":
            flags |= {
                "warm_item": targets.label < stage.first_new_item,
                "new_item": targets.label >= stage.first_new_item,
            }
        flags["known"] = flags["all"]
        for stratum, flag in flags.items():
            n = int(flag.sum())
            found = {name: float(value[flag].mean()) for name, value in values.items()} if n else {}
            self.measured[stratum] = n
            if stratum == "all":
                self.metrics |= found
            else:
                metrics, rows = self.strata.get(stratum, ({}, 0))
                self.strata[stratum] = ({**metrics, **found}, rows)


def _flags(stage: Stage, user: np.ndarray, more: Flags) -> dict[str, np.ndarray]:
    """Returns the strata of rows by their users, and those that were asked for."""
    new = user >= stage.first_new_user
    return {"warm_user": ~new, "new_user": new, **more}


def ranking_outcome(
    config: Any,
    stream: Stream,
    stage: Stage,
    rows: Rows,
    top: np.ndarray,
    auc: np.ndarray,
    cold: np.ndarray,
    more: Flags,
    levels: Flags,
) -> Outcome:
    """Returns the outcome of rankings.

    Args:
        config: The run's configuration.
        stream: The stream.
        stage: The evaluated stage.
        rows: What was ranked.
        top: Recommended items, 0 for an empty slot, shape ``[n, K]``.
        auc: Area under the curve of each row, shape ``[n]``; 0 where no metric needs it.
        cold: Which positives of ``rows`` the model never trained on.
        more: Further strata of the rows.
        levels: Coarser levels of items, name to the group of each item.
    """
    n_rows = len(rows.targets)
    hit = rows.hits(top)
    new_item = rows.item >= stage.first_new_item
    count = rows.count
    known_only = count(~cold)
    total = known_only if config["cold_targets"] == "drop" else count(np.ones(len(rows.row), dtype=bool))
    is_new = top >= stage.first_new_item
    every = np.ones(n_rows, dtype=bool)
    strata = {
        "all": (hit, total, every),
        "known": (hit, known_only, every),
        **{name: (hit, total, flag) for name, flag in _flags(stage, rows.targets.user, {}).items()},
        "warm_item": (hit & ~is_new, count(~new_item), every),
        "new_item": (hit & is_new, count(new_item), every),
        **{name: (hit, total, flag) for name, flag in more.items()},
    }
    names = asked_metrics(config, stage.task)
    out: dict[str, Measured] = {}
    done: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = []  # strata that differ in their rows alone
    for name, (hits, length, chosen) in strata.items():
        counted = length > 0
        found = next((f for h, n, f in done if h is hits and np.array_equal(n, length)), None)
        if found is None:
            found = by_row(config, names, hits[counted], length[counted])
            done.append((hits, length, found))
        part, chosen = chosen[counted], chosen & counted
        of_rows = {metric: values[part] for metric, values in found.items()}
        measured = ranking_metrics(config, stream, stage, of_rows, length[chosen], top[chosen], auc[chosen])
        out[name] = (measured, int(chosen.sum()))
    metrics, n = out.pop("all")
    used = total > 0
    primary = stage.task.primary_metric(str(config["valid_metric"]))
    utility = done[0][2].get(primary) if used.any() else None
    if utility is None:
        utility = one_by_row(config, primary, hit[used], total[used])
    outcome = Outcome(metrics, out, n, int(cold.sum()), rows.targets.user[used], top[used], utility)
    for level, groups in levels.items():
        outcome.levels[level] = _level_outcome(config, stage, *at_level(rows, top, cold, groups), more)
    return outcome


def _level_outcome(
    config: Any, stage: Stage, rows: Rows, top: np.ndarray, cold: np.ndarray, more: Flags
) -> dict[str, Measured]:
    """Returns the strata of rankings of groups of items; those of items have no meaning for groups.

    Unlike an item, a group that a list holds may be that of a positive that the model never trained on: where such
    positives do not count, their hits do not either.
    """
    known = Rows(rows.targets, rows.row[~cold], rows.item[~cold], rows.mask_row, rows.mask_item, None)
    counted = known if config["cold_targets"] == "drop" else rows
    every = np.ones(len(rows.targets), dtype=bool)
    names = asked_metrics(config, stage.task)
    out: dict[str, Measured] = {}
    for stratum, flag in {"all": every, "known": every, **_flags(stage, rows.targets.user, more)}.items():
        those = known if stratum == "known" else counted
        length = those.count(np.ones(len(those.row), dtype=bool))
        used = flag & (length > 0)
        found = by_row(config, names, those.hits(top)[used], length[used])
        out[stratum] = ({name: float(values.mean()) for name, values in found.items()}, int(used.sum()))
    return out


def value_outcome(
    config: Any,
    stage: Stage,
    score: np.ndarray,
    label: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    cold: np.ndarray,
    more: Flags,
) -> Outcome:
    """Returns the outcome of single scores.

    Args:
        config: The run's configuration.
        stage: The evaluated stage.
        score: Predictions, shape ``[n]``.
        label: What they should be, shape ``[n]``.
        user: Users of the rows, shape ``[n]``.
        item: Items of the rows, shape ``[n]``.
        cold: Which rows have a user or item that the model never trained on, shape ``[n]``.
        more: Further strata of the rows.
    """
    used = ~cold if config["cold_targets"] == "drop" else np.ones(len(item), dtype=bool)
    new_user, new_item = user >= stage.first_new_user, item >= stage.first_new_item
    flags = {
        "known": ~cold,
        "warm_user": ~new_user & used,
        "new_user": new_user & used,
        "warm_item": ~new_item & used,
        "new_item": new_item & used,
        **{name: flag & used for name, flag in more.items()},
    }
    names = asked_metrics(config, stage.task)

    def measure(flag: np.ndarray) -> dict[str, float]:
        return value_metrics(config, names, score[flag], label[flag], user[flag])

    strata = {name: (measure(flag), int(flag.sum())) for name, flag in flags.items()}
    return Outcome(measure(used), strata, int(used.sum()), int(cold.sum()), user[used])


def class_outcome(
    config: Any, stage: Stage, targets: Targets, predicted: np.ndarray, cold: np.ndarray, more: Flags
) -> Outcome:
    """Returns the outcome of guessed classes.

    Args:
        config: The run's configuration.
        stage: The evaluated stage.
        targets: Its targets, ``n`` of them.
        predicted: Their classes, shape ``[n]``.
        cold: Which targets the model cannot know, shape ``[n]``.
        more: Further strata of the targets.
    """
    used = ~cold if config["cold_targets"] == "drop" else np.ones(len(targets), dtype=bool)
    names = asked_metrics(config, stage.task)

    def measure(flag: np.ndarray) -> dict[str, float]:
        return class_metrics(names, targets.label[flag], predicted[flag])

    flags = {"known": ~cold, **{k: flag & used for k, flag in _flags(stage, targets.user, more).items()}}
    strata = {name: (measure(f), int(f.sum())) for name, f in flags.items()}
    right = (predicted == targets.label)[used].astype(float)
    return Outcome(measure(used), strata, int(used.sum()), int(cold.sum()), targets.user[used], None, right)
