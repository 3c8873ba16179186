"""Tasks as a person declares them: kind, filter, target, metric and words about it.

A declaration is data. Conditions are (field, op, value), compared here and never evaluated as code; a field is looked
up in the headers of the atomic files before anything is loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.schema import is_integer, is_number

KINDS = ("next_item", "classification")
REPEAT = "_repeat"
"""A field of every log: 1 where the user had the item before, else 0."""
OPS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
SETS = ("in", "not in")


@dataclass(frozen=True)
class Condition:
    """One condition on an interaction, its user or its item.

    Args:
        field: Column of the .inter, .user or .item file, or :data:`REPEAT`.
        op: One of :data:`OPS`, ``in`` or ``not in``. On a column of several values (genres), ``==`` and ``in`` ask
            whether any of them matches, ``!=`` and ``not in`` whether none does. Where there is no value, none matches.
        value: A number or a text; a list of them for ``in`` and ``not in``.
    """

    field: str
    op: str
    value: Any

    def __str__(self) -> str:
        return f"{self.field} {self.op} {self.value}"


@dataclass(frozen=True)
class TaskSpec:
    """One declared task.

    Args:
        name: Name in reports; unique.
        kind: ``next_item`` (rank items) or ``classification``.
        filter: Conditions that an interaction must meet to be a target; all of them.
        target: Field of the label of a classification: of the user (one target a user), or of the next item or
            interaction. Where it has several values (genres), the first one is the label.
        bins: Edges that cut a number into classes: below the first, [e_i, e_{i+1}), from the last on.
        classes: Keep only so many classes, the most frequent among the training targets.
        metric: Primary metric (``hit@5``, ``macro_f1``); the run's ``valid_metric``, or accuracy, by default.
        description: Words about the task, for prompts; made of the other fields by default.
        attributes: Item columns that may accompany the history of this task (PCL's task-related attributes).
        train_per_user: Keep so many of a user's training targets, the newest; by default all in the first task and the
            run's ``task_train_per_user`` in the others.
        eval_per_user: The same for the validation and the test targets; the run's ``task_eval_per_user`` by default.
        candidates: ``all`` items of the catalogue are ranked, or only those that are ``targets`` of its training.
    """

    name: str
    kind: str = "next_item"
    filter: tuple[Condition, ...] = ()
    target: str | None = None
    bins: tuple[float, ...] | None = None
    classes: int | None = None
    metric: str | None = None
    description: str = ""
    attributes: tuple[str, ...] = ()
    train_per_user: int | None = None
    eval_per_user: int | None = None
    candidates: str = "all"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the atomic files that the task reads."""
        named = [condition.field for condition in self.filter] + [self.target or REPEAT, *self.attributes]
        return tuple(dict.fromkeys(name for name in named if name != REPEAT))


def parse_tasks(declared: Any) -> list[TaskSpec]:
    """Returns the tasks of the property ``tasks``.

    Args:
        declared: A list of mappings.

    Raises:
        ConfigError: If a declaration makes no sense; the message names task, key, value and remedy.
    """
    if not isinstance(declared, list | tuple) or not declared:
        raise ConfigError(f"tasks: {declared!r} is no list of tasks; write [{{name: ..., kind: next_item}}, ...]")
    specs = [_parse(number, given) for number, given in enumerate(declared)]
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"tasks: two of them are named {twice!r}; rename one")
    return specs


def _parse(number: int, given: Any) -> TaskSpec:
    known = [f.name for f in fields(TaskSpec)]
    if not isinstance(given, Mapping) or not given.get("name"):
        raise ConfigError(f"tasks: number {number + 1} is {given!r}; a task is a mapping with at least a name")
    name = str(given["name"])
    where = f"tasks: {name!r}"
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has an unknown key {key!r}{nearest(str(key), known)} Known: {', '.join(known)}")
    kind = given.get("kind", "next_item")
    if kind not in KINDS:
        raise ConfigError(f"{where}: kind is {kind!r}; it must be one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
    target = given.get("target")
    if kind == "classification" and not (isinstance(target, str) and target):
        raise ConfigError(f"{where}: a classification needs target, the column that holds its label")
    classes_only = [key for key in ("target", "bins", "classes") if given.get(key) is not None]
    if kind == "next_item" and classes_only:
        raise ConfigError(f"{where}: {classes_only[0]} belongs to kind: classification; leave it out or set the kind")
    for key in ("train_per_user", "eval_per_user", "classes"):
        value, low = given.get(key), 2 if key == "classes" else 1
        if value is not None and not (is_integer(value) and value >= low):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be an integer of at least {low}, or left out")
    bins = given.get("bins")
    if bins is not None:
        numbers = isinstance(bins, list | tuple) and bool(bins) and all(is_number(b) for b in bins)
        if not numbers or (np.diff(bins) <= 0).any():
            raise ConfigError(f"{where}: bins is {bins!r}; it must be a list of increasing numbers")
    candidates = given.get("candidates", "all")
    if candidates not in ("all", "targets"):
        raise ConfigError(f"{where}: candidates is {candidates!r}; it must be 'all' or 'targets'")
    if kind == "classification" and candidates != "all":
        raise ConfigError(
            f"{where}: candidates is {candidates!r}, but a classification ranks no items; leave candidates out, or set "
            f"kind: next_item"
        )
    metric = given.get("metric")
    if metric is not None and not (isinstance(metric, str) and metric):
        raise ConfigError(f"{where}: metric is {metric!r}; it must be a name such as hit@5 or macro_f1, or left out")
    attributes = given.get("attributes") or ()
    attributes = [attributes] if isinstance(attributes, str) else attributes
    if not isinstance(attributes, list | tuple) or not all(isinstance(name, str) for name in attributes):
        raise ConfigError(f"{where}: attributes is {attributes!r}; it must be a list of columns of the .item file")
    return TaskSpec(
        name=name,
        kind=kind,
        filter=tuple(_condition(where, condition) for condition in _listed(where, given.get("filter"))),
        target=target,
        bins=None if bins is None else tuple(float(b) for b in bins),
        classes=given.get("classes"),
        metric=metric,
        description=str(given.get("description") or ""),
        attributes=tuple(attributes),
        train_per_user=given.get("train_per_user"),
        eval_per_user=given.get("eval_per_user"),
        candidates=candidates,
    )


FORM = "{field: rating, op: '>=', value: 4}"


def _listed(where: str, given: Any) -> Sequence[Any]:
    if given is not None and not isinstance(given, Mapping | list | tuple):
        raise ConfigError(f"{where}: the filter {given!r} is no condition; write {FORM}, or a list of such")
    return [given] if isinstance(given, Mapping) else list(given or ())


def _condition(where: str, given: Any) -> Condition:
    if not isinstance(given, Mapping) or set(given) != {"field", "op", "value"}:
        raise ConfigError(f"{where}: the filter {given!r} is not of the form {FORM}")
    op, value = given["op"], given["value"]
    if not isinstance(op, str) or (op not in OPS and op not in SETS):
        raise ConfigError(f"{where}: the filter's op is {op!r}; it must be one of {', '.join([*OPS, *SETS])}")
    if (op in SETS) != isinstance(value, list | tuple) or (op in SETS and not value):
        raise ConfigError(
            f"{where}: the filter on {given['field']!r} has op {op!r} with value {value!r}; 'in' and 'not in' take a "
            f"list of at least one value, the others a number or a text"
        )
    return Condition(str(given["field"]), op, tuple(value) if op in SETS else value)
