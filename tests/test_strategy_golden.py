"""EWC, SI, ERRandom and their parts against values computed by hand, in plain loops, or known in distribution."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from run_helpers import bare_context
from scipy.stats import chisquare
from torch import nn

from recbole_cl.config import CLConfig
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.parts.checks import check_loss
from recbole_cl.strategy.parts.exemplars import ReservoirMemory, join_rows
from recbole_cl.strategy.parts.importance import squared_gradients, stage_importance
from recbole_cl.strategy.parts.rows import OwnRows
from recbole_cl.stream.batch import STAGE, TARGETS
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.vocabulary import Growth, fixed_axis, item_axis
from recbole_cl.testing import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

SMALL = {
    "embedding_size": 8, "hidden_size": 8, "inner_size": 16, "n_layers": 1, "n_heads": 2, "MAX_ITEM_LIST_LENGTH": 10,
    "mlp_hidden_size": [16, 8], "num_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def context(toy: PlantedDrift) -> Callable[..., StageContext]:
    """Returns the context of a stage with a fresh model."""
    return lambda model, index=0, **more: bare_context(toy, model, index, previous=False, **{**SMALL, **more})


def toy_context(module: nn.Module, **more: Any) -> Any:
    """A context around a plain module, for strategies that need no data."""
    parameters = dict(module.named_parameters())
    found = SimpleNamespace(
        model=module, parameters=lambda: parameters, terms={}, step=0, epoch=0, pass_=Pass(), data_gradients={}, **more
    )
    found.log = lambda name, value: found.terms.__setitem__(name, [float(value), 1.0])
    return found


class Point(nn.Module):
    """Two parameters and nothing else."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))


# -- importance ---------------------------------------------------------------------------------------------------


def plain_loop(model: nn.Module, batch: Interaction) -> dict[str, torch.Tensor]:
    """The definition: one sample, one backward pass of RecBole's own loss, squares added up."""
    model.eval()
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for n in range(len(batch)):
        model.zero_grad()
        model.calculate_loss(batch[[n]]).backward()  # type: ignore[operator]
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad.double() ** 2
    model.zero_grad()
    model.train()
    return {name: value / len(batch) for name, value in sums.items()}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("BPR", {}),
        ("NeuMF", {}),
        ("DeepFM", {}),
        ("LightGCN", {}),
        ("SASRec", {}),
        ("SASRec", {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}),
        ("SASRec", {"train_positions": "last"}),
        ("GRU4Rec", {}),
    ],
)
def test_squared_gradients_are_those_of_a_plain_loop(context: Any, model: str, settings: dict[str, Any]) -> None:
    ctx = context(model, **settings)
    batch = make_loader(ctx, ctx.stage.train, "test").make(np.arange(24))
    assert (TARGETS in batch) == (model in ("SASRec", "GRU4Rec") and "train_positions" not in settings)
    expected = plain_loop(ctx.model, batch)
    largest = max(float(v.max()) for v in expected.values())
    assert largest > 0
    for chunk, parts in ((None, [batch]), (5, [batch[list(range(10))], batch[list(range(10, len(batch)))]])):
        found = squared_gradients(ctx.model, parts, chunk=chunk)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # The bias of attention keys has no gradient but rounding: softmax does not see a shift.
            near = 1e-6 * float(value.max()) + 1e-12 * largest
            assert torch.allclose(found[name].double(), value, rtol=1e-5, atol=near), name


def test_squared_batch_mean_gradients_are_something_else(context: Any) -> None:
    """The known mistake: squares of the gradients of batch means shrink with the batch size."""
    ctx = context("BPR")
    batch = make_loader(ctx, ctx.stage.train, "test").make(np.arange(64))
    right = sum(float(v.sum()) for v in squared_gradients(ctx.model, [batch]).values())
    wrong = {}
    for size in (1, 8, 64):
        squares = []
        for start in range(0, 64, size):
            ctx.model.zero_grad()
            ctx.model.calculate_loss(batch[list(range(start, start + size))]).backward()
            squares.append(sum(float((p.grad**2).sum()) for p in ctx.model.parameters()))
        wrong[size] = np.mean(squares)
    assert wrong[1] == pytest.approx(right, rel=1e-5)
    assert wrong[8] < right / 4
    assert wrong[64] < right / 20


