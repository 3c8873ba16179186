"""Gradients accumulated over batches, warm-up and schedules: one step of many batches, rates step by step, resumed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from run_helpers import run, toy
from transformers import get_scheduler

from recbole_cl.config.models import recbole_models
from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import TARGETS
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training import stage_trainer
from recbole_cl.training.runner import Runner
from recbole_cl.training.stage_trainer import pace
from recbole_cl.training.trainer import HookedTrainer, size_of

SASREC: dict[str, Any] = {
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "train_positions": "last",
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "learner": "sgd",
    "learning_rate": 0.5,
    "epochs": 2,
}
"""A mean over rows without anything drawn: an epoch's order is that of its targets, whatever the batch size."""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    """The toy log, whose first stage has no even number of batches."""
    return toy(tmp_path_factory.mktemp("toy"))


class Anchored(Strategy):
    """A term that does not depend on the batch, and one that is a mean over its rows."""

    def loss_terms(self, ctx: StageContext, batch: Any) -> dict[str, torch.Tensor]:
        weights = sum((p.square().sum() for p in ctx.parameters().values()), torch.zeros(()))
        rows = ctx.model.forward(batch["item_id_list"], batch["item_length"]).square().mean()
        return {"decay": 0.01 * weights, "rows": 0.1 * rows}


class Looking(Strategy):
    """Looks at the optimiser after each step."""

    trainers: list[Any] = []
    rates: list[tuple[int, int, tuple[float, ...]]] = []

    def after_step(self, ctx: StageContext) -> None:
        groups = self.trainers[-1].optimizer.param_groups
        self.rates.append((ctx.index, ctx.step, tuple(group["lr"] for group in groups)))


