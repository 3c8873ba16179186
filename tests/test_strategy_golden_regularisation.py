"""OnlineEWC, MAS, LwF and PersonalizedImitation against values computed by hand, by autograd or in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from run_helpers import bare_context
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.mas import sensitivities
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.vocabulary import Growth, item_axis
from recbole_cl.testing import PlantedDrift, write_planted_drift

SMALL = {
    "embedding_size": 8, "hidden_size": 8, "inner_size": 16, "n_layers": 1, "n_heads": 2, "MAX_ITEM_LIST_LENGTH": 10,
    "mlp_hidden_size": [16, 8], "num_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def context(toy: PlantedDrift) -> Callable[..., StageContext]:
    """Returns the context of a stage with a fresh model, and a fresh model of the stage before as its previous one."""
    return lambda model, index=0, **more: bare_context(toy, model, index, **{**SMALL, **more})


def toy_context(module: nn.Module) -> Any:
    """A context around a plain module, for strategies that need no data."""
    parameters = dict(module.named_parameters())
    found = SimpleNamespace(model=module, parameters=lambda: parameters, terms={}, step=0, epoch=0, pass_=Pass())
    found.log = lambda name, value: found.terms.__setitem__(name, [float(value), 1.0])
    return found


class Point(nn.Module):
    """One parameter and nothing else."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))


def first_batch(ctx: StageContext, size: int = 24) -> Interaction:
    return make_loader(ctx, ctx.stage.train, "test").make(np.arange(size))


# -- OnlineEWC ----------------------------------------------------------------------------------------------------


def test_online_ewc_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """F_1 = (2, 0), F_2 = (3, 2), gamma = 0.5: F = (4, 2); anchor theta_2 = (2, -1); theta = (4, 1), lambda = 0.5.

    Penalty 0.25 * (4*4 + 2*4) = 6; gradient 0.5 * (4*2, 2*2) = (4, 2).
    """
    strategy, point = strategies.get("OnlineEWC")({"lambda": 0.5, "gamma": 0.5, "samples": None}), Point([1.0, 5.0])
    ctx = toy_context(point)
    for fisher, theta in (([2.0, 0.0], [1.0, 5.0]), ([3.0, 2.0], [2.0, -1.0])):
        monkeypatch.setattr("recbole_cl.strategy.ewc.stage_importance", lambda *_, f=fisher: {"theta": torch.tensor(f)})
        point.theta.data = torch.tensor(theta)
        strategy.end_stage(ctx)
    assert strategy.importance["theta"].tolist() == [4.0, 2.0]
    with torch.no_grad():
        point.theta += 2.0  # in place: an anchor that is a view would move along
    assert float(strategy.penalty(ctx)) == pytest.approx(6.0)
    strategy.add_gradients(ctx)
    assert torch.allclose(point.theta.grad, torch.tensor([4.0, 2.0]))
    assert ctx.terms["OnlineEWC/penalty"][0] == pytest.approx(6.0)
    strategy.grow(Growth((2, 2), (2, 3), {"theta": [item_axis()]}))
    assert strategy.importance["theta"].tolist() == [4.0, 2.0, 0.0]


def test_online_ewc_refuses_a_gamma_that_makes_no_sense(context: Any) -> None:
    ctx = context("BPR")
    for parameters, told in (({"gamma": 1.5}, "online_ewc_gamma: 1.5"), ({"samples": 0}, "online_ewc_samples: 0")):
        strategy = strategies.get("OnlineEWC")({"lambda": 1.0, "gamma": 1.0, "samples": None, **parameters})
        with pytest.raises(ConfigError, match=told):
            strategy.check(ctx.config, ctx.model)


