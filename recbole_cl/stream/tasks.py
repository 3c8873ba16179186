"""Tasks as a person declares them: kind, filter, target, metric and words about it.

A declaration is data. Conditions are (field, op, value), compared here and never evaluated as code; a field is looked
up in the headers of the atomic files before anything is loaded.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from recbole.utils import FeatureSource, FeatureType

from recbole_cl.errors import ConfigError, DataError, nearest
from recbole_cl.schema import is_integer, is_number

if TYPE_CHECKING:
    from recbole_cl.stream.dataset import StreamDatasetMixin
    from recbole_cl.stream.table import InteractionTable

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


# -- columns over the log -----------------------------------------------------------------------------------------


@dataclass
class Columns:
    """Looks fields up by position or by user.

    Args:
        dataset: The loaded dataset.
        table: The sorted table.
    """

    dataset: StreamDatasetMixin
    table: InteractionTable
    _repeat: np.ndarray | None = field(default=None, repr=False)

    def of_user(self, name: str) -> bool:
        """Tells whether a field is an attribute of users."""
        return self.dataset.field2source.get(name) == FeatureSource.USER

    def _feature(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the values of a field's own file, NaN where a number is missing, and the row of each position."""
        values, rows = self._stored(name)
        if values.ndim > 1 and self.dataset.field2type.get(name) == FeatureType.FLOAT:
            values = values[:, 0]  # of RecBole's numerical_features, whose second number is a weight
        counts = self.dataset.number_counts.get(name)
        if counts is not None:  # what RecBole put into the gaps is nobody's value
            there = counts > 0 if values.ndim == 1 else np.arange(values.shape[1]) < counts[:, None]
            values = np.where(there, values, values.dtype.type(np.nan))
        return values, rows

    def _stored(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        if name == REPEAT:
            return self.repeat, None
        dataset, source = self.dataset, self.dataset.field2source.get(name)
        if source == FeatureSource.USER:
            return dataset.user_feat[name].numpy(), self.table.user
        if source == FeatureSource.ITEM:
            return dataset.item_feat[name].numpy(), self.table.item
        if name not in dataset.inter_feat:
            raise ConfigError(f"tasks: the field {name!r} is not loaded; add it to load_col")
        return dataset.inter_feat[name].numpy(), None

    @property
    def repeat(self) -> np.ndarray:
        """1 where the position's user had its item before, shape ``[N]``."""
        if self._repeat is None:
            key = self.table.user * self.table.n_items + self.table.item
            first = np.zeros(len(key), dtype=bool)
            first[np.unique(key, return_index=True)[1]] = True  # positions are in stream order
            self._repeat = (~first).astype(np.int64)
        return self._repeat

    def _tokens(self, name: str) -> np.ndarray | None:
        tokenised = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
        is_token = name != REPEAT and self.dataset.field2type.get(name) in tokenised
        return np.asarray(self.dataset.field2id_token[name]).astype(str) if is_token else None

    def matches(self, task: str, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
        """Looks which positions meet a condition.

        Returns:
            Flags of the positions that meet it, and of those without a value to compare; both of shape ``[N]``.

        Raises:
            ConfigError: If a text is compared with numbers or the other way round, or a text never occurs.
        """
        values, rows = self._feature(condition.field)
        tokens, op = self._tokens(condition.field), condition.op
        asked = list(condition.value) if op in SETS else [condition.value]
        odd = [value for value in asked if not (is_number(value) or isinstance(value, bool))]
        where = f"tasks: {task!r}: the filter {condition}"
        found: np.ndarray
        if tokens is None or op not in ("==", "!=", *SETS):
            if odd:
                what = "orders numbers" if tokens is not None else f"compares the number {condition.field}"
                remedy = " or use op '==', '!=', 'in' or 'not in'" if tokens is not None else " in its place"
                raise ConfigError(f"{where} {what}, but {odd[0]!r} is none; write a number{remedy}")
            if tokens is not None:
                numbers = _numbers(tokens)
                if len(tokens) > 1 and np.isnan(numbers).all():
                    raise ConfigError(
                        f"{where} orders numbers, but {condition.field} holds words, such as {str(tokens[1])!r}; use "
                        f"op '==', '!=', 'in' or 'not in', or another field"
                    )
                values = numbers[values]
            none = np.isnan(values)
            kind = values.dtype.type if values.dtype.kind == "f" else np.float64  # 0.1 is what the column has for it
            values = values.astype(kind)
            one = OPS["==" if op in ("!=", *SETS) else op]
            found = np.logical_or.reduce([one(values, kind(value)) for value in asked]) & ~none
        else:
            unknown = [value for value in asked if _text(value) not in tokens[1:]]
            if unknown:
                hint = nearest(str(unknown[0]), tokens[1:].tolist()) or f"; it has {', '.join(tokens[1:6])}, ..."
                raise ConfigError(f"{where}: {condition.field} never is {unknown[0]!r}{hint}")
            none = values == 0  # RecBole's padding
            found = np.isin(values, np.flatnonzero(np.isin(tokens, [_text(value) for value in asked])))
        if found.ndim > 1:
            found, none = np.asarray(found.any(axis=1)), np.asarray(none.all(axis=1))
        found = ~found if op in ("!=", "not in") else found
        return np.asarray(found if rows is None else found[rows]), np.asarray(none if rows is None else none[rows])

    def raw_labels(self, spec: TaskSpec) -> tuple[np.ndarray, list[str] | None]:
        """Returns what a classification's classes are made of.

        Returns:
            A value of each position, shape ``[N]``: ids of names, -1 where there is none, or numbers, NaN where there
            is none. And the names of the ids; ``None`` for numbers.

        Raises:
            ConfigError: If bins are asked of words.
        """
        assert spec.target is not None
        values, rows = self._feature(spec.target)
        tokens = self._tokens(spec.target)
        values = values[:, 0] if values.ndim > 1 else values
        names: list[str] | None
        if spec.bins is not None:
            numbers = values.astype(np.float64) if tokens is None else _numbers(tokens)[values]
            if tokens is not None and len(tokens) > 1 and np.isnan(_numbers(tokens)).all():
                raise ConfigError(
                    f"tasks: {spec.name!r}: bins cut numbers, but {spec.target} holds words, such as "
                    f"{str(tokens[1])!r}; leave bins out, and set classes to keep the most frequent of them"
                )
            # RecBole holds numbers in single precision: so must the edges, or 1.65 falls below an edge of 1.65.
            cuts = np.asarray(spec.bins, dtype=values.dtype if tokens is None else np.float64)
            ids = np.where(np.isnan(numbers), -1, np.digitize(numbers, cuts.astype(np.float64)))
            edges = [f"{edge:g}" for edge in spec.bins]
            inner = [f"{low} to below {high}" for low, high in itertools.pairwise(edges)]
            names = [f"below {edges[0]}", *inner, f"{edges[-1]} and above"]
        elif tokens is not None:
            ids, names = values.astype(np.int64) - 1, list(tokens[1:])  # RecBole's token 0 is padding
        else:
            ids, names = values, None
        return (ids if rows is None else ids[rows]), names


def _text(value: Any) -> str:
    return str(value)


def _numbers(tokens: np.ndarray) -> np.ndarray:
    """Returns the tokens as numbers, NaN where they are none."""

    def number(token: str) -> float:
        try:
            return float(token)
        except ValueError:
            return np.nan

    return np.array([np.nan, *(number(token) for token in tokens[1:])])


MOST_CLASSES = 1000


def labelled(values: np.ndarray, names: list[str] | None) -> np.ndarray:
    """Returns the flags of the raw labels that are one, see :meth:`Columns.raw_labels`."""
    return np.asarray(~np.isnan(values) if names is None else values != -1)


def label_classes(
    spec: TaskSpec, values: np.ndarray, names: list[str] | None, train: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Turns raw labels into classes counted from 0, in an order that does not depend on the split.

    Args:
        spec: The task.
        values: Raw labels of the positions, see :meth:`Columns.raw_labels`.
        names: Names of the ids.
        train: Positions of the training targets, those that are trained on.
        held_out: Positions of the validation and test targets.

    Returns:
        The class of each position, -1 where its target is to be left out, and the classes' names.

    Raises:
        DataError: If training holds a single class, a held-out class never occurs in training, or there are more than
            :data:`MOST_CLASSES`.
    """

    def name(value: Any) -> str:
        return f"{value:g}" if names is None else str(names[int(value)])

    where = f"tasks: {spec.name!r} (target {spec.target})"
    known, later = (of[labelled(of, names)] for of in (values[train], values[held_out]))
    classes, counts = np.unique(known, return_counts=True)
    if spec.classes is not None and len(classes) > spec.classes:
        classes = np.sort(classes[np.lexsort((classes, -counts))[: spec.classes]])
    if len(classes) < 2:
        found = f"{len(train)} training targets hold the single class {name(classes[0])!r}" if len(classes) else ""
        raise DataError(
            f"{where}: its {found or 'training targets hold no label'}; choose another target or other "
            f"bins, loosen its filter, or raise train_per_user"
        )
    if len(classes) > MOST_CLASSES:
        raise DataError(f"{where}: {len(classes)} classes are more than {MOST_CLASSES}; set bins or classes")
    later = np.setdiff1d(later, classes)
    if len(later) and spec.classes is None:
        raise DataError(
            f"{where}: the class {name(later[0])!r} is to be predicted but occurs in no training target; set classes "
            f"to keep only the most frequent ones of training, wider bins, or a larger train_per_user"
        )
    at = np.minimum(np.searchsorted(classes, values), len(classes) - 1)
    return np.where(classes[at] == values, at, -1), [name(value) for value in classes]


__all__ = ["KINDS", "REPEAT", "Columns", "Condition", "TaskSpec", "label_classes", "labelled", "parse_tasks"]