def test_importance_leaves_everything_as_it_was(context: Any) -> None:
    ctx = context("SASRec", hidden_dropout_prob=0.5)
    ctx.model.train()
    ctx.model.trm_encoder.eval()
    modes = [m.training for m in ctx.model.modules()]
    for p in ctx.model.parameters():
        p.grad = torch.full_like(p, 7.0)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = stage_importance(ctx, "EWC")
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1]) and python_state == random.getstate()
    assert [m.training for m in ctx.model.modules()] == modes
    assert all(bool((p.grad == 7.0).all()) for p in ctx.model.parameters())
    again = stage_importance(ctx, "EWC")  # no dropout: the same bits
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_limit_draws_without_replacement(context: Any) -> None:
    ctx = context("BPR")
    rows = OwnRows(ctx, "EWC")
    drawn = torch.cat([b["_position"] for b in rows.batches(50)])
    assert len(drawn) == 50 == len(set(drawn.tolist())) < rows.size
    assert len(torch.cat([b["_position"] for b in OwnRows(ctx, "EWC").batches()])) == rows.size
    assert not torch.equal(drawn, torch.cat([b["_position"] for b in OwnRows(ctx, "EWC").batches(50)]))


def test_a_model_without_a_loss_is_refused() -> None:
    from recbole.model.knowledge_aware_recommender import MKR

    model = MKR.__new__(MKR)
    nn.Module.__init__(model)
    with pytest.raises(ConfigError, match="EWC cannot serve the model MKR"):
        check_loss("EWC", {"model": "MKR"}, model)


# -- EWC ----------------------------------------------------------------------------------------------------------


def ewc(strength: float) -> Any:
    return strategies.get("EWC")({"lambda": strength, "samples": None})


def test_ewc_two_anchors_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """F_1 = (1, 0), theta_1 = (1, 5); F_2 = (3, 2), theta_2 = (2, -1); theta = (4, 1), lambda = 0.5.

    Penalty 0.25 * (1*9 + 3*4 + 2*4) = 7.25; gradient 0.5 * (1*3 + 3*2, 2*2) = (4.5, 2).
    """
    strategy, point = ewc(0.5), Point([1.0, 5.0])
    ctx = toy_context(point)
    for fisher, theta in (([1.0, 0.0], [1.0, 5.0]), ([3.0, 2.0], [2.0, -1.0])):
        monkeypatch.setattr("recbole_cl.strategy.ewc.stage_importance", lambda *_, f=fisher: {"theta": torch.tensor(f)})
        point.theta.data = torch.tensor(theta)
        strategy.end_stage(ctx)
    point.theta.data = torch.tensor([4.0, 1.0])
    assert float(strategy.penalty(ctx)) == pytest.approx(7.25)
    strategy.add_gradients(ctx)  # no gradient of the data: taken as zero
    assert torch.allclose(point.theta.grad, torch.tensor([4.5, 2.0]))
    point.theta.grad = torch.tensor([1.0, 1.0])
    strategy.add_gradients(ctx)
    assert torch.allclose(point.theta.grad, torch.tensor([5.5, 3.0]))
    assert ctx.terms["EWC/penalty"][0] == pytest.approx(7.25)
    strategy.params["lambda"] = 0.0
    point.theta.grad = None
    strategy.add_gradients(ctx)
    assert point.theta.grad is None


