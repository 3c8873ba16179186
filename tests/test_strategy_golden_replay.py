"""ERFreq, ADER, INFER, ReLoop and ReLoop2 against values computed by hand, by autograd or in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from recbole.data.interaction import Interaction
from run_helpers import bare_context
from scipy.stats import chisquare

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.alias import AliasTable
from recbole_cl.strategy.parts.error_memory import ErrorMemory
from recbole_cl.strategy.parts.exemplars import build_rows
from recbole_cl.strategy.parts.histories import history_vectors, item_logits
from recbole_cl.strategy.parts.influence import mean_gradient, products
from recbole_cl.strategy.parts.rows import OwnRows
from recbole_cl.strategy.parts.selection import herding, quotas, smallest
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.stage import Targets
from recbole_cl.testing import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

SMALL = {
    "embedding_size": 8, "hidden_size": 8, "inner_size": 16, "n_layers": 1, "n_heads": 2, "MAX_ITEM_LIST_LENGTH": 10,
    "mlp_hidden_size": [8], "mf_embedding_size": 4, "mlp_embedding_size": 4, "num_layers": 1, "dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "train_batch_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def context(toy: PlantedDrift) -> Callable[..., StageContext]:
    """Returns the context of a stage with a fresh model, and a fresh model of the stage before as its previous one."""

    def context(model: str, index: int = 0, **settings: Any) -> StageContext:
        ctx = bare_context(toy, model, index, scale=3, **{**SMALL, **settings})
        ctx.learning_rate = 0.01
        return ctx

    return context


def make(name: str, **parameters: Any) -> Any:
    """A strategy with the defaults of its properties file."""
    config = CLConfig(model="BPR", dataset="ml-100k", config_dict={"strategy": name})
    return strategies.get(name)({**dict(config.strategy_specs())[name], **parameters})


# -- quotas and herding -------------------------------------------------------------------------------------------


def test_quotas_are_within_one_of_their_due_and_right_on_average() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, 50)
    for equal, weight in ((False, counts), (True, (counts > 0) * 1.0)):
        due = weight / weight.sum() * 100
        drawn = np.array([quotas(counts, 100, equal, rng) for _ in range(2000)])
        capped = np.minimum(np.floor(due), counts)
        assert ((drawn >= capped) & (drawn <= np.ceil(due) + 1e-9) & (drawn <= counts)).all()
        if not equal:
            assert (drawn.sum(axis=1) == 100).all()
            assert np.abs(drawn.mean(axis=0) - due).max() < 0.05
    assert (quotas(counts, 10_000, False, rng) == counts).all()
    assert quotas(np.array([1, 50]), 20, True, rng).tolist() == [1, 10]
    assert not quotas(np.zeros(3, dtype=int), 5, False, rng).any()


@pytest.mark.parametrize("seed", range(4))
def test_herding_is_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[rng.integers(0, 9, 120), np.full(70, 9)]
    vectors = rng.normal(size=(190, 6)) + 0.3
    counts = np.bincount(labels, minlength=12)
    quota = np.minimum(rng.integers(0, 20, 12), counts)
    quota[3] = counts[3]
    expected: list[int] = []
    for label in range(12):
        index = np.flatnonzero(labels == label)
        if not len(index):
            continue
        unit = vectors[index] / np.linalg.norm(vectors[index], axis=1, keepdims=True)
        mean, chosen = unit.mean(axis=0), []
        w = mean.copy()
        for _ in range(quota[label]):
            match = unit @ w
            match[chosen] = -np.inf
            chosen.append(int(match.argmax()))
            w += mean - unit[chosen[-1]]
        expected += index[chosen].tolist()
    assert herding(torch.from_numpy(vectors), labels, quota).tolist() == sorted(expected)


def test_herding_follows_the_mean_better_than_chance() -> None:
    rng = np.random.default_rng(1)
    unit = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(400, 8)) + 0.5), dim=1)
    labels, quota = np.zeros(400, dtype=int), np.array([20])
    gap = float((unit[herding(unit, labels, quota)].mean(0) - unit.mean(0)).norm())
    random = [float((unit[rng.choice(400, 20, replace=False)].mean(0) - unit.mean(0)).norm()) for _ in range(200)]
    assert gap < min(random)


def test_smallest_keys_of_each_label() -> None:
    keys, labels = np.array([3.0, 1.0, 2.0, 9.0, 8.0, 7.0]), np.array([2, 2, 2, 0, 0, 1])
    assert smallest(keys, labels, np.array([1, 0, 2])).tolist() == [1, 2, 4]


# -- ADER ---------------------------------------------------------------------------------------------------------


def history(ctx: StageContext, targets: Targets, n: int) -> list[int]:
    table = ctx.batcher.table
    return [int(i) for i in table.item[table.seq[targets.lo[n] : targets.hi[n]]]][-10:]


def after(model: Any, items: list[int]) -> torch.Tensor:
    """The model's vector after a history, in a row of RecBole's width."""
    found: torch.Tensor = model(torch.tensor([items + [0] * (10 - len(items))]), torch.tensor([len(items)]))[0]
    return found


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "NARM"])
def test_history_vectors_are_those_of_single_rows(context: Any, model: str) -> None:
    ctx = context(model, 2)
    targets = ctx.stage.train[np.random.default_rng(0).permutation(len(ctx.stage.train))[:60]]
    assert (targets.hi - targets.lo).max() > 10  # longer than the model's input
    ctx.model.train()
    found = history_vectors(ctx, targets)
    assert ctx.model.training and not found.requires_grad
    ctx.model.eval()
    for n in range(len(targets)):
        assert torch.allclose(found[n], after(ctx.model, history(ctx, targets, n)), atol=1e-5)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "NARM"])
@pytest.mark.parametrize("target", ["distil", "label"])
def test_ader_term_by_hand(context: Any, model: str, target: str) -> None:
    """lambda 0.8 sqrt(V_0/V_1 |E|/|D_1|) times the mean divergence from the old softmax over old items alone."""
    before, ctx = context(model, 0), context(model, 1)
    strategy = make("ADER", memory_size=40, batch_size=7, target=target)
    assert strategy.loss_terms(before, next(iter(before.loader))) == {}
    strategy.end_stage(before)
    kept = strategy.exemplars
    assert len(kept) == 40 and set(kept.position) <= set(before.stage.train.position)
    old_n, new_n = before.stage.n_items, ctx.stage.n_items
    assert new_n > old_n
    strength = 0.8 * math.sqrt((old_n - 1) / (new_n - 1) * 40 / len(ctx.stage.train))
    assert strategy.strength(ctx) == pytest.approx(strength)
    assert make("ADER", weight="fixed").strength(ctx) == 0.8
    ctx.model.eval()
    teacher, expected = ctx.previous_model, []
    term = strategy.loss_terms(ctx, next(iter(ctx.loader)))[f"ADER/{target}"]
    embedding = ctx.model.item_embedding.weight
    for n in strategy.order[:7]:
        items = history(ctx, kept, n)
        hidden = after(ctx.model, items)
        if model == "NARM":
            scores = ctx.model.full_sort_predict(ctx.batcher.rows(kept[np.array([n])]))[0]
            old = teacher.full_sort_predict(ctx.batcher.rows(kept[np.array([n])]))[0, 1:old_n].softmax(0)
        else:
            scores = embedding @ hidden
            old = (teacher.item_embedding.weight[1:old_n] @ after(teacher, items)).softmax(0)
        if target == "distil":
            expected.append((old * (old.log() - scores[1:old_n].log_softmax(0))).sum())
        else:
            expected.append(-scores[1:new_n].log_softmax(0)[kept.label[n] - 1])
    assert float(term.detach()) == pytest.approx(strength * float(torch.stack(expected).mean().detach()), rel=1e-4)
    by_hand = torch.autograd.grad(strength * torch.stack(expected).mean(), embedding)[0]
    term.backward()
    assert float(embedding.grad.abs().sum()) > 0
    torch.testing.assert_close(embedding.grad[1:], by_hand[1:], atol=1e-6, rtol=1e-4)  # row 0 is padding
    assert all(p.grad is None for p in teacher.parameters())


def test_ader_passes_once_over_the_exemplars_in_an_epoch(context: Any) -> None:
    before, ctx = context("SASRec", 0), context("SASRec", 1)
    strategy = make("ADER", memory_size=50)
    strategy.end_stage(before)
    orders = []
    for _ in range(2):
        drawn = [strategy.draw(ctx).position for _ in range(len(ctx.loader))]
        orders.append(np.concatenate(drawn).tolist())
        assert sorted(orders[-1]) == sorted(strategy.exemplars.position.tolist())
    assert orders[0] != orders[1]


@pytest.mark.parametrize("selection", ["herding", "loss", "random"])
def test_ader_chooses_anew_from_stage_and_old_exemplars(context: Any, selection: str) -> None:
    strategy, ctx = make("ADER", memory_size=60, selection=selection), context("SASRec", 0)
    strategy.end_stage(ctx)
    old, ctx = strategy.exemplars, context("SASRec", 1)
    candidates = strategy.candidates(ctx)
    assert set(candidates.position) == set(old.position) | set(ctx.stage.train.position)
    strategy.end_stage(ctx)
    kept = strategy.exemplars
    assert len(kept) == 60 == len(set(kept.position)) and set(kept.position) <= set(candidates.position)
    assert 0 < len(set(kept.position) & set(old.position)) < 60
    counts = np.bincount(candidates.label, minlength=ctx.stage.n_items)
    quota = np.bincount(kept.label, minlength=ctx.stage.n_items)
    due = counts / counts.sum() * 60
    assert ((quota >= np.floor(due)) & (quota <= np.ceil(due))).all()
    if selection == "random":
        return
    ctx.model.eval()
    for label in np.flatnonzero(quota)[:6]:
        index = np.flatnonzero(candidates.label == label)
        hidden = torch.stack([after(ctx.model, history(ctx, candidates, n)) for n in index]).detach()
        if selection == "loss":
            logits = hidden @ ctx.model.item_embedding.weight[1:].T
            chosen = torch.argsort(-logits.log_softmax(-1)[:, label - 1], stable=True)[: quota[label]].numpy()
        else:
            chosen = herding(hidden, np.zeros(len(index), dtype=int), quota[[label]])
        mine = kept.position[kept.label == label]
        assert sorted(mine) == sorted(candidates.position[index[chosen]])


def test_ader_validation_targets_only_where_asked(context: Any) -> None:
    ctx = context("SASRec", 0)
    for valid in (False, True):
        found = set(make("ADER", valid=valid).candidates(ctx).position)
        assert (found >= set(ctx.stage.valid.position)) == valid and not found & set(ctx.stage.test.position)


def test_ader_refuses_by_name(context: Any) -> None:
    for model, settings in (("BPR", {}), ("SASRec", {"loss_type": "BPR"})):
        ctx = context(model, 0, **settings)
        with pytest.raises(ConfigError, match=f"ADER cannot serve the model {model}: it distils a softmax"):
            make("ADER").check(ctx.config, ctx.model)
    ctx = context("SASRec")
    for parameters, told in (({"selection": "best"}, "ader_selection: 'best'"), ({"memory_size": 0}, "memory_size: 0")):
        with pytest.raises(ConfigError, match=told):
            make("ADER", **parameters).check(ctx.config, ctx.model)


# -- ERFreq -------------------------------------------------------------------------------------------------------


def test_alias_table_holds_the_weights() -> None:
    rng = np.random.default_rng(0)
    for weights in (rng.pareto(0.7, 300), np.r_[np.zeros(20), rng.random(7)], np.ones(3), np.array([5.0])):
        table = AliasTable(weights)
        chance = table.keep.copy()
        np.add.at(chance, table.alias, 1 - table.keep)
        assert np.allclose(chance / len(weights), weights / weights.sum(), atol=1e-12)
    weights = np.array([0.0, 1.0, 2.0, 5.0, 12.0])
    counts = np.bincount(AliasTable(weights).draw(20_000, rng), minlength=5)
    assert counts[0] == 0 and chisquare(counts[1:], 1000 * weights[1:]).pvalue > 0.001


def test_er_freq_weights_by_hand(context: Any) -> None:
    """Memory: users 1 1 1 2 3, items 4 5 4 4 6. New targets: user 1 once, user 2 three times, of 4."""
    ctx = context("BPR", 1)
    columns = {"user_id": torch.tensor([1, 1, 1, 2, 3]), "item_id": torch.tensor([4, 5, 4, 4, 6])}
    new = ctx.stage.train[np.arange(4)]
    new = replace(new, user=np.array([2, 1, 2, 2]))
    fake = SimpleNamespace(stage=SimpleNamespace(train=new), batcher=ctx.batcher)

    def weights(**parameters: Any) -> list[float]:
        strategy = make("ERFreq", **parameters)
        strategy.memory.columns = columns
        found: list[float] = (strategy.weights(fake) / strategy.weights(fake).sum()).tolist()
        return found

    assert weights() == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3])
    assert weights(weighting="proportional") == pytest.approx([3 / 11, 3 / 11, 3 / 11, 1 / 11, 1 / 11])
    # user 1: 1/3 * (1/4) / (3/5) = 5/36; user 2: 1 * (3/4) / (1/5) = 135/36; user 3: 0
    assert weights(weighting="adaptive") == pytest.approx(np.array([5, 5, 5, 135, 0]) / 150)
    assert weights(degree="item") == pytest.approx(np.array([1 / 3, 1, 1 / 3, 1 / 3, 1]) / 3)
    fake.stage.train = replace(new, user=np.array([7, 7, 8, 9]))
    assert weights(weighting="adaptive") == weights()


@pytest.mark.parametrize("weighting", ["inverse", "proportional", "adaptive"])
def test_er_freq_draws_by_weight_and_makes_one_table_a_stage(
    context: Any, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = AliasTable.__init__
    monkeypatch.setattr(AliasTable, "__init__", lambda self, w: (made.append(len(w)), original(self, w))[1])
    strategy = make("ERFreq", memory_size=40, batch_size=20, weighting=weighting)
    strategy.end_stage(context("BPR", 0))
    ctx = context("BPR", 1)
    counts, order = np.zeros(40), np.argsort(strategy.memory.columns["_position"].numpy())
    held = strategy.memory.columns["_position"].numpy()[order]
    for _ in range(500):
        drawn = strategy.draw(ctx)
        assert len(drawn) == 20
        np.add.at(counts, order[np.searchsorted(held, drawn["_position"].numpy())], 1)
    expected = strategy.weights(ctx) / strategy.weights(ctx).sum() * counts.sum()
    seen = expected > 0
    assert made == [40] and not counts[~seen].any()
    assert chisquare(counts[seen], expected[seen]).pvalue > 0.001
    batch = next(iter(ctx.loader))
    assert len(strategy.augment_batch(ctx, batch)) == len(batch) + 20


def test_er_freq_refuses_a_weighting_that_does_not_exist(context: Any) -> None:
    ctx = context("BPR")
    with pytest.raises(ConfigError, match="er_freq_weighting: 'log' is none of inverse, proportional, adaptive"):
        make("ERFreq", weighting="log").check(ctx.config, ctx.model)


# -- INFER --------------------------------------------------------------------------------------------------------


def row_gradient(ctx: StageContext, row: Interaction) -> dict[str, torch.Tensor]:
    ctx.model.zero_grad()
    loss = ctx.model.per_sample_loss(row) if hasattr(ctx.model, "per_sample_loss") else ctx.model.calculate_loss(row)
    loss.sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in ctx.parameters().items()}


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BPR", "NeuMF"])
def test_influence_is_a_product_of_plain_gradients(context: Any, model: str) -> None:
    ctx = context(model, 1)
    batch = ctx.loader.make(np.arange(12))
    ctx.model.eval()
    each = [row_gradient(ctx, batch[[n]]) for n in range(len(batch))]
    mean = {name: torch.stack([g[name] for g in each[:5]]).mean(0) for name in each[0]}
    expected = torch.stack([sum((mean[name] * g[name]).sum() for name in mean) for g in each])  # type: ignore[misc]
    ctx.model.zero_grad()
    ctx.model.train()
    state = torch.get_rng_state()
    found = mean_gradient(ctx.model, batch[list(range(5))], ctx.parameters())
    for name, value in mean.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
    assert torch.allclose(products(ctx.model, batch, mean, ctx.parameters()), expected, rtol=1e-3, atol=1e-6)
    assert float(expected.abs().max()) > 1e-3
    assert ctx.model.training and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in ctx.model.parameters())


def test_influence_does_not_depend_on_graphs_drawn_before(context: Any) -> None:
    """SGL's loss reads two graphs that its ``train()`` draws: a resumed run has other ones when a stage ends."""
    ctx = context("SGL", 1)
    batch, found = ctx.loader.make(np.arange(6)), []
    for _ in range(2):
        ctx.model.train()
        direction = mean_gradient(ctx.model, batch, ctx.parameters())
        found.append(products(ctx.model, batch, direction, ctx.parameters()))
    assert torch.equal(*found) and bool(found[0].any())


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_influence_is_what_a_small_step_does(context: Any, model: str) -> None:
    """The measured fall of the reference loss after a step of 1e-3 on a sample is the score."""
    ctx = context(model, 1)
    ctx.model.double().eval()
    batch = ctx.loader.make(np.arange(14))
    reference = batch[list(range(8, 14))]

    of_row = ctx.model.per_sample_loss if model == "SASRec" else ctx.model.calculate_loss

    def loss() -> float:
        with torch.no_grad():
            return float(torch.stack([of_row(reference[[n]]).sum() for n in range(len(reference))]).mean())

    direction = mean_gradient(ctx.model, reference, ctx.parameters())
    scores = 1e-3 * products(ctx.model, batch, direction, ctx.parameters())
    for n in (0, 3, 9):
        step = row_gradient(ctx, batch[[n]])
        start = loss()
        with torch.no_grad():
            for name, p in ctx.parameters().items():
                p -= 1e-3 * step[name]
        fall = start - loss()
        with torch.no_grad():
            for name, p in ctx.parameters().items():
                p += 1e-3 * step[name]
        assert fall == pytest.approx(float(scores[n]), rel=0.05, abs=1e-9)


