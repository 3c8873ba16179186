"""A model that plans its passes: backbone first, then the rest, with rates and trainers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_resumes, checkpoints, write_log
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from recbole_cl import checkpoint
from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import ContinualModel
from recbole_cl.model.state import owned_state
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.tree import tree_hash

BACKBONE = {"user_embedding.weight", "item_embedding.weight"}
REST = {"rest.weight", "rest.bias"}


class TwoPhases(ContinualModel, GeneralRecommender):
    """Embeddings, and a layer between them that is trained when they are frozen."""

    input_type = InputType.POINTWISE
    defaults = {"train_neg_sample_args": None, "user_rate": 2.0}
    begun: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.user_rate = float(config["user_rate"])
        self.user_embedding = nn.Embedding(self.n_users, 8, padding_idx=0)
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)
        self.rest = nn.Linear(8, 8)
        nn.init.eye_(self.rest.weight)

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        halves = ((replace(p, name="backbone"), replace(p, name="rest", init="previous", epochs=2)) for p in passes)
        return [half for pair in halves for half in pair]

    def begin_pass(self, ctx: StageContext) -> None:
        first = ctx.pass_.name == "backbone"
        for p in (self.user_embedding.weight, self.item_embedding.weight):
            p.requires_grad_(first)
        self.rest.requires_grad_(not first)
        entry = {"stage": ctx.index, "pass": ctx.pass_.name, "step": ctx.step, "hash": tree_hash(owned_state(self))}
        self.begun.append(entry)

    def parameter_groups(self, ctx: StageContext, learning_rate: float) -> list[dict[str, Any]] | None:
        if ctx.pass_.name != "backbone":
            return None
        users = {"params": [self.user_embedding.weight], "lr": self.user_rate * learning_rate}
        return [users, {"params": [self.item_embedding.weight]}]

    def logits(self, batch: Any) -> torch.Tensor:
        return self.rest(self.user_embedding(batch[self.USER_ID])) @ self.item_embedding.weight.T

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.logits(batch), batch[self.ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(batch)


class Steps:
    """Trains the rest by itself, with momentum of its own."""

    def __init__(self, model: TwoPhases, ctx: StageContext, learning_rate: float) -> None:
        self.model, self.ctx, self.rate = model, ctx, learning_rate
        self.momentum = [torch.zeros_like(p) for p in model.rest.parameters()]

    def train_epoch(self, loader: Any, epoch: int) -> float:
        total = 0.0
        for batch in loader:
            loss = self.model.calculate_loss(batch)
            parameters = list(self.model.rest.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for number, (p, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                    self.momentum[number] = 0.9 * self.momentum[number] + gradient
                    p -= self.rate * self.momentum[number]
            self.ctx.step += 1
            total += float(loss.detach())
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": [m.clone() for m in self.momentum]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.momentum = [m.clone() for m in state["momentum"]]


class TwoTrainers(TwoPhases):
    """RecBole's trainer for the first stage and for each backbone, the model's own for the rest after that."""

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> Steps | None:
        return None if ctx.index == 0 or ctx.pass_.name == "backbone" else Steps(self, ctx, learning_rate)


class Watching(Strategy):
    """Notes the weights that each pass ends with."""

    ended: ClassVar[list[str]] = []

    def end_pass(self, ctx: StageContext) -> None:
        self.ended.append(tree_hash(owned_state(ctx.model)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the log."""
    return write_log(tmp_path_factory.mktemp("log")).folder


def job_of(data: Path, model: type = TwoPhases, strategy: Any = ("Watching",), **settings: Any) -> Job:
    """Returns a model over the log."""
    given = {"strategy": list(strategy), "checkpoint_keep": 100, "epochs": 3, **settings}
    return Job(model, data, given, {"strategies": Watching})


def walked(job: Job, folder: Path) -> tuple[Walk, list[dict[str, Any]]]:
    """Returns a walk and how each of its passes began."""
    TwoPhases.begun.clear()
    Watching.ended.clear()
    walk = job.walk(folder)
    return walk, list(TwoPhases.begun)


def moved(state: Mapping[str, Any], start: Mapping[str, Any]) -> set[str]:
    """Returns the names of the tensors that differ."""
    return {name for name in start if not torch.equal(state[name], start[name])}