# -- MAS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "NARM", "BPR", "LightGCN"])
def test_mas_sensitivities_are_those_of_a_plain_loop(context: Any, model: str) -> None:
    """The definition: one sample, one backward pass of the squared norm, absolute values added up."""
    ctx = context(model)
    batch, net = first_batch(ctx), ctx.model
    net.eval()
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.named_parameters()}
    for n in range(len(batch)):
        row = batch[[n]]
        if model == "BPR":
            vector = net.user_embedding.weight[row["user_id"]]
        elif model == "LightGCN":
            vector = net()[0][row["user_id"]]
        else:
            vector = net(row[net.ITEM_SEQ], row[net.ITEM_SEQ_LEN])
        net.zero_grad()
        (vector**2).sum().backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad.double().abs() / len(batch)
    net.zero_grad()
    net.train()
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    largest = max(float(v.max()) for v in expected.values())
    assert largest > 0
    for parts in ([batch], [batch[list(range(10))], batch[list(range(10, len(batch)))]]):
        found = sensitivities(net, parts, ctx.parameters())
        for name, value in expected.items():
            assert torch.allclose(found[name].double(), value, rtol=1e-4, atol=1e-6 * largest), name
    assert [m.training for m in net.modules()] == modes and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_mas_on_bpr_in_closed_form(context: Any) -> None:
    """d ||e_u||^2 / d e_u = 2 e_u, so Omega of a user's row is 2 |e_u| times the user's share of the targets."""
    ctx = context("BPR")
    strategy = strategies.get("MAS")({"lambda": 1.0, "alpha": 0.25, "samples": None})
    strategy.end_stage(ctx)
    users = ctx.stage.train.user
    share = torch.from_numpy(np.bincount(users, minlength=ctx.stage.n_users) / len(users)).float()
    first = 2 * ctx.model.user_embedding.weight.detach().abs() * share[:, None]
    assert torch.allclose(strategy.importance["user_embedding.weight"], first, rtol=1e-5)
    assert not strategy.importance["item_embedding.weight"].any()
    with torch.no_grad():
        ctx.model.user_embedding.weight *= 3  # the next stage's end, on the same users
    drift = ctx.model.user_embedding.weight.detach() * 2 / 3  # the anchor is a copy: it did not move along
    expected = float((first * drift.square()).sum())
    assert expected > 0 and float(strategy.penalty(ctx)) == pytest.approx(expected, rel=1e-4)
    strategy.end_stage(ctx)
    assert torch.allclose(strategy.importance["user_embedding.weight"], (0.25 + 0.75 * 3) * first, rtol=1e-5)


def test_mas_term_by_hand() -> None:
    """Omega = (4, 2), anchor (1, 5), theta (2, 3), lambda = 0.5: penalty 0.5 * (4 + 8) = 6, gradient (4, -4)."""
    strategy, point = strategies.get("MAS")({"lambda": 0.5, "alpha": 0.5, "samples": None}), Point([2.0, 3.0])
    ctx = toy_context(point)
    strategy.importance, strategy.anchor = {"theta": torch.tensor([4.0, 2.0])}, {"theta": torch.tensor([1.0, 5.0])}
    strategy.add_gradients(ctx)
    assert torch.allclose(point.theta.grad, torch.tensor([4.0, -4.0]))
    assert float(strategy.penalty(ctx)) == pytest.approx(6.0)


def test_mas_refuses_by_name(context: Any) -> None:
    ctx = context("NeuMF")
    strategy = strategies.get("MAS")({"lambda": 1.0, "alpha": 0.5, "samples": None})
    with pytest.raises(ConfigError, match="MAS cannot serve the model NeuMF, which gives no user representation"):
        strategy.check(ctx.config, ctx.model)
    for parameters, told in (({"alpha": 2}, "mas_alpha: 2"), ({"samples": 0}, "mas_samples: 0")):
        with pytest.raises(ConfigError, match=told):
            member = strategies.get("MAS")({"lambda": 1.0, "alpha": 0.5, "samples": None, **parameters})
            member.check(ctx.config, context("BPR").model)


# -- LwF ----------------------------------------------------------------------------------------------------------


def lwf(ctx: StageContext, batch: Interaction, **parameters: Any) -> torch.Tensor:
    """The term of a model without dropout, lambda 1, T 2."""
    ctx.model.eval()
    strategy = strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0, **parameters})
    term: torch.Tensor = strategy.loss_terms(ctx, batch)["LwF/distillation"]
    return term