def test_ewc_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty of the example above, by a strategy that was made anew from the other one's state: 7.25 again.

    The anchors lie apart, so a part of it, 0.25 * 3/4 = 0.1875, is held by no tensor.
    """
    strategy, point = ewc(0.5), Point([0.0, 0.0])
    for fisher, theta in (([1.0, 0.0], [1.0, 5.0]), ([3.0, 2.0], [2.0, -1.0])):
        strategy._add_anchor("theta", torch.tensor(fisher), torch.tensor(theta))
    again = ewc(0.5)
    again.load_state_dict(strategy.state_dict())
    point.theta.data = torch.tensor([4.0, 1.0])
    assert float(again.penalty(toy_context(point))) == pytest.approx(7.25)
    assert again.weight() * again.residual == pytest.approx(0.1875)


def test_ewc_collapses_many_anchors_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    strategy, point = ewc(2.0), Point([0.0] * 50)
    kept = []
    for _ in range(10):
        fisher, theta = (
            torch.rand(50, generator=generator) * (torch.rand(50, generator=generator) > 0.3),
            torch.randn(50, generator=generator),
        )
        strategy._add_anchor("theta", fisher, theta)
        kept.append((fisher.double(), theta.double()))
    point.theta.data = torch.randn(50, generator=generator)
    ctx = toy_context(point)
    strategy.add_gradients(ctx)
    theta = point.theta.detach().double()
    assert float(strategy.penalty(ctx)) == pytest.approx(
        float(sum((f * (theta - a) ** 2).sum() for f, a in kept)), rel=1e-6
    )
    assert torch.allclose(point.theta.grad.double(), 2 * sum(f * (theta - a) for f, a in kept), atol=1e-5)


def test_ewc_does_not_cancel_near_the_anchor() -> None:
    """A theta - B in float32 would lose a drift of 1e-6 at weights near 1; the mean anchor keeps it."""
    strategy, point = ewc(1.0), Point([0.9])
    strategy._add_anchor("theta", torch.tensor([0.3]), torch.tensor([0.9]))
    strategy._add_anchor("theta", torch.tensor([0.4]), torch.tensor([0.9]))
    point.theta.data += 1e-6
    drift = float(point.theta.detach().double() - torch.tensor(0.9).double())
    strategy.add_gradients(toy_context(point))
    assert float(point.theta.grad) == pytest.approx(0.7 * drift, rel=1e-5)


def test_ewc_new_rows_are_free() -> None:
    strategy = ewc(1.0)
    strategy._add_anchor("table", torch.ones(3, 2), torch.full((3, 2), 4.0))
    strategy.grow(Growth((2, 2), (3, 5), {"table": [item_axis(), fixed_axis(2)]}))
    assert strategy.importance["table"].tolist() == [[1.0, 1.0]] * 3 + [[0.0, 0.0]] * 2
    assert strategy.anchor["table"].shape == (5, 2)


# -- SI -----------------------------------------------------------------------------------------------------------


def test_si_on_a_quadratic_is_the_papers_loop() -> None:
    """SGD on 1/2 h (theta - a)^2 through two stages, against the formulas in a plain loop with scalars."""
    h, goals, rate, c, xi = [2.0, 0.5], ([1.0, -1.0], [-0.5, 2.0]), 0.1, 0.3, 0.1
    strategy, point = strategies.get("SI")({"c": c, "xi": xi}), Point([0.0, 0.3])
    ctx = toy_context(point)
    optimizer = torch.optim.SGD(point.parameters(), lr=rate)
    for goal in goals:
        strategy.begin_stage(ctx)
        for step in range(20):
            ctx.step = step
            optimizer.zero_grad()
            (0.5 * torch.tensor(h) * (point.theta - torch.tensor(goal)) ** 2).sum().backward()
            ctx.data_gradients = {"theta": point.theta.grad.clone()}
            strategy.add_gradients(ctx)
            optimizer.step()
            strategy.after_step(ctx)
        strategy.end_stage(ctx)
    for i in range(2):
        theta, big, anchor = [0.0, 0.3][i], 0.0, 0.0
        for goal in goals:
            start, omega = theta, 0.0
            for _ in range(20):
                g = h[i] * (theta - goal[i])
                new = theta - rate * (g + 2 * c * big * (theta - anchor))
                omega -= g * (new - theta)
                theta = new
            big, anchor = max(big + omega / ((theta - start) ** 2 + xi), 0.0), theta
        assert big > 0.1
        assert float(strategy.importance["theta"][i]) == pytest.approx(big, rel=1e-4)
        assert point.theta[i].item() == pytest.approx(theta, rel=1e-4)
    point.theta.data += 1.0
    assert float(strategy.penalty(ctx)) == pytest.approx(c * float(strategy.importance["theta"].sum()), rel=1e-4)


def test_si_path_is_the_fall_of_the_loss() -> None:
    """With small steps omega sums to what the loss fell by (the paper's eq. 2)."""
    strategy, point = strategies.get("SI")({"c": 0.0, "xi": 0.1}), Point([3.0, -2.0])
    ctx = toy_context(point)
    strategy.begin_stage(ctx)
    optimizer = torch.optim.SGD(point.parameters(), lr=1e-3)
    first = float((point.theta**2).sum())
    for _ in range(500):
        optimizer.zero_grad()
        loss = (point.theta**2).sum()
        loss.backward()
        ctx.data_gradients = {"theta": point.theta.grad.clone()}
        strategy.add_gradients(ctx)
        optimizer.step()
        strategy.after_step(ctx)
    assert float(strategy.path["theta"].sum()) == pytest.approx(first - float((point.theta**2).sum()), rel=5e-3)


def test_si_snapshot_is_not_changed_by_later_steps() -> None:
    strategy, point = strategies.get("SI")({"c": 0.1, "xi": 0.1}), Point([1.0, 1.0])
    ctx = toy_context(point)
    strategy.begin_stage(ctx)
    snapshot = strategy.state_dict()
    strategy.add_gradients(ctx)
    point.theta.data -= 1.0
    ctx.data_gradients = {"theta": torch.ones(2)}
    strategy.after_step(ctx)
    assert strategy.path["theta"].tolist() == [1.0, 1.0]
    assert snapshot["path"]["theta"].tolist() == [0.0, 0.0]
    strategy.load_state_dict(snapshot)  # early stopping goes back to an earlier epoch
    assert strategy.path["theta"].tolist() == [0.0, 0.0]


def test_si_negative_importance_is_cut_and_a_fresh_pass_begins_anew() -> None:
    strategy, point = strategies.get("SI")({"c": 0.1, "xi": 0.1}), Point([1.0, 1.0])
    ctx = toy_context(point)
    strategy.begin_stage(ctx)
    strategy.path["theta"] = torch.tensor([-1.0, 1.0])
    strategy.end_stage(ctx)
    assert torch.allclose(strategy.importance["theta"], torch.tensor([0.0, 10.0]))
    strategy.path["theta"] = torch.ones(2)
    point.theta.data += 5.0
    ctx.pass_ = Pass(init="fresh")
    strategy.first_step(ctx)
    assert strategy.start["theta"].tolist() == [6.0, 6.0] and strategy.path["theta"].tolist() == [0.0, 0.0]


# -- memory and replay ----------------------------------------------------------------------------------------------


def test_reservoir_is_a_uniform_sample_of_all_stages(context: Any) -> None:
    """Every target of three stages is kept equally often; the keys' order says which, not the stages' order."""
    base = context("BPR")
    stages = [SimpleNamespace(stage=stage, stream=base.stream, batcher=base.batcher) for stage in base.stream.stages]
    for fake in stages:
        fake.stage = SimpleNamespace(
            n_users=fake.stage.n_users, n_items=fake.stage.n_items, train=fake.stage.train[:40]
        )
    generator = np.random.default_rng(5)
    counts: dict[int, int] = {int(p): 0 for s in stages for p in s.stage.train.position}
    for _ in range(400):
        memory = ReservoirMemory(12)
        for fake in stages:
            memory.add(fake, fake.stage.train, generator)  # type: ignore[arg-type]
        kept = memory.columns["_position"].tolist()
        assert len(kept) == len(set(kept)) == 12 == len(memory)
        for position in kept:
            counts[position] += 1
    observed = np.array(list(counts.values()))
    assert chisquare(observed).pvalue > 0.01
    assert chisquare(observed.reshape(3, 40).sum(axis=1)).pvalue > 0.01


def test_reservoir_keeps_rows_and_their_keys_together(context: Any) -> None:
    ctx = context("SASRec", train_positions="last")
    memory, generator = ReservoirMemory(30), np.random.default_rng(0)
    memory.add(ctx, ctx.stage.train, generator)
    expected = ctx.batcher.rows(ctx.stage.train)
    for n in range(len(memory)):
        at = int((expected["_position"] == memory.columns["_position"][n]).nonzero()[0])
        assert all(torch.equal(memory.columns[name][n], expected[name][at]) for name in expected.columns)
    drawn = memory.sample(7, generator)
    assert len(drawn) == 7 == len(set(drawn["_position"].tolist()))
    assert len(memory.sample(1000, generator)) == 30 and len(memory.sample(0, generator)) == 0
    counts = np.zeros(30)
    for _ in range(600):
        at = np.searchsorted(memory.columns["_position"].numpy(), memory.sample(5, generator)["_position"].numpy())
        counts[at] += 1
    assert chisquare(counts).pvalue > 0.01


def test_a_memory_goes_on_from_its_state(context: Any) -> None:
    """Keys are part of it: shown another stage, a memory made from the state keeps the rows that the other keeps."""
    memory = ReservoirMemory(30)
    memory.add(context("BPR"), context("BPR").stage.train, np.random.default_rng(0))
    assert len(set(memory.keys.tolist())) == 30 and memory.keys.max() < 0.7, "the smallest keys stay"
    again = ReservoirMemory(30)
    again.load_state_dict(memory.state_dict())
    ctx = context("BPR", 1)
    for one in (memory, again):
        one.add(ctx, ctx.stage.train, np.random.default_rng(1))
    assert np.array_equal(memory.keys, again.keys)
    assert memory.columns["_position"].tolist() == again.columns["_position"].tolist()
    assert set(memory.columns[STAGE].tolist()) == {0, 1}


def test_memory_of_another_log_is_refused(context: Any) -> None:
    ctx = context("BPR")
    memory, generator = ReservoirMemory(5), np.random.default_rng(0)
    memory.add(ctx, ctx.stage.train, generator)
    state = memory.state_dict()
    again = ReservoirMemory(5)
    again.load_state_dict(state)
    again.check(ctx)
    again.load_state_dict({**state, "vocabulary": {**state["vocabulary"], "hash": "0"}})
    with pytest.raises(CheckpointError, match="first 48 users and 32 items"):
        again.check(ctx)


def test_join_rows_pads_and_names_what_is_missing() -> None:
    one = Interaction({"a": torch.tensor([1, 2]), "s": torch.tensor([[1, 2, 3], [4, 5, 0]])})
    two = Interaction({"a": torch.tensor([3]), "s": torch.tensor([[6, 7]])})
    joined = join_rows(one, two)
    assert joined["a"].tolist() == [1, 2, 3] and joined["s"].tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 0]]
    assert join_rows(two, one)["s"].tolist() == [[6, 7, 0], [1, 2, 3], [4, 5, 0]]
    with pytest.raises(ConfigError, match=r"price \(memory only\), s \(batch only\)"):
        join_rows(one, Interaction({"a": torch.tensor([3]), "price": torch.tensor([1.0])}))
    assert len(join_rows(one, Interaction({"a": torch.tensor([3])}), optional=frozenset({"s"}))["s"]) == 2


