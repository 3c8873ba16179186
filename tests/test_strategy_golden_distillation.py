"""Contrastive, ContrastivePIW, PISA and CCD against plain loops and values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from run_helpers import bare_context

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.model.state import grow_model
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.parts.neighbours import draw_neighbours, past_pairs
from recbole_cl.strategy.parts.outputs import final, layers
from recbole_cl.strategy.parts.soft_labels import draw_soft_labels, soft_label_loss, soft_labels_of_all
from recbole_cl.strategy.pisa import cluster, distances, divergence, info_nce
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.vocabulary import Growth
from recbole_cl.testing import PlantedDrift, write_planted_drift
from recbole_cl.testing.comparing import assert_same
from recbole_cl.testing.contract import SMALL
from recbole_cl.training.runner import Runner

TOWERS = ["BPR", "LightGCN"]
DEFAULTS: dict[str, dict[str, Any]] = {
    "Contrastive": {"lambda": 0.5, "temperature": 0.7, "positives": 100, "negatives": None},
    "PISA": {"alpha": 0.5, "temperature": 0.5, "clusters": 4, "least": 0.2},
    "CCD": {
        "lambda": 0.5, "teacher_size": 6, "stability": 0.75, "plasticity": 0.25, "top": 8, "samples": 3,
        "sharpness": 2.0, "annealing": 4.0,
    },
}  # fmt: skip
DEFAULTS["ContrastivePIW"] = {**DEFAULTS["Contrastive"], "centers": 4, "cluster": 2.0, "hidden": 3}


def make(name: str, **parameters: Any) -> Any:
    return strategies.get(name)({**DEFAULTS[name], **parameters})


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"), n_users=16, n_items=16, length=4)


@pytest.fixture(scope="module")
def context(toy: PlantedDrift) -> Callable[..., StageContext]:
    """Returns the context of a stage with a fresh model, and another fresh one as its previous model."""
    return lambda model, index=1, **more: bare_context(toy, model, index, scale=3, **{**SMALL, **more})


def whole_batch(ctx: StageContext) -> Interaction:
    loader = make_loader(ctx, ctx.stage.train, "test")
    return loader.make(np.arange(loader.size))


def layers_by_hand(model: Any, pairs: set[tuple[int, int]], towers: Any = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tables and propagations with a dense normalised adjacency built pair by pair."""
    tables = towers or (model.user_embedding.weight, model.item_embedding.weight)
    users, items = (t.detach().double().numpy() for t in tables)
    found = [(users, items)]
    if type(model).__name__ == "BPR":
        return found
    adjacency = np.zeros((len(users), len(items)))
    for u, i in pairs:
        adjacency[u, i] = 1
    left = 1 / np.sqrt(np.maximum(adjacency.sum(1, keepdims=True), 1e-7))
    right = 1 / np.sqrt(np.maximum(adjacency.sum(0, keepdims=True), 1e-7))
    adjacency *= left * right
    for _ in range(model.n_layers):
        users, items = adjacency @ items, adjacency.T @ users
        found.append((users, items))
    return found


def pairs_until(ctx: StageContext, stage: int) -> set[tuple[int, int]]:
    found = set()
    for s in ctx.stream.stages[: stage + 1]:
        found |= set(zip(s.train.user.tolist(), s.train.label.tolist(), strict=True))
    return found


# -- layers and neighbours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TOWERS)
def test_layers_end_in_the_models_own_vectors(context: Any, model: str) -> None:
    ctx = context(model, n_layers=2)
    found = layers(ctx.model)
    assert len(found) == (1 if model == "BPR" else 3)
    for one, two in zip(found, layers_by_hand(ctx.model, pairs_until(ctx, 1)), strict=True):
        for side in (0, 1):
            assert np.allclose(one[side].detach().numpy(), two[side], atol=1e-4)
    users, items = final(found)
    batch = whole_batch(ctx)
    scores = (users[batch["user_id"]] * items[batch["item_id"]]).sum(-1)
    assert torch.allclose(scores, ctx.model.predict(batch), atol=1e-5)