def test_backbone_then_the_rest(data: Path, tmp_path: Path) -> None:
    """Each stage has both passes, each trains its own parameters alone, the second goes on from the first's best."""
    walk, begun = walked(job_of(data), tmp_path)
    assert [(b["stage"], b["pass"]) for b in begun] == [(s, p) for s in range(3) for p in ("backbone", "rest")]
    points = [(c["stage"], c["pass"], c["epoch"]) for c in walk.result["curves"]]
    expected = [(s, p, e) for s in range(3) for p, n in (("backbone", 3), ("rest", 2)) for e in range(n)]
    assert points == expected
    assert [b["hash"] for b in begun[1::2]] == Watching.ended[::2], "the rest began from other weights"
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    for state in (s for s in states if s["phase"] == "train"):
        place, start = state["progress"]["number"], state["stage_start"]["model"]["tensors"]
        trained = set(state["trainer"]["own"]["optimizer"])
        assert trained == (BACKBONE if place == 0 else REST)
        if place == 0:
            assert moved(state["model"]["tensors"], start) == BACKBONE
    last = [s for s in states if s["phase"] == "train"][-1]
    assert last["progress"]["number"] == 1
    assert moved(last["model"]["tensors"], last["stage_start"]["model"]["tensors"]) == BACKBONE | REST


def test_a_full_retraining_begins_each_stage_anew(data: Path, tmp_path: Path) -> None:
    """Under FullRetrain the backbone starts from new weights, on all data so far, and the rest goes on from it."""
    walk, begun = walked(job_of(data, strategy=("FullRetrain", "Watching"), stage_optimizer="carry"), tmp_path)
    assert [b["hash"] for b in begun[1::2]] == Watching.ended[::2]
    assert not {b["hash"] for b in begun[2::2]} & set(Watching.ended), "a stage went on from the one before"
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    for state in (s for s in states if s["phase"] == "train" and s["progress"]["number"] == 0):
        steps = {int(m["step"]) for m in state["trainer"]["own"]["optimizer"].values()}
        assert steps == {state["progress"]["step"]}, "a new beginning has no moments from before"
    assert targets(walk) == so_far(walk)


def test_a_joint_training_sees_all_data_in_both_passes(data: Path, tmp_path: Path) -> None:
    """Under Joint both halves train on the data so far, and go on from the stage before."""
    walk, begun = walked(job_of(data, strategy=("Joint", "Watching")), tmp_path)
    assert [b["hash"] for b in begun[1::2]] == Watching.ended[::2]
    assert targets(walk) == so_far(walk)
    assert tree_hash(owned_state(walk.runner.model)) == Watching.ended[-1]


def test_an_empty_plan_stays_empty(data: Path, tmp_path: Path) -> None:
    """Under Pretrain there is nothing to split after the first stage."""
    _, begun = walked(job_of(data, strategy=("Pretrain", "Watching")), tmp_path)
    assert [(b["stage"], b["pass"]) for b in begun] == [(0, "backbone"), (0, "rest")]


def targets(walk: Walk) -> list[int]:
    """Returns the training targets that each stage's curve ends with."""
    return [[c["targets"] for c in walk.result["curves"] if c["stage"] == stage][-1] for stage in range(3)]


def so_far(walk: Walk) -> list[int]:
    """Returns five epochs of all training targets up to each stage."""
    return [5 * int(n) for n in np.cumsum([len(stage.train) for stage in walk.runner.stream.stages])]