@pytest.fixture(autouse=True)
def lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategies of this file are registered for its tests alone."""
    strategies.names()
    for name in ("_members", "_names"):
        monkeypatch.setattr(strategies, name, dict(getattr(strategies, name)))
    for cls in (Anchored, Looking):
        strategies.register()(cls)


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    """Returns the trained weights."""
    return dict(runner.model.state_dict())


# -- several batches a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    ["FineTune", "Anchored", {"EWC": {"lambda": 0.5}}, {"SI": {"c": 0.5}}, [{"SI": {"c": 0.5}}, "Anchored"]],
    ids=["plain", "terms", "EWC", "SI", "SI+terms"],
)
def test_two_batches_count_as_one_of_both(strategy: Any, log: PlantedDrift, tmp_path: Path) -> None:
    """Weights, losses, terms and what strategies keep are those of one batch of the same rows, also of a short one."""
    one, whole = run(log, tmp_path / "one", **SASREC, strategy=strategy, train_batch_size=60)
    two, parts = run(log, tmp_path / "two", **SASREC, strategy=strategy, train_batch_size=30, accumulate_gradients=2)
    sizes = [len(stage.train) % 60 for stage in one.stream.stages]
    assert any(30 < size < 60 for size in sizes), "no step has batches of unequal size: the test asks for nothing"
    assert [c["targets"] for c in whole["curves"]] == [c["targets"] for c in parts["curves"]]
    # The same sums in another order, in float32 over some 20 steps of plain SGD: 1e-5 of weights of size 0.1 to 1.
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], rtol=0, atol=1e-5), name
    for a, b in zip(whole["curves"], parts["curves"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-4)
    for member, other in zip(one.strategy.members, two.strategy.members, strict=True):
        for key, kept in member.state_dict().items():
            for name, value in kept.items() if isinstance(kept, dict) else ():
                theirs = other.state_dict()[key][name]
                scale = float(value.abs().max()) + 1e-6
                assert torch.allclose(value, theirs, rtol=0, atol=1e-3 * scale), f"{key}/{name}"


def test_a_step_less_does_not_go_unnoticed(log: PlantedDrift, tmp_path: Path) -> None:
    """The comparison above can fail: one batch of half the size is another run."""
    one, _ = run(log, tmp_path / "one", **SASREC, train_batch_size=60)
    half, _ = run(log, tmp_path / "half", **SASREC, train_batch_size=30)
    assert not all(torch.allclose(v, weights(half)[n], rtol=0, atol=1e-3) for n, v in weights(one).items())


def test_data_gradients_stay_apart(log: PlantedDrift, tmp_path: Path) -> None:
    """With a term beside the data loss, ``ctx.data_gradients`` is the gradient of the data loss of all the batches."""
    seen: list[float] = []
    batches: list[Any] = []

    class Apart(Strategy):
        wants_data_gradients = True

        def augment_batch(self, ctx: StageContext, batch: Any) -> Any:
            batches.append(batch)
            return batch

        def loss_terms(self, ctx: StageContext, batch: Any) -> dict[str, torch.Tensor]:
            return {"decay": 0.1 * sum((p.square().sum() for p in ctx.parameters().values()), torch.zeros(()))}

        def add_gradients(self, ctx: StageContext) -> None:
            both = Interaction({k: torch.cat([b[k] for b in batches]) for k in batches[0].interaction})
            parameters = ctx.parameters()
            loss = ctx.model.calculate_loss(both.to(ctx.device))
            alone = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, _), gradient in zip(parameters.items(), alone, strict=True):
                if gradient is not None:
                    gap = (ctx.data_gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(
                        min=1e-5
                    )  # biases of keys have none but noise
                    seen.append(float(gap))
            batches.clear()

    strategies.register()(Apart)
    settings = {**SASREC, "epochs": 1, "train_batch_size": 20}
    run(log, tmp_path, **settings, strategy="Apart", accumulate_gradients=3)
    # Three sums of 20 rows and one of 60, in float32.
    assert seen and max(seen) < 1e-4


def test_what_a_batch_counts() -> None:
    """Rows, or the positions that windows supervise."""
    assert size_of(Interaction({"user_id": torch.arange(5)})) == 5
    assert size_of(Interaction({TARGETS: torch.tensor([[1, 2, 0], [0, 0, 3]])})) == 3


# -- rates --------------------------------------------------------------------------------------------------------

PACES: list[dict[str, Any]] = [
    {"lr_schedule": "linear"},
    {"lr_schedule": "cosine", "warmup": 3},
    {"lr_schedule": "linear", "warmup": 0.25},
    {"lr_schedule": "constant", "warmup": 5},
    {"lr_schedule": "cosine", "warmup": 0.1, "accumulate_gradients": 3},
]


@pytest.mark.parametrize("given", PACES, ids=lambda given: "-".join(map(str, given.values())))
def test_rates_are_those_of_transformers(
    given: dict[str, Any], log: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of each stage has the rate that transformers' schedule, stepped as it is meant to be, has there."""
    original = stage_trainer.pace

    def caught(trainer: Any, *rest: Any) -> None:
        groups = trainer.optimizer.param_groups
        groups.append({**groups[0], "params": groups[0]["params"][:1], "lr": 3 * groups[0]["lr"]})
        groups[0]["params"] = groups[0]["params"][1:]
        Looking.trainers.append(trainer)
        original(trainer, *rest)

    monkeypatch.setattr("recbole_cl.training.passes.pace", caught)
    Looking.rates.clear()
    settings = {**SASREC, "epochs": 3, "stage_lr_scale": 0.5, "eval_step": 0}
    runner, _ = run(log, tmp_path, **settings, strategy="Looking", **given)
    for stage in runner.stream.stages:
        batches, size = -(-len(stage.train) // 64), given.get("accumulate_gradients", 1)
        steps = 3 * -(-batches // size)
        rate = 0.5 * (1.0 if stage.index == 0 else 0.5)
        warm = given.get("warmup", 0)
        warm = round(warm * steps) if 0 < warm < 1 else warm
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": factor * rate} for factor in (1, 3)])
        name = "constant_with_warmup" if given["lr_schedule"] == "constant" else given["lr_schedule"]
        theirs = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=steps)
        expected = []
        for step in range(steps):
            expected.append((stage.index, step + 1, tuple(theirs.get_last_lr())))
            optimizer.step()
            theirs.step()
        found = [entry for entry in Looking.rates if entry[0] == stage.index]
        assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
        for (_, step, rates), (_, _, told) in zip(found, expected, strict=True):
            assert rates == pytest.approx(told, rel=1e-12, abs=1e-15), f"step {step}"


def test_neutral_values_leave_recboles_way(log: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one batch a step, no warm-up and a constant rate RecBole's own epoch runs, and gives its bits."""
    plain, _ = run(log, tmp_path / "plain", "BPR")
    asked: list[int] = []
    monkeypatch.setattr(HookedTrainer, "_hooked_epoch", lambda *_: pytest.fail("the epoch with hooks ran"))
    monkeypatch.setattr(HookedTrainer, "pace", lambda *_: asked.append(1))
    given = {"accumulate_gradients": 1, "warmup": 0, "lr_schedule": "constant"}
    neutral, _ = run(log, tmp_path / "neutral", "BPR", **given)
    assert not asked
    assert all(torch.equal(v, weights(neutral)[n]) for n, v in weights(plain).items())


def test_a_schedule_alone_runs_the_same_steps(
    log: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that does not change gives, in the epoch with hooks, the bits of RecBole's own."""
    plain, _ = run(log, tmp_path / "plain", "BPR", epochs=1)

    def constant(trainer: HookedTrainer, *_: Any) -> None:
        trainer.rates = [(group["lr"], lambda step: 1.0) for group in trainer.optimizer.param_groups]

    monkeypatch.setattr(HookedTrainer, "pace", constant)
    again, _ = run(log, tmp_path / "again", "BPR", epochs=1, warmup=1)
    assert all(torch.equal(v, weights(again)[n]) for n, v in weights(plain).items())


# -- refusals -----------------------------------------------------------------------------------------------------


def bare_trainer() -> HookedTrainer:
    """Returns a trainer that is asked for nothing but its kind."""
    trainer: HookedTrainer = object.__new__(HookedTrainer)
    return trainer


class Settings(dict[str, Any]):
    """What ``pace`` reads of a configuration."""

    model_class: Any


def settings_of(model: str, kind: ModelType, **given: Any) -> Settings:
    """Returns the settings of a run of one of RecBole's models."""
    found = Settings({**stage_trainer.PACE, "MODEL_TYPE": kind, "model": model, "train_rec_step": None, **given})
    name, module = recbole_models()[model.lower()]
    found.model_class = type(name, (), {"__module__": module})  # some need a package that is not there
    return found


@pytest.mark.parametrize(
    ("model", "kind", "more"),
    [
        ("KGAT", ModelType.KNOWLEDGE, {}),
        ("MKR", ModelType.KNOWLEDGE, {}),
        ("Pop", ModelType.TRADITIONAL, {}),
        ("RecVAE", ModelType.GENERAL, {}),
        ("CKE", ModelType.KNOWLEDGE, {"train_rec_step": 1, "train_kg_step": 1}),
    ],
)
@pytest.mark.parametrize("asked", [{"accumulate_gradients": 2}, {"warmup": 10}, {"lr_schedule": "linear"}])
def test_trainers_with_other_epochs_are_refused(
    model: str, kind: ModelType, more: dict[str, Any], asked: dict[str, Any]
) -> None:
    """Their steps cannot be counted from the loader: a schedule would end in the middle, or never be read."""
    with pytest.raises(ConfigError, match=rf"property '{next(iter(asked))}' cannot serve the model {model}"):
        pace(bare_trainer(), settings_of(model, kind, **more, **asked), 2, [1, 2])


def test_several_processes_do_not_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """They part each batch; a schedule they can follow."""
    monkeypatch.setattr(stage_trainer.distributed, "current", lambda: SimpleNamespace(size=2))
    given = settings_of("BPR", ModelType.GENERAL, accumulate_gradients=4)
    with pytest.raises(ConfigError, match="'accumulate_gradients' is 4, which several processes cannot do yet"):
        pace(bare_trainer(), given, 2, [1, 2])
    trainer = bare_trainer()
    trainer.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    pace(trainer, settings_of("BPR", ModelType.GENERAL, lr_schedule="linear"), 2, [1, 2])
    assert trainer.accumulate == 1 and trainer.rates is not None
    assert [trainer.rates[0][1](step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