def test_neighbours_are_drawn_from_the_past_only(context: Any) -> None:
    ctx = context("BPR", 2)
    users, items = past_pairs(ctx)
    past = set(zip(users.tolist(), items.tolist(), strict=True))
    assert past == pairs_until(ctx, 1) and len(past) == len(users)
    assert pairs_until(ctx, 2) - past
    n = ctx.stream.stages[1].n_users
    every = draw_neighbours(users, items, n, 100, np.random.default_rng(0))
    for user in range(n):
        drawn = every[user][every[user] > 0].tolist()
        assert sorted(drawn) == sorted(i for u, i in past if u == user)
    some, counts = draw_neighbours(users, items, n, 2, np.random.default_rng(0)), np.zeros(40)
    assert some.shape == (n, 2) and all((int(u), int(i)) in past for u in range(n) for i in some[u] if i > 0)
    anchors, others = np.array([3, 3, 3, 3, 1]), np.array([5, 6, 7, 8, 9])
    for seed in range(400):
        row = draw_neighbours(anchors, others, 4, 2, np.random.default_rng(seed))
        assert row[1].tolist() == [9, 0] and row[0].tolist() == [0, 0] and len(set(row[3].tolist())) == 2
        counts[row[3]] += 1
    assert np.allclose(counts[5:9] / 400, 0.5, atol=0.1)


# -- Contrastive ----------------------------------------------------------------------------------------------------


def contrast_by_hand(
    ctx: StageContext, batch: Interaction, t: float, weights: dict[int, float] | None = None
) -> tuple[float, int]:
    """The term with lambda 1, one anchor, neighbour and layer after the other; and how many anchors were left out."""
    before, past = ctx.stream.stages[ctx.index - 1], pairs_until(ctx, ctx.index - 1)
    old = layers_by_hand(ctx.previous_model, past)
    new = layers_by_hand(ctx.model, pairs_until(ctx, ctx.index))
    total, left_out = 0.0, 0
    for side, (field, n_others) in enumerate((("user_id", before.n_items), ("item_id", before.n_users))):
        neighbours: dict[int, list[int]] = {}
        for pair in past:
            neighbours.setdefault(pair[side], []).append(pair[1 - side])
        anchors = sorted(set(batch[field].tolist()))
        left_out += len([a for a in anchors if a not in neighbours])
        anchors = [a for a in anchors if a in neighbours]
        for o, z in zip(old, new, strict=True):
            each = []
            for a in anchors:
                exps = [math.exp(o[side][a] @ z[1 - side][j] / t) for j in range(1, n_others)]
                loss = -np.mean([math.log(exps[j - 1] / sum(exps)) for j in neighbours[a]])
                each.append(loss * (weights[a] if weights is not None and side == 0 else 1.0))
            total += float(np.mean(each)) / len(old)
    return total, left_out


@pytest.mark.parametrize("model", TOWERS)
def test_contrastive_is_a_plain_loop(context: Any, model: str) -> None:
    ctx = context(model, n_layers=2)
    batch = whole_batch(ctx)
    expected, left_out = contrast_by_hand(ctx, batch, 0.7)
    assert left_out, "new users and items are in the batch and must not count"
    term = make("Contrastive").loss_terms(ctx, batch)["Contrastive/distillation"]
    assert float(term.detach()) == pytest.approx(0.5 * expected, rel=1e-4) and expected > 0.1
    term.backward()
    before = ctx.stream.stages[0]
    for table, n in ((ctx.model.user_embedding, before.n_users), (ctx.model.item_embedding, before.n_items)):
        assert table.weight.grad[1:n].abs().sum() > 0
        if model == "BPR":  # new users and items are neither neighbours nor negatives
            assert not table.weight.grad[n:].any()
    assert all(p.grad is None for p in ctx.previous_model.parameters())


