"""EWC, SI, MAS and LwF beside Avalanche's on one model and one data set: equal where it is right, and where it is not.

Needs ``pip install recbole-cl[peers]``; avalanche-lib 0.6.0 is what was compared. Everything runs on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from recbole_cl.registry import strategies
from recbole_cl.strategy.context import Pass
from recbole_cl.strategy.mas import sensitivities
from recbole_cl.strategy.parts.importance import squared_gradients

plugins = pytest.importorskip(
    "avalanche.training.plugins",
    reason="Avalanche is not installed (pip install recbole-cl[peers])",
    exc_type=ImportError,
)


class Classifier(nn.Module):
    """Two layers; a classifier for Avalanche, a model with a loss and a representation for us."""

    capabilities = ("user_representation", "per_sample_loss")

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out

    def per_sample_loss(self, batch: Interaction) -> torch.Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"], reduction="none")

    def user_representation(self, batch: Interaction) -> torch.Tensor:
        return self(batch["x"])


def stage(number: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels whose rule changes with the stage."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 4, generator=generator)
    return x, (x[:, number % 4] > 0).long() + (x[:, (number + 1) % 4] > 1).long()


def train(model: nn.Module, number: int, steps: int = 15) -> Iterator[torch.optim.Optimizer]:
    """Yields with the gradients of the data in place, before each step, and once more after it."""
    x, y = stage(number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        yield optimizer


def avalanche(model: nn.Module, number: int, batch_size: int = 1) -> Any:
    """What Avalanche's plugins read of its training strategy."""
    dataset = TensorDataset(*stage(number), torch.zeros(40, dtype=torch.long))
    return SimpleNamespace(
        model=model, device="cpu", loss=torch.zeros(()), clock=SimpleNamespace(train_exp_counter=number),
        experience=SimpleNamespace(dataset=dataset), train_mb_size=batch_size, _criterion=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip


def ours(model: nn.Module) -> Any:
    """What our strategies read of a stage."""
    found = SimpleNamespace(model=model, parameters=lambda: dict(model.named_parameters()), terms={}, step=0, epoch=0)
    found.pass_, found.data_gradients = Pass(), {}
    found.log = lambda name, value: found.terms.__setitem__(name, [float(value), 1.0])
    return found


def rows(number: int) -> list[Interaction]:
    x, y = stage(number)
    return [Interaction({"x": x, "y": y})]


def same(theirs: Any, mine: dict[str, torch.Tensor], rtol: float = 1e-5) -> bool:
    return all(
        torch.allclose(getattr(theirs[name], "data", theirs[name]), value, rtol=rtol, atol=1e-9)
        for name, value in mine.items()
    )


def penalty_gradient(plugin: Any, strategy: Any) -> dict[str, torch.Tensor]:
    strategy.loss = torch.zeros((), requires_grad=True) + 1e-30  # its MAS calls a loss of 0 "not available"
    plugin.before_backward(strategy)
    found = torch.autograd.grad(strategy.loss, list(strategy.model.parameters()))
    return {name: g for (name, _), g in zip(strategy.model.named_parameters(), found, strict=True)}


def our_gradient(member: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    member.add_gradients(ours(model))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- EWC ----------------------------------------------------------------------------------------------------------


def test_ewc_fisher_is_right_at_batch_size_one_and_wrong_above() -> None:
    """WRONG in Avalanche: it squares the gradient of a batch's mean loss. Only a batch of one gives the Fisher."""
    model = Classifier()
    mine = squared_gradients(model, rows(0))
    total, sums = sum(float(value.sum()) for value in mine.values()), {}
    for size in (1, 8, 40):
        s = avalanche(model, 0, size)
        theirs = plugins.EWCPlugin(1.0).compute_importances(
            model, s._criterion, s.optimizer, s.experience.dataset, "cpu", size
        )
        assert same(theirs, mine) == (size == 1)
        sums[size] = sum(float(value.data.sum()) for value in theirs.values())
    assert sums[1] == pytest.approx(total, rel=1e-5)
    assert sums[8] < 0.5 * total and sums[40] < 0.25 * total  # the same lambda means less and less


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_ewc_terms_are_equal(mode: str) -> None:
    """RIGHT, given the Fisher of single samples: its loop over stages is our closed form, its lambda our lambda / 2."""
    model = Classifier()
    theirs = plugins.EWCPlugin(1.5, mode=mode, decay_factor=0.5 if mode == "online" else None)
    name, more = ("OnlineEWC", {"gamma": 0.5}) if mode == "online" else ("EWC", {})
    mine = strategies.get(name)({"lambda": 3.0, "samples": None, **more})
    for number in range(4):
        for optimizer in train(model, number):
            optimizer.step()
        s = avalanche(model, number)
        if number:
            wanted = penalty_gradient(theirs, s)
            assert sum(float(g.abs().sum()) for g in wanted.values()) > 0
            assert same(wanted, our_gradient(mine, model), rtol=1e-4)
        theirs.after_training_exp(s)
        fisher = squared_gradients(model, rows(number))
        for key, p in model.named_parameters():
            mine._add_anchor(key, fisher[key], p.detach())


# -- SI -----------------------------------------------------------------------------------------------------------


def walk_si(model: nn.Module, plugin: Any, mine: Any, number: int, regularised: bool = False) -> None:
    """One stage under both; the steps are the same, with ``plugin``'s penalty in them where there is one."""
    s, ctx = avalanche(model, number), ours(model)
    plugin.before_training_exp(s)
    mine.begin_stage(ctx)
    for step, optimizer in enumerate(train(model, number)):
        plugin.before_training_iteration(s)
        data = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        for (_, p), g in zip(model.named_parameters(), penalty_gradient(plugin, s).values(), strict=True):
            p.grad = g if p.grad is None else p.grad + g
        total = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        ctx.step, ctx.data_gradients = step, total if regularised else data
        kept, mine.params["c"] = mine.params["c"], 0.0  # the penalty of the plugin is already in
        mine.add_gradients(ctx)
        mine.params["c"] = kept
        optimizer.step()
        mine.after_step(ctx)
        plugin.after_training_iteration(s)
    plugin.after_training_exp(s)
    mine.end_stage(ctx)


def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs its SI: weights are kept as copies."""

    def extract(model: nn.Module, target: Any, excluded: Any) -> None:
        for name, p in plugins.SynapticIntelligencePlugin.allowed_parameters(model, excluded):
            target[name].data = p.detach().clone().flatten()

    monkeypatch.setattr(plugins.SynapticIntelligencePlugin, "extract_weights", staticmethod(extract))


def test_si_is_exactly_zero_on_a_cpu() -> None:
    """WRONG in Avalanche: "the weights before the step" are a view of the weights, so that every step has length 0."""
    model = Classifier()
    plugin, mine = plugins.SynapticIntelligencePlugin(1.0, eps=0.1), strategies.get("SI")({"c": 0.5, "xi": 0.1})
    before = copy.deepcopy(model.state_dict())
    walk_si(model, plugin, mine, 0)
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not value.data.any() for value in plugin.ewc_data[1].values())
    assert all(float(value.sum()) > 0 for value in mine.importance.values())
    for p in model.parameters():
        p.data += 1.0
    assert not any(g.any() for g in penalty_gradient(plugin, avalanche(model, 1)).values())
    assert all(g.any() for g in our_gradient(mine, model).values())


def test_si_repaired_is_the_same_formula_until_its_penalty_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """RIGHT once copies are kept, before its clip at 0.001 and our cut at 0.

    WRONG from the second stage on: the path takes the gradient with the penalty's own in it, not the data's.
    """
    copies(monkeypatch)
    for regularised in (False, True):
        model = Classifier()
        plugin, mine = plugins.SynapticIntelligencePlugin(400.0, eps=0.1), strategies.get("SI")({"c": 1.0, "xi": 0.1})
        shapes = {name: p.shape for name, p in model.named_parameters()}
        raw: dict[str, torch.Tensor] = {}
        for number in range(2):
            walk_si(model, plugin, mine, number, regularised)
            theirs = {n: -v.data.view(shapes[n]) for n, v in plugin.syn_data["cum_trajectory"].items()}
            if not number:
                raw = {name: value.clamp(min=0) for name, value in theirs.items()}
                assert same(raw, mine.importance, rtol=1e-4)
                assert all(float(value.data.max()) < 0.00101 for value in plugin.ewc_data[1].values())
                assert max(float(value.max()) for value in mine.importance.values()) > 0.01
        share = {n: plugin.syn_data["trajectory"][n].data.view(shapes[n]) for n in shapes}
        moved = {n: p.detach() - mine.start[n] for n, p in model.named_parameters()}
        path = {n: -share[n] / (moved[n].square() + 0.1) for n in shapes}
        added = {n: (raw[n] + path[n]).clamp(min=0) for n in shapes}
        assert same(added, mine.importance, rtol=1e-3) == regularised


# -- MAS ----------------------------------------------------------------------------------------------------------


def test_mas_is_right_at_batch_size_one_and_wrong_above() -> None:
    """WRONG in Avalanche: the absolute value of a batch's mean gradient, in which samples of opposite sign cancel."""
    model = Classifier()
    mine = sensitivities(model, rows(0), dict(model.named_parameters()))
    theirs = {size: plugins.MASPlugin()._get_importance(avalanche(model, 0, size)) for size in (1, 40)}
    assert same(theirs[1], mine)
    sums = {size: sum(float(v.data.sum()) for v in found.values()) for size, found in theirs.items()}
    assert sums[40] < 0.8 * sums[1]


def test_mas_takes_dropout_for_importance() -> None:
    """WRONG in Avalanche: importances are taken in train mode, so that they are noise where there is dropout."""
    model = Classifier(dropout=0.5)
    mine = [sensitivities(model, rows(0), dict(model.named_parameters())) for _ in range(2)]
    assert same(mine[0], mine[1], rtol=0)
    theirs = [plugins.MASPlugin()._get_importance(avalanche(model, 0)) for _ in range(2)]
    assert not same(theirs[0], {name: value.data for name, value in theirs[1].items()}, rtol=0.01)


def test_mas_terms_are_equal() -> None:
    """RIGHT, given importances of single samples: the mix with alpha and the term."""
    model = Classifier()
    theirs, mine = plugins.MASPlugin(0.7, alpha=0.25), strategies.get("MAS")({"lambda": 0.7, "alpha": 0.25})
    for number in range(3):
        for optimizer in train(model, number):
            optimizer.step()
        s = avalanche(model, number)
        if number:
            assert same(penalty_gradient(theirs, s), our_gradient(mine, model), rtol=1e-4)
        theirs.after_training_exp(s)
        found = sensitivities(model, rows(number), dict(model.named_parameters()))
        for name, p in model.named_parameters():  # the formula of MAS.end_stage, whose rows come from a stream
            old = mine.importance.get(name)
            mine.importance[name] = found[name] if old is None else 0.25 * old + 0.75 * found[name]
            mine.anchor[name] = p.detach().clone()


# -- LwF ----------------------------------------------------------------------------------------------------------


def test_lwf_leaves_out_the_square_of_the_temperature(tmp_path: Any) -> None:
    """DIFFERENT in Avalanche: KL at temperature T without T^2 (Hinton et al. 2015); otherwise the same number."""
    from run_helpers import configure, toy

    from recbole_cl.strategy.context import StageContext
    from recbole_cl.stream.batch import Batcher
    from recbole_cl.stream.build import build_stream
    from recbole_cl.stream.loader import make_loader

    config = configure(toy(tmp_path), tmp_path, "SASRec", train_positions="last")
    stream = build_stream(config)
    torch.manual_seed(1)
    old = config.model_class(config, stream.view(0)).requires_grad_(False).eval()
    new = config.model_class(config, stream.view(1)).eval()
    for p in (*old.parameters(), *new.parameters()):
        p.data *= 3
    known = stream.stages[1]
    batcher = Batcher(config, stream, stream.view(1), known.n_users, known.n_items)
    ctx = StageContext(config, stream, 1, new, stream.view(1), batcher, torch.device("cpu"))
    ctx.previous_factory = lambda: old
    loader, n_old = make_loader(ctx, known.train, "test"), stream.stages[0].n_items
    batch = loader.make(torch.arange(loader.size).numpy())
    batch = batch[(batch["item_id_list"] < n_old).all(dim=1)]  # the old model reads the history as it is
    assert len(batch) > 5
    lwf = plugins.LwFPlugin(alpha=1.0, temperature=2.0).lwf
    lwf.prev_classes_by_task = {0: set(range(1, n_old))}
    lwf.prev_model = lambda batch: old.full_sort_predict(batch).view(len(batch), -1)
    theirs = lwf(batch, new.full_sort_predict(batch).view(len(batch), -1), new)
    mine = strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0}).loss_terms(ctx, batch)["LwF/distillation"]
    assert float(theirs) > 1e-3
    assert float(mine) == pytest.approx(4 * float(theirs), rel=1e-4)


def test_lwf_teacher_stays_in_train_mode() -> None:
    """WRONG in Avalanche: the teacher is a copy of the model as training left it, dropout on."""
    model = Classifier(dropout=0.5)
    plugin = plugins.LwFPlugin()
    unique = SimpleNamespace(uniques={0, 1, 2})
    task = SimpleNamespace(targets=unique)
    dataset = SimpleNamespace(targets_task_labels=SimpleNamespace(uniques={0}), task_set={0: task})
    plugin.after_training_exp(SimpleNamespace(model=model, experience=SimpleNamespace(dataset=dataset)))
    assert plugin.lwf.prev_model.training
    x = stage(0)[0]
    out = model.eval()(x)
    assert float(plugin.lwf(x, out, model)) != float(plugin.lwf(x, out, model))
