"""Histories, RecBole's rows and all-position windows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.dataset import SequentialDataset
from stream_helpers import configure, random_rows, stage_context, stream_of, write

from recbole_cl.config import RECBOLE
from recbole_cl.errors import ConfigError
from recbole_cl.strategy.parts.exemplars import ReservoirMemory, join_rows
from recbole_cl.stream.batch import HI, LO, POSITION, STAGE, TARGETS, TASK, TIMESTAMP, Batcher, Windows
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.stage import Targets
from recbole_cl.stream.table import InteractionTable


def table_of(rows: list[tuple[int, int, int]], n_users: int = 8, n_items: int = 40) -> InteractionTable:
    """A table of (stage, user, item) rows."""
    stage, user, item = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return InteractionTable(user, item, np.arange(len(rows)), stage, n_users, n_items)


tables = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 30)), min_size=1, max_size=70).map(
    lambda rows: table_of(sorted(rows, key=lambda row: row[0]))
)


@settings(max_examples=100, deadline=None)
@given(tables, st.sampled_from(["all", "stage"]))
def test_histories_equal_a_plain_loop(table: InteractionTable, scope: str) -> None:
    targets = Targets.next_items(table, np.arange(len(table)), scope)
    for p in range(len(table)):
        before = [
            q
            for q in range(p)
            if table.user[q] == table.user[p] and (scope == "all" or table.stage[q] == table.stage[p])
        ]
        assert table.seq[targets.lo[p] : targets.hi[p]].tolist() == before
        assert table.seq[table.at[p]] == p and targets.label[p] == table.item[p]
    for user in range(table.n_users):
        assert (table.user[table.seq[table.ptr[user] : table.ptr[user + 1]]] == user).all()


def test_a_table_must_be_sorted_by_stage() -> None:
    with pytest.raises(ValueError, match="sorted by stage"):
        table_of([(1, 1, 1), (0, 1, 2)])


@settings(max_examples=200, deadline=None)
@given(tables, st.sampled_from(["all", "stage"]), st.integers(1, 9), st.data())
def test_windows_supervise_each_target_once(
    table: InteractionTable, scope: str, size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, size))
    chosen = data.draw(st.sets(st.integers(0, len(table) - 1)))
    targets = Targets.next_items(table, np.array(sorted(chosen), dtype=np.int64), scope)
    targets = targets[targets.hi > targets.lo]
    targets = targets[np.array(data.draw(st.permutations(range(len(targets)))), dtype=np.int64)]
    supervised = np.zeros(len(table) + 1, dtype=bool)
    supervised[targets.hi] = True
    windows = Windows(targets, supervised, size, stride)
    if data.draw(st.booleans()):
        shifted = windows.shifted(torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
        whole = np.bincount(windows.user[windows.n_targets == stride], minlength=table.n_users) == 0
        for user in np.flatnonzero(whole):  # nothing is cut that fits into one window
            assert shifted.last[shifted.user == user].tolist() == windows.last[windows.user == user].tolist()
        windows = shifted
    assert int(windows.n_targets.sum()) == len(targets)
    if not len(targets):
        assert len(windows) == 0
        return
    batcher = object.__new__(Batcher)
    batcher.table, batcher.uid, batcher.iid, batcher.suffix, batcher.length_field = table, "u", "i", "_list", "length"
    rows = batcher.window_rows(windows, np.arange(len(windows)))
    lo_of = dict(zip(targets.hi.tolist(), targets.lo.tolist(), strict=True))
    found = []
    for r in range(len(windows)):
        length, last = int(rows["length"][r]), int(windows.last[r])
        at = np.arange(last - length, last)
        assert 1 <= length <= size and at[0] >= lo_of[last]  # inside the user's history, and not longer than asked
        assert length == min(size, last - lo_of[last])  # the longest context that fits
        assert rows["i_list"][r, :length].tolist() == table.item[table.seq[at]].tolist()
        assert not rows["i_list"][r, length:].any() and not rows[TARGETS][r, length:].any()
        assert set(table.user[table.seq[at]].tolist()) == {int(rows["u"][r])} == {int(table.user[table.seq[last]])}
        here = np.flatnonzero(rows[TARGETS][r].numpy())
        for j in here:
            assert rows[TARGETS][r, j] == table.item[table.seq[at[j] + 1]]
            found.append(int(at[j]) + 1)
        assert len(here) == windows.n_targets[r] and at[here[0]] + 1 == windows.first[r]
        assert last - windows.first[r] < stride and here[-1] == length - 1
        assert rows[POSITION][r] == table.seq[last] and rows["i"][r] == rows[TARGETS][r, length - 1]
        assert rows[STAGE][r] == table.stage[table.seq[last]] == rows[TASK][r]
        assert rows[TIMESTAMP][r] == table.timestamp[table.seq[last]]
    assert sorted(found) == sorted(targets.hi.tolist())


def test_every_target_closes_a_window_of_some_epoch() -> None:
    table = table_of([(0, 1, k) for k in range(1, 31)])
    targets = Targets.next_items(table, np.arange(1, 30))
    supervised = np.zeros(31, dtype=bool)
    supervised[targets.hi] = True
    fixed, generator = Windows(targets, supervised, 5, 5), torch.Generator().manual_seed(0)
    closing = [set(fixed.shifted(generator).last.tolist()) for _ in range(60)]
    assert len(set(map(frozenset, closing))) == 5
    assert set.union(*closing) == set(range(5, 30)) | {1, 2, 3, 4}


def test_windows_of_the_docstring() -> None:
    table = table_of([(0, 1, k) for k in range(1, 9)])
    targets = Targets.next_items(table, np.arange(4, 8))
    supervised = np.zeros(9, dtype=bool)
    supervised[targets.hi] = True
    windows = Windows(targets, supervised, 4, 2)
    got = [
        (table.item[table.seq[lo:last]].tolist(), table.item[table.seq[first : last + 1]].tolist())
        for lo, first, last in zip(windows.lo, windows.first, windows.last, strict=True)
    ]
    assert got == [([2, 3, 4, 5], [5, 6]), ([4, 5, 6, 7], [7, 8])]
    with pytest.raises(ConfigError, match="window_stride: 5 is more than the window of 4"):
        Windows(targets, supervised, 4, 5)


@pytest.fixture(scope="module")
def ml_100k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ml-100k in time order: RecBole's float32 timestamps then sort it no further."""
    frame = pd.read_csv(RECBOLE / "dataset_example" / "ml-100k" / "ml-100k.inter", sep="\t", dtype=str)
    order = frame["timestamp:float"].astype(float).argsort(kind="stable")
    folder = tmp_path_factory.mktemp("sorted")
    (folder / "log").mkdir()
    frame.iloc[order].to_csv(folder / "log" / "log.inter", sep="\t", index=False)
    return folder