def test_contrastive_with_drawn_negatives_by_hand() -> None:
    """One anchor (1, 0), tau 1, items 1: (2, 0), 2: (0, 1), 3: (1, 1), 4: (-1, 0); C = {1, 3}.

    Neighbour 1 is in C: log(e^2 + e) - 2. Neighbour 2 is not: log(e^2 + e + 1) - 0.
    """
    strategy = make("Contrastive", temperature=1.0)
    new = torch.tensor([[9.0, 9.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    positives = torch.tensor([[1, 2, 0], [1, 0, 0]])
    found = strategy.contrast(torch.tensor([[1.0, 0.0]] * 2), positives, new, torch.tensor([1, 3]))
    one, two = math.log(math.e**2 + math.e) - 2, math.log(math.e**2 + math.e + 1)
    assert found.tolist() == pytest.approx([(one + two) / 2, one])
    huge = strategy.contrast(torch.tensor([[200.0, 0.0]]), positives[1:], new, torch.tensor([1, 3]))
    assert torch.isfinite(huge).all()  # exp(400) overflows, a logarithm of sums does not


def test_contrastive_draws_negatives_of_the_past(context: Any) -> None:
    ctx = context("BPR")
    strategy, n = make("Contrastive", negatives=5), ctx.stream.stages[0].n_items
    seen: set[int] = set()
    for _ in range(60):
        drawn = strategy.candidates(ctx, "users", n)
        assert len(set(drawn.tolist())) == 5
        seen |= set(drawn.tolist())
    assert seen == set(range(1, n))


def test_contrastive_draws_neighbours_anew_each_epoch_and_again_the_same(context: Any) -> None:
    ctx = context("BPR", 2)
    one = make("Contrastive", positives=2)
    first = one.neighbours(ctx)
    ctx.epoch = 1
    second = one.neighbours(ctx)
    assert not torch.equal(first[0], second[0]) or not torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(second, make("Contrastive", positives=2).neighbours(ctx), strict=True))


# -- ContrastivePIW -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TOWERS)
def test_contrastive_piw_is_a_plain_loop(context: Any, model: str) -> None:
    ctx = context(model, n_layers=2)
    batch, strategy = whole_batch(ctx), make("ContrastivePIW")
    strategy.prepare_model(ctx)
    generator = torch.Generator().manual_seed(3)
    for p in strategy.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    own = {name: value.double().numpy() for name, value in strategy.state_dict().items()}
    before = ctx.stream.stages[0].n_users
    users = [u for u in sorted(set(batch["user_id"].tolist())) if u < before]
    new = np.mean([z[0] for z in layers_by_hand(ctx.model, pairs_until(ctx, 1))], axis=0)
    old = np.mean([z[0] for z in layers_by_hand(ctx.previous_model, pairs_until(ctx, 0))], axis=0)
    raw = {}
    for u in users:
        g = []
        for e in (new[u], old[u]):
            logits = np.array([own["centers"][k] @ own["maps"][k] @ e for k in range(4)])
            g.append(np.exp(logits) / np.exp(logits).sum())
        hidden = np.maximum(own["hidden_weight"] @ (g[1] - g[0]) ** 2 + own["hidden_bias"], 0)
        raw[u] = float(np.log1p(np.exp(own["out_weight"][0] @ hidden + own["out_bias"][0])))
    weights = {u: value / np.mean(list(raw.values())) for u, value in raw.items()}
    assert np.std(list(weights.values())) > 0.001
    expected, _ = contrast_by_hand(ctx, batch, 0.7, weights)
    plain, _ = contrast_by_hand(ctx, batch, 0.7)
    terms = strategy.loss_terms(ctx, batch)
    found = float(terms["ContrastivePIW/distillation"].detach())
    assert found == pytest.approx(0.5 * expected, rel=1e-5) and abs(expected - plain) > 1e-4 * plain
    terms["ContrastivePIW/clusters"].backward(retain_graph=True)
    assert all(p.grad is None for p in ctx.model.parameters())  # the model is not drawn into clusters
    terms["ContrastivePIW/distillation"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in strategy.parameters())


# -- PISA -----------------------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    """JSD of (1, 0) and (1/2, 1/2): m = (3/4, 1/4); [log2(4/3) + (log2(2/3) + log2(2)) / 2] / 2 = 0.3113."""
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.3, 0.7], [0.5, 0.5]])
    q = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.3, 0.7], [1.0, 0.0]])
    by_hand = (math.log2(4 / 3) + (math.log2(2 / 3) + math.log2(2)) / 2) / 2
    assert by_hand == pytest.approx(0.31128, abs=1e-5)
    assert divergence(p, q).tolist() == pytest.approx([by_hand, 1.0, 0.0, by_hand], abs=1e-6)


