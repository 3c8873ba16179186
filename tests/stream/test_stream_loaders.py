"""Loaders: orders, negatives, and a resumed epoch that goes on with the very same batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import KGDataLoaderState
from stream_helpers import configure, random_rows, stage_context, stream_of, write

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.stream.batch import TARGETS
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.stream.knowledge_loader import KnowledgeStageLoader
from recbole_cl.stream.loader import make_loader

UNIFORM = {"distribution": "uniform", "sample_num": 2}
CASES: dict[str, dict[str, Any]] = {
    "rows": {"model": "SASRec", "train_positions": "last"},
    "rows with negatives": {
        "model": "GRU4Rec",
        "train_positions": "last",
        "loss_type": "BPR",
        "train_neg_sample_args": UNIFORM,
    },
    "windows": {"model": "SASRec", "window": 6, "window_stride": 2},
    "windows cut anew": {"model": "SASRec", "window": 3, "window_shift": True},
    "windows with negatives": {"model": "SASRec", "window": 6, "loss_type": "BPR", "train_neg_sample_args": UNIFORM},
    "pairs": {"model": "BPR"},
    "points": {"model": "NeuMF", "train_neg_sample_args": UNIFORM},
    "users": {"model": "MultiVAE", "train_batch_size": 10},
}


def equal(a: Interaction, b: Interaction) -> bool:
    return set(a.interaction) == set(b.interaction) and all(torch.equal(a[name], b[name]) for name in a.interaction)


def same(left: list[Interaction], right: list[Interaction]) -> bool:
    return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))


def supervised(batches: list[Interaction]) -> list[tuple[int, ...]]:
    """User and item of each target, however they are laid out."""
    if TARGETS not in batches[0]:
        return sorted((p,) for b in batches for p in b["_position"].tolist())
    found = []
    for batch in batches:
        row, column = (batch[TARGETS] > 0).nonzero(as_tuple=True)
        found += list(zip(batch["user_id"][row].tolist(), batch[TARGETS][row, column].tolist(), strict=True))
    return sorted(found)


@pytest.fixture(params=list(CASES))
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Returns a function that makes the same loader anew."""
    write(tmp_path, random_rows(500, users=40, items=150))
    config, stream = stream_of(tmp_path, **{"train_batch_size": 48, **CASES[request.param]})
    model = SimpleNamespace(trains_all_positions="windows" in request.param)
    return lambda name="train": make_loader(stage_context(config, stream, 1, model), stream.stages[1].train, name)


def test_two_loaders_of_a_seed_agree_and_epochs_differ(fresh: Any) -> None:
    one, two = fresh(), fresh()
    first = list(one)
    assert len(first) > 2
    assert same(first, list(two))
    second = list(one)
    assert not same(first, second) and same(second, list(two))
    other = list(fresh("another pass"))
    assert not same(first, other)
    # Orders differ, the targets are the same (negatives aside).
    for batches in (second, other):
        assert supervised(batches) == supervised(first)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_resumed_epoch_has_the_same_batches(fresh: Any, epochs: int) -> None:
    loader = fresh()
    for _ in range(epochs):
        list(loader)
    states, batches = [loader.state_dict()], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    following = list(loader)
    for done, state in enumerate(states):
        resumed = fresh()
        resumed.load_state_dict(state)
        resumed.load_state_dict(resumed.state_dict())  # a state that was put back can be asked for again
        assert same(list(resumed), batches[done:])
        assert same(list(resumed), following)
    # A loader whose epoch was broken off takes a state, too.
    loader.load_state_dict(states[1])
    next(iter(loader))
    loader.load_state_dict(states[-1])
    assert loader.state_dict()["done"] == len(batches)


