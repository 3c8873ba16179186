"""Sums of per-sample gradients from activations against gradients that autograd forms one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from run_helpers import bare_context
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from recbole_cl.model.capabilities import capabilities
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.mas import sensitivities
from recbole_cl.strategy.parts import per_sample_gradients as per_sample
from recbole_cl.strategy.parts.importance import Objective, mean_of_gradients, squared_gradients
from recbole_cl.stream.loader import make_loader
from recbole_cl.testing import PlantedDrift, write_planted_drift

SMALL = {
    "embedding_size": 8, "hidden_size": 8, "inner_size": 16, "n_layers": 2, "n_heads": 2, "MAX_ITEM_LIST_LENGTH": 10,
    "mlp_hidden_size": [16, 8], "num_layers": 1,
}  # fmt: skip
PAIRS = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def context(toy: PlantedDrift) -> Callable[..., StageContext]:
    """Returns the context of the first stage with a fresh model, its weights away from zero."""

    def context(model: str, **settings: Any) -> StageContext:
        ctx = bare_context(toy, model, 0, **{**SMALL, **settings})
        for p in ctx.model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return ctx

    return context


def rows(ctx: StageContext) -> Interaction:
    """Rows of the training loader; in long enough histories the third item is the first one again."""
    loader = make_loader(ctx, ctx.stage.train, "test")
    batch = loader.make(np.arange(loader.size)[:: max(loader.size // 24, 1)])
    if "item_id_list" in batch:
        sequence = batch["item_id_list"]
        again = sequence[:, 2] > 0
        assert again.any()
        sequence[again, 2] = sequence[again, 0]
    return batch


def by_vmap(model: nn.Module, batch: Interaction) -> dict[str, torch.Tensor]:
    """The mean of squared gradients by ``vmap(grad)`` over the rows, in float64 sums."""

    def loss(parameters: dict[str, torch.Tensor], row: dict[str, torch.Tensor]) -> torch.Tensor:
        one = Interaction({name: column.unsqueeze(0) for name, column in row.items()})
        name = "per_sample_loss" if "per_sample_loss" in capabilities(model) else "calculate_loss"
        return functional_call(_Call(model, name), {f"model.{k}": v for k, v in parameters.items()}, (one,)).sum()

    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, dict(batch.interaction))
    model.train()
    return {name: g.double().square().mean(dim=0) for name, g in found.items()}


class _Call(nn.Module):
    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, batch: Interaction) -> torch.Tensor:
        out: torch.Tensor = getattr(self.model, self.name)(batch)
        return out


def by_loop(model: nn.Module, batch: Interaction) -> dict[str, torch.Tensor]:
    """The same by one backward pass a row, for recurrent layers, which ``vmap`` refuses."""
    model.eval()
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for n in range(len(batch)):
        found = torch.autograd.grad(model.calculate_loss(batch[[n]]), list(model.parameters()))  # type: ignore
        for total, g in zip(sums.values(), found, strict=True):
            total += g.double().square() / len(batch)
    model.train()
    return sums


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(float(value.max()) for value in expected.values())
    assert found.keys() == expected.keys() and largest > 0
    for name, value in expected.items():
        # A bias of attention keys has no gradient but rounding: softmax does not see a shift.
        near = 1e-6 * float(value.max()) + 1e-12 * largest
        assert torch.allclose(found[name].double(), value, rtol=1e-5, atol=near), name


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("BPR", {}),
        ("SASRec", {}),
        ("SASRec", PAIRS),
        ("SASRec", {"train_positions": "last"}),
        ("SASRec", {"train_positions": "last", **PAIRS}),
        ("GRU4Rec", {}),
        ("GRU4Rec", {"num_layers": 2, "train_positions": "last"}),
        ("DeepFM", {}),
        ("FM", {}),
        ("NeuMF", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "default",
)
def test_fisher_is_that_of_vmap(
    context: Any, model: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Within 1e-5, with items that come twice in a window, a tied softmax, and a table of fields with offsets."""
    ctx = context(model, **settings)
    batch = rows(ctx)
    with caplog.at_level(logging.DEBUG, "recbole_cl"):
        found = squared_gradients(ctx.model, [batch])
    assert caplog.messages == [f"per-sample gradients of {model}: from activations"]
    expected = (by_loop if model == "GRU4Rec" else by_vmap)(ctx.model, batch)
    close(found, expected)
    close(squared_gradients(ctx.model, [batch], chunk=7), expected)
    assert all(p.requires_grad for p in ctx.model.parameters())


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BPR"])
def test_absolute_values_take_the_same_path(context: Any, model: str, caplog: pytest.LogCaptureFixture) -> None:
    """MAS: the loop of its golden test is the reference; here it is that the fast path serves it."""
    ctx = context(model)
    batch = rows(ctx)
    with caplog.at_level(logging.DEBUG, "recbole_cl"):
        found = sensitivities(ctx.model, [batch], ctx.parameters())
    assert caplog.messages == [f"per-sample gradients of {model}: from activations"]
    assert sum(float(value.sum()) for value in found.values()) > 0