def test_distances_to_clusters_by_hand() -> None:
    """Items 1 and 2 have the centre (1, 0), item 3 (0, 3): user 1 at (1, 3) is 3 and 1 away, user 2 at (1, 0) 0, 10^.5.

    Item 4 is new: it has no cluster and is not read.
    """
    items = torch.tensor([[7.0, 7.0], [0.0, 0.0], [2.0, 0.0], [0.0, 3.0], [50.0, 50.0]])
    users = torch.tensor([[0.0, 0.0], [1.0, 3.0], [1.0, 0.0], [9.0, 9.0]])
    found = distances((users, items), torch.tensor([4, 4, 2]), 3)
    expected = []
    for near in ((1.0, 3.0), (10**0.5, 0.0)):  # cluster 2 (item 3) comes first
        e = [math.exp(-near[0]), math.exp(-near[1])]
        expected.append([e[0] / sum(e), e[1] / sum(e)])
    assert found.shape == (3, 2)
    assert found[1:].flatten().tolist() == pytest.approx([x for row in expected for x in row], abs=1e-5)


def test_clusters_find_planted_groups_and_draw_from_their_generator() -> None:
    centers = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    planted = torch.arange(60) % 3
    items = centers[planted] + 0.1 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"]
    found = cluster(items, 3, np.random.default_rng(0))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state(legacy=False)["state"]["pos"]
    assert {tuple(found[planted == k].unique().tolist()) for k in range(3)} == {(0,), (1,), (2,)}
    assert torch.equal(found, cluster(items, 3, np.random.default_rng(0)))
    assert cluster(items[:2], 20, np.random.default_rng(0)).sort().values.tolist() == [0, 1]


def test_weights_at_the_extremes() -> None:
    """J = 0 gives L, the largest J gives 1 - L, half of it a half; the padding row does not count."""
    j = torch.tensor([0.9, 0.0, 0.2, 0.4])
    assert make("PISA").weigh(j)[1:].tolist() == pytest.approx([0.2, 0.5, 0.8])
    assert make("PISA", least=0.0).weigh(j)[1:].tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert make("PISA").weigh(torch.zeros(4)).tolist() == pytest.approx([0.2] * 4)  # nobody moved


def nce_by_hand(new: torch.Tensor, reference: torch.Tensor, t: float) -> list[float]:
    new_rows, rows = new.detach().double().numpy(), reference.detach().double().numpy()
    found = []
    for n, e in enumerate(new_rows):
        exps = [math.exp(e @ r / (np.linalg.norm(e) * np.linalg.norm(r)) / t) for r in rows]
        found.append(-math.log(exps[n] / sum(exps)))
    return found


