"""The metrics of one evaluation: RecBole's of rankings and of values, and those of classes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metric_information, metrics_dict
from recbole.utils import EvaluatorType

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.model.contract import contract, offers
from recbole_cl.strategy.base import Strategy
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import CLASSIFICATION_METRICS, Stage, Task

GAUC_NEEDS_SCORES = (
    "metrics: GAUC needs the scores of all items, but {} makes its lists itself (recommend); leave GAUC out, or rank "
    "sampled candidates with eval_args: {{mode: uni100}}"
)


def asked_metrics(config: Any, task: Task | None = None) -> list[str]:
    """Returns the metrics of a run, or those of a stage's task, in lower case and without cut-off."""
    if task is None or task.metrics is None:
        classes = task is not None and task.kind == "classification"
        return list(CLASSIFICATION_METRICS) if classes else [metric.lower() for metric in config["metrics"]]
    return [metric.lower() for metric in task.metrics]


def computed_metrics(config: Any, task: Task | None = None) -> list[str]:
    """Returns the names of the metrics that a run computes, ``name@k`` where they have a cut-off.

    Args:
        config: The run's configuration.
        task: The task of a stage, whose own metrics count where it has some.

    Raises:
        ConfigError: If a task names a metric that does not exist.
    """
    asked = asked_metrics(config, task)
    classes = task is not None and task.kind == "classification"
    for metric in asked:
        known = CLASSIFICATION_METRICS if classes else metrics_dict
        if metric not in known:
            raise ConfigError(f"task {task.name if task else ''!r}: unknown metric {metric!r}{nearest(metric, known)}")
    if classes:
        return asked
    names: list[str] = []
    for metric in asked:
        plain = metric_information[metric] == ["rec.meanrank"] or config["eval_type"] == EvaluatorType.VALUE
        names += [metric] if plain else [f"{metric}@{k}" for k in config["topk"]]
    return names


def check_tasks(config: Any, stream: Stream, model: Any) -> None:
    """Refuses a stage whose task the model cannot answer, or whose metrics nobody computes.

    Raises:
        ConfigError: Naming the stage and its task.
    """
    own = [name.lower() for name in contract(model).own_metrics]
    for stage in stream.stages:
        computed, primary = computed_metrics(config, stage.task), stage.task.primary_metric(str(config["valid_metric"]))
        computed = [*computed, *own]
        if primary not in computed:
            raise ConfigError(
                f"stage {stage.index + 1} ({stage.name}): its primary metric {primary!r} is not computed; the task "
                f"{stage.task.name!r} has {', '.join(computed)}"
            )
        ranked = stage.task.kind == "next_item" and "full" in config["eval_args"]["mode"].values()
        adjusted = any(cls.adjust_scores is not Strategy.adjust_scores for cls in config.strategy_classes)
        own_lists = ranked and offers(model, "recommend") and not adjusted
        if own_lists and "gauc" in asked_metrics(config, stage.task):
            raise ConfigError(GAUC_NEEDS_SCORES.format(config["model"]))
        if stage.task.kind == "classification" and not offers(model, "predict_task"):
            raise ConfigError(
                f"model: {config['model']} has no predict_task(batch, task), which the task "
                f"{stage.task.name!r} (classification) of stage {stage.index + 1} needs"
            )


# -- rankings -----------------------------------------------------------------------------------------------------