def test_models_without_rules_fall_back(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    """LightGCN concatenates its tables and propagates them: no use that has a rule, so gradients are formed whole."""
    ctx = context("LightGCN")
    batch = rows(ctx)
    with caplog.at_level(logging.DEBUG, "recbole_cl"):
        found = squared_gradients(ctx.model, [batch])
    assert caplog.messages == ["per-sample gradients of LightGCN: formed whole (Refused: cat of a parameter)"]
    assert float(found["user_embedding.weight"].sum()) > 0


def test_a_wrong_rule_is_noticed(
    context: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that a sample read twice are added unmerged: the probe sees it, and the answer is still right."""

    def unmerged(self: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.arange(self.ids.numel()) // self.ids.shape[1], self.ids.flatten(), self.rows.flatten(0, 1)

    ctx = context("SASRec", **PAIRS)
    batch = rows(ctx)
    monkeypatch.setattr(per_sample._Gradients, "_merged", unmerged)
    with caplog.at_level(logging.DEBUG, "recbole_cl"):
        found = squared_gradients(ctx.model, [batch])
    told = "per-sample gradients of SASRec: formed whole (item_embedding.weight: other values than plain"
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(told)
    close(found, by_vmap(ctx.model, batch))


# -- every rule, in float64 ---------------------------------------------------------------------------------------


class Uses(nn.Module):
    """All ways of using a parameter that have a rule, some of them twice for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Embedding(5, 4)
        self.popularity = nn.Parameter(torch.randn(7))
        self.inner = nn.Linear(4, 4)
        self.once = nn.Linear(4, 3, bias=False)
        self.square = nn.Parameter(torch.randn(4, 4))
        self.gain, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1))
        self.norm, self.batch_norm = nn.LayerNorm(4), nn.BatchNorm1d(4)
        self.gru = nn.GRU(4, 4, num_layers=2, batch_first=True)
        self.late = nn.GRU(4, 4, bias=False)
        self.double()
        self.batch_norm.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, batch: Interaction) -> torch.Tensor:
        ids, label = batch["ids"], batch["label"]  # [1, 5], [1]
        x = self.table(ids) + self.places(torch.arange(5))
        x = self.norm(x @ self.square) * self.gain + self.shift
        x = self.gru(torch.tanh(self.inner(x)))[0]
        x = self.late(x.transpose(0, 1))[0].transpose(0, 1)
        last = self.batch_norm(self.inner(x[:, -1]))
        if batch["tied"].dim():  # always: the same code in all rows
            scores = last @ self.table.weight.T + torch.matmul(last, self.table.weight.transpose(0, 1)) * 0.5
        scores = scores + self.popularity
        extra = (self.table.weight[label] * last).sum(-1) + self.popularity[label] + self.once(last).square().sum(-1)
        return F.cross_entropy(scores, label) + extra.sum()


class _Plain(Objective):
    def of(self, batch: Interaction) -> torch.Tensor:
        out: torch.Tensor = self.model(batch)
        return out