@pytest.mark.parametrize("model", ["BPR", "NeuMF", "DeepFM", "SASRec", "GRU4Rec", "BERT4Rec", "LightGCN"])
@pytest.mark.parametrize("count", [0, 16])
def test_replay_adds_rows_and_draws_nothing_from_the_loader(context: Any, model: str, count: int) -> None:
    before, ctx = context(model, 0), context(model, 1)
    strategy = strategies.get("ERRandom")({"memory_size": 60, "batch_size": count})
    strategy.end_stage(before)
    assert set(strategy.memory.columns[STAGE].tolist()) == {0}
    ctx.loader = make_loader(ctx, ctx.stage.train, "0/train")
    random.seed(0)
    batch = ctx.loader.make(np.arange(32))
    state, python_state = str(ctx.loader.state_dict()), random.getstate()
    copy = Interaction({name: column.clone() for name, column in batch.interaction.items()})
    joined = strategy.augment_batch(ctx, batch)
    assert str(ctx.loader.state_dict()) == state and random.getstate() == python_state
    times = ctx.loader.negatives.times if not ctx.loader.negatives.pairwise else 1
    times = len(batch) // 32 if model == "BERT4Rec" else times
    replayed = strategy.count(ctx)
    if TARGETS not in batch:  # m counts rows of negatives, as train_batch_size does
        assert replayed * ctx.loader.negatives.times == count
    assert bool(replayed) == bool(count)
    assert len(joined) == len(batch) + replayed * times
    for name, column in copy.interaction.items():
        width = column.shape[1] if column.dim() > 1 else None
        ours = joined[name][: len(batch)]
        assert torch.equal(ours if width is None else ours[:, :width], column)
        assert count or joined[name].shape == column.shape
    assert (joined[STAGE][len(batch) :] == 0).all()
    loss = ctx.model.calculate_loss(joined)
    assert torch.isfinite(loss)
    if TARGETS in batch:
        assert bool((joined[TARGETS][len(batch) :] > 0).any(dim=1).all())