def test_windows_have_the_class_of_each_target() -> None:
    """The window of the docstring; a target that is none of the task's has no class."""
    seq = np.arange(8)
    table = SimpleNamespace(seq=seq, item=seq + 101, stage=np.zeros(8, dtype=np.int64), timestamp=np.zeros(8))
    hi = np.array([4, 5, 7])
    targets = Targets(seq[hi], np.full(3, 9), np.zeros(3, dtype=np.int64), hi, np.array([2, 0, 1]))
    supervised, labels = np.zeros(9, dtype=bool), np.zeros(9, dtype=np.int64)
    supervised[hi], labels[hi] = True, targets.label
    batcher = SimpleNamespace(
        collate=None, table=table, uid="user_id", iid="item_id", suffix="_list", length_field="item_length"
    )
    for windows in (Windows(targets, supervised, 4, 2, labels=labels), Windows(targets, supervised, 4, 2)):
        rows = Batcher.window_rows(batcher, windows, np.array([0, 1]))  # type: ignore[arg-type]
        assert rows["_targets"].tolist() == [[0, 0, 105, 106], [0, 0, 0, 108]]
        if windows.labels is not None:
            assert rows["_labels"].tolist() == [[0, 0, 2, 0], [0, 0, 0, 1]]
            shifted = windows.shifted(torch.Generator().manual_seed(0))
            assert "_labels" in Batcher.window_rows(batcher, shifted, np.array([0])).interaction  # type: ignore[arg-type]
        else:
            assert "_labels" not in rows.interaction


