"""Exemplar memories: rows of the past, kept as plain tensors.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.model.forget import Forgetting
from recbole_cl.strategy.base import require
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import TARGETS, Windows
from recbole_cl.stream.build import Stream
from recbole_cl.stream.loader import Units


def vocabulary_hash(stream: Stream, n_users: int, n_items: int) -> str:
    """Returns a hash of the tokens behind the first ``n_users`` user ids and ``n_items`` item ids."""
    base: Any = stream.dataset
    digest = hashlib.sha256()
    for field, known in ((base.uid_field, n_users), (base.iid_field, n_items)):
        digest.update("\x1f".join(map(str, base.field2id_token[field][:known])).encode())
        digest.update(b"\x1e")
    return digest.hexdigest()


def build_rows(ctx: StageContext, units: Units, index: np.ndarray) -> Interaction:
    """Returns rows of the targets or windows at ``index`` (not empty), without negatives and the model's own columns.

    Those are added when rows are replayed (:meth:`recbole_cl.stream.loader.StageLoader.complete`), as they are then.
    """
    if isinstance(units, Windows):
        return ctx.batcher.window_rows(units, index, collate=False)
    if isinstance(units, tuple):
        raise ConfigError(f"strategy: {ctx.config['model']} trains on whole users, there are no rows to remember")
    return ctx.batcher.rows(units[index], collate=False)


def join_rows(first: Interaction, second: Interaction, optional: frozenset[str] = frozenset()) -> Interaction:
    """Returns the rows of both, ``first`` before ``second``; the narrower sequences are padded on the right with 0.

    Args:
        first: Rows, as a loader yields them.
        second: Further rows; where there are none their fields do not matter.
        optional: Fields of ``first`` that ``second`` may lack; they stay as they are (triples of a knowledge graph).

    Raises:
        ConfigError: If a field is in one of them only; the message names it.
    """
    a, b = first.interaction, second.interaction
    missing = sorted((a.keys() ^ b.keys()) - optional)
    if missing and len(second):
        where = ", ".join(f"{name} ({'batch' if name in a else 'memory'} only)" for name in missing)
        raise ConfigError(
            f"replayed rows and the batch differ in their fields: {where}; use the same load_col throughout"
        )
    return Interaction({name: _append(a[name], b[name]) if name in b else a[name] for name in a})


def _append(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dim() > 1 and a.shape[1] != b.shape[1]:
        width = max(a.shape[1], b.shape[1])
        a, b = _widen(a, width), _widen(b, width)
    return torch.cat([a, b])


def _widen(column: torch.Tensor, width: int) -> torch.Tensor:
    if column.shape[1] == width:
        return column
    wide = column.new_zeros(len(column), width, *column.shape[2:])
    wide[:, : column.shape[1]] = column
    return wide


class ReservoirMemory:
    """A uniform sample, without replacement, of everything it was ever shown.

    Every unit (a target, or a window) gets a uniform random key; the ``size`` units with the smallest keys stay. This
    is reservoir sampling (Vitter 1985) whose outcome does not depend on the order in which units come, and a whole
    stage is one vectorised step.

    Args:
        size: Units it holds at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.keys = np.empty(0)
        self.columns: dict[str, torch.Tensor] = {}
        self.vocabulary: dict[str, Any] = {}
        self._checked: Stream | None = None
        self._mean: float | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def check(self, ctx: StageContext) -> None:
        """Raises a :class:`CheckpointError` if the ids inside mean other users or items in this stream."""
        if self._checked is ctx.stream or not self.vocabulary:
            return
        known = {key: int(self.vocabulary[key]) for key in ("n_users", "n_items")}
        if vocabulary_hash(ctx.stream, **known) != self.vocabulary["hash"]:
            raise CheckpointError(
                f"the exemplar memory was filled from a log in which the first {known['n_users'] - 1} users and "
                f"{known['n_items'] - 1} items are others than here; resume with that log or start anew without resume"
            )
        self._checked = ctx.stream

    def add(self, ctx: StageContext, units: Units, generator: np.random.Generator) -> None:
        """Shows it all units of a stage; rows are built only for those that stay."""
        self.check(ctx)
        held = len(self.keys)
        keys = np.r_[self.keys, generator.random(len(units))]
        chosen = np.sort(np.argsort(keys, kind="stable")[: self.size])
        old, new = torch.from_numpy(chosen[chosen < held]), chosen[chosen >= held] - held
        kept = Interaction({name: column[old] for name, column in self.columns.items()})
        if len(new):
            rows = build_rows(ctx, units, new)
            kept = join_rows(kept, rows) if self.columns else rows
        self.hold(ctx, keys[chosen], kept)

    def hold(self, ctx: StageContext, keys: np.ndarray, rows: Interaction) -> None:
        """Takes rows and their keys in place of what it held; ids are those of the stage."""
        self.keys, self.columns, self._mean = keys, dict(rows.interaction), None
        known = {"n_users": ctx.stage.n_users, "n_items": ctx.stage.n_items}
        self.vocabulary = {**known, "hash": vocabulary_hash(ctx.stream, **known)}
        self._checked = ctx.stream

    def rows(self, index: np.ndarray) -> Interaction:
        """Returns a copy of the rows at ``index``; windows only as wide as the longest of them."""
        chosen = torch.from_numpy(np.asarray(index, dtype=np.int64))
        columns = {name: column[chosen] for name, column in self.columns.items()}
        if TARGETS in columns:
            filled = (columns[TARGETS] > 0).any(dim=0).nonzero()
            width = int(filled.max()) + 1 if len(filled) else 0
            columns = {name: c[:, :width] if c.dim() > 1 else c for name, c in columns.items()}
        return Interaction(columns)

    def rows_of(self, targets: int) -> int:
        """Returns how many rows hold about so many targets: as many, or fewer windows by what one holds on average."""
        if TARGETS not in self.columns or not targets:
            return min(targets, len(self))
        if self._mean is None:
            self._mean = float((self.columns[TARGETS] > 0).sum()) / len(self)
        return min(max(1, round(targets / self._mean)), len(self))

    def sample(self, count: int, generator: np.random.Generator) -> Interaction:
        """Returns ``count`` different rows (all, where it holds fewer), uniformly."""
        return self.rows(generator.choice(len(self), size=min(count, len(self)), replace=False, shuffle=False))

    def state_dict(self) -> dict[str, Any]:
        """Returns rows, keys and the vocabulary's hash."""
        return {"keys": self.keys, "columns": dict(self.columns), "vocabulary": dict(self.vocabulary)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state back; the vocabulary is compared when the memory is next used."""
        require(state, "keys", "columns", "vocabulary")
        self.keys, self.columns, self._mean = np.array(state["keys"], dtype=np.float64), dict(state["columns"]), None
        self.vocabulary, self._checked = dict(state["vocabulary"]), None

    def without_users(self, state: Mapping[str, Any], forgetting: Forgetting) -> dict[str, Any]:
        """Returns a saved state without the rows of users who are to be forgotten."""
        if not state["columns"]:
            return dict(state)
        rows = forgetting.removal.rows({**state["columns"], "keys": state["keys"]}, forgetting.stream.dataset.uid_field)
        keys, vocabulary = rows.pop("keys"), dict(state["vocabulary"])
        known = {key: int(vocabulary[key]) for key in ("n_users", "n_items")}
        return {
            "keys": keys,
            "columns": rows if len(keys) else {},
            "vocabulary": {**known, "hash": vocabulary_hash(forgetting.stream, **known)},
        }