def row_by_row(ctx: StageContext, history: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Vectors of the old and the new model after a history, the old one's without items it does not know."""
    old_items = ctx.previous_model.n_items  # type: ignore[union-attr]
    vectors = []
    for model, items in ((ctx.previous_model, [i for i in history if i < old_items]), (ctx.model, history)):
        if not items:
            return None
        padded = torch.tensor([items[-10:] + [0] * (10 - len(items[-10:]))])
        vectors.append(model(padded, torch.tensor([min(len(items), 10)]))[0])  # type: ignore[misc]
    return vectors[0], vectors[1]


def kl_at_2(ctx: StageContext, vectors: tuple[torch.Tensor, torch.Tensor]) -> float:
    n = ctx.previous_model.n_items  # type: ignore[union-attr]
    old = torch.softmax(vectors[0] @ ctx.previous_model.item_embedding.weight[1:n].T / 2, 0)  # type: ignore
    new = torch.softmax(vectors[1] @ ctx.model.item_embedding.weight[1:n].T / 2, 0)
    return 4 * float((old * (old.log() - new.log())).sum())


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
@pytest.mark.parametrize("train", ["all", "last"])
def test_lwf_softmax_is_a_plain_loop(context: Any, model: str, train: str) -> None:
    ctx = context(model, 1, train_positions=train, hidden_dropout_prob=0.0, attn_dropout_prob=0.0, dropout_prob=0.0)
    for p in (*ctx.previous_model.parameters(), *ctx.model.parameters()):
        p.data *= 3  # away from uniform answers
    loader = make_loader(ctx, ctx.stage.train, "test")
    batch = loader.make(np.arange(loader.size)[:: 1 if train == "all" else 3])
    sequence, expected, closed, left_out = batch["item_id_list"], [], 0, 0
    for n in range(len(batch)):
        ends = (
            [j + 1 for j in range(sequence.size(1)) if batch["_targets"][n, j] > 0]
            if train == "all"
            else [int(batch["item_length"][n])]
        )
        for end in ends:
            history = sequence[n, :end].tolist()
            vectors = row_by_row(ctx, history)
            closed += max(history) >= ctx.previous_model.n_items
            left_out += vectors is None
            if vectors is not None:
                expected.append(kl_at_2(ctx, vectors))
    assert closed and left_out and len(expected) > 10
    term = lwf(ctx, batch)
    assert float(term) == pytest.approx(np.mean(expected), rel=1e-4) and float(term) > 1e-3
    term.backward()
    gradient = ctx.model.item_embedding.weight.grad
    assert gradient is not None and gradient[1:].abs().sum() > 0
    assert all(p.grad is None for p in ctx.previous_model.parameters())


def bce(new: float, old: float) -> float:
    p, q = 1 / (1 + np.exp(-old)), 1 / (1 + np.exp(-new))
    return float(-(p * np.log(q) + (1 - p) * np.log(1 - q)))


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "NeuMF", "DeepFM", "DIN"])
def test_lwf_pairs_are_a_plain_loop(context: Any, model: str) -> None:
    ctx = context(model, 1, dropout_prob=0.0)
    ctx.model.eval()
    loader = make_loader(ctx, ctx.stage.train, "test")
    batch, before, expected, unknown = loader.make(np.arange(loader.size)), ctx.stream.stages[0], [], 0
    for n in range(0, len(batch), 7):
        for field in ("item_id", "neg_item_id"):
            if field not in batch:
                continue
            row = batch[[n]]
            row.interaction["item_id"] = row[field]
            if model == "DIN" and (row["item_id_list"] >= before.n_items).any():
                continue
            if int(row["user_id"]) >= before.n_users or int(row[field]) >= before.n_items:
                unknown += 1
                continue
            scores = [float(net.predict(row)) for net in (ctx.model, ctx.previous_model)]
            if "neg_item_id" not in batch:
                scores = [float(np.log(p / (1 - p))) for p in scores]
            expected.append(bce(*scores))
    assert unknown and len(expected) > 5
    picked = list(range(0, len(batch), 7))
    if model == "DIN":
        picked = [n for n in picked if (batch["item_id_list"][n] < before.n_items).all()]
    assert float(lwf(ctx, batch[picked])) == pytest.approx(np.mean(expected), rel=1e-4)