@pytest.mark.parametrize("length", [20, 50])
def test_rows_equal_recboles_augmentation(ml_100k: Path, length: int) -> None:
    load = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    config, stream = stream_of(ml_100k, MAX_ITEM_LIST_LENGTH=length, load_col=load, n_stages=4)
    theirs = SequentialDataset(configure(ml_100k, MAX_ITEM_LIST_LENGTH=length, load_col=load))
    theirs._change_feat_format()
    want = theirs.inter_feat
    table = stream.table
    targets = Targets.next_items(table, np.arange(len(table)))
    targets = targets[targets.hi > targets.lo]
    batcher = Batcher(config, stream, stream.dataset, table.n_users, table.n_items)

    def ours(field: str) -> torch.Tensor:
        """Translates RecBole's ids into ours."""
        names = theirs.field2id_token[field]
        return torch.tensor([0] + [stream.dataset.field2token_id[field][name] for name in names[1:]])

    user, item = ours("user_id")[want["user_id"]], ours("item_id")
    # RecBole's rows are grouped by its user ids, in time order inside; so are ours after a stable sort by user.
    order = np.argsort(targets.user, kind="stable")
    reference = torch.from_numpy(np.argsort(user.numpy(), kind="stable"))
    got = batcher.rows(targets[order])
    assert set(want.interaction) == {name for name in got.interaction if not name.startswith("_")}
    assert len(got) == len(want) == 99_057
    for name, column in want.interaction.items():
        column = column[reference]
        if name.startswith("user_id"):
            column = ours("user_id")[column]
        elif name.startswith("item_id"):
            column = item[column]
        assert got[name].shape == column.shape, name
        assert torch.equal(got[name].to(column.dtype), column), name
    assert got["item_length"].max() == length
    assert torch.equal(got[POSITION], torch.from_numpy(targets.position[order]))
    assert got[TIMESTAMP].dtype == torch.int64
    assert (got[TIMESTAMP].numpy() != got["timestamp"].double().numpy()).any()  # float32 loses seconds, ours does not


def test_evaluation_rows_know_no_unknown_ids(tmp_path: Path) -> None:
    write(tmp_path, random_rows(seed=3))
    config, stream = stream_of(tmp_path, MAX_ITEM_LIST_LENGTH=6)
    table, n_users, n_items = stream.table, 6, 9
    targets = Targets.next_items(table, np.arange(len(table)))
    targets = targets[targets.hi > targets.lo]
    rows = Batcher(config, stream, stream.dataset, n_users, n_items).rows(targets, stage=2, evaluation=True)
    for r in range(len(targets)):
        recent = table.item[table.seq[max(targets.lo[r], targets.hi[r] - 6) : targets.hi[r]]]
        kept = [int(i) for i in recent if i < n_items]
        assert rows["item_id_list"][r].tolist() == kept + [0] * (6 - len(kept)) and rows["item_length"][r] == len(kept)
        times = [
            int(t)
            for t, i in zip(
                table.timestamp[table.seq[max(targets.lo[r], targets.hi[r] - 6) : targets.hi[r]]], recent, strict=True
            )
            if i < n_items
        ]
        assert rows["timestamp_list"][r].tolist() == times + [0] * (6 - len(kept))
        assert rows["user_id"][r] == (targets.user[r] if targets.user[r] < n_users else 0)
        assert rows["item_id"][r] == (targets.label[r] if targets.label[r] < n_items else 0)
    assert (rows[TASK] == 2).all() and (rows["_label"].numpy() == targets.label).all()
    assert (rows["item_length"] == 0).any() and (rows["item_id"] == 0).any()


def test_rows_join_features_of_users_and_items(tmp_path: Path) -> None:
    rows = random_rows(100, seed=6)
    write(tmp_path, rows)
    write(tmp_path, [(f"i{k}", k / 4) for k in range(60)], "item_id:token\tprice:float", "item")
    write(tmp_path, [(f"u{k}", f"c{k % 3}") for k in range(25)], "user_id:token\tcountry:token", "user")
    load: dict[str, Any] = {"inter": ["user_id", "item_id", "timestamp"], "item": "*", "user": "*"}
    config, stream = stream_of(tmp_path, model="BPR", load_col=load)
    batch = Batcher(config, stream, stream.dataset, stream.table.n_users, stream.table.n_items).rows(
        stream.stages[1].train
    )
    names = stream.dataset.field2id_token
    for r in range(len(batch)):
        assert batch["price"][r] == int(names["item_id"][batch["item_id"][r]][1:]) / 4
        assert names["country"][batch["country"][r]] == f"c{int(names['user_id'][batch['user_id'][r]][1:]) % 3}"


def test_windows_may_not_exceed_what_the_model_takes(tmp_path: Path) -> None:
    write(tmp_path, random_rows())
    config, stream = stream_of(tmp_path, MAX_ITEM_LIST_LENGTH=5, window=8)
    ctx = stage_context(config, stream, 0, SimpleNamespace(trains_all_positions=True))
    with pytest.raises(ConfigError, match="window: 8 inputs are more than MAX_ITEM_LIST_LENGTH: 5"):
        make_loader(ctx, ctx.stage.train, "train")