@pytest.mark.parametrize("model", TOWERS)
def test_pisa_is_a_plain_loop_and_pulls_where_its_weights_say(context: Any, model: str) -> None:
    ctx = context(model)
    batch, strategy = whole_batch(ctx), make("PISA")
    ctx.pass_ = strategy.plan_stage(ctx)[1]
    assert strategy.loss_terms(ctx, batch) == {}  # without a forward model there is nothing to pull to
    n = ctx.stream.stages[0].n_users
    generator = torch.Generator().manual_seed(5)
    strategy.forward = torch.randn(ctx.stage.n_users, 8, generator=generator)
    users = [u for u in sorted(set(batch["user_id"].tolist())) if u < n]
    assert 1 < len(users) < len(set(batch["user_id"].tolist()))
    now, last = ctx.model.user_embedding.weight[users], ctx.previous_model.user_embedding.weight[users]
    ahead = nce_by_hand(now, strategy.forward[users], 0.5)
    back = nce_by_hand(now, last, 0.5)
    for shift in (torch.zeros(n), torch.ones(n), torch.rand(n, generator=generator)):
        strategy.shift = shift
        terms = {name: float(term.detach()) for name, term in strategy.loss_terms(ctx, batch).items()}
        w = shift[users].tolist()
        assert terms["PISA/plasticity"] == pytest.approx(0.5 * np.mean(np.multiply(w, ahead)), rel=1e-4)
        assert terms["PISA/stability"] == pytest.approx(0.5 * np.mean(np.subtract(1, w) * back), rel=1e-4)
    # Gradients: with w = 1 a step of descent nears the forward rows, with w = 0 the old ones.
    for value, goal in ((1.0, strategy.forward[users]), (0.0, last)):
        strategy.shift = torch.full((n,), value)
        ctx.model.zero_grad()
        sum(strategy.loss_terms(ctx, batch).values()).backward()
        with torch.no_grad():
            step = now - 0.1 * ctx.model.user_embedding.weight.grad[users]
            assert info_nce(step, goal, 0.5).mean() < info_nce(now, goal, 0.5).mean()
        assert not ctx.model.user_embedding.weight.grad[n:].any()
    assert all(p.grad is None for p in ctx.previous_model.parameters())


@pytest.mark.parametrize("model", TOWERS)
def test_pisa_measures_the_shift_between_old_and_forward_model(context: Any, model: str) -> None:
    ctx = context(model)
    strategy = make("PISA")
    strategy.end_pass(ctx)
    assert strategy.shift is None  # not the forward pass
    ctx.pass_ = strategy.plan_stage(ctx)[0]
    assert strategy.loss_terms(ctx, whole_batch(ctx)) == {}
    teacher, n = ctx.previous_model, ctx.stream.stages[0].n_users
    still = 3
    if model == "BPR":  # a model in which only other users moved
        with torch.no_grad():
            ctx.model.item_embedding.weight[: len(teacher.item_embedding.weight)] = teacher.item_embedding.weight
            ctx.model.user_embedding.weight[still] = teacher.user_embedding.weight[still]
    strategy.end_pass(ctx)
    assert torch.equal(strategy.forward, ctx.model.user_embedding.weight)
    with torch.no_grad():
        ctx.model.user_embedding.weight += 1
    assert not torch.equal(strategy.forward, ctx.model.user_embedding.weight)  # a copy, no view
    with torch.no_grad():
        ctx.model.user_embedding.weight -= 1
    old = [np.mean([z[side] for z in layers_by_hand(teacher, pairs_until(ctx, 0))], axis=0) for side in (0, 1)]
    new = [np.mean([z[side] for z in layers_by_hand(ctx.model, pairs_until(ctx, 1))], axis=0) for side in (0, 1)]
    labels = cluster(torch.from_numpy(old[1][1:]), 4, context(model).generator("PISA/clusters")).numpy()
    j = []
    for u in range(1, n):
        both = []
        for users, items in (old, new):
            gaps = []
            for k in range(4):
                members = [items[i + 1] for i in range(len(labels)) if labels[i] == k]
                gaps.append(np.linalg.norm(users[u] - np.mean(members, axis=0)))
            e = np.exp(-np.array(gaps))
            both.append(e / e.sum())
        m = (both[0] + both[1]) / 2
        j.append(sum(float((p * np.log2(p / m)).sum()) for p in both) / 2)
    expected = [0.2 + 0.6 * value / max(j) for value in j]
    assert strategy.shift[1:].tolist() == pytest.approx(expected, abs=1e-3)
    assert np.std(expected) > 0.05
    if model == "BPR":
        assert float(strategy.shift[still]) == pytest.approx(0.2, abs=1e-3)


