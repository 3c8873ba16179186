"""Fewer operations, the same numbers: fused layers, the softmax loss, passes by length, shared prefixes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.model.layers import TransformerEncoder
from run_helpers import assert_same_ranking, configure, toy
from torch.nn import functional as F

from recbole_cl.evaluation.evaluator import Evaluator, Known
from recbole_cl.evaluation.scores import best
from recbole_cl.model import all_positions, fused
from recbole_cl.model.all_positions import AllPositions, _cuts, passes
from recbole_cl.model.prefixes import prefix_outputs
from recbole_cl.model.sasrec import SASRec
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.composite import Composite
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.training.runner import Runner


def made(tmp_path: Path, model: str = "SASRec", stage: int = 2, **settings: Any) -> tuple[Any, Any, Any, Batcher]:
    """A configuration, its stream, an initialised model in eval mode at a stage, and its batcher."""
    config = configure(toy(tmp_path), tmp_path / "run", model, **settings)
    stream = build_stream(config)
    view, known = stream.view(stage), stream.stages[stage]
    net: Any = Runner(config).build_model(view, ModelRandomness(1)).eval()
    for p in net.parameters():  # away from zero: what an initialisation of 0.02 leaves is hardly more than rounding
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return config, stream, net, Batcher(config, stream, view, known.n_users, known.n_items)


def ragged(net: Any, rows: int = 9, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded sequences of all lengths, and their lengths."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.arange(rows) % width + 1
    items = torch.randint(1, net.item_embedding.num_embeddings, (rows, width), generator=draw)
    return items * (torch.arange(width) < lengths.unsqueeze(1)), lengths


@pytest.mark.parametrize("act", ["gelu", "relu", "swish"])
def test_a_fused_layer_is_recboles(tmp_path: Path, act: str) -> None:
    _, _, net, _ = made(tmp_path, hidden_act=act, MAX_ITEM_LIST_LENGTH=7)
    items, lengths = ragged(net)
    real = torch.arange(7) < lengths.unsqueeze(1)
    hidden = net.LayerNorm(net.item_embedding(items) + net.position_embedding(torch.arange(7)))
    slow = net.trm_encoder(hidden, net.get_attention_mask(items))[-1]
    assert net._plain()
    torch.testing.assert_close(net.encode(items)[real], slow[real], rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # one position a row: the top layer alone is asked for less
        last = torch.arange(7) == lengths.unsqueeze(1) - 1
        torch.testing.assert_close(net.outputs(items, last), slow[last].detach(), rtol=1e-5, atol=1e-6)
        few = last | (torch.arange(7) == 0)
        torch.testing.assert_close(net.outputs_at(items, few), slow[few].detach(), rtol=1e-5, atol=1e-6)


def test_a_hooked_or_replaced_layer_is_called(tmp_path: Path) -> None:
    _, _, net, _ = made(tmp_path)
    items, lengths = ragged(net)
    seen: list[int] = []
    handle = net.trm_encoder.layer[0].feed_forward.register_forward_hook(lambda *_: seen.append(1))
    net.encode(items)
    handle.remove()
    net.encode(items)
    assert len(seen) == 1

    class Other(TransformerEncoder):
        pass

    net.trm_encoder.__class__ = Other
    assert not net._plain()
    last = torch.arange(7) == lengths.unsqueeze(1) - 1
    with torch.no_grad():
        assert torch.isfinite(net.outputs(items, last)).all()


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_passes_by_length_change_nothing(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, net, _ = made(tmp_path, model)
    items, lengths = ragged(net, 23)
    wanted = (torch.arange(7) < lengths.unsqueeze(1)) & (torch.rand(23, 7) < 0.7)
    wanted[4] = False
    whole = net.encode(items)[wanted]
    monkeypatch.setattr(all_positions, "PASS_OVERHEAD", {True: 0, False: 0})
    monkeypatch.setattr(all_positions, "INPUTS_AT_ONCE", {"cpu": 10})
    assert len(passes(wanted)) > 3
    torch.testing.assert_close(net.outputs(items, wanted), whole, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert len(passes(wanted)) > 7
        torch.testing.assert_close(net.outputs(items, wanted), whole.detach(), rtol=1e-5, atol=1e-6)
    rows = torch.cat([rows for rows, _ in passes(wanted)])
    assert sorted(rows.tolist()) == torch.nonzero(wanted.any(dim=1)).flatten().tolist()
    assert net.outputs(items, torch.zeros_like(wanted)).shape == (0, whole.size(1))


def test_cuts_cost_least() -> None:
    draw = np.random.default_rng(0)
    for overhead in (0, 5, 20, 1000):
        lengths = np.sort(draw.integers(1, 12, 9))[::-1].copy()

        def cost(cuts: Any, lengths: np.ndarray = lengths, overhead: int = overhead) -> int:
            return sum(overhead + part.max() * len(part) for part in np.split(lengths, list(cuts)))

        every = itertools.chain.from_iterable(itertools.combinations(range(1, 9), k) for k in range(9))
        assert cost(_cuts(lengths, overhead)) == min(cost(cuts) for cuts in every)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_shared_prefixes_score_as_one_by_one(tmp_path: Path, model: str) -> None:
    """Histories longer than the window, of several lengths, with items that the model has no row for."""
    _, stream, net, batcher = made(tmp_path, model, stage=0, MAX_ITEM_LIST_LENGTH=6)
    targets = stream.stages[-1].train
    length = targets.hi - targets.lo
    assert length.max() > 6 and len(np.unique(length)) > 3
    assert (stream.table.item >= batcher.n_items).any()
    rows = batcher.rows(targets, evaluation=True)
    told = rows["item_length"] > 0  # the others are misses whatever they score
    assert told.sum() > 100
    rows.interaction["item_length"] = rows["item_length"].clamp(min=1)
    with torch.no_grad():
        shared = net.item_scores(prefix_outputs(net, batcher, targets))
    slow = torch.cat([net.full_sort_predict(rows[[i]]).detach() for i in range(len(targets))])  # RecBole's own pass
    torch.testing.assert_close(shared[told], slow.view(shared.shape)[told], rtol=1e-5, atol=1e-6)


def test_metrics_are_those_without_sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, stream, net, batcher = made(tmp_path, MAX_ITEM_LIST_LENGTH=6)
    known = Known.everything(stream.table, batcher.n_users, batcher.n_items)
    ctx = Runner(config)
    ctx.begin(stream)
    stage = ctx.state.models.context(2, net, batcher.view)
    found = {}
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(type(net), "shares_prefixes", lambda _: False)
        calls: list[int] = []
        original = net.outputs_at
        monkeypatch.setattr(type(net), "outputs_at", lambda *a: (calls.append(len(a[1])), original(*a[1:]))[1])  # noqa: B023
        outcome = Evaluator(config, stream, Composite([])).evaluate(stage, known, stream.stages[2])
        found[shared] = outcome
        monkeypatch.undo()
        assert calls
    rows = batcher.rows(stream.stages[2].test, evaluation=True)
    assert_same_ranking(found[True], found[False], net.full_sort_predict(rows).detach())
    assert max(found[True].metrics.values())


def test_who_gives_scores_another_meaning_does_not_share(tmp_path: Path) -> None:
    _, _, net, _ = made(tmp_path)
    assert net.shares_prefixes()

    class Own(SASRec):
        def full_sort_predict(self, interaction: Any) -> torch.Tensor:
            return super().full_sort_predict(interaction) * 2

    class Inside(SASRec):
        def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
            return super().forward(item_seq, item_seq_len) + 1

    class Renamed(SASRec):
        pass

    for kind, shares in ((Own, False), (Inside, False), (Renamed, True)):
        other = copy.copy(net)
        other.__class__ = kind
        assert isinstance(other, AllPositions) and other.shares_prefixes() is shares


@pytest.fixture(params=["rows", "tiles"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small catalogues a few rows at a time, and as large ones by tiles, of which the last is not whole."""
    monkeypatch.setattr(fused, "TILED_FROM", 0 if request.param == "tiles" else 10**6)
    monkeypatch.setattr(fused, "TILE", (50, 16))
    return str(request.param)