@pytest.mark.parametrize("name", ["ERRandom", "ERFreq", "INFER"])
def test_replay_counts_targets_in_rows_and_in_windows(context: Any, name: str) -> None:
    """m replayed targets are m rows, or the windows that hold m targets on average; never none where m > 0."""
    for model in ("BPR", "SASRec"):
        before, ctx = context(model, 0), context(model, 1)
        member: Any = strategies.get(name)
        strategy = member({**member.defaults, "memory_size": 60, "batch_size": 20})
        assert strategy.count(ctx) == 0, "an empty memory"
        strategy.end_stage(before)
        held = strategy.memory
        if model == "BPR":
            assert strategy.count(ctx) == len(strategy.draw(ctx)) == 20
            continue
        per_window = (held.columns[TARGETS] > 0).sum(dim=1).double()
        assert per_window.mean() > 2, "windows of one target would be rows"
        assert strategy.count(ctx) == round(20 / float(per_window.mean())) < 20
        drawn = np.mean([int((strategy.draw(ctx)[TARGETS] > 0).sum()) for _ in range(200)])
        if name != "ERFreq":  # whose draws are weighted
            assert drawn == pytest.approx(strategy.count(ctx) * float(per_window.mean()), rel=0.1)
        assert held.rows_of(1) == 1 and held.rows_of(0) == 0 and held.rows_of(10**6) == len(held)


