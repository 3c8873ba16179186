"""A stream with one more stage: what came after it, by token.

Ids and positions of the stream so far stay what they are, so everything that was learnt keeps its place: new rows stand
behind the others, new users and items get the next ids. Only ``table.seq`` is another array, for it groups positions by
user; ranges in it move by what came before them::

    seq before   [u1: 0 2 5][u2: 1 3 4]                       a target of u2 with the history [3, 5)
    seq after    [u1: 0 2 5 6][u2: 1 3 4 8][u3: 7]            the same history is [4, 6)
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType, ModelType

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.stream.build import Stream
from recbole_cl.stream.features import filled
from recbole_cl.stream.split import roles, vocabulary_phase
from recbole_cl.stream.stage import Stage, Targets, Task
from recbole_cl.stream.table import TEST, TRAIN, VALID, InteractionTable


@dataclass
class Moves:
    """Where the ranges of a table's ``seq`` lie in that of the longer one.

    Args:
        old: The table before.
        new: The table with more rows.
    """

    old: InteractionTable
    new: InteractionTable

    def __call__(self, user: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bounds of the same histories in the longer table."""
        own = (lo >= self.old.ptr[user]) & (lo <= self.old.ptr[user + 1]) & (hi <= self.old.ptr[user + 1])
        shift = np.where(own, self.new.ptr[user] - self.old.ptr[user], len(self.new) - len(self.old))
        return lo + shift, hi + shift

    def targets(self, targets: Targets) -> Targets:
        """Returns the same targets over the longer table."""
        lo, hi = self(targets.user, targets.lo, targets.hi)
        return replace(targets, lo=lo, hi=hi)

    def state(self, value: Any) -> Any:
        """Returns a strategy's state with its histories moved: those of targets (``lo``, ``hi``) and rows (``_lo``)."""
        if isinstance(value, Mapping):
            moved = {key: self.state(inner) for key, inner in value.items()}
            if {"user", "lo", "hi"} <= moved.keys():
                arrays = [np.asarray(value[key], dtype=np.int64) for key in ("user", "lo", "hi")]
                lo, hi = self(*arrays)
                for key, array in (("lo", lo), ("hi", hi)):
                    moved[key] = torch.from_numpy(array) if torch.is_tensor(value[key]) else array
            elif {"_position", "_lo", "_hi"} <= moved.keys():  # rows of batches
                position, lo, hi = (np.asarray(value[key]) for key in ("_position", "_lo", "_hi"))
                for key, array in zip(("_lo", "_hi"), self(self.new.user[position], lo, hi), strict=True):
                    moved[key] = torch.from_numpy(array) if torch.is_tensor(value[key]) else array
            return moved
        return [self.state(inner) for inner in value] if isinstance(value, list) else value


def extended(
    config: Any, stream: Stream, rows: pd.DataFrame, name: str, features: Mapping[str, pd.DataFrame] | None = None
) -> tuple[Stream, Moves]:
    """Returns a stream with one more stage, and where the ranges of its histories went.

    The new rows are split as every stage is (``stage_split``, ``stage_ratios``); ``next_stage`` has no stage to test
    on, so their end is tested.

    Args:
        config: The run's configuration.
        stream: The stream so far; it stays as it is.
        rows: The new interactions, a column for each of the dataset's, users and items as tokens, times in seconds
            (float64).
        name: Name of the stage.
        features: What is told of new users (``user``) and items (``item``), see :func:`.features.filled`.

    Raises:
        ConfigError: If streams of this kind cannot be continued.
        DataError: If nothing can be trained on.
    """
    if config["parity"] or config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        what = "parity" if config["parity"] else f"model: {config['model']}"
        why = "its stream is RecBole's" if config["parity"] else "new items would need links into its knowledge graph"
        raise ConfigError(f"{what}: the run cannot be updated, for {why}; run again over the longer log")
    base = stream.dataset
    uid, iid, clock = base.uid_field, base.iid_field, base.time_field
    rows = rows.sort_values(clock, kind="stable").reset_index(drop=True)
    time = rows[clock].to_numpy(dtype=np.float64)
    tail = "tail" if config["stage_split"] == "next_stage" else config["stage_split"]
    settings: Any = ChainMap({"stage_split": tail}, config.final_config_dict)
    role = roles(settings, pd.factorize(rows[uid])[0], time, np.zeros(len(rows), dtype=np.int64))
    phase = vocabulary_phase(config, role)
    dataset: Any = copy.copy(base)
    dataset.field2id_token, dataset.field2token_id = dict(base.field2id_token), dict(base.field2token_id)
    late = {}  # ids of users and items that only held-out rows bring come last
    ids = {}
    for field in (uid, iid):
        ids[field], late[field] = _grown(dataset, field, rows[field], phase)
    columns = {}
    for field, column in base.inter_feat.interaction.items():
        if field in ids:
            added = torch.from_numpy(ids[field])
        elif field == clock:
            added = torch.from_numpy(time)
        else:
            added = _column(base, field, rows[field])
        columns[field] = torch.cat([column, added.to(column.dtype)])
    dataset.inter_feat = Interaction(columns)
    slice_ = int(base.raw_stage.max()) + 1
    for attribute, values in (
        ("raw_stage", np.full(len(rows), slice_)),
        ("raw_time", time),
        ("raw_role", role),
        ("raw_phase", phase),
        ("raw_late", np.zeros(len(rows), dtype=bool)),
    ):
        before = getattr(base, attribute)
        setattr(dataset, attribute, np.concatenate([before, values.astype(before.dtype)]))
    dataset.slice_names = [*base.slice_names, name]
    for feature, field in (("user_feat", uid), ("item_feat", iid)):
        table = getattr(base, feature)
        if table is not None:
            longer_table = _with_rows(dataset, table, field, len(dataset.field2id_token[field]))
            given = (features or {}).get(feature.removesuffix("_feat"))
            if given is not None:
                longer_table = filled(dataset, longer_table, field, len(table), given)
            setattr(dataset, feature, longer_table)
    before, table = stream.table, dataset.build_table()
    table.seq = np.concatenate([table.seq, before.seq[len(before) :]])
    moves = Moves(before, table)
    stages = [
        replace(s, train=moves.targets(s.train), valid=moves.targets(s.valid), test=moves.targets(s.test))
        for s in stream.stages
    ]
    stages.append(_stage(config, stream, table, role, time, late, name))
    longer = replace(stream, table=table, stages=stages, dataset=dataset)
    return longer, moves