@pytest.mark.parametrize("n", [1, 127, 300])
def test_softmax_loss(n: int, shape: str) -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(n, 5, generator=draw).requires_grad_()
    table = torch.randn(40, 5, generator=draw).requires_grad_()
    items = torch.randint(0, 40, (n,), generator=draw)
    ours, theirs = fused.softmax_loss(outputs, table, items), F.cross_entropy(outputs @ table.T, items)
    assert "SoftmaxLoss" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours, theirs)
    pairs = [torch.autograd.grad(3 * loss, (outputs, table)) for loss in (ours, theirs)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    second = []
    for loss in (fused.softmax_loss(outputs, table, items), F.cross_entropy(outputs @ table.T, items)):
        first = torch.autograd.grad(loss, (outputs, table), create_graph=True)
        second.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), (outputs, table)))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_softmax_loss_of_scores_far_from_zero(shape: str) -> None:
    """The largest score may come in any tile, and none of the others may overflow."""
    outputs = torch.tensor([[300.0], [-300.0], [0.0]]).requires_grad_()
    table = torch.linspace(-1, 1, 40).unsqueeze(1).requires_grad_()
    items = torch.tensor([39, 39, 7])
    ours, theirs = fused.softmax_loss(outputs, table, items), F.cross_entropy(outputs @ table.T, items)
    torch.testing.assert_close(ours, theirs)
    pairs = [torch.autograd.grad(loss, (outputs, table)) for loss in (ours, theirs)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("n", [1, 127])
def test_distillation(n: int, temperature: float, shape: str) -> None:
    """Autograd of the plain formula; the teacher has another width."""
    draw = torch.Generator().manual_seed(0)
    outputs, table = (torch.randn(k, 5, generator=draw).requires_grad_() for k in (n, 40))
    old, old_table = (torch.randn(k, 3, generator=draw) for k in (n, 40))
    ours = fused.distillation(outputs, table, old, old_table, temperature)
    assert "Distillation" in type(ours.grad_fn).__name__
    new, before = outputs @ table.T / temperature, old @ old_table.T / temperature
    p = before.softmax(1)
    theirs = temperature**2 * (p * (before.log_softmax(1) - new.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(ours, theirs)
    for again in (True, False):  # the second frees the graph
        pairs = [torch.autograd.grad(3 * loss, (outputs, table), create_graph=again) for loss in (ours, theirs)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_softmax_loss_under_vmap_and_without_gradients() -> None:
    outputs, table, items = torch.randn(6, 3), torch.randn(9, 3), torch.arange(6)
    slopes = torch.func.vmap(torch.func.grad(lambda o, i: fused.softmax_loss(o.unsqueeze(0), table, i.unsqueeze(0))))(
        outputs, items
    )
    reference = [
        torch.autograd.grad(F.cross_entropy(o.unsqueeze(0) @ table.T, i.unsqueeze(0)), o)[0]
        for o, i in zip(outputs.clone().requires_grad_().unbind(), items, strict=True)
    ]
    torch.testing.assert_close(slopes, torch.stack(reference))
    torch.testing.assert_close(fused.softmax_loss(outputs, table, items), F.cross_entropy(outputs @ table.T, items))


@pytest.mark.parametrize("p", [0.5, 0.1, 0.25, 0.9])
def test_dropout(p: float) -> None:
    x = torch.full((400, 1001), 2.0, requires_grad=True)
    torch.manual_seed(5)
    y = fused.dropout(x, p, True)
    torch.manual_seed(5)
    assert torch.equal(y, fused.dropout(x, p, True)), "drawn from torch's generator"
    assert not torch.equal(y, fused.dropout(x, p, True))
    zeros = (y == 0).double().mean().item()
    assert zeros == pytest.approx(p, abs=5 * (p * (1 - p) / y.numel()) ** 0.5 + 2**-16)
    assert y.mean().item() == pytest.approx(2.0, rel=0.01)
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 2 / (1 - p)), rtol=1e-3, atol=0)
    columns = (y == 0).double().mean(dim=0)  # no column of the random words is favoured
    assert columns.std().item() == pytest.approx((p * (1 - p) / 400) ** 0.5, rel=0.15)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach() / 2)
    assert fused.dropout(x, p, False) is x and fused.dropout(x, 0.0, True) is x
    assert not fused.dropout(x, 1.0, True).any()


@pytest.mark.parametrize("width", [9, 320, 641, 5003])
def test_best_is_topk(width: int) -> None:
    scores = torch.randn(17, width, generator=torch.Generator().manual_seed(width))
    scores[3, 5:] = -torch.inf
    values, items = best(scores, 5)
    assert torch.equal(values, torch.topk(scores, 5, dim=1).values)
    assert torch.equal(scores.gather(1, items), values)
    assert all(len(set(row.tolist())) == 5 for row in items)