def test_lwf_pairs_of_windows_are_a_plain_loop(context: Any) -> None:
    negatives = {"distribution": "uniform", "sample_num": 1}
    settings = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    ctx = context("SASRec", 1, loss_type="BPR", train_neg_sample_args=negatives, **settings)
    ctx.model.eval()
    loader = make_loader(ctx, ctx.stage.train, "test")
    batch, expected = loader.make(np.arange(loader.size)), []
    for n in range(len(batch)):
        for j in range(batch["item_id_list"].size(1)):
            vectors = row_by_row(ctx, batch["item_id_list"][n, : j + 1].tolist()) if batch["_targets"][n, j] else None
            for item in (batch["_targets"][n, j], batch["neg__targets"][n, j]) if vectors is not None else ():
                if item < ctx.previous_model.n_items:
                    old = float(vectors[0] @ ctx.previous_model.item_embedding.weight[item])
                    expected.append(bce(float(vectors[1] @ ctx.model.item_embedding.weight[item]), old))
    assert len(expected) > 10
    assert float(lwf(ctx, batch)) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("model", ["NARM", "BERT4Rec", "Caser"])
def test_lwf_serves_other_softmax_models(context: Any, model: str) -> None:
    ctx = context(model, 1)
    batch, _ = first_batch(ctx), ctx.previous_model  # made here: the fixture seeds the global generator
    ctx.model.train()
    state = torch.get_rng_state()
    term = strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0}).loss_terms(ctx, batch)["LwF/distillation"]
    assert torch.isfinite(term) and float(term.detach()) > 0
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in ctx.model.modules())


def test_lwf_without_a_teacher_and_with_an_equal_one(context: Any) -> None:
    first = context("SASRec", 0)
    strategy = strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0})
    assert strategy.loss_terms(first, first_batch(first)) == {}
    ctx = context("SASRec", 1)
    state = {k: v[: len(ctx.previous_model.state_dict()[k])] for k, v in ctx.model.state_dict().items()}
    ctx.previous_model.load_state_dict(state)
    batch = first_batch(ctx, 50)
    keep = [n for n in range(len(batch)) if int(batch["item_id_list"][n].max()) < ctx.previous_model.n_items]
    assert keep and float(lwf(ctx, batch[keep])) == pytest.approx(0.0, abs=1e-6)


def test_lwf_refuses_by_name(context: Any) -> None:
    ctx = context("FISM")
    strategy = strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0})
    with pytest.raises(ConfigError, match="LwF cannot serve the model FISM"):
        strategy.check(ctx.config, ctx.model)
    with pytest.raises(ConfigError, match="lwf_temperature: 0"):
        strategies.get("LwF")({"lambda": 1.0, "temperature": 0}).check(ctx.config, ctx.model)


# -- PersonalizedImitation ------------------------------------------------------------------------------------------


def piw(ctx: StageContext, **parameters: Any) -> Any:
    """The strategy with random parameters of its own."""
    strategy = strategies.get("PersonalizedImitation")(
        {"lambda": 0.5, "centers": 4, "cluster": 2.0, "hidden": 3, **parameters}
    )
    strategy.prepare_model(ctx)
    generator = torch.Generator().manual_seed(3)
    for p in strategy.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return strategy