def by_row(config: Any, names: Iterable[str], hit: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the metrics that are means over rows, ``name@k`` to values of shape ``[n]``.

    Args:
        config: ``topk`` is read.
        names: Metrics; others than those of hits are left out.
        hit: Which recommended items are positives, shape ``[n, K]``.
        length: Number of positives of each row, shape ``[n]``.
    """
    out: dict[str, np.ndarray] = {}
    for name in names if len(hit) else ():
        if metric_information[name] == ["rec.topk"]:
            rows = _metric_rows(config, name, hit, length)
            out.update({f"{name}@{k}": np.ascontiguousarray(rows[:, k - 1]) for k in config["topk"]})
    return out


def one_by_row(config: Any, metric: str, hit: np.ndarray, length: np.ndarray) -> np.ndarray | None:
    """Returns one ``name@k`` of each row, shape ``[n]``; ``None`` where it is no mean over rows."""
    name, _, k = metric.partition("@")
    if name not in metrics_dict or metric_information[name] != ["rec.topk"] or not len(hit):
        return None
    return np.asarray(_metric_rows(config, name, hit, length)[:, int(k) - 1])


def ranking_metrics(
    config: Any,
    stream: Stream,
    stage: Stage,
    rows: dict[str, np.ndarray],
    length: np.ndarray,
    top: np.ndarray,
    auc: np.ndarray,
) -> dict[str, float]:
    """Returns the metrics of a stage over rows of rankings.

    Args:
        config: ``topk`` is read.
        stream: The stream.
        stage: The evaluated stage.
        rows: Metrics of each row (:func:`by_row`).
        length: Number of positives of each row, shape ``[n]``.
        top: Recommended items, 0 for an empty slot, shape ``[n, K]``.
        auc: Area under the curve of each row, shape ``[n]``.
    """
    if not len(length):
        return {}
    out: dict[str, float] = {}
    for name in asked_metrics(config, stage.task):
        if metric_information[name] == ["rec.topk"]:
            out.update({f"{name}@{k}": float(rows[f"{name}@{k}"].mean()) for k in config["topk"]})
        elif name == "gauc":
            out[name] = float((auc * length).sum() / length.sum())
        else:
            out.update(_of_lists(config, stream, stage, name, top))
    return out


def _of_lists(config: Any, stream: Stream, stage: Stage, name: str, top: np.ndarray) -> dict[str, float]:
    """Metrics of the recommended lists; an empty slot counts nowhere, a row without any item neither.

    RecBole knows full lists only. Where one is shorter than k, its functions are asked for what is there.
    """
    top = top[top[:, 0] > 0]
    if not len(top):
        return {}
    filled = np.where(top > 0, top, top[:, :1])  # the row's first item again
    data = DataStruct()
    data.set("rec.items", torch.from_numpy(filled))
    data.set("data.num_items", stage.catalogue)
    items, counts = np.unique(stream.table.item[stage.train.position], return_counts=True)
    table = {int(i): 0 for i in np.unique(filled)}
    table.update({int(i): int(c) for i, c in zip(items, counts, strict=True)})
    data.set("data.count_items", table)
    metric = metrics_dict[name](config)
    out = {k: float(v) for k, v in metric.calculate_metric(data).items()}
    for k in config["topk"]:
        there = top[:, :k] > 0
        if there.all() or name == "itemcoverage":  # what is repeated covers nothing new
            continue
        slots = top[:, :k][there][None, :]
        if name == "shannonentropy":
            value = metric.get_entropy(slots)
        elif name == "giniindex":
            value = metric.get_gini(slots, stage.catalogue)
        else:
            of_slots = (metric.get_pop if name == "averagepopularity" else metric.get_tail)(filled, table)
            value = ((of_slots[:, :k] * there).sum(axis=1) / there.sum(axis=1)).mean()
        out[f"{name}@{k}"] = float(round(value, metric.decimal_place))
    return out


def _metric_rows(config: Any, name: str, hit: np.ndarray, length: np.ndarray) -> np.ndarray:
    metric = metrics_dict[name](config)
    if _takes_lengths(metrics_dict[name]):
        return np.asarray(metric.metric_info(hit, length))
    return np.asarray(metric.metric_info(hit))


@functools.cache
def _takes_lengths(metric: Any) -> bool:
    return len(inspect.signature(metric.metric_info).parameters) > 2  # self, hits, numbers of positives


# -- values and classes -------------------------------------------------------------------------------------------


def value_metrics(
    config: Any, names: Iterable[str], score: np.ndarray, label: np.ndarray, user: np.ndarray
) -> dict[str, float]:
    """Returns the metrics of single scores; AUC and GAUC need labels of both kinds.

    Args:
        config: Read by RecBole's metrics.
        names: The metrics.
        score: Predictions, shape ``[n]``.
        label: What they should be, shape ``[n]``.
        user: Users of the rows, shape ``[n]``.
    """
    out: dict[str, float] = {}
    for name in names:
        if not len(score) or (name == "auc" and (label.min() == label.max())):
            continue
        found = (
            grouped_auc(score, label, user) if name == "gauc" else metrics_dict[name](config).metric_info(score, label)
        )
        if found is not None:
            out[name] = float(found)
    return out


def grouped_auc(score: np.ndarray, label: np.ndarray, user: np.ndarray) -> float | None:
    """Returns the mean of the users' areas under the ROC curve, weighted by their numbers of rows.

    ``AUC_u = (R_u - p_u (p_u + 1) / 2) / (p_u n_u)`` with p_u rows of a positive label, n_u others and R_u the sum of
    the positives' ranks among the user's rows, rows of equal score sharing their mean rank. A user with labels of one
    kind only has no area and is left out.

    Args:
        score: Predictions, shape ``[n]``.
        label: Positive above 0, shape ``[n]``.
        user: Users of the rows, shape ``[n]``.

    Returns:
        The mean, or ``None`` where no user has labels of both kinds.
    """
    order = np.lexsort((score, user))
    score, positive, user = score[order], label[order] > 0, user[order]
    _, first, owner, rows = np.unique(user, return_index=True, return_inverse=True, return_counts=True)
    tie = np.cumsum(np.r_[True, (user[1:] != user[:-1]) | (score[1:] != score[:-1])]) - 1
    place = np.arange(len(user)) - first[owner] + 1.0
    rank = (np.bincount(tie, weights=place) / np.bincount(tie))[tie]
    p = np.bincount(owner, weights=positive)
    area = np.bincount(owner, weights=rank * positive) - p * (p + 1) / 2
    both = (p > 0) & (p < rows)
    if not both.any():
        return None
    return float(np.average(area[both] / (p * (rows - p))[both], weights=rows[both]))


def constant_answer(name: str, stage: Stage) -> float | None:
    """Returns what a stage's test targets give whoever always answers the most frequent training class.

    Args:
        name: ``accuracy`` or ``macro_f1``.
        stage: Its task is a classification, or the answer is ``None``.
    """
    if stage.task.kind != "classification" or not len(stage.train) or not len(stage.test):
        return None
    guess = np.full(len(stage.test), np.bincount(stage.train.label).argmax())
    return class_metrics([name], stage.test.label, guess)[name]


def class_metrics(names: Iterable[str], truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    """Returns accuracy and F1, the mean over the classes that occur, of guessed classes; both of shape ``[n]``."""
    if not len(truth):
        return {}
    scores = []
    for label in np.unique(truth):
        hits = ((truth == label) & (guess == label)).sum()
        scores.append(2 * hits / max((truth == label).sum() + (guess == label).sum(), 1))
    found = {"accuracy": float((truth == guess).mean()), "macro_f1": float(np.mean(scores))}
    return {name: found[name] for name in names}