class Aside(Strategy):
    """A pass beside FineTune's, and nothing else; it takes part in steps."""

    neutral = {}
    stop: bool = False

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass("forward", auxiliary=True), Pass(init="stage_start")]

    def after_step(self, ctx: StageContext) -> None:
        if type(self).stop and ctx.index == 1 and ctx.pass_.name == "forward" and ctx.step == 4:
            raise KeyboardInterrupt


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategy of the test is known to the registry there only."""
    strategies.names()
    for name in ("_members", "_names"):
        monkeypatch.setattr(strategies, name, dict(getattr(strategies, name)))
    strategies.register()(Aside)


@pytest.mark.usefixtures("lent")
def test_an_auxiliary_pass_leaves_no_trace(toy: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under dropout and carried moments the second pass has FineTune's bits, also where the first one broke off.

    Growing draws here, as it does in models that grow in place: a resumed stage does not grow again.
    """

    def drawing(*args: Any) -> Any:
        torch.rand(3)
        return grow_model(*args)

    monkeypatch.setattr("recbole_cl.training.stage_models.grow_model", drawing)

    def runner(strategy: str, folder: str, **settings: Any) -> Runner:
        given = {**SMALL, **toy.settings(), "strategy": strategy, "output_dir": str(tmp_path / folder)}
        given |= {"stage_optimizer": "carry", "epochs": 1, "train_batch_size": 8, **settings}
        return Runner(CLConfig(model="SASRec", dataset=toy.name, config_dict=given))

    plain, aside = runner("FineTune", "plain"), runner("Aside", "aside")
    plain.run()
    aside.run()
    assert_same(plain.model.state_dict(), aside.model.state_dict())
    passes = [(point["stage"], point["pass"]) for point in aside.journal.curves]
    assert passes == [(s, name) for s in range(3) for name in ("forward", "train")]
    monkeypatch.setattr(Aside, "stop", True)
    with pytest.raises(KeyboardInterrupt):
        runner("Aside", "broken", checkpoint_steps=2).run()
    monkeypatch.setattr(Aside, "stop", False)
    again = runner("Aside", "broken", checkpoint_steps=2, resume=True)
    again.run()
    assert_same(plain.model.state_dict(), again.model.state_dict())


# -- CCD ------------------------------------------------------------------------------------------------------------