def piw_weights(own: dict[str, np.ndarray], new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The formulas of one user after the other."""
    raw = []
    for both in zip(new, old, strict=True):
        g = []
        for e in both:
            logits = np.array([own["centers"][k] @ own["maps"][k] @ e for k in range(len(own["centers"]))])
            g.append(np.exp(logits) / np.exp(logits).sum())
        shift = (g[1] - g[0]) ** 2
        hidden = np.maximum(own["hidden_weight"] @ shift + own["hidden_bias"], 0)
        raw.append(np.log1p(np.exp(own["out_weight"][0] @ hidden + own["out_bias"][0])))
    return np.array(raw) / np.mean(raw)


@pytest.mark.parametrize("model", ["BPR", "LightGCN"])
def test_piw_is_a_plain_loop(context: Any, model: str) -> None:
    ctx = context(model, 1)
    teacher: Any = ctx.previous_model
    for p in (*teacher.parameters(), *ctx.model.parameters()):
        p.data *= 5
    strategy = piw(ctx)
    own = {name: value.double().numpy() for name, value in strategy.state_dict().items()}
    loader = make_loader(ctx, ctx.stage.train, "test")
    batch, n_users = loader.make(np.arange(loader.size)), ctx.stream.stages[0].n_users
    users = sorted({u for u in batch["user_id"].tolist() if u < n_users})
    assert 1 < len(users) < len(set(batch["user_id"].tolist())) < len(batch)
    items = sorted(set(batch["item_id"].tolist()))
    with torch.no_grad():
        if model == "BPR":
            tables = [net.user_embedding.weight for net in (ctx.model, teacher)] + [ctx.model.item_embedding.weight]
        else:
            tables = [ctx.model()[0], teacher()[0], ctx.model()[1]]
        new, old = tables[0][users].double().numpy(), tables[1][users].double().numpy()
        vectors = tables[2][items].double().numpy()
    weights = piw_weights(own, new, old)
    assert weights.std() > 0.01
    distillation = 0.5 * np.mean([w * ((a - b) ** 2).sum() for w, a, b in zip(weights, new, old, strict=True)])
    q = np.array([[1 / (1 + ((e - c) ** 2).sum()) for c in own["centers"]] for e in vectors])
    q /= q.sum(axis=1, keepdims=True)
    p = q**2 / q.sum(axis=0)
    p /= p.sum(axis=1, keepdims=True)
    clusters = 2.0 * np.mean([(a * np.log(a / b)).sum() for a, b in zip(p, q, strict=True)])
    terms = strategy.loss_terms(ctx, batch)
    assert float(terms["PersonalizedImitation/distillation"].detach()) == pytest.approx(distillation, rel=1e-4)
    assert float(terms["PersonalizedImitation/clusters"].detach()) == pytest.approx(clusters, rel=1e-4)
    terms["PersonalizedImitation/clusters"].backward(retain_graph=True)
    assert all(p.grad is None for p in ctx.model.parameters())  # the model is not drawn into clusters
    terms["PersonalizedImitation/distillation"].backward()
    if model == "BPR":  # weights are constants for the model: 2 * lambda / B * w_u (e_u - e_u_old)
        expected = 2 * 0.5 / len(users) * weights[:, None] * (new - old)
        found = ctx.model.user_embedding.weight.grad
        assert np.allclose(found[users].numpy(), expected, rtol=1e-4, atol=1e-6)
        assert not found[n_users:].any()


def test_piw_users_who_did_not_move_weigh_the_same(context: Any) -> None:
    strategy, e = piw(context("BPR", 1)), torch.randn(5, 8)
    assert torch.equal(strategy.weights(e, e), torch.ones(5))
    assert float(strategy.weights(e, 2 * e).mean()) == pytest.approx(1.0)


def test_piw_begins_the_same_and_draws_nothing(context: Any) -> None:
    state = torch.get_rng_state()
    ctx = context("NGCF", 1, hidden_size_list=[8], message_dropout=0.3)
    state, made = torch.get_rng_state(), []
    for _ in range(2):
        made.append(strategies.get("PersonalizedImitation")({"lambda": 1.0, "centers": 4, "cluster": 1.0, "hidden": 3}))
        made[-1].prepare_model(ctx)
    assert torch.equal(state, torch.get_rng_state())
    one, two = (strategy.state_dict() for strategy in made)
    assert all(torch.equal(one[name], two[name]) for name in one)
    kept = list(made[0].parameters())
    made[0].prepare_model(context("NGCF", 0, hidden_size_list=[8]))  # the model of the stage before is prepared too
    assert all(a is b for a, b in zip(kept, made[0].parameters(), strict=True))


@pytest.mark.parametrize("model", ["SASRec", "NeuMF"])
def test_piw_refuses_by_name(context: Any, model: str) -> None:
    ctx = context(model)
    with pytest.raises(ConfigError, match=f"PersonalizedImitation cannot serve the model {model}"):
        piw(ctx)
    with pytest.raises(ConfigError, match="piw_centers: 1 is too small"):
        piw(context("BPR"), centers=1)