def unit_positions(ctx: StageContext) -> list[int]:
    """The positions by which the rows of all of a stage's targets or windows are known."""
    units = ctx.loader.units
    found: list[int] = build_rows(ctx, units, np.arange(ctx.loader.size))["_position"].tolist()
    return found


@pytest.mark.parametrize("model", ["SASRec", "BPR", "NeuMF"])
def test_infer_keeps_the_best_scored(context: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = make("INFER", memory_size=15, samples=50, reference=20)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    original = type(strategy).scores

    def look(member: Any, ctx: StageContext, rows: Interaction, reference: Interaction) -> np.ndarray:
        found: np.ndarray = original(member, ctx, rows, reference)
        assert len(found) == len(rows) and len(reference) == (10 if ctx.index == 0 else 20)
        told = set(reference["_position"].tolist())
        held, stage = set(member.memory.columns.get("_position", torch.empty(0)).tolist()), set(unit_positions(ctx))
        assert not held & stage and told <= held | stage
        # Half of what is to be kept are exemplars (none in the first stage), half the new stage's, each row once.
        assert (len(told & held), len(told & stage)) == (10 if ctx.index else 0, 10)
        seen.append((rows["_position"].numpy(), found))
        return found

    monkeypatch.setattr(type(strategy), "scores", look)
    for index in (0, 1):
        ctx = context(model, index)
        held = strategy.memory.columns["_position"].tolist() if index else []
        strategy.end_stage(ctx)
        position, score = seen[-1]
        best = position[np.argsort(-score)[:15]]
        assert sorted(strategy.memory.columns["_position"].tolist()) == sorted(best.tolist())
        assert position[: len(held)].tolist() == held
    assert not any(name.startswith("neg_") for name in strategy.memory.columns)
    batch = next(iter(ctx.loader))
    assert len(strategy.augment_batch(ctx, batch)) > len(batch)


# -- ReLoop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["NeuMF", "DeepFM"])
def test_reloop_terms_by_hand(context: Any, model: str) -> None:
    ctx = context(model, 1)
    teacher, stage = ctx.previous_model, ctx.stream.stages[0]
    batch = ctx.loader.make(np.arange(len(ctx.stage.train))[::3])
    ctx.model.eval()
    terms = make("ReLoop", alpha=0.3).loss_terms(ctx, batch)
    correction, entropy, unknown = 0.0, 0.0, 0
    for n in range(len(batch)):
        row = batch[[n]]
        if int(row["user_id"]) >= stage.n_users or int(row["item_id"]) >= stage.n_items:
            unknown += 1
            continue
        with torch.no_grad():
            p, last, y = float(ctx.model.predict(row)), float(teacher.predict(row)), float(row["label"])
        correction += max(last - p, 0.0) if y == 1 else max(p - last, 0.0)
        entropy -= math.log(p) if y == 1 else math.log(1 - p)
    assert unknown and correction > 0
    size = len(batch)
    assert float(terms["ReLoop/correction"].detach()) == pytest.approx(0.3 * correction / size, rel=1e-4)
    assert float(terms["ReLoop/entropy"].detach()) == pytest.approx(-0.3 * entropy / size, rel=1e-4)
    assert make("ReLoop").loss_terms(context(model, 0), batch) == {}


def test_reloop_at_one_leaves_the_correction_alone(context: Any) -> None:
    """alpha 1, all rows known to the old model: data loss and terms add up to R, and so do their gradients."""
    ctx = context("NeuMF", 1)
    stage, batch = ctx.stream.stages[0], ctx.loader.make(np.arange(60))
    keep = (batch["user_id"] < stage.n_users) & (batch["item_id"] < stage.n_items)
    batch = batch[keep]
    terms = make("ReLoop", alpha=1.0).loss_terms(ctx, batch)
    (ctx.model.calculate_loss(batch) + sum(terms.values())).backward()
    found = {n: p.grad.clone() for n, p in ctx.parameters().items()}
    ctx.model.zero_grad()
    p, last, y = ctx.model.predict(batch), ctx.previous_model.predict(batch), batch["label"]
    (y * (last - p).clamp(min=0) + (1 - y) * (p - last).clamp(min=0)).mean().backward()
    for name, parameter in ctx.parameters().items():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("model", ["SASRec", "BPR", "ConvNCF"])
def test_reloop_refuses_by_name(context: Any, model: str) -> None:
    ctx = context(model)
    with pytest.raises(ConfigError, match=f"ReLoop cannot serve the model {model}"):
        Composite([make("ReLoop")]).check(ctx.config, ctx.model)
    with pytest.raises(ConfigError, match=r"reloop_alpha: 1\.5"):
        make("ReLoop", alpha=1.5).check(ctx.config, ctx.model)


# -- ReLoop2 ------------------------------------------------------------------------------------------------------


def test_error_memory_is_a_dictionary_of_lists() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, held = ErrorMemory(3, 5), {}
    users, items = torch.randn(40, 4, generator=generator), torch.randn(25, 6, generator=generator)
    cu, ci = memory.codes(users, "user", 1), memory.codes(items, "item", 1)
    assert cu.shape == (40, 3) and int(cu.max()) < 4 and int(ci.max()) < 8 and len(ci.unique()) > 4
    assert torch.equal(cu, memory.codes(users * 8, "user", 1))  # only the direction counts; a power of two is exact
    assert not torch.equal(cu, memory.codes(users, "user", 2))
    grid = torch.randn(10, 25, generator=generator)
    memory.write_grid(cu[:10], ci, grid)
    pairs = torch.randint(0, 25, (30,), generator=generator)
    errors = torch.randn(30, generator=generator)
    memory.write(cu[10:], ci[pairs], errors)
    told = [(u, i, float(grid[u, i])) for u in range(10) for i in range(25)]
    told += [(10 + n, int(pairs[n]), float(errors[n])) for n in range(30)]
    for u, i, error in told:
        for k in range(3):
            held.setdefault((k, int(cu[u, k]), int(ci[i, k])), []).append(error)
    read = memory.read_grid(cu, ci)
    for u in range(40):
        for i in range(25):
            found = [np.mean(held.get((k, int(cu[u, k]), int(ci[i, k])), [0.0])) for k in range(3)]
            assert float(read[u, i]) == pytest.approx(np.mean(found), abs=1e-5)
    assert torch.allclose(memory.read(cu[:25], ci).float(), read[:25].diagonal(), atol=1e-6)
    memory.clear()
    assert not memory.read_grid(cu, ci).any()


def test_codes_agree_as_often_as_angles_are_small() -> None:
    """One plane separates two vectors with probability angle / pi."""
    memory = ErrorMemory(4000, 2)
    for angle in (0.3, 1.0, 2.0):
        pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        one, two = memory.codes(pair, "item", 0)
        assert float((one != two).float().mean()) == pytest.approx(angle / math.pi, abs=0.03)


@pytest.mark.parametrize("observed", ["valid", "train", "both"])
def test_reloop2_holds_errors_of_observed_targets_only(
    context: Any, observed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, seen = context("NeuMF", 1), []
    strategy = make("ReLoop2", observed=observed, bits=6, arrays=2)
    original = OwnRows.complete
    monkeypatch.setattr(OwnRows, "complete", lambda own, rows: (seen.append(rows["_position"]), original(own, rows))[1])
    strategy.end_stage(ctx)
    position = torch.cat(seen)
    parts = {"valid": [ctx.stage.valid], "train": [ctx.stage.train], "both": [ctx.stage.train, ctx.stage.valid]}
    asked = np.concatenate([t.position for t in parts[observed]])
    assert (position.diff() > 0).all() and set(position.tolist()) <= set(asked)
    assert len(position) > 0.8 * len(asked) and not set(position.tolist()) & set(ctx.stage.test.position)
    assert int(strategy.memory.counts[0].sum()) == 2 * len(position)  # a negative for each
    strategy.begin_stage(ctx)
    assert not strategy.memory.counts.any()


def test_reloop2_corrects_probabilities_of_a_label(context: Any) -> None:
    ctx = context("NeuMF", 1)
    strategy = make("ReLoop2", bits=4, arrays=2, **{"lambda": 0.8})
    ctx.model.eval()
    strategy.end_stage(ctx)
    batch = ctx.batcher.rows(ctx.stage.test[np.arange(9)], evaluation=True)
    scores = torch.rand(9, ctx.stage.n_items)
    scores[2, 5] = -torch.inf
    found = strategy.adjust_scores(ctx, batch, scores)
    model, memory = ctx.model, strategy.memory
    users = torch.cat([model.user_mf_embedding.weight, model.user_mlp_embedding.weight], 1)[batch["user_id"]]
    items = torch.cat([model.item_mf_embedding.weight, model.item_mlp_embedding.weight], 1)
    cu, ci = memory.codes(users, "user", ctx.config["seed"]), memory.codes(items, "item", ctx.config["seed"])
    for b, i in ((0, 1), (2, 5), (3, 7), (8, 20)):
        sums = [memory.sums[k, cu[b, k], ci[i, k]] / max(memory.counts[k, cu[b, k], ci[i, k]], 1) for k in range(2)]
        expected = min(max(float(scores[b, i]) + 0.8 * float(sum(sums)) / 2, 0), 1)
        assert float(found[b, i]) == pytest.approx(expected if b != 2 else -math.inf, abs=1e-5)
    own = strategy.adjust_scores(ctx, batch, scores[torch.arange(9), batch["item_id"]])
    assert torch.allclose(own, found[torch.arange(9), batch["item_id"]], atol=1e-6)
    strategy.params["lambda"] = 0.0
    assert torch.equal(strategy.adjust_scores(ctx, batch, scores), scores)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_reloop2_corrects_a_softmax(context: Any, model: str) -> None:
    ctx = context(model, 1)
    strategy = make("ReLoop2", bits=4, arrays=1, **{"lambda": 1.0})
    strategy.end_stage(ctx)
    ctx.model.eval()
    n_items, memory = ctx.stage.n_items, strategy.memory
    known = [n for n in range(len(ctx.stage.valid)) if max(history(ctx, ctx.stage.valid, n)) < n_items]
    known = [n for n in known if ctx.stage.valid.label[n] < n_items and ctx.stage.valid.user[n] < ctx.stage.n_users]
    sums, counts = torch.zeros(4, 4), torch.zeros(4, 4)
    ci = memory.codes(ctx.model.item_embedding.weight, "item", ctx.config["seed"])[:, 0]
    for n in known:
        hidden = after(ctx.model, history(ctx, ctx.stage.valid, n)).detach()
        error = -(ctx.model.item_embedding.weight[1:] @ hidden).softmax(0).detach()
        error[ctx.stage.valid.label[n] - 1] += 1
        cu = int(memory.codes(hidden[None], "user", ctx.config["seed"])[0, 0])
        for i in range(1, n_items):
            sums[cu, ci[i]] += error[i - 1]
            counts[cu, ci[i]] += 1
    assert torch.equal(counts.double(), memory.counts[0])
    assert torch.allclose(sums.double(), memory.sums[0], atol=1e-4)
    batch = ctx.batcher.rows(ctx.stage.train[np.arange(5)])
    scores = ctx.model.full_sort_predict(batch).detach()
    scores[1, 4] = -torch.inf
    found = strategy.adjust_scores(ctx, batch, scores.clone())
    real = scores.clone()
    real[:, 0] = -torch.inf
    base, mean = real.softmax(1), sums / counts.clamp(min=1)
    cu = memory.codes(ctx.model.user_representation(batch), "user", ctx.config["seed"])[:, 0]
    expected = torch.maximum((base + mean[cu][:, ci]).clamp(max=1), base.clamp(max=1e-12))
    total = real.logsumexp(1, keepdim=True)
    checked = torch.isfinite(real)
    assert torch.allclose((found - total).exp()[checked], expected[checked], atol=1e-5)
    assert not torch.isfinite(found[1, 4]) and torch.equal(found[:, 0], scores[:, 0])
    assert not torch.equal(found, scores)
    strategy.params["lambda"] = 0.0
    assert torch.equal(strategy.adjust_scores(ctx, batch, scores), scores)
    strategy.params["lambda"] = 1.0
    memory.clear()
    assert torch.equal(strategy.adjust_scores(ctx, batch, scores), scores)  # an empty memory corrects nothing


@pytest.mark.parametrize("model", ["BPR", "DMF", "DIN"])
def test_reloop2_refuses_by_name(context: Any, model: str) -> None:
    ctx = context(model)
    with pytest.raises(ConfigError, match=f"ReLoop2 cannot serve the model {model}: it corrects probabilities"):
        make("ReLoop2").check(ctx.config, ctx.model)
    for parameters, told in (({"bits": 1}, "reloop2_bits: 1"), ({"observed": "test"}, "reloop2_observed: 'test'")):
        with pytest.raises(ConfigError, match=told):
            make("ReLoop2", **parameters).check(ctx.config, ctx.model)


@pytest.mark.parametrize("model", ["FM", "DeepFM"])
def test_reloop2_reads_the_rows_of_context_models(context: Any, model: str) -> None:
    ctx = context(model, 1)
    strategy = make("ReLoop2", bits=4)
    strategy.check(ctx.config, ctx.model)
    ctx.model.eval()
    rows = ctx.batcher.rows(ctx.stage.train[np.arange(6)])
    fields = ctx.model.token_field_names
    embedded = ctx.model.embed_token_fields(torch.stack([rows[name] for name in fields], dim=1))
    users = strategy.memory.codes(embedded[:, fields.index("user_id")], "user", ctx.config["seed"])
    items = strategy.memory.codes(embedded[:, fields.index("item_id")], "item", ctx.config["seed"])
    assert torch.equal(strategy._users(ctx, rows), users)
    assert torch.equal(strategy._items(ctx)[rows["item_id"]], items)


# -- composition --------------------------------------------------------------------------------------------------


def test_two_replays_are_refused_and_the_loops_compose(context: Any) -> None:
    for one in ("ERRandom", "ERFreq", "INFER"):
        with pytest.raises(ConfigError, match="are both a replay; keep one of them"):
            Composite([make("ADER"), make(one)])
    ctx = context("NeuMF", 1)
    both = Composite([make("ERFreq", memory_size=30, batch_size=8), make("ReLoop"), make("ReLoop2")])
    both.check(ctx.config, ctx.model)
    replay, loop, _ = both.members
    replay.end_stage(context("NeuMF", 0))
    batch = replay.augment_batch(ctx, ctx.loader.make(np.arange(10)))
    assert len(batch) == 2 * (10 + 4) and loop.loss_terms(ctx, batch)["ReLoop/correction"].requires_grad


def test_item_logits_are_full_sort_predictions(context: Any) -> None:
    ctx = context("SASRec", 1)
    ctx.model.eval()
    rows = ctx.batcher.rows(ctx.stage.train[np.arange(9)])
    found = item_logits(ctx.model, rows, ctx.stage.n_items)
    assert torch.allclose(found, ctx.model.full_sort_predict(rows)[:, 1:], atol=1e-5)


def test_reloop2_corrects_labelled_values(toy: PlantedDrift, tmp_path: Path) -> None:
    """Value metrics (AUC, log loss) are taken of the corrected probabilities, those of validation of the base's own."""
    found = []
    for number, strategy in enumerate(
        ("FineTune", {"ReLoop2": {"lambda": 0.0}}, {"ReLoop2": {"lambda": 1.0, "bits": 4}})
    ):
        given = {
            **toy.settings(),
            **SMALL,
            "strategy": strategy,
            "output_dir": str(tmp_path / str(number)),
            "epochs": 1,
        }
        given |= {"metrics": ["AUC", "LogLoss"], "valid_metric": "AUC", "learning_rate": 0.02, "show_progress": False}
        config = CLConfig(model="DeepFM", dataset=toy.name, config_dict=given)
        config["saved"] = False
        runner = Runner(config)
        runner.run()
        found.append(runner)
    records = [runner.records for runner in found]
    assert records[0] == records[1] and records[0] != records[2]
    valid = [[point["valid"] for point in runner.journal.curves] for runner in found]
    assert valid[0] == valid[1] == valid[2]


def test_the_protocol_of_the_page_is_aders(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "strategies" / "ADER.md").read_text(encoding="utf-8")
    given = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    header = "session_id:token\titem_id:token\ttimestamp:float\tperiod:float\n"
    (tmp_path / "diginetica-weeks").mkdir()
    rows = "".join(f"s{n // 4}\ti{n % 7}\t{1000 * (n // 80) + n}\t{n // 80}\n" for n in range(240))
    (tmp_path / "diginetica-weeks" / "diginetica-weeks.inter").write_text(header + rows, encoding="utf-8")
    config = CLConfig(model="SASRec", dataset="diginetica-weeks", config_dict={**given, "data_path": str(tmp_path)})
    assert dict(config.strategy_specs())["ADER"] == {**make("ADER").params, "valid": True}
    stream = build_stream(config)
    assert [stage.name for stage in stream.stages] == ["period 0", "period 1"]
    first = stream.stages[0]
    assert set(first.test.position) == set(stream.stages[1].train.position) | set(stream.stages[1].valid.position)
    assert len(first.valid) == pytest.approx(0.1 * (len(first.train) + len(first.valid)), abs=1)
