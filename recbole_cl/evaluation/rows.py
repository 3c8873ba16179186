"""What is ranked on one split of a stage: rows, their positives, what is masked, and sampled candidates."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.utils import ModelType

from recbole_cl.config.recbole_properties import labels_are_learnt
from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.known import Known
from recbole_cl.rng import numpy_generator
from recbole_cl.stream.build import Stream
from recbole_cl.stream.sampler import NegativeSampler
from recbole_cl.stream.stage import Stage, Targets


@dataclass
class Rows:
    """Ranking rows of one (stage, split): one a user for general models, one a target for sequential ones."""

    targets: Targets  # one target a row: user and history
    row: np.ndarray  # row of each positive
    item: np.ndarray  # item of each positive
    mask_row: np.ndarray  # rows and items that are not recommended again
    mask_item: np.ndarray
    candidates: np.ndarray | None  # [n, C] sampled candidates, positives first, 0 where there is none

    @functools.cached_property
    def positives(self) -> Grouped:
        """The positives of ranges of rows."""
        return Grouped(self.row, self.item, len(self.targets))

    @functools.cached_property
    def masked(self) -> Grouped:
        """What is not recommended again to ranges of rows."""
        return Grouped(self.mask_row, self.mask_item, len(self.targets))

    def count(self, flag: np.ndarray) -> np.ndarray:
        """Returns how many of each row's positives have a flag, shape ``[n]``."""
        return np.bincount(self.row[flag], minlength=len(self.targets))

    def hits(self, top: np.ndarray) -> np.ndarray:
        """Returns which recommended items, shape ``[n, K]``, are positives of their row."""
        if len(self.row) == len(self.targets) and (np.diff(self.row) == 1).all():  # one a row
            return (top == self.item[:, None]) & (top > 0)
        asked = (np.arange(len(top))[:, None] << 32) + top
        found = np.minimum(np.searchsorted(self._keys, asked), len(self._keys) - 1)
        return (self._keys[found] == asked) & (top > 0)

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.unique(np.r_[-1, (self.row << 32) + self.item])


