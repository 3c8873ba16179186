"""From targets to RecBole's ``Interaction``, one batch at a time.

A sequential batch equals the rows that RecBole's own augmentation would have stored, for the targets asked. Every
batch carries int64 ``_position``, ``_stage`` and ``_timestamp``: RecBole's own timestamps are float32. Every row says
which interactions came before its target: those of ``table.seq[_lo:_hi]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

from recbole_cl.config.models import configured_traits
from recbole_cl.errors import ConfigError
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Targets

POSITION, STAGE, TIMESTAMP, TASK = "_position", "_stage", "_timestamp", "_task"
LO, HI = "_lo", "_hi"
"""Fields of rows, int64: the half-open range of their history in ``table.seq``, of general models' rows, too.

It is the whole history, longer than what a row lists (``MAX_ITEM_LIST_LENGTH``) and, in evaluation, with the items that
the model has no row for. Of a window it is the range of its inputs.
"""
LABEL = "_label"
"""Field of rows: the target's label, an item or a class."""
TARGETS = "_targets"
"""Field of all-position batches: the item to predict after each input, 0 where none is supervised, ``[B, L]``."""
LABELS = "_labels"
"""Field of all-position batches of a classification: the class after each input, 0 where none is supervised, too."""


class Windows:
    """Windows of sequences whose targets are supervised in one causal pass.

    ::

        seq      i1 i2 i3 i4 i5 i6 i7 i8          targets t5 .. t8 of one user, window 4, stride 2
        window            [i4 i5 i6 i7] -> i5 i6 *i7 *i8      chunk of the last two targets
        window      [i2 i3 i4 i5]       -> i3 i4 *i5 *i6      chunk before; * is supervised, each target once

    Chunks are cut from the end of a user's targets, so that the newest have the longest context. A shift moves the
    cuts: the newest chunk is shorter by it.

    Args:
        targets: Next-item targets with a history.
        supervised: Flag of each index of ``table.seq``, shape ``[N]``.
        size: Inputs a window holds at most.
        stride: Targets of a window at most.
        generator: Draws a shift from 0 to ``stride - 1`` for each sequence of more than ``stride`` targets; without it
            nothing is shifted.
        labels: Class of each supervised index of ``table.seq``, shape ``[N]``, where classes are asked for.

    Raises:
        ConfigError: If the stride exceeds the size: targets would be left out.
    """

    def __init__(
        self,
        targets: Targets,
        supervised: np.ndarray,
        size: int,
        stride: int,
        generator: torch.Generator | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        if stride > size:
            raise ConfigError(
                f"window_stride: {stride} is more than the window of {size} inputs, so targets between two windows "
                f"would never be trained on; make it at most the window"
            )
        self.targets, self.supervised, self.size, self.stride = targets, supervised, size, stride
        self.labels = labels
        order = np.lexsort((targets.hi, targets.user))
        hi, user, lo = targets.hi[order], targets.user[order], targets.lo[order]
        last = np.r_[(user[1:] != user[:-1]) | (lo[1:] != lo[:-1]), True] if len(user) else np.empty(0, dtype=bool)
        group = np.cumsum(np.r_[False, last[:-1]]) if len(user) else np.empty(0, dtype=np.int64)
        end = hi[last][group] if len(user) else hi
        if generator is not None:
            shift = torch.randint(stride, (int(last.sum()),), generator=generator).numpy()
            end = end + (shift * (np.bincount(group, minlength=len(shift)) > stride))[group]
        chunk = (end - hi) // stride
        new = np.r_[True, (group[1:] != group[:-1]) | (chunk[1:] != chunk[:-1])] if len(user) else last
        close = np.r_[new[1:], True] if len(user) else last
        self.user = user[new]
        self.first = hi[new]  # seq index of the first supervised target
        self.last = hi[close]  # seq index of the last supervised target
        self.lo = np.maximum(lo[new], self.last - size)
        self.task = None if targets.task is None else targets.task[order][close]
        self.n_targets = np.bincount(np.cumsum(new) - 1, minlength=len(self.user)) if len(user) else last.astype(int)

    def shifted(self, generator: torch.Generator) -> Windows:
        """Returns windows over the same targets, cut at places that the generator draws."""
        return Windows(self.targets, self.supervised, self.size, self.stride, generator, self.labels)

    def __len__(self) -> int:
        return len(self.user)


Collate = Callable[["Batcher", Interaction, Targets, bool], Interaction]
"""Adds to rows what a model reads beside RecBole's columns: ``collate(batcher, rows, targets, evaluation)``."""


class Batcher:
    """Builds batches for one model at one stage.

    Args:
        config: The run's configuration.
        stream: The stream.
        view: RecBole's dataset at the stage (:class:`recbole_cl.stream.dataset.StageView`).
        n_users: Users that the model has rows for.
        n_items: Items that the model has rows for.

    Attributes:
        collate: The model's own columns, see :data:`Collate`; ``None`` adds none. It is called on all rows that a model
            gets, those of training, of evaluation and those replayed, before RecBole's transform and the negatives: a
            negative's row is a copy of its positive's with another item. Whole users (``user_batches``) and the batches
            of ``parity`` are no rows.
    """

    collate: Collate | None = None

    def __init__(self, config: Any, stream: Stream, view: Any, n_users: int, n_items: int) -> None:
        self.config = config
        self.stream = stream
        self.table = stream.table
        self.view = view
        self.n_users, self.n_items = n_users, n_items
        self.sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.negative_lists = configured_traits(config).negative_lists
        base = stream.dataset
        self.uid, self.iid = base.uid_field, base.iid_field
        self.length_field = config["ITEM_LIST_LENGTH_FIELD"]
        self.suffix = config["LIST_SUFFIX"]
        self.max_length: int = config["MAX_ITEM_LIST_LENGTH"]
        self.columns: dict[str, torch.Tensor] = dict(base.inter_feat.interaction)
        self.table_columns = {
            POSITION: np.arange(len(self.table)),
            STAGE: self.table.stage,
            TIMESTAMP: self.table.timestamp,
        }

    def windows_index(self, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns positions and mask of the last ``max_length`` interactions of each history, left-aligned.

        Args:
            lo: Starts in ``table.seq``, shape ``[n]``.
            hi: Ends in ``table.seq``, exclusive, shape ``[n]``.

        Returns:
            Positions ``[n, L]`` (0 where masked) and the mask ``[n, L]``.
        """
        start = np.maximum(lo, hi - self.max_length)
        index = start[:, None] + np.arange(self.max_length)[None, :]
        mask = index < hi[:, None]
        return np.where(mask, self.table.seq[np.minimum(index, len(self.table.seq) - 1)], 0), mask

    def rows(
        self, targets: Targets, stage: int | None = None, evaluation: bool = False, collate: bool = True
    ) -> Interaction:
        """Returns one row a target, without negatives.

        Args:
            targets: The targets.
            stage: Stage that the prediction answers for (``_task``); default each target's own.
            evaluation: Users and items that the model has no row for become 0 (padding), in the row and in its
                history; histories are closed up, so they stay left-aligned. In training all ids are known.
            collate: Add the model's own columns; a loader does that itself when it completes rows.
        """
        position = torch.from_numpy(targets.position)
        data = {name: column[position] for name, column in self.columns.items()}
        data[self.uid] = torch.from_numpy(targets.user)
        if self.sequential:
            data.update(self._histories(targets, evaluation))
            if self.negative_lists:  # looked up whenever the model scores; only its training reads them
                name = self.iid + self.suffix
                data[self.config["NEG_PREFIX"] + name] = torch.zeros_like(data[name])
        if evaluation:
            data[self.uid] = torch.where(data[self.uid] < self.n_users, data[self.uid], 0)
            data[self.iid] = torch.where(data[self.iid] < self.n_items, data[self.iid], 0)
        for name, column in self.table_columns.items():
            data[name] = torch.from_numpy(column[targets.position])
        if stage is not None:
            data[TASK] = torch.full((len(targets),), stage, dtype=torch.int64)
        else:
            data[TASK] = data[STAGE] if targets.task is None else torch.from_numpy(targets.task)
        data[LO], data[HI] = torch.from_numpy(targets.lo), torch.from_numpy(targets.hi)
        data[LABEL] = torch.from_numpy(targets.label)
        rows = self.join(Interaction(data))
        return self.collated(rows, targets, evaluation) if collate and self.collate is not None else rows

    def collated(self, rows: Interaction, targets: Targets | None = None, evaluation: bool = False) -> Interaction:
        """Returns rows with the model's own columns.

        Args:
            rows: Rows or windows, without negatives.
            targets: Their targets; by default those that the rows tell of (:meth:`targets_of`).
            evaluation: Ids that the model has no rows for are 0.

        Raises:
            ConfigError: If the model's columns do not have a row each.
        """
        if self.collate is None:
            return rows
        n = len(rows)
        found = self.collate(self, rows, self.targets_of(rows) if targets is None else targets, evaluation)
        wrong = [f"{name!r} ({len(column)})" for name, column in found.interaction.items() if len(column) != n]
        if wrong:
            raise ConfigError(
                f"model {self.config['model']}: its collate was given {n} rows and returns columns of other lengths: "
                f"{', '.join(wrong)}; give every row one entry"
            )
        return found

    def targets_of(self, rows: Interaction) -> Targets:
        """Returns the targets behind rows of training, a window's being its last one after the inputs of the window."""
        position = rows[POSITION].numpy()
        if LABEL in rows:
            label = rows[LABEL].numpy()
        elif LABELS in rows:
            label = rows[LABELS].gather(1, rows[self.length_field].unsqueeze(1) - 1).squeeze(1).numpy()
        else:
            label = self.table.item[position]
        lo, hi, task = (rows[name].numpy() for name in (LO, HI, TASK))
        return Targets(position, rows[self.uid].numpy(), lo, hi, label, task)

    def join(self, rows: Interaction) -> Interaction:
        """Adds the features of the rows' users and items."""
        base = self.stream.dataset
        for feat, field in ((base.user_feat, self.uid), (base.item_feat, self.iid)):
            if feat is not None and field in rows:
                ids = rows[field]
                for name, column in feat.interaction.items():
                    if name != field:
                        rows.interaction[name] = column[ids]
        return rows

    def _histories(self, targets: Targets, evaluation: bool) -> dict[str, torch.Tensor]:
        positions, mask = self.windows_index(targets.lo, targets.hi)
        if evaluation:
            seen = mask & (self.table.item[positions] < self.n_items)
            if (seen != mask).any():
                order = np.argsort(~seen, axis=1, kind="stable")
                positions = np.take_along_axis(np.where(seen, positions, 0), order, axis=1)
                mask = np.take_along_axis(seen, order, axis=1)
        index, keep = torch.from_numpy(positions), torch.from_numpy(mask)
        out: dict[str, torch.Tensor] = {self.length_field: keep.sum(dim=1)}
        for name, column in self.columns.items():
            if name == self.uid:
                continue
            listed = column[index]
            shape = keep.shape + (1,) * (listed.dim() - 2)
            out[name + self.suffix] = listed * keep.view(shape).to(listed.dtype)
        return out

    def window_rows(self, windows: Windows, index: np.ndarray, collate: bool = True) -> Interaction:
        """Returns all-position rows: inputs, and the target after each input (field ``_targets``).

        Windows of a classification have the class of each target, too (field ``_labels``, 0 where there is no target).

        Args:
            windows: The windows.
            index: Which of them, shape ``[B]``.
            collate: See :meth:`rows`; a window's target is its last one.
        """
        lo, last, first = windows.lo[index], windows.last[index], windows.first[index]
        width = int((last - lo).max())
        at = lo[:, None] + np.arange(width)[None, :]
        mask = at < last[:, None]
        at = np.minimum(at, len(self.table.seq) - 2)
        seq, item = self.table.seq, self.table.item
        inputs = np.where(mask, item[seq[at]], 0)
        supervised = mask & windows.supervised[at + 1] & (at + 1 >= first[:, None])
        targets = np.where(supervised, item[seq[at + 1]], 0)
        closing = seq[last]
        classes = {}
        if windows.labels is not None:
            classes[LABELS] = torch.from_numpy(np.where(supervised, windows.labels[at + 1], 0))
        rows = Interaction(
            {
                **classes,
                self.uid: torch.from_numpy(windows.user[index]),
                self.iid: torch.from_numpy(item[closing]),
                self.iid + self.suffix: torch.from_numpy(inputs),
                self.length_field: torch.from_numpy(mask.sum(axis=1)),
                TARGETS: torch.from_numpy(targets),
                LO: torch.from_numpy(lo),
                HI: torch.from_numpy(last),
                POSITION: torch.from_numpy(closing),
                STAGE: torch.from_numpy(self.table.stage[closing]),
                TIMESTAMP: torch.from_numpy(self.table.timestamp[closing]),
                TASK: torch.from_numpy(self.table.stage[closing] if windows.task is None else windows.task[index]),
            }
        )
        return self.collated(rows) if collate and self.collate is not None else rows