@pytest.mark.parametrize("model", [TwoPhases, TwoTrainers])
def test_killed_in_either_pass(model: type, data: Path, tmp_path: Path) -> None:
    """Killed in the backbone's pass and in the rest's, by RecBole's trainer or the model's own: the same bits."""
    job = job_of(data, model, stage_optimizer="carry")
    whole, begun = walked(job, tmp_path / "whole")
    per_epoch = [-(-len(stage.train) // 64) for stage in whole.runner.stream.stages]
    start = 5 * per_epoch[0]
    for number, step in enumerate((start + per_epoch[1] + 3, start + 4 * per_epoch[1] + 3)):
        state = job.killed(tmp_path / str(number), step)
        assert state["progress"]["number"] == number, "the kill was meant to fall into the other pass"
        TwoPhases.begun.clear()
        again = assert_resumes(job, tmp_path / f"again{number}", whole, step, stage=1)
        first = TwoPhases.begun[0]
        assert (first["stage"], first["pass"]) == (1, ("backbone", "rest")[number])
        # Its weights are the checkpoint's, also where the pass before was trained in the process that was killed.
        assert first["hash"] == tree_hash(state["model"]) and first["step"] == state["progress"]["step"]
        assert again.result["curves"][-1]["pass"] == "rest"
    own = [s["trainer"]["own"] for s in map(checkpoint.read, checkpoints(whole)) if s["phase"] == "train"]
    assert {name for state in own for name in state} == (
        {"optimizer"} if model is TwoPhases else {"optimizer", "momentum"}
    )
    assert len(begun) == 6


def test_a_strategy_of_steps_is_refused_where_the_own_trainer_begins(data: Path, tmp_path: Path) -> None:
    """RecBole's passes run under EWC; the first pass that the model trains itself is refused, by name."""

    class Gradient(TwoTrainers):
        capabilities = ("per_sample_loss",)

    with pytest.raises(ConfigError, match=r"SI cannot serve the model Gradient, which trains its stages by itself"):
        job_of(data, Gradient, ("SI", "Watching")).walk(tmp_path)


# -- rates --------------------------------------------------------------------------------------------------------


def first_step(job: Job, folder: Path) -> dict[str, torch.Tensor]:
    """Returns how far one step of plain SGD moved each parameter of the backbone."""
    walk = job.walk(folder, learner="sgd", train_batch_size=100_000, epochs=1, checkpoint_steps=None)
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    state = next(s for s in states if s["phase"] == "train" and s["progress"]["number"] == 0)
    assert state["progress"]["step"] == 1
    now, start = state["model"]["tensors"], state["stage_start"]["model"]["tensors"]
    return {name: now[name] - start[name] for name in BACKBONE}


def test_rates_reach_the_optimiser(data: Path, tmp_path: Path) -> None:
    """Under SGD a step is rate times gradient: three times the rate is three times the way, for that group alone."""
    plain = first_step(job_of(data, user_rate=1.0), tmp_path / "plain")
    scaled = first_step(job_of(data, user_rate=3.0), tmp_path / "scaled")
    # The step is rounded to the weights' 24 bits: differences of weights of size one are exact to 6e-8 or so.
    assert plain["user_embedding.weight"].abs().max() > 1e-4
    assert torch.allclose(scaled["user_embedding.weight"], 3 * plain["user_embedding.weight"], rtol=0, atol=1e-6)
    assert torch.equal(scaled["item_embedding.weight"], plain["item_embedding.weight"])


@pytest.mark.parametrize(
    ("choose", "told"),
    [
        (lambda m: [[m.user_embedding.weight]], "leave out item_embedding.weight"),
        (lambda m: [[m.user_embedding.weight, m.item_embedding.weight], [m.user_embedding.weight]], "twice"),
        (lambda m: [[*m.parameters(), nn.Parameter(torch.zeros(1))]], "a parameter that is none of the model's"),
    ],
)
def test_groups_that_are_no_partition_are_refused(
    choose: Any, told: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that nobody would train, or two groups would, is named before anything is trained."""
    groups = lambda self, ctx, rate: [{"params": params} for params in choose(self)]  # noqa: E731
    monkeypatch.setattr(TwoPhases, "parameter_groups", groups)
    with pytest.raises(ConfigError, match=rf"parameter_groups of TwoPhases.*{told}"):
        job_of(data).walk(tmp_path)


@pytest.mark.parametrize("model", [TwoPhases, TwoTrainers])
def test_carried_moments_survive_the_pass_after(model: type, data: Path, tmp_path: Path) -> None:
    """The backbone goes on with its moments of the stage before, though the rest was trained last, by whomever."""
    walk, _ = walked(job_of(data, model, stage_optimizer="carry"), tmp_path)
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    first = [s for s in states if s["phase"] == "train" and s["stage"] > 0 and s["progress"]["number"] == 0]
    assert {state["stage"] for state in first} == {1, 2}
    for state in first:
        moments = state["trainer"]["own"]["optimizer"]
        assert set(moments) == BACKBONE
        assert all(int(m["step"]) > state["progress"]["step"] for m in moments.values()), "they began anew"
