"""What declared tasks read of a log: conditions by position, and labels turned into classes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from recbole.utils import FeatureSource, FeatureType

from recbole_cl.errors import ConfigError, DataError, nearest
from recbole_cl.schema import is_number
from recbole_cl.stream.tasks import OPS, REPEAT, SETS, Condition, TaskSpec

if TYPE_CHECKING:
    from recbole_cl.stream.dataset import StreamDatasetMixin
    from recbole_cl.stream.table import InteractionTable


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
