"""Nothing of the future: histories, ids in batches, what a model's constructor sees, statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from stream_helpers import configure, random_rows, stage_context, stream_of, write

from recbole_cl.config import CLConfig
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.stream.loader import make_loader

SPLITS = ("tail", "user_tail", "leave_one_out", "next_stage")
SCHEDULERS: dict[str, dict[str, Any]] = {
    "TimeSlices": {},
    "BaseThenIncrements": {},
    "Boundaries": {"boundaries": [1500, 3200], "n_stages": None},
    "Periods": {"period_field": "week", "n_stages": None},
    "UserDisjoint": {},
    "Domains": {"period_field": "shop", "n_stages": None},
}


def write_log(folder: Path) -> None:
    rows = [(u, i, t, t // 1700, int(i[1:]) % 3) for u, i, t in random_rows(500, seed=8)]
    write(folder, rows, "user_id:token\titem_id:token\ttimestamp:float\tweek:float\tshop:token")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_histories_precede_their_targets(tmp_path: Path, scheduler: str, split: str) -> None:
    write_log(tmp_path)
    config, stream = stream_of(
        tmp_path, scheduler=scheduler, stage_split=split, valid_split="random", **SCHEDULERS[scheduler]
    )
    assert config["history"] == ("stage" if scheduler in ("UserDisjoint", "Domains") else "all")
    assert not any("history: all" in told for told in stream.warnings)
    table, checked = stream.table, 0
    for stage in stream.stages:
        for name in ("train", "valid", "test"):
            targets = stage.split(name)
            for position, user, lo, hi in zip(targets.position, targets.user, targets.lo, targets.hi, strict=True):
                history = table.seq[lo:hi]
                assert len(history) and (history < position).all() and (table.user[history] == user).all()
                assert (table.timestamp[history] <= table.timestamp[position]).all()
                assert (np.diff(table.timestamp[history]) >= 0).all()
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("scheduler", ["Domains", "Periods"])
def test_looking_ahead_is_counted(tmp_path: Path, scheduler: str) -> None:
    write_log(tmp_path)
    _, stream = stream_of(tmp_path, scheduler=scheduler, period_field="shop", n_stages=None, history="all")
    table = stream.table
    steps = sum(
        int((np.diff(table.timestamp[table.seq[table.ptr[u] : table.ptr[u + 1]]]) < 0).sum())
        for u in range(table.n_users)
    )
    assert steps > 0 and any(f"({steps} such steps)" in told for told in stream.warnings)


def highest(batch: Interaction, word: str) -> int:
    fields = [name for name in batch.interaction if word in name]
    return max(int(batch[name].max()) for name in fields)


MODELS: list[tuple[str, dict[str, Any]]] = [
    ("SASRec", {"train_positions": "last"}),
    ("GRU4Rec", {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}}),
    ("BPR", {}),
    ("BPR", {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1, "alpha": 0.5}}),
    ("NeuMF", {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3}}),
    ("DIEN", {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}),
    ("MultiVAE", {}),
]


@pytest.mark.parametrize("split", ["tail", "leave_one_out", "next_stage"])
@pytest.mark.parametrize(("model", "more"), MODELS)
def test_no_batch_holds_an_id_of_the_future(tmp_path: Path, model: str, more: dict[str, Any], split: str) -> None:
    write_log(tmp_path)
    config, stream = stream_of(tmp_path, model=model, stage_split=split, train_batch_size=64, **more)
    assert stream.stages[0].n_items < stream.table.n_items and stream.stages[0].n_users < stream.table.n_users
    for stage in stream.stages:
        ctx = stage_context(config, stream, stage.index)
        trained = set(stage.train.position.tolist())
        seen = []
        for batch in make_loader(ctx, stage.train, "train"):
            assert highest(batch, "user_id") < stage.n_users
            if model != "MultiVAE":  # RecBole's user batches hold users only
                assert highest(batch, "item_id") < stage.n_items
            seen += batch["_position"].tolist()
        assert set(seen) <= trained and (model == "MultiVAE" or set(seen) == trained)


@pytest.mark.parametrize(("loss", "shift"), [("CE", False), ("BPR", False), ("CE", True)])
def test_no_window_holds_an_id_of_the_future(tmp_path: Path, loss: str, shift: bool) -> None:
    write_log(tmp_path)
    more: dict[str, Any] = (
        {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}} if loss == "BPR" else {}
    )
    more |= {"window": 7, "window_stride": 3, "window_shift": shift}
    config, stream = stream_of(tmp_path, loss_type=loss, train_batch_size=32, **more)
    held = {p for s in stream.stages for name in ("valid", "test") for p in s.split(name).position.tolist()}
    for stage in stream.stages:
        ctx = stage_context(config, stream, stage.index, type("Model", (), {"trains_all_positions": True}))
        loader = make_loader(ctx, stage.train, "train")
        supervised = 0
        for batch in loader:
            assert highest(batch, "item_id") < stage.n_items and highest(batch, "_targets") < stage.n_items
            assert not set(batch["_position"].tolist()) & held
            supervised += int((batch["_targets"] > 0).sum())
            if loss == "BPR":
                negative, target = batch["neg__targets"], batch["_targets"]
                assert ((negative > 0) == (target > 0)).all() and not ((negative == target) & (target > 0)).any()
        assert supervised == len(stage.train) == loader.n_targets


def test_views_hold_the_past_only(tmp_path: Path) -> None:
    write_log(tmp_path)
    write(tmp_path, [(f"i{k}", k) for k in range(60)], "item_id:token\tprice:float", "item")
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": "*"}
    config, stream = stream_of(tmp_path, model="LightGCN", load_col=load, valid_split="random")
    so_far: list[int] = []
    for stage in stream.stages:
        view = stream.view(stage.index)
        so_far = sorted(so_far + stage.train.position.tolist())
        assert view.inter_feat["user_id"].tolist() == stream.table.user[so_far].tolist()
        assert view.inter_feat["item_id"].tolist() == stream.table.item[so_far].tolist()
        only = stream.view(stage.index, "stage")
        assert only.inter_feat["item_id"].tolist() == stream.table.item[np.sort(stage.train.position)].tolist()
        assert (view.num("user_id"), view.user_num, view.num("item_id"), view.item_num) == (
            stage.n_users, stage.n_users, stage.n_items, stage.n_items,
        )  # fmt: skip
        assert len(view.item_feat) == stage.n_items
        assert view.inter_matrix().shape == (stage.n_users, stage.n_items)
        matrix, _, _ = view.history_item_matrix()
        assert matrix.shape[0] == stage.n_users and int(matrix.max()) < stage.n_items
        assert set(view.item_counter) == set(stream.table.item[so_far].tolist())
    assert len(stream.dataset.item_feat) == stream.table.n_items and stream.dataset.item_num == stream.table.n_items
    config.model_class(config, stream.view(0))  # LightGCN builds its graph from the view


@pytest.fixture(scope="module")
def cke() -> tuple[CLConfig, Stream]:
    config = configure(
        None,
        model="CKE",
        dataset="ml-100k",
        scheduler="BaseThenIncrements",
        base_ratio=0.3,
        n_stages=3,
        train_batch_size=4096,
    )
    return config, build_stream(config)


def test_no_triple_of_the_future(cke: tuple[CLConfig, Stream]) -> None:
    config, stream = cke
    total = stream.table.n_items
    sizes = []
    for stage in stream.stages:
        ctx = stage_context(config, stream, stage.index)
        kg = ctx.view.kg_feat
        sizes.append(len(kg))
        loader = make_loader(ctx, stage.train, "train")
        columns = [kg["head_id"], kg["tail_id"]]
        for batch in loader:
            columns += [batch["head_id"], batch["tail_id"], batch["neg_tail_id"], torch.tensor([0])]
            assert highest(batch, "item_id") < stage.n_items and highest(batch, "user_id") < stage.n_users
        for column in columns:
            assert not ((column >= stage.n_items) & (column < total)).any()
    assert sizes[0] < sizes[1] <= sizes[2] <= len(stream.dataset.kg_feat)
    # None is lost that only speaks of the known.
    head, tail = (stream.dataset.kg_feat[f].numpy() for f in ("head_id", "tail_id"))
    known = stream.stages[0].n_items
    late = ((head >= known) & (head < total)) | ((tail >= known) & (tail < total))
    assert sizes[0] == int((~late).sum())


def featured(folder: Path, **properties: Any) -> Stream:
    """A log of two halves whose second one has much larger numbers."""
    rows = [
        (f"u{k % 4}", f"i{k % 5 + 5 * (k >= 20)}", k, (k % 3) + 100 * (k >= 20) if k != 35 else "", 3)
        for k in range(40)
    ]
    write(folder, rows, "user_id:token\titem_id:token\ttimestamp:float\tdepth:float\tflat:float")
    prices = [
        (f"i{k}", "" if k in (4, 9) else k + 1000 * (k >= 5), " ".join(str(k * j) for j in range(3))) for k in range(10)
    ]
    write(folder, prices, "item_id:token\tprice:float\tsizes:float_seq", "item")
    load = {"inter": ["user_id", "item_id", "timestamp", "depth", "flat"], "item": "*"}
    return stream_of(folder, model="BPR", load_col=load, n_stages=2, **properties)[1]


def test_missing_numbers_are_filled_from_the_base(tmp_path: Path) -> None:
    stream = featured(tmp_path)
    names = stream.dataset.field2token_id["item_id"]
    price = stream.dataset.item_feat["price"]
    # Trained in the base: i0 to i4 (16 rows of cycles of 5); i4's price is missing, hence the mean of the others.
    assert price[int(names["i4"])] == price[int(names["i9"])] == np.mean([0, 1, 2, 3])
    assert price[int(names["i7"])] == 1007
    base = [k % 3 for k in range(16)]  # training rows of stage 0, 80 % of 20
    assert float(stream.dataset.inter_feat["depth"][35]) == pytest.approx(np.mean(base))


def test_normalisation_knows_the_base_only(tmp_path: Path) -> None:
    stream = featured(tmp_path, normalize_all=True)
    depth = stream.dataset.inter_feat["depth"].numpy()
    assert depth[:3].tolist() == [0, 0.5, 1] and depth[39] == 50  # (100 + 39 % 3 - 0) / 2
    price = stream.dataset.item_feat["price"]
    names = stream.dataset.field2token_id["item_id"]
    assert price[int(names["i3"])] == 1 and price[int(names["i7"])] == pytest.approx(1007 / 3)
    assert stream.dataset.inter_feat["flat"].tolist() == [1.0] * 40
    sizes = stream.dataset.item_feat["sizes"]  # base: 0 .. 4 * 2
    assert sizes[int(names["i4"])].tolist() == [0, 0.5, 1] and sizes[int(names["i8"])].tolist() == [0, 1, 2]
    assert stream.dataset.inter_feat["timestamp"].tolist() == list(range(40))  # the clock is kept


def test_a_column_that_is_constant_in_the_base_keeps_its_later_values(tmp_path: Path) -> None:
    rows = [(f"u{k % 4}", f"i{k % 5}", k, 1 if k < 20 else k % 2) for k in range(40)]
    write(tmp_path, rows, "user_id:token\titem_id:token\ttimestamp:float\tlabel:float")
    load = {"inter": ["user_id", "item_id", "timestamp", "label"]}
    _, stream = stream_of(tmp_path, model="BPR", load_col=load, n_stages=2, normalize_all=True)
    assert stream.dataset.inter_feat["label"].tolist() == [r[3] for r in rows]


@pytest.mark.parametrize("graph", ["all", "stage"])
def test_graph_positions_are_the_sorted_union(tmp_path: Path, graph: str) -> None:
    """Each once, in order: of slices, which are disjoint, and of tasks over the same interactions; no classes."""
    tasks = [
        {"name": "next"},
        {"name": "again", "filter": {"field": "_repeat", "op": "==", "value": 1}},
        {"name": "country", "kind": "classification", "target": "country"},
        {"name": "first", "filter": {"field": "_repeat", "op": "==", "value": 0}},
    ]
    write(tmp_path, random_rows(600, seed=2))
    write(tmp_path, [(f"u{k}", f"c{k % 3}") for k in range(25)], "user_id:token\tcountry:token", "user")
    for given in ({}, {"scheduler": "TaskStream", "tasks": tasks, "n_stages": None}):
        _, stream = stream_of(tmp_path, model="BPR", **given)
        for stage in stream.stages:
            upto = stream.stages[: stage.index + 1]
            if graph == "stage" and stage.task.kind != "classification":
                upto = upto[-1:]
            wanted = sorted({int(p) for s in upto if s.task.kind != "classification" for p in s.train.position})
            found = stream.graph_positions(stage.index, graph)
            assert found.tolist() == wanted and found.dtype == np.int64