def test_soft_labels_prefer_what_the_learner_ranks_low() -> None:
    """Source ranks items 1, 2, 3 first; the learner's ranks of them are 4, 0 and 3 of I = 5.

    Chances of one draw ~ exp(s (r_learner - r_source) / 5), s = 5: exp(4 - 0), exp(0 - 1), exp(3 - 2).
    """
    source = torch.tensor([[-7.0, 3.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    learner = torch.tensor([[8.0, -9.0, 9.0, 4.0, 5.0]]).repeat(4000, 1)
    items, labels = draw_soft_labels(source, learner, 3, 1, 5.0, np.random.default_rng(0))
    chances = np.exp([4.0, -1.0, 1.0]) / np.exp([4.0, -1.0, 1.0]).sum()
    counts = np.bincount(items.flatten(), minlength=5)
    assert counts[0] == counts[4] == 0 and counts.sum() == 4000
    assert np.allclose(counts[1:4] / 4000, chances, atol=0.01)
    assert torch.equal(labels, torch.sigmoid(source.gather(1, items)))
    even = draw_soft_labels(source, learner, 3, 1, 0.0, np.random.default_rng(0))[0]
    assert np.allclose(np.bincount(even.flatten(), minlength=5)[1:4] / 4000, 1 / 3, atol=0.03)
    both = draw_soft_labels(source, learner, 3, 2, 1.0, np.random.default_rng(0))[0]
    assert (both[:, 0] != both[:, 1]).all()


def test_soft_labels_leave_out_what_a_user_had_and_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    towers = [(torch.randn(3, 4, generator=generator), torch.randn(7, 4, generator=generator)) for _ in range(3)]
    seen = torch.tensor([1, 1, 2, 2, 2, 2]), torch.tensor([3, 6, 1, 2, 4, 6])  # item 6 is new
    items, labels = soft_labels_of_all(towers[:2], towers[2], seen, (3, 6), (50, 4, 1.0), np.random.default_rng(0))
    assert items.shape == labels.shape == (3, 8)
    assert sorted(items[1, :4].tolist()) == [1, 2, 4, 5] == sorted(items[1, 4:].tolist())
    assert sorted(items[2, :4].tolist()) == [0, 0, 3, 5]  # two are left
    for u in (1, 2):
        for at, item in enumerate(items[u].tolist()):
            users, vectors = towers[at // 4]
            expected = 1 / (1 + math.exp(-float(users[u] @ vectors[item]))) if item else 0.0
            assert float(labels[u, at]) == pytest.approx(expected, abs=1e-6)


def test_soft_label_loss_is_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    users, vectors = torch.randn(4, 3, generator=generator), torch.randn(6, 3, generator=generator)
    ids, items = torch.tensor([1, 3]), torch.tensor([[2, 5, 0], [4, 0, 0]])
    labels = torch.tensor([[0.9, 0.2, 0.0], [0.5, 0.0, 0.0]])
    each = []
    for u, row, told in zip(ids, items, labels, strict=True):
        for i, y in zip(row, told, strict=True):
            if i:
                p = 1 / (1 + math.exp(-float(users[u] @ vectors[i])))
                each.append(-float(y) * math.log(p) - (1 - float(y)) * math.log(1 - p))
    assert len(each) == 3
    assert float(soft_label_loss((users, vectors), ids, items, labels)) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("model", TOWERS)
def test_ccd_terms_are_plain_loops(context: Any, model: str) -> None:
    first, ctx = context(model, 0, n_layers=2), context(model, 1, n_layers=2)
    strategy = make("CCD")
    strategy.prepare_model(first)
    assert list(strategy.loss_terms(first, whole_batch(first))) == ["CCD/teacher"]  # there is no past
    strategy.end_stage(first)
    strategy.grow(Growth((first.stage.n_users, ctx.stage.n_users), (first.stage.n_items, ctx.stage.n_items)))
    for p in strategy.parameters():
        p.data *= 3
    batch, pairs, ctx.epoch = whole_batch(ctx), pairs_until(ctx, 1), 2
    terms = strategy.loss_terms(ctx, batch)
    hand = layers_by_hand(ctx.model, pairs, (strategy.teacher["users"], strategy.teacher["items"]))
    teacher = [np.mean([z[side] for z in hand], axis=0) for side in (0, 1)]
    student = [np.mean([z[side] for z in layers_by_hand(ctx.model, pairs)], axis=0) for side in (0, 1)]
    rows = zip(*(batch[field].tolist() for field in ("user_id", "item_id", "neg_item_id")), strict=True)
    bpr = [math.log(1 + math.exp(-(teacher[0][u] @ (teacher[1][i] - teacher[1][j])))) for u, i, j in rows]
    strength, replay = 0.5 * math.exp(-2 / 4), {}
    for name, towers in (("student", student), ("teacher", teacher)):
        each = []
        for u in sorted({u for u in batch["user_id"].tolist() if u < first.stage.n_users}):
            drawn = strategy.soft_labels[name]
            for i, y in zip(drawn["items"][u].tolist(), drawn["labels"][u].tolist(), strict=True):
                assert (u, i) not in pairs and i < first.stage.n_items
                if i:
                    p = 1 / (1 + math.exp(-(towers[0][u] @ towers[1][i])))
                    each.append(-y * math.log(p) - (1 - y) * math.log(1 - p))
        assert len(each) > 50
        replay[name] = strength * np.mean(each)
    assert float(terms["CCD/teacher"].detach()) == pytest.approx(np.mean(bpr) + replay["teacher"], rel=1e-4)
    assert float(terms["CCD/replay"].detach()) == pytest.approx(replay["student"], rel=1e-4)
    terms["CCD/teacher"].backward(retain_graph=True)
    assert all(p.grad is None for p in ctx.model.parameters())  # the student is a source, it is not moved
    terms["CCD/replay"].backward()
    assert ctx.model.user_embedding.weight.grad.abs().sum() > 0


def test_ccd_proxies_and_growth_by_hand(context: Any) -> None:
    first, ctx = context("BPR", 0), context("BPR", 1)
    strategy = make("CCD")
    strategy.prepare_model(first)
    strategy.end_stage(first)
    before = {name: {side: t.clone() for side, t in proxy.items()} for name, proxy in strategy.proxies.items()}
    old_teacher, n = strategy.teacher["items"].detach().clone(), first.stage.n_items
    strategy.grow(Growth((first.stage.n_users, ctx.stage.n_users), (n, ctx.stage.n_items)))
    grown = strategy.teacher["items"].detach()
    assert grown.shape == (ctx.stage.n_items, 6) and torch.equal(grown[:n], old_teacher) and grown[n:].abs().min() > 0
    strategy.end_stage(ctx)
    now = ctx.model.item_embedding.weight.detach()
    for name, share in (("stability", 0.75), ("plasticity", 0.25)):
        found = strategy.proxies[name]["items"]
        assert torch.allclose(found[:n], share * before[name]["items"] + (1 - share) * now[:n])
        assert torch.equal(found[n:], now[n:]) and len(found) > n
    with torch.no_grad():
        ctx.model.item_embedding.weight += 1
    assert torch.equal(found[n:], now[n:] - 1) or not torch.equal(found[n:], now[n:])  # a copy, no view


def test_ccd_draws_soft_labels_once_an_epoch(context: Any) -> None:
    ctx = context("BPR")
    strategy = make("CCD")
    strategy.prepare_model(ctx)
    strategy.end_stage(context("BPR", 0))
    batch = whole_batch(ctx)
    strategy.loss_terms(ctx, batch)
    kept = strategy.soft_labels["student"]["items"]
    strategy.loss_terms(ctx, batch)
    assert strategy.soft_labels["student"]["items"] is kept
    ctx.epoch = 1
    strategy.loss_terms(ctx, batch)
    assert not torch.equal(strategy.soft_labels["student"]["items"], kept)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_other_models_are_refused_by_name(context: Any, name: str) -> None:
    for model in ("SASRec", "NeuMF", "NGCF"):
        ctx = context(model, 0, hidden_size_list=[8], mlp_hidden_size=[8])
        with pytest.raises(ConfigError, match=f"{name} cannot serve the model {model}.*BPR and LightGCN"):
            make(name).check(ctx.config, ctx.model)


@pytest.mark.parametrize(
    ("name", "parameters", "told"),
    [
        ("Contrastive", {"temperature": 0}, "contrastive_temperature: 0"),
        ("Contrastive", {"positives": 0}, "contrastive_positives: 0"),
        ("Contrastive", {"negatives": 0}, "contrastive_negatives: 0"),
        ("ContrastivePIW", {"temperature": -1}, "contrastive_piw_temperature: -1"),
        ("ContrastivePIW", {"centers": 1}, "contrastive_piw_centers: 1"),
        ("PISA", {"temperature": 0}, "pisa_temperature: 0"),
        ("PISA", {"clusters": 1}, "pisa_clusters: 1"),
        ("PISA", {"least": 0.6}, "pisa_least: 0.6"),
        ("CCD", {"samples": 0}, "ccd_samples: 0"),
        ("CCD", {"stability": 1.5}, "ccd_stability: 1.5"),
        ("CCD", {"annealing": 0}, "ccd_annealing: 0"),
    ],
)
def test_parameters_without_sense_are_refused(context: Any, name: str, parameters: dict[str, Any], told: str) -> None:
    ctx = context("BPR", 0)
    with pytest.raises(ConfigError, match=told):
        make(name, **parameters).check(ctx.config, ctx.model)
