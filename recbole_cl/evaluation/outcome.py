"""The result of one evaluation: metrics over all targets and by stratum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
    """

    metrics: dict[str, float]
    strata: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)
    n: int = 0
    n_cold: int = 0
    users: np.ndarray | None = None
    recommended: np.ndarray | None = None
    utility: np.ndarray | None = None


def ranking_outcome(
    config: Any, stream: Stream, stage: Stage, rows: Rows, top: np.ndarray, auc: np.ndarray, cold: np.ndarray
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
    """
    n_rows = len(rows.targets)
    hit = rows.hits(top)
    new_item = rows.item >= stage.first_new_item
    new_user = rows.targets.user >= stage.first_new_user

    def count(flag: np.ndarray) -> np.ndarray:
        return np.bincount(rows.row[flag], minlength=n_rows)

    everything = count(np.ones(len(rows.row), dtype=bool))
    known_only = count(~cold)
    total = known_only if config["cold_targets"] == "drop" else everything
    is_new = top >= stage.first_new_item
    every = np.ones(n_rows, dtype=bool)
    strata = {
        "all": (hit, total, every),
        "known": (hit, known_only, every),
        "warm_user": (hit, total, ~new_user),
        "new_user": (hit, total, new_user),
        "warm_item": (hit & ~is_new, count(~new_item), every),
        "new_item": (hit & is_new, count(new_item), every),
    }
    names = asked_metrics(config, stage.task)
    out: dict[str, tuple[dict[str, float], int]] = {}
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
    return Outcome(metrics, out, n, int(cold.sum()), rows.targets.user[used], top[used], utility)


def value_outcome(
    config: Any,
    stage: Stage,
    score: np.ndarray,
    label: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    cold: np.ndarray,
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
    """
    used = ~cold if config["cold_targets"] == "drop" else np.ones(len(item), dtype=bool)
    new_user, new_item = user >= stage.first_new_user, item >= stage.first_new_item
    flags = {
        "known": ~cold,
        "warm_user": ~new_user & used,
        "new_user": new_user & used,
        "warm_item": ~new_item & used,
        "new_item": new_item & used,
    }
    names = asked_metrics(config, stage.task)
    strata = {name: (value_metrics(config, names, score[f], label[f]), int(f.sum())) for name, f in flags.items()}
    metrics = value_metrics(config, names, score[used], label[used])
    return Outcome(metrics, strata, int(used.sum()), int(cold.sum()), user[used])


def class_outcome(config: Any, stage: Stage, targets: Targets, predicted: np.ndarray, cold: np.ndarray) -> Outcome:
    """Returns the outcome of guessed classes.

    Args:
        config: The run's configuration.
        stage: The evaluated stage.
        targets: Its targets, ``n`` of them.
        predicted: Their classes, shape ``[n]``.
        cold: Which targets the model cannot know, shape ``[n]``.
    """
    used = ~cold if config["cold_targets"] == "drop" else np.ones(len(targets), dtype=bool)
    new = targets.user >= stage.first_new_user
    names = asked_metrics(config, stage.task)

    def measure(flag: np.ndarray) -> dict[str, float]:
        return class_metrics(names, targets.label[flag], predicted[flag])

    flags = {"known": ~cold, "warm_user": ~new & used, "new_user": new & used}
    strata = {name: (measure(f), int(f.sum())) for name, f in flags.items()}
    right = (predicted == targets.label)[used].astype(float)
    return Outcome(measure(used), strata, int(used.sum()), int(cold.sum()), targets.user[used], None, right)