class Grouped:
    """Pairs (row, item) that can be taken by ranges of rows."""

    def __init__(self, row: np.ndarray, item: np.ndarray, n_rows: int) -> None:
        order = np.argsort(row, kind="stable")
        self.row, self.item = row[order], item[order]
        self.ptr = np.searchsorted(self.row, np.arange(n_rows + 1))

    def of(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows (from 0) and items of a contiguous range of rows."""
        part = slice(self.ptr[index[0]], self.ptr[index[-1] + 1])
        return self.row[part] - index[0], self.item[part]


def mode_of(config: Any, split: str) -> str:
    """Returns RecBole's evaluation mode of a split (``full``, ``uni100``, ``labeled``)."""
    return str(config["eval_args"]["mode"][split])


def is_sampled(mode: str) -> bool:
    """Tells whether a mode ranks sampled candidates."""
    return mode[:3] in ("uni", "pop")


def build_rows(config: Any, stream: Stream, stage: Stage, split: str) -> Rows:
    """Returns what is ranked on one split of a stage; the same for every trained stage.

    Args:
        config: The run's configuration.
        stream: The stream.
        stage: The evaluated stage.
        split: ``valid`` or ``test``.
    """
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    targets = stage.split(split)
    targets = targets[_liked(config, stream, targets)]
    if sequential:
        rows, row, item = targets, np.arange(len(targets)), targets.label
    else:
        _, first, row = np.unique(targets.user, return_index=True, return_inverse=True)
        rows = targets[first]
        pairs = np.unique(np.stack([row, targets.label]), axis=1)
        row, item = pairs[0], pairs[1]
    empty = np.empty(0, dtype=np.int64)
    mask_row, mask_item = (
        (empty, empty) if config.repeatable_items else _earlier(stream, stage, split, rows, row, item, sequential)
    )
    if not is_sampled(mode_of(config, split)):
        return Rows(rows, row, item, mask_row, mask_item, None)
    if config["candidates_exclude"] != "auto":
        mask_row, mask_item = _owned(config, stream, stage, split, rows)
    candidates = _sample(config, stream, stage, split, len(rows), row, item, mask_row, mask_item)
    return Rows(rows, row, item, empty, empty, candidates)  # what is masked is no candidate


def _earlier(
    stream: Stream, stage: Stage, split: str, rows: Targets, row: np.ndarray, item: np.ndarray, sequential: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What a user had before, not to be recommended again; targets themselves are never masked."""
    table = stream.table
    lengths = rows.hi - rows.lo if sequential else table.ptr[rows.user + 1] - table.ptr[rows.user]
    start = rows.lo if sequential else table.ptr[rows.user]
    owner = np.repeat(np.arange(len(rows)), lengths)
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = table.seq[np.repeat(start, lengths) + inside]
    if not sequential:
        held = np.zeros(len(table), dtype=bool)
        held[stage.test.position] = True
        if split == "valid":
            held[stage.valid.position] = True
        first_later = np.searchsorted(table.stage, _last_slice(stream, stage), side="right")
        keep = (position < first_later) & ~held[position]
        owner, position = owner[keep], position[keep]
    key = np.unique(owner * table.n_items + table.item[position])
    key = np.setdiff1d(key, row * table.n_items + item, assume_unique=False)
    return key // table.n_items, key % table.n_items


def _owned(config: Any, stream: Stream, stage: Stage, split: str, rows: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and the items that are no sampled candidates of theirs beside their positives.

    ``candidates_exclude: seen`` leaves out what the user had before: before the target of a row (sequential models), or
    up to the evaluated slice of time without its held-out targets (general ones: a row stands for all of a user's).
    ``stage`` also leaves out everything that the user has in the slice of the evaluated targets, later ones included.
    """
    empty, table = np.empty(0, dtype=np.int64), stream.table
    how = config["candidates_exclude"]
    if how in ("auto", "target") or not len(rows):
        return empty, empty
    start, lengths = table.ptr[rows.user], table.ptr[rows.user + 1] - table.ptr[rows.user]
    owner = np.repeat(np.arange(len(rows)), lengths)
    at = np.repeat(start, lengths) + np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = table.seq[at]
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and stage.task.kind != "value":
        chosen = position < rows.position[owner]
    else:
        held = np.zeros(len(table), dtype=bool)
        held[stage.test.position] = True
        held[stage.valid.position] |= split == "valid"
        chosen = (table.stage[position] <= _last_slice(stream, stage)) & ~held[position]
    if how == "stage":
        chosen |= np.isin(table.stage[position], np.unique(table.stage[stage.split(split).position]))
    pairs = np.unique(owner[chosen] * table.n_items + table.item[position[chosen]])
    return pairs // table.n_items, pairs % table.n_items


def _last_slice(stream: Stream, stage: Stage) -> int:
    """Slice in which the stage's test targets lie."""
    return int(stream.table.stage[stage.test.position].max()) if len(stage.test) else stage.index


def _sample(
    config: Any,
    stream: Stream,
    stage: Stage,
    split: str,
    n_rows: int,
    row: np.ndarray,
    item: np.ndarray,
    mask_row: np.ndarray,
    mask_item: np.ndarray,
) -> np.ndarray:
    """Draws the candidates of sampled ranking once, the same for every trained stage."""
    mode = mode_of(config, split)
    number = int(mode[3:])
    limit = stream.table.n_items if config["candidates"] == "all" else stage.catalogue
    by_popularity = mode.startswith("pop")  # of the task's own training targets, hence among its items anyway
    pool = None if stage.items is None or by_popularity else stage.items[stage.items < limit]
    sampler = NegativeSampler(
        np.r_[row, mask_row],
        np.r_[item, mask_item],
        limit,
        numpy_generator(config["seed"], stage.index, f"candidates/{split}"),
        pool=pool,
    )
    if by_popularity:
        counts = np.bincount(stream.table.item[stage.train.position], minlength=limit)[1:limit].astype(float)
        sampler.cumulative = np.cumsum(counts / counts.sum())
    negatives = sampler.sample(row, number).reshape(number, len(row)).T
    per_row = np.bincount(row, minlength=n_rows)
    width = int(per_row.max()) * (1 + number)
    out = np.zeros((n_rows, width), dtype=np.int64)
    order = np.argsort(row, kind="stable")
    place = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    out[row[order], place] = item[order]
    start = per_row[row[order]] + place * number
    out[row[order][:, None], start[:, None] + np.arange(number)[None, :]] = negatives[order]
    return out


@dataclass
class Labelled:
    """Single scores of one (stage, split): columns of equal length ``n``.

    Args:
        target: Number of the target that a row belongs to.
        user: Its user.
        item: Its item, the target's own or a sampled one.
        label: What the score should be.
        sampled: Items were sampled, so that a batch's own ones have to be replaced.
    """

    target: np.ndarray
    user: np.ndarray
    item: np.ndarray
    label: np.ndarray
    sampled: bool


def _liked(config: Any, stream: Stream, targets: Targets) -> np.ndarray:
    """Returns which targets are positives, shape ``[n]``: where labels are learnt, those whose label is above 0."""
    field, columns = config["LABEL_FIELD"], stream.dataset.inter_feat
    if not labels_are_learnt(config) or field not in columns:
        return np.ones(len(targets), dtype=bool)
    return np.asarray(columns[field][torch.from_numpy(targets.position)].numpy() > 0)


def build_labelled(config: Any, stream: Stream, stage: Stage, split: str) -> Labelled:
    """Returns the rows of a value task: a target each, or each target and its sampled items.

    Args:
        config: The run's configuration.
        stream: The stream.
        stage: The evaluated stage.
        split: ``valid`` or ``test``.

    Raises:
        ConfigError: If the log has no labels and none are sampled.
    """
    targets, mode, field = stage.split(split), mode_of(config, split), config["LABEL_FIELD"]
    number = np.arange(len(targets))
    if is_sampled(mode):
        number = np.flatnonzero(_liked(config, stream, targets))
        targets = targets[number]
        users, first = np.unique(targets.user, return_index=True)
        row, item = _owned(config, stream, stage, split, targets[first])
        sampler = NegativeSampler(
            np.r_[targets.user, users[row]],
            np.r_[targets.label, item],
            stage.catalogue,
            numpy_generator(config["seed"], stage.index, f"candidates/{split}"),
        )
        each = int(mode[3:])
        negatives = sampler.sample(targets.user, each)
        return Labelled(
            np.tile(number, 1 + each),
            np.tile(targets.user, 1 + each),
            np.r_[targets.label, negatives],
            np.r_[np.ones(len(targets)), np.zeros(len(negatives))],
            True,
        )
    columns = stream.dataset.inter_feat
    if field not in columns:
        raise ConfigError(
            f"LABEL_FIELD: {field!r} is no column of the interactions and no threshold makes it; set "
            f"threshold: {{rating: 4}} or evaluate with eval_args mode uni100"
        )
    label = columns[field][torch.from_numpy(targets.position)].numpy().astype(np.float64)
    return Labelled(number, targets.user, targets.label, label, False)


def allowed_items(config: Any, known: Known, stage: Stage, n_items: int, untrained: bool = False) -> np.ndarray:
    """Returns which items may be recommended, shape ``[n_items]``.

    Args:
        config: ``candidates`` is read.
        known: What the model has trained on.
        stage: The evaluated stage.
        n_items: Items that the model has rows for.
        untrained: It also scores items that it never trained on (``scores_untrained_items``).
    """
    allowed = np.zeros(n_items, dtype=bool)
    scope = config["candidates"]
    if scope == "seen":
        allowed[1 : min(n_items, stage.catalogue)] = True
        allowed &= known.scorable(n_items, untrained)[:n_items]
    elif scope == "trained":
        allowed = known.items[:n_items].copy()
    else:
        allowed[1:] = True
    if stage.items is not None:
        allowed &= np.isin(np.arange(n_items), stage.items)
    allowed[0] = False
    return allowed