@pytest.mark.parametrize("name", ["ERRandom", "ERFreq", "INFER"])
def test_replay_counts_as_the_batch_size_does(context: Any, name: str) -> None:
    """With m equal to train_batch_size a batch is doubled, whatever negatives a target brings; m > 0 brings one."""
    for model, num, targets in (("NeuMF", 1, 32), ("NeuMF", 3, 16), ("BPR", 1, 64), ("BPR", 2, 32)):
        args = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": num}, "train_batch_size": 64}
        before, ctx = context(model, 0, **args), context(model, 1, **args)
        ctx.loader = make_loader(ctx, ctx.stage.train, "0/train")
        member: Any = strategies.get(name)
        strategy = member({**member.defaults, "memory_size": 100, "batch_size": 64, "samples": 100})
        strategy.end_stage(before)
        batch = next(iter(ctx.loader))
        rows = len(batch)
        assert (rows, strategy.count(ctx)) == (64, targets)
        assert len(strategy.augment_batch(ctx, batch)) == 2 * rows
        strategy.params["batch_size"] = 1
        assert strategy.count(ctx) == 1
        strategy.params["batch_size"] = 0
        assert strategy.count(ctx) == 0


def test_replayed_negatives_are_known_items_that_the_user_did_not_have(context: Any) -> None:
    before, ctx = context("BPR", 0), context("BPR", 1)
    strategy = strategies.get("ERRandom")({"memory_size": 200, "batch_size": 200})
    strategy.end_stage(before)
    batch = make_loader(ctx, ctx.stage.train, "0/train").make(np.arange(8))
    joined = strategy.augment_batch(ctx, batch)
    past = ctx.stream.trained_targets(1, "so_far").position
    had = set(zip(ctx.stream.table.user[past].tolist(), ctx.stream.table.item[past].tolist(), strict=True))
    drawn = joined["neg_item_id"]
    assert len(drawn) == 208 and int(drawn.max()) < ctx.stage.n_items
    assert not had & set(zip(joined["user_id"].tolist(), drawn.tolist(), strict=True))