@pytest.mark.parametrize("scope", ["all", "stage"])
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_rows_carry_the_range_of_their_history(tmp_path: Path, model: str, scope: str) -> None:
    """Counted anew from the interactions, in training and in evaluation, of known users and of those that become 0."""
    write(tmp_path, random_rows(seed=5))
    config, stream = stream_of(tmp_path, model=model, history=scope, train_positions="last", MAX_ITEM_LIST_LENGTH=4)
    table = stream.table
    for stage in stream.stages:
        ctx = stage_context(config, stream, 0)
        for evaluation in (False, True):
            targets = stage.test if evaluation else stage.train
            rows = ctx.batcher.rows(targets, evaluation=evaluation)
            assert rows[LO].dtype == rows[HI].dtype == torch.int64
            for r, position in enumerate(rows[POSITION].tolist()):
                same = (table.user[:position] == table.user[position]) & (
                    (scope == "all") | (table.stage[:position] == table.stage[position])
                )
                assert table.seq[int(rows[LO][r]) : int(rows[HI][r])].tolist() == np.flatnonzero(same).tolist()
        if stage.index:
            assert (rows["user_id"] == 0).any() and (rows[HI] - rows[LO] > 4).any()


def test_windows_carry_the_range_of_their_inputs(tmp_path: Path) -> None:
    """The items of the range are the window's inputs, and the interaction after it is its last target."""
    config, stream = stream_of(write(tmp_path, random_rows(seed=5)), MAX_ITEM_LIST_LENGTH=4)
    ctx, table = stage_context(config, stream, 1, SimpleNamespace(trains_all_positions=True)), stream.table
    seen = 0
    for batch in make_loader(ctx, ctx.stage.train, "t"):
        assert batch[LO].dtype == batch[HI].dtype == torch.int64
        for r in range(len(batch)):
            lo, hi = int(batch[LO][r]), int(batch[HI][r])
            assert batch["item_id_list"][r, : hi - lo].tolist() == table.item[table.seq[lo:hi]].tolist()
            assert batch["item_length"][r] == hi - lo and table.seq[hi] == batch[POSITION][r]
            seen += 1
    assert seen


def test_negatives_and_replayed_rows_carry_it_too(tmp_path: Path) -> None:
    """A pointwise row of a negative has its positive's range; a memory gives back the ranges that it was shown."""
    config, stream = stream_of(write(tmp_path, random_rows(seed=5)), model="DeepFM")
    ctx = stage_context(config, stream, 0)
    batch = next(iter(make_loader(ctx, ctx.stage.train, "t")))
    half = len(batch) // 2
    assert batch["label"].tolist() == [1.0] * half + [0.0] * half
    assert (
        batch[LO][:half].tolist() == batch[LO][half:].tolist()
        and batch[HI][:half].tolist() == batch[HI][half:].tolist()
    )
    memory = ReservoirMemory(10)
    memory.add(ctx, ctx.stage.train, np.random.default_rng(0))
    later = stage_context(config, stream, 1)
    memory.add(later, later.stage.train, np.random.default_rng(1))
    held = memory.rows(np.arange(len(memory)))
    lo, hi = stream.table.history(held[POSITION].numpy())
    assert held[LO].tolist() == lo.tolist() and held[HI].tolist() == hi.tolist()
    both = join_rows(later.batcher.rows(later.stage.train), held)
    assert len(both[LO]) == len(later.stage.train) + 10


def test_task_streams_carry_the_range_in_the_sequences_of_a_task(tmp_path: Path) -> None:
    """Histories in which cold items never were lie behind the users' own sequences; rows point there."""
    write(tmp_path, random_rows(600, seed=5))
    tasks = [{"name": "all"}, {"name": "cold"}]
    config, stream = stream_of(tmp_path, scheduler="TaskStream", tasks=tasks, n_stages=None, task_cold_items=0.3)
    table, behind = stream.table, 0
    assert len(table.seq) > len(table)
    for stage in stream.stages:
        rows = stage_context(config, stream, stage.index).batcher.rows(stage.train)
        for r in range(len(rows)):
            lo, hi = int(rows[LO][r]), int(rows[HI][r])
            behind += lo >= len(table)
            listed = table.item[table.seq[lo:hi]]
            assert rows["item_id_list"][r, : rows["item_length"][r]].tolist() == listed[-50:].tolist()
            assert (table.user[table.seq[lo:hi]] == int(rows["user_id"][r])).all() and hi > lo
    assert behind
