"""A stream without some of its users: their interactions, targets, features and tokens are gone.

Ids stay what they are, so everything that was learnt of the others keeps its row: a forgotten user leaves an empty
place that no token leads to. Positions close up, and the ranges of histories with them::

    positions before   0:u1  1:u2  2:u1  3:u3        u2 is forgotten: 0:u1  1:u1  2:u3
    seq before         [u1: 0 2][u2: 1][u3: 3]       [u1: 0 1][u2: ][u3: 2]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType

from recbole_cl.stream.build import Stream
from recbole_cl.stream.dataset import select
from recbole_cl.stream.stage import Targets

PLACE = "[FORGOTTEN"
"""What the token of an empty place begins with."""
_POSITIONS, _RANGES = ("position", "_position"), ("lo", "hi", "_lo", "_hi")
Array = np.ndarray | torch.Tensor


def is_array(value: Any) -> bool:
    """Tells whether a leaf of a state is a tensor or an array with at least one dimension."""
    return (torch.is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim > 0


def like(array: np.ndarray, model: Any) -> Any:
    """Returns an array as what another one is: a tensor or an array."""
    return torch.from_numpy(array) if torch.is_tensor(model) else array


@dataclass(frozen=True)
class Removal:
    """What was taken out of a stream, and where the rest went.

    Args:
        users: Ids of the users, sorted.
        position: New position of each old one, -1 for those that are gone, shape ``[N]``.
        place: New index of each old one in ``table.seq``, also of its end, shape ``[len(seq) + 1]``.
    """

    users: np.ndarray
    position: np.ndarray
    place: np.ndarray

    def stays(self, user: Array) -> np.ndarray:
        """Returns flags of the rows of other users."""
        return ~np.isin(np.asarray(user), self.users)

    def targets(self, targets: Targets) -> Targets:
        """Returns the targets of the other users."""
        kept = targets[self.stays(targets.user)]
        return replace(kept, position=self.position[kept.position], lo=self.place[kept.lo], hi=self.place[kept.hi])

    def rows(self, columns: Mapping[str, Any], user: str) -> dict[str, Any]:
        """Returns the rows of the other users of a memory, their positions and ranges moved.

        Args:
            columns: Columns with a row an entry; values that are no array, or of another length, stay as they are.
            user: Name of the column of user ids.
        """
        stays = self.stays(columns[user])
        out: dict[str, Any] = {}
        for name, column in columns.items():
            if not is_array(column) or len(column) != len(stays):
                out[name] = column
                continue
            kept = column[like(stays, column)]
            moved = self.position if name in _POSITIONS else self.place if name in _RANGES else None
            out[name] = kept if moved is None else like(moved[np.asarray(kept)], column)
        return out


def without_users(stream: Stream, users: np.ndarray) -> tuple[Stream, Removal]:
    """Returns a stream without some users, and where the rest went.

    Features of theirs become those of nobody (tokens 0, numbers the mean of the others), and a word that only they had
    (a postal code, the name of a shop) loses its token. Items stay, also those that nobody else has had.

    Args:
        stream: The stream; it stays as it is.
        users: Their ids.
    """
    table, base = stream.table, stream.dataset
    users = np.unique(np.asarray(users, dtype=np.int64))
    keep = ~np.isin(table.user, users)
    position = np.where(keep, np.cumsum(keep) - 1, -1)
    in_seq = keep[table.seq]
    removal = Removal(users, position, np.concatenate([[0], np.cumsum(in_seq)]).astype(np.int64))
    dataset: Any = copy.copy(base)
    rows = torch.from_numpy(np.flatnonzero(keep))
    dataset.inter_feat = select(base.inter_feat, rows)
    for attribute in ("raw_stage", "raw_time", "raw_role", "raw_phase", "raw_late"):
        setattr(dataset, attribute, getattr(base, attribute)[keep])
    dataset.number_counts = {
        name: counts[keep] if name in base.inter_feat.interaction and len(counts) == len(keep) else counts
        for name, counts in base.number_counts.items()
    }
    if base.user_feat is not None:
        dataset.user_feat = _nobody(base.user_feat, base.uid_field, users)
    dataset.field2id_token, dataset.field2token_id = dict(base.field2id_token), dict(base.field2token_id)
    for field in {base.uid_field, *(base.alias.get("user_id") or [])} & base.field2id_token.keys():
        _blank(dataset, field, users)
    for field in _words(base):
        _blank(dataset, field, _only_theirs(base, dataset, field))
    fresh = dataset.build_table()
    fresh.seq = np.concatenate([fresh.seq, position[table.seq[len(table) :]][in_seq[len(table) :]]])
    stages = [
        replace(
            stage,
            train=removal.targets(stage.train),
            valid=removal.targets(stage.valid),
            test=removal.targets(stage.test),
        )
        for stage in stream.stages
    ]
    return replace(stream, table=fresh, stages=stages, dataset=dataset), removal


def _nobody(feature: Interaction, field: str, users: np.ndarray) -> Interaction:
    """Returns a table of users' features in which some rows say nothing."""
    columns, rows = {}, torch.from_numpy(users)
    others = torch.ones(len(feature), dtype=torch.bool)
    others[rows] = False
    others[0] = False
    for name, column in feature.interaction.items():
        column = column.clone()
        if name != field:
            column[rows] = 0
            if column.is_floating_point() and column.dim() == 1 and bool(others.any()):
                column[rows] = column[others].mean()
        columns[name] = column
    return Interaction(columns)


def _words(base: Any) -> list[str]:
    """Returns the fields of words, beside ids, that interactions and users have."""
    ids = {base.uid_field, base.iid_field, *(base.alias.get("user_id") or []), *(base.alias.get("item_id") or [])}
    kinds = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
    features = [feature for feature in (base.inter_feat, base.user_feat) if feature is not None]
    names = {name for feature in features for name in feature.interaction}
    return sorted(name for name in names - ids if base.field2type[name] in kinds and name in base.field2id_token)


def _only_theirs(base: Any, dataset: Any, field: str) -> np.ndarray:
    """Returns the ids of a field's words that stood in the old tables and do not in the new ones."""

    def used(data: Any) -> np.ndarray:
        tables = [data.inter_feat, data.user_feat, data.item_feat]
        columns = [t[field].flatten().numpy() for t in tables if t is not None and field in t.interaction]
        return np.unique(np.concatenate(columns)) if columns else np.zeros(0, dtype=np.int64)

    gone = np.setdiff1d(used(base), used(dataset)).astype(np.int64)
    return gone[gone > 0]


def _blank(dataset: Any, field: str, ids: np.ndarray) -> None:
    """Takes the tokens of ids away."""
    tokens = [str(token) for token in dataset.field2id_token[field]]
    for number in ids.tolist():
        tokens[number] = f"{PLACE} {number}]"
    dataset.field2id_token[field] = np.array(tokens)
    dataset.field2token_id[field] = {token: number for number, token in enumerate(tokens)}