def with_more_users(stream: Stream, more: int) -> Stream:
    """Returns the stream with further users at its end who have done nothing: what of a model grows by them is theirs.

    Args:
        stream: The stream; it stays as it is.
        more: How many.
    """
    base = stream.dataset
    dataset: Any = copy.copy(base)
    uid, size = base.uid_field, len(base.field2id_token[base.uid_field]) + more
    dataset.field2id_token, dataset.field2token_id = dict(base.field2id_token), dict(base.field2token_id)
    tokens = [*map(str, base.field2id_token[uid]), *(f"[MORE {number}]" for number in range(more))]
    for field in {uid, *(base.alias.get("user_id") or [])} & base.field2id_token.keys():
        dataset.field2id_token[field] = np.array(tokens)
        dataset.field2token_id[field] = {token: number for number, token in enumerate(tokens)}
    if base.user_feat is not None:
        dataset.user_feat = _with_rows(dataset, base.user_feat, uid, size)
    last = stream.stages[-1]
    stages = [*stream.stages[:-1], replace(last, n_users=last.n_users + more)]
    return replace(stream, stages=stages, dataset=dataset, table=dataset.build_table())


def _stage(
    config: Any,
    stream: Stream,
    table: InteractionTable,
    role: np.ndarray,
    time: np.ndarray,
    late: Mapping[str, int],
    name: str,
) -> Stage:
    """Returns the stage of the new rows."""
    before, base = stream.table, stream.dataset
    first = len(before)

    def targets(wanted: int) -> Targets:
        found = Targets.next_items(table, first + np.flatnonzero(role == wanted), config["history"])
        return found[found.hi > found.lo] if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else found

    asked = next((s.task for s in reversed(stream.stages) if s.task.kind != "classification"), Task())
    names = {s.task.name for s in stream.stages}
    task = asked if len(names) == 1 else Task(kind=asked.kind, name=name, description=asked.description)
    growing = config["vocabulary"] == "growing"
    stage = Stage(
        index=len(stream),
        name=name,
        start=float(time.min()),
        end=float(time.max()),
        train=targets(TRAIN),
        valid=targets(VALID),
        test=targets(TEST),
        task=task,
        n_users=table.n_users - (late[base.uid_field] if growing else 0),
        n_items=table.n_items - (late[base.iid_field] if growing else 0),
        catalogue=table.n_items,
        first_new_user=before.n_users,
        first_new_item=before.n_items,
        n_new_users=table.n_users - before.n_users,
        n_new_items=table.n_items - before.n_items,
    )
    if not len(stage.train):
        need = " after an earlier interaction of its user" if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else ""
        raise DataError(f"new data: none of the {len(time)} rows can be trained on{need}; collect more and update then")
    return stage


def _grown(dataset: Any, field: str, tokens: pd.Series, phase: np.ndarray) -> tuple[np.ndarray, int]:
    """Gives new tokens the next ids, those that training may know first; returns ids, and how many come last."""
    known = dataset.field2token_id[field]
    order = np.lexsort((np.arange(len(tokens)), phase))
    first = pd.unique(tokens.to_numpy()[order])
    new = [token for token in first if token not in known]
    early = set(tokens.to_numpy()[phase == 0])
    every = np.concatenate([np.asarray(dataset.field2id_token[field]).astype(str), np.array(new, dtype=str)])
    dataset.field2id_token[field] = every
    dataset.field2token_id[field] = {token: number for number, token in enumerate(every)}
    lookup = dataset.field2token_id[field]
    ids = np.fromiter((lookup[token] for token in tokens), dtype=np.int64, count=len(tokens))
    return ids, sum(token not in early for token in new)


def _column(base: Any, field: str, values: pd.Series) -> torch.Tensor:
    """Returns the values of a column of the interactions as the dataset holds them; a token that is new there is 0."""
    kind = base.field2type[field]
    if kind == FeatureType.FLOAT and base.inter_feat[field].dim() == 1:
        return torch.from_numpy(values.to_numpy(dtype=np.float64))
    if kind == FeatureType.TOKEN:
        known = base.field2token_id[field]
        return torch.tensor([known.get(str(value), 0) for value in values], dtype=torch.int64)
    raise ConfigError(
        f"load_col: the column {field!r} of the interactions is a {kind.value}, which an update cannot continue; run "
        f"again over the longer log"
    )


def _with_rows(dataset: Any, feature: Interaction, field: str, size: int) -> Interaction:
    """Returns a table of features with rows for new users or items: tokens 0, numbers the mean of the known ones."""
    missing = size - len(feature)
    if missing <= 0:
        return feature
    columns = {}
    for name, column in feature.interaction.items():
        if name == field:
            added = torch.arange(len(feature), size, dtype=column.dtype)
        else:
            added = column.new_zeros((missing, *column.shape[1:]))
            if column.is_floating_point() and column.dim() == 1 and len(column) > 1:
                added += column[1:].mean()
        columns[name] = torch.cat([column, added])
    return Interaction(columns)