def test_batches_hold_the_targets_they_promise(tmp_path: Path) -> None:
    write(tmp_path, random_rows(500))
    for case, times in (("rows", 1), ("rows with negatives", 2), ("pairs", 1), ("points", 3)):
        config, stream = stream_of(tmp_path, train_batch_size=48, **CASES[case])
        loader = make_loader(stage_context(config, stream, 0), stream.stages[0].train, "train")
        sizes = [len(batch) for batch in loader]
        assert len(sizes) == len(loader) and set(sizes[:-1]) == {48 // times * times}
        assert sum(sizes) == len(stream.stages[0].train) * times
    config, stream = stream_of(tmp_path, train_batch_size=48, shuffle=False, **CASES["rows"])
    loader = make_loader(stage_context(config, stream, 0), stream.stages[0].train, "train")
    assert [p for b in loader for p in b["_position"].tolist()] == stream.stages[0].train.position.tolist()


def test_windows_fill_batches_with_targets(tmp_path: Path) -> None:
    write(tmp_path, random_rows(900, users=30))
    config, stream = stream_of(tmp_path, train_batch_size=64, window=5)
    loader = make_loader(
        stage_context(config, stream, 0, SimpleNamespace(trains_all_positions=True)), stream.stages[0].train, "t"
    )
    counts = [int((batch["_targets"] > 0).sum()) for batch in loader]
    assert sum(counts) == loader.n_targets == len(stream.stages[0].train)
    assert all(abs(count - 64) < 5 for count in counts[:-1]) and counts[-1] <= 64 + 5


def test_windows_are_cut_anew_each_epoch_and_their_units_stay(tmp_path: Path) -> None:
    write(tmp_path, random_rows(900, users=30))
    config, stream = stream_of(tmp_path, train_batch_size=64, window=5, window_shift=True)
    model = SimpleNamespace(trains_all_positions=True)
    loader = make_loader(stage_context(config, stream, 0, model), stream.stages[0].train, "t")
    before = loader.make(np.arange(len(loader.units)))
    closings = [sorted(p for batch in loader for p in batch["_position"].tolist()) for _ in range(3)]
    assert closings[0] != closings[1] != closings[2]
    assert equal(before, loader.make(np.arange(len(loader.units))))  # what memories and importances are taken from


def test_negatives_are_laid_out_as_in_recbole(tmp_path: Path) -> None:
    write(tmp_path, random_rows(500, users=30, items=120))
    config, stream = stream_of(tmp_path, train_batch_size=40, **CASES["points"])
    for batch in make_loader(stage_context(config, stream, 0), stream.stages[0].train, "train"):
        n = len(batch) // 3
        assert batch["label"].tolist() == [1.0] * n + [0.0] * 2 * n
        assert batch["user_id"].tolist() == batch["user_id"][:n].tolist() * 3
        assert batch["_position"].tolist() == batch["_position"][:n].tolist() * 3
        assert batch["item_id"][:n].tolist() == stream.table.item[batch["_position"][:n]].tolist()
    more = {"model": "BPR", "train_neg_sample_args": UNIFORM}
    config, stream = stream_of(tmp_path, train_batch_size=40, **more)
    for batch in make_loader(stage_context(config, stream, 0), stream.stages[0].train, "train"):
        n = len(batch) // 2
        assert batch["item_id"].tolist() == batch["item_id"][:n].tolist() * 2 and len(batch["neg_item_id"]) == 2 * n


def test_dynamic_negatives_are_the_hardest_candidates(tmp_path: Path) -> None:
    write(tmp_path, random_rows(300, users=30, items=120))
    args = {"distribution": "uniform", "sample_num": 1, "dynamic": True, "candidate_num": 5}
    config, stream = stream_of(tmp_path, model="BPR", train_neg_sample_args=args)

    class Largest(torch.nn.Module):
        device = torch.device("cpu")

        def predict(self, interaction: Interaction) -> torch.Tensor:
            return interaction["item_id"].float()

    loader = make_loader(stage_context(config, stream, 0), stream.stages[0].train, "train")
    loader.get_model(Largest())
    hard = np.mean([float(b["neg_item_id"].float().mean()) for b in loader])
    assert hard > 0.7 * stream.stages[0].n_items  # the largest of five, on average 5/6 of the way
    assert loader.negatives.model.training


@pytest.fixture(scope="module")
def cke() -> tuple[CLConfig, Stream]:
    config = configure(None, model="CKE", dataset="ml-100k", n_stages=6, train_batch_size=1024)
    return config, build_stream(config)


@pytest.mark.parametrize("state", list(KGDataLoaderState))
def test_knowledge_loaders_resume(cke: tuple[CLConfig, Stream], state: KGDataLoaderState) -> None:
    config, stream = cke

    def fresh() -> KnowledgeStageLoader:
        loader = make_loader(stage_context(config, stream, 1), stream.stages[1].train, "train")
        assert isinstance(loader, KnowledgeStageLoader)
        loader.set_mode(state)
        return loader

    loader = fresh()
    list(loader)
    states, batches = [loader.state_dict()], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert len(batches) == len(loader) > 3
    following = list(loader)
    assert not same(batches, following)
    ends = {0, 1, len(batches) // 2, len(batches) - 1, len(batches)}
    for done in ends:
        resumed = fresh()
        resumed.load_state_dict(states[done])
        if done not in (0, len(batches)):
            resumed.load_state_dict(resumed.state_dict())
        assert same(list(resumed), batches[done:]) and same(list(resumed), following)
    fields = set(batches[0].interaction)
    assert ("head_id" in fields) == (state != KGDataLoaderState.RS)
    assert ("user_id" in fields) == (state != KGDataLoaderState.KG)
    if state == KGDataLoaderState.KG:
        assert sum(map(len, batches)) == len(loader.view.kg_feat)


def test_more_interactions_than_triples(tmp_path: Path) -> None:
    rows = random_rows(400, users=12, items=40)
    write(tmp_path, rows)
    items = sorted({r[1] for r in rows})
    write(tmp_path, [(i, f"m{i}") for i in items], "item_id:token\tentity_id:token", "link")
    triples = [(f"m{i}", "is", f"g{k % 3}") for k, i in enumerate(items)]
    write(tmp_path, triples, "head_id:token\trelation_id:token\ttail_id:token", "kg")
    load = {"inter": ["user_id", "item_id", "timestamp"], "kg": "*", "link": "*"}
    config, stream = stream_of(tmp_path, model="CKE", load_col=load, train_batch_size=16)
    loader = make_loader(stage_context(config, stream, 2), stream.stages[2].train, "train")
    batches, states = [], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert len(batches) * 16 > 2 * len(loader.view.kg_feat)
    for done in range(1, len(batches)):
        resumed = make_loader(stage_context(config, stream, 2), stream.stages[2].train, "train")
        resumed.load_state_dict(states[done - 1])
        assert same(list(resumed), batches[done:])


@pytest.mark.parametrize("model", ["BPR", "DeepFM"])
def test_windows_are_for_sequential_models(tmp_path: Path, model: str) -> None:
    """A general or context-aware model that asks for windows is told so: some targets have no history."""
    folder, windowed = write(tmp_path, random_rows()), SimpleNamespace(trains_all_positions=True)
    config, stream = stream_of(folder, model=model)
    with pytest.raises(ConfigError, match=rf"train_positions: 'all', and model '{model}' trains on windows.*: last"):
        make_loader(stage_context(config, stream, 0, windowed), stream.stages[0].train, "t")
    config, stream = stream_of(folder, model=model, train_positions="last")
    ctx = stage_context(config, stream, 0, windowed)
    found = torch.cat([batch["_position"] for batch in make_loader(ctx, ctx.stage.train, "t")])
    first = ctx.stage.train.hi == ctx.stage.train.lo
    assert first.any() and set(found.tolist()) == set(ctx.stage.train.position.tolist())


def normed(model: str, folder: Path, **given: Any) -> tuple[Any, Any]:
    """Stage 0 of a log with labels, 96 training targets, for a model with BatchNorm."""
    rows = [(f"u{k % 12}", f"i{k % 10}", k, k % 2) for k in range(360)]
    write(folder, rows, "user_id:token\titem_id:token\ttimestamp:float\tlabel:float")
    load = {"inter": ["user_id", "item_id", "timestamp", "label"]}
    config, stream = stream_of(folder, model=model, load_col=load, **given)
    view = stream.view(0)
    ctx = stage_context(config, stream, 0, config.model_class(config, view))
    return ctx, lambda: make_loader(ctx, ctx.stage.train, "t")


@pytest.mark.parametrize(("size", "batches"), [(95, [96]), (19, [19, 19, 19, 19, 20]), (24, [24, 24, 24, 24])])
def test_a_last_batch_of_one_row_joins_the_one_before_under_batchnorm(
    tmp_path: Path, size: int, batches: list[int]
) -> None:
    """No row is lost, the model learns from every batch; without BatchNorm batches are as RecBole cuts them."""
    ctx, loader = normed("NFM", tmp_path, train_batch_size=size)
    found = [*loader()]
    assert [len(batch) for batch in found] == batches and len(loader()) == len(batches)
    assert sorted(torch.cat([batch["_position"] for batch in found]).tolist()) == sorted(ctx.stage.train.position)
    for batch in found:
        ctx.model.train().calculate_loss(batch).backward()
    _, plain = normed("FM", tmp_path, train_batch_size=size)
    assert [len(batch) for batch in plain()] == [size] * (96 // size) + ([1] if 96 % size else [])


def test_batches_of_one_row_are_told_before_training_under_batchnorm(tmp_path: Path) -> None:
    _, loader = normed("NFM", tmp_path, train_batch_size=1)
    with pytest.raises(DataError, match=r"train_batch_size: at stage 1, 96 .* one row, and the model NFM normalises"):
        loader()
    _, plain = normed("FM", tmp_path, train_batch_size=1)
    assert len(plain()) == 96


def test_a_resumed_epoch_goes_on_after_the_joined_batch(tmp_path: Path) -> None:
    _, make = normed("NFM", tmp_path, train_batch_size=19)
    whole = [batch["_position"].tolist() for batch in make()]
    first = make()
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    again = make()
    again.load_state_dict(first.state_dict())
    assert [batch["_position"].tolist() for batch in again] == whole[4:]


@pytest.mark.parametrize("loss", ["CE", "BPR"])
def test_masking_ends_where_a_history_holds_every_item(tmp_path: Path, loss: str) -> None:
    """RecBole draws until an item is not in the history. Under cross-entropy nobody reads it; else it is said."""
    rows = [(f"u{k % 4}", f"i{(k // 4) % 6}", k) for k in range(240)]
    given = {"train_neg_sample_args": UNIFORM | {"sample_num": 1}} if loss == "BPR" else {}
    config, stream = stream_of(write(tmp_path, rows), model="BERT4Rec", loss_type=loss, **given)
    ctx = stage_context(config, stream, 0)
    if loss == "BPR":
        with pytest.raises(DataError, match=r"a history holds all 6 items that are known.*set loss_type: CE"):
            list(make_loader(ctx, ctx.stage.train, "t"))
        return
    found = list(make_loader(ctx, ctx.stage.train, "t"))
    assert sum(len(batch) for batch in found) == len(ctx.stage.train)
    assert all((batch["Mask_item_id_list"] == ctx.stage.n_items).any() for batch in found)


def test_draws_are_recboles_while_they_end() -> None:
    """The same numbers from the same state; then one of the items that are left; then 0 or a message."""
    import random

    from recbole.data.transform import MaskItemSequence

    from recbole_cl.stream.transforms import let_end

    theirs, ours = object.__new__(MaskItemSequence), object.__new__(MaskItemSequence)
    let_end(ours, None, needed=True)
    drawn = []
    for one in (theirs, ours):
        random.seed(3)
        drawn.append([one._neg_sample([1, 2, 3, 0, 0], 6) for _ in range(50)])
    assert drawn[0] == drawn[1]
    random.seed(0)
    assert ours._neg_sample([*range(1, 77_777), *range(77_778, 100_000)], 100_000) == 77_777
    with pytest.raises(DataError, match="a history holds all 5 items"):
        ours._neg_sample([1, 2, 3, 4, 5], 6)
    let_end(ours, None, needed=False)
    assert ours._neg_sample([1, 2, 3, 4, 5], 6) == 0