def test_the_planted_rule_is_the_oracle(toy: PlantedDrift, context: Any) -> None:
    stream = context("SASRec").stream
    table, tokens = stream.table, stream.dataset.field2id_token["item_id"]
    assert len(stream) == 3 == toy.n_stages
    for stage in stream.stages:
        for split in ("train", "valid", "test"):
            targets = stage.split(split)
            last, label = tokens[table.item[table.seq[targets.hi - 1]]], tokens[targets.label]
            right = [toy.accuracy(list(last), list(label), s) for s in range(3)]
            assert right == [float(s == stage.index) for s in range(3)]
        users, items = stream.dataset.field2id_token["user_id"][table.user], tokens[table.item]
        assert all(toy.user_cluster[u] == toy.item_cluster[i] for u, i in zip(users, items, strict=True))
    assert [s.n_items for s in stream.stages] == [33, 37, 41] and [s.n_users for s in stream.stages] == [49, 55, 61]


def test_same_seed_same_file(tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate((3, 3, 4)):
        found = write_planted_drift(tmp_path / str(number), seed=seed)
        texts.append((found.folder / found.name / f"{found.name}.inter").read_text())
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(ValueError, match="too few"):
        write_planted_drift(tmp_path, n_items=4, n_clusters=2, n_stages=5)


def test_knowledge_models_take_triples_beside_their_rows(tmp_path: Path) -> None:
    """EWC pairs each target with a triple; replay leaves a batch's triples as they are."""
    found = write_planted_drift(tmp_path)
    stem = tmp_path / found.name / found.name
    items = sorted(found.item_cluster)
    stem.with_suffix(".link").write_text("\n".join(["item_id:token\tentity_id:token", *(f"{i}\te{i}" for i in items)]))
    triples = [f"e{i}\tin\tcluster{found.item_cluster[i]}" for i in items]
    stem.with_suffix(".kg").write_text("\n".join(["head_id:token\trelation_id:token\ttail_id:token", *triples]))
    load = {"inter": ["user_id", "item_id", "timestamp"], "kg": ["head_id", "relation_id", "tail_id"]}
    settings = {**found.settings(), **SMALL, "load_col": {**load, "link": ["item_id", "entity_id"]}, "epochs": 2}
    settings |= {"kg_embedding_size": 8, "metrics": ["Hit"], "valid_metric": "Hit@10", "show_progress": False}
    runs = {}
    for number, chosen in enumerate(("FineTune", ["EWC", "ERRandom"], {"EWC": {"lambda": 0.0}})):
        given = {**settings, "strategy": chosen, "output_dir": str(tmp_path / str(number))}
        runs[number] = Runner(CLConfig(model="CKE", dataset=found.name, config_dict=given))
        runs[number].run()
    importance = runs[1].strategy.members[1].importance  # type: ignore[attr-defined]
    assert float(importance["relation_embedding.weight"].sum()) > 0
    weights = [r.model.state_dict() for r in runs.values()]
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