@pytest.mark.parametrize("reduce", [torch.square, torch.abs])
def test_every_rule_is_exact(reduce: Callable[[torch.Tensor], torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    model, n = Uses(), 12
    batch = Interaction({"ids": torch.randint(0, 7, (n, 5)), "label": torch.randint(1, 7, (n,)), "tied": torch.ones(n)})
    assert (batch["ids"] == 0).any() and any(len(set(row.tolist())) < 5 for row in batch["ids"])
    with caplog.at_level(logging.DEBUG, "recbole_cl"):
        found = mean_of_gradients(_Plain(model), [batch], dict(model.named_parameters()), reduce)
    assert caplog.messages == ["per-sample gradients of Uses: from activations"]
    model.eval()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(n):
        gradients = torch.autograd.grad(model(batch[[i]]), list(model.parameters()))
        for total, g in zip(expected.values(), gradients, strict=True):
            total += reduce(g) / n
    for name, value in expected.items():
        assert float(value.abs().sum()) > 0, name
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-14), name


def test_factors_of_a_tied_table_are_exact(caplog: pytest.LogCaptureFixture) -> None:
    """One position: ``f(R)^T f(H)`` with the entries of rows that were also read taken out and added whole."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3).double()

        def forward(self, batch: Interaction) -> torch.Tensor:
            hidden = torch.tanh(self.table(batch["ids"]).sum(1))
            return F.cross_entropy(hidden @ self.table.weight.T, batch["label"])

    model = Tied()
    batch = Interaction({"ids": torch.tensor([[1, 2, 1], [3, 3, 3], [5, 4, 0]]), "label": torch.tensor([1, 2, 0])})
    with caplog.at_level(logging.DEBUG, "recbole_cl"):
        found = mean_of_gradients(_Plain(model), [batch], dict(model.named_parameters()), torch.square)["table.weight"]
    assert caplog.messages == ["per-sample gradients of Tied: from activations"]
    rows = [torch.autograd.grad(model(batch[[i]]), [model.table.weight])[0] for i in range(3)]
    assert torch.allclose(found, torch.stack(rows).square().mean(0), rtol=1e-10)


def test_what_couples_samples_or_has_no_rule_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how, self.w = how, nn.Parameter(torch.ones(2, 2))

        def forward(self, row: Any) -> torch.Tensor:
            x = row["x"].unsqueeze(0)
            if self.how == "batch":
                return F.batch_norm(torch.cat([x, -x]), None, None, self.w[0], None, True).sum()
            if self.how == "slice":
                return (x @ self.w[:1].T).sum()
            if self.how == "norm":
                return x.sum() * self.w.norm()
            return (self.w @ self.w).sum() * x.sum()

    for how in ("batch", "slice", "norm", "itself"):
        model = Odd(how)
        with pytest.raises(per_sample.Refused):
            per_sample.PerSample(model, dict(model.named_parameters()), torch.square, {"x": torch.ones(2)})


# -- models that PyTorch's functional call, or a batch of one row, does not suit ------------------------------------


class Twice(nn.Module):
    """One module under two names, one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.alias, self.other.weight = self.first, self.first.weight

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        return self.other(self.alias(batch["x"]).tanh()).square().sum(-1).mean()


class Squeezing(nn.Module):
    """Squeezes a batch of one row away, as DSSM does; some rows have no loss, as BERT4Rec's without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        if batch["x"].size(0) == 1:
            raise ValueError("Target size must be the same as input size")
        told = (batch["x"][:, 0] > 0).float()
        return (self.linear(batch["x"]).squeeze(-1).square() * told).sum() / told.sum()


def one_by_one(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        loss = model.calculate_loss(Interaction({"x": torch.stack([row, row])}))
        if torch.isfinite(loss):
            for (_, value), g in zip(total.items(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                value += g.square() / len(x)
    return total


@pytest.mark.parametrize("model", [Twice, Squeezing])
@pytest.mark.parametrize("fast", [True, False])
def test_shared_modules_single_rows_and_rows_without_a_loss(model: type[nn.Module], fast: bool) -> None:
    torch.manual_seed(0)
    net, x = model(), torch.randn(12, 3)
    assert (x[:, 0] <= 0).any() and (x[:, 0] > 0).any()
    before = [p.clone() for p in net.parameters()]
    found = squared_gradients(net, [Interaction({"x": x})], fast=fast)
    for p, was in zip(net.parameters(), before, strict=True):  # and still real tensors, with a storage
        assert p.data_ptr() and torch.equal(p, was)
    for name, value in one_by_one(net, x).items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8)


def test_importance_does_not_depend_on_graphs_drawn_before(context: Callable[..., StageContext]) -> None:
    """SGL's loss reads two graphs that its ``train()`` draws: a resumed run has other ones when a stage ends."""
    ctx = context("SGL")
    ctx.model.train()
    batch, state = rows(ctx), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first = squared_gradients(ctx.model, [batch])
    ctx.model.train()  # draws from the global generator
    assert not np.array_equal(np.random.get_state()[1], state) and ctx.model.training  # type: ignore[index]
    for name, second in squared_gradients(ctx.model, [batch]).items():
        assert torch.equal(first[name], second), name
