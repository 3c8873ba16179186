"""Per-user state and a stage trainer of the model's own, as ProtoFed-SP needs them, with a ledger never rolled back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_reported, assert_same_walk, checkpoints, matrix, write_log
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from recbole_cl import checkpoint
from recbole_cl.errors import ConfigError
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext

BATCHES_A_ROUND = 3


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Appends a line that survives the process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a store."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Rounds:
    """A round is: sample users, step their prompts with momentum, release a mean to the server, charge the ledger."""

    epochs = 3
    made: ClassVar[list[tuple[int, float]]] = []

    def __init__(self, model: PromptedUsers, ctx: StageContext, learning_rate: float) -> None:
        self.model, self.ctx, self.learning_rate = model, ctx, learning_rate
        self.momentum = torch.zeros_like(model.prompts)
        self.rounds = 0
        self.made.append((ctx.index, learning_rate))

    def train_epoch(self, loader: Any, epoch: int) -> float:
        model, generator, total = self.model, self.ctx.generator("rounds/clients"), 0.0
        key = f"{self.ctx.index}/{epoch}"
        if all(entry["round"] != key for entry in lines(model.ledger)):  # a round run again is not charged again
            append(model.ledger, {"round": key, "pid": os.getpid()})
        for number, batch in enumerate(loader):
            if number == BATCHES_A_ROUND:  # an epoch that a trainer leaves early
                break
            FUSE.tick()
            users = batch[model.USER_ID].unique()
            users = users[torch.from_numpy(generator.random(len(users)) < 0.7)]
            chosen = torch.isin(batch[model.USER_ID], users)
            if not chosen.any():
                continue
            prompts = model.prompts.clone().requires_grad_(True)
            loss = model.loss(prompts, batch[model.USER_ID][chosen], batch[model.ITEM_ID][chosen])
            (gradient,) = torch.autograd.grad(loss, prompts)
            # Noise as a mechanism would add it: from the model's random state, which the checkpoint holds.
            gradient = gradient + 1e-3 * torch.randn_like(gradient)
            self.momentum = 0.9 * self.momentum + gradient
            model.prompts = model.prompts - self.learning_rate * self.momentum
            for user in users.tolist():
                model.visits[str(user)] = model.visits.get(str(user), 0) + 1
            model.prototype = 0.5 * model.prototype + 0.5 * model.prompts[users].mean(0)
            total += float(loss.detach())
        self.rounds += 1
        self.ctx.log("rounds", self.rounds)
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.momentum, self.rounds = state["momentum"].clone(), int(state["rounds"])


class PromptedUsers(GeneralRecommender):
    """A frozen random item table; each user's prompt, the prototype and the visits are state of its own."""

    input_type = InputType.POINTWISE
    defaults = {"train_neg_sample_args": None, "ledger_file": None}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)
        self.item_embedding.requires_grad_(False)
        self.ledger = Path(config["ledger_file"])
        self.prompts = torch.zeros(self.n_users, 8)
        self.prototype = torch.zeros(8)
        self.visits: dict[str, int] = {}

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> Rounds:
        return Rounds(self, ctx, learning_rate)

    def owned_state(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "prototype": self.prototype, "visits": dict(self.visits)}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        self.prompts, self.prototype = state["prompts"].clone(), state["prototype"].clone()
        self.visits = dict(state["visits"])
        assert len(self.prompts) == self.n_users

    def grow_owned_state(self, state: dict[str, Any], growth: Any) -> dict[str, Any]:
        new = growth.n_users[1] - growth.n_users[0]
        drawn = state["prototype"] + 0.1 * torch.randn(new, 8)  # drawn: a resumed run has to draw the same
        return {**state, "prompts": torch.cat([state["prompts"], drawn])}

    def side_stores(self) -> dict[str, str]:
        return {"ledger": str(self.ledger)}

    def logits(self, prompts: torch.Tensor) -> torch.Tensor:
        return (prompts + self.prototype) @ self.item_embedding.weight.T

    def loss(self, prompts: torch.Tensor, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(prompts[users]), items)

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(self.prompts[batch[self.USER_ID]])


class Audited(Strategy):
    """Writes a line at the end of each stage to a store of its own; takes no part in steps."""

    defaults = {"file": None}
    prefix = "audited"

    def end_stage(self, ctx: StageContext) -> None:
        append(Path(self.params["file"]), {"stage": ctx.index, "pid": os.getpid()})

    def side_stores(self) -> dict[str, str]:
        return {"audit": str(self.params["file"])}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over a log, its stores beside the run's folder."""
    stores = {"ledger_file": "{folder}/ledger.jsonl", "strategy": "Audited", "audited_file": "{folder}/audit.jsonl"}
    settings = {**stores, "train_batch_size": 32, "learning_rate": 0.5, "epochs": 7, "checkpoint_keep": 100}
    return Job(PromptedUsers, write_log(tmp_path_factory.mktemp("log")).folder, settings, {"strategies": Audited})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk."""
    Rounds.made.clear()
    return job.walk(tmp_path_factory.mktemp("whole"))


def test_its_own_rounds_run(whole: Walk) -> None:
    """The model's trainer runs for its own number of epochs at the stage's learning rate; the curves tell its loss."""
    assert Rounds.made[:3] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    for stage in range(3):
        curve = [c for c in whole.result["curves"] if c["stage"] == stage]
        assert len(curve) == Rounds.epochs
        assert [c["terms"]["rounds"] for c in curve] == [1, 2, 3]
        assert curve[-1]["train_loss"] < curve[0]["train_loss"], "the prompts did not learn"
    assert whole.ticks == 3 * Rounds.epochs * BATCHES_A_ROUND


def test_state_that_is_no_parameter_grows(whole: Walk) -> None:
    """Users get rows, old ones keep theirs, and the state is in every checkpoint; both triangles are filled."""
    stages, model = whole.runner.stream.stages, whole.runner.model
    assert stages[0].n_users < stages[1].n_users < stages[2].n_users
    assert model.prompts.shape == (stages[2].n_users, 8)
    assert not any(p.requires_grad for p in model.parameters())
    assert np.isfinite(matrix(whole, "ndcg@5")).all()
    states = [checkpoint.read(path) for path in checkpoints(whole)]
    ends = {s["stage"]: s["model"]["owned"] for s in states if s["phase"] == "done"}
    starts = {s["stage"]: s["stage_start"]["model"]["owned"] for s in states if s["phase"] == "train"}
    for stage in (1, 2):
        old, new = ends[stage - 1]["prompts"], starts[stage]["prompts"]
        assert torch.equal(new[: len(old)], old) and len(new) == stages[stage].n_users
        assert new[len(old) :].std() > 0, "new users share one prompt"
        assert starts[stage]["visits"] == ends[stage - 1]["visits"] != {}


def test_killed_inside_a_round(job: Job, whole: Walk, tmp_path: Path) -> None:
    """The walk resumes to the same bits; what the stores recorded before the kill is still there, once."""
    state = job.killed(tmp_path, (Rounds.epochs + 1) * BATCHES_A_ROUND + 2)  # in the second round of stage 1
    assert (state["phase"], state["stage"], state["progress"]["epoch"]) == ("train", 1, 1)
    stores = {"ledger": str(tmp_path / "ledger.jsonl"), "audit": str(tmp_path / "audit.jsonl")}
    assert state["side_stores"] == stores
    before = lines(tmp_path / "ledger.jsonl")
    # The killed round was charged before it was released; no checkpoint knows of it.
    assert [entry["round"] for entry in before] == ["0/0", "0/1", "0/2", "1/0", "1/1"]
    assert [entry["stage"] for entry in lines(tmp_path / "audit.jsonl")] == [0]
    again = job.walk(tmp_path, resume=True)
    assert_same_walk(whole, again)
    after = lines(tmp_path / "ledger.jsonl")
    assert after[: len(before)] == before, "a store was rolled back"
    assert [entry["round"] for entry in after] == [f"{s}/{e}" for s in range(3) for e in range(Rounds.epochs)]
    assert {entry["pid"] for entry in after[len(before) :]} == {os.getpid()} != {before[0]["pid"]}
    assert [entry["stage"] for entry in lines(tmp_path / "audit.jsonl")] == [0, 1, 2]
    assert_reported(again)


def test_a_store_that_is_gone_is_told(job: Job, tmp_path: Path) -> None:
    """A resumed run whose ledger was deleted says so in its results."""
    job.killed(tmp_path, (Rounds.epochs + 1) * BATCHES_A_ROUND + 2)
    (tmp_path / "ledger.jsonl").unlink()
    result = job.walk(tmp_path, resume=True).result
    assert any("'ledger'" in warning and "ledger.jsonl" in warning for warning in result["warnings"])


def test_two_stores_of_one_name_are_refused(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy's store may not hide the model's."""
    monkeypatch.setattr(Audited, "side_stores", lambda self: {"ledger": str(self.params["file"])})
    with pytest.raises(ConfigError, match="'ledger'"):
        job.walk(tmp_path)


def test_a_strategy_of_steps_is_refused(job: Job, tmp_path: Path) -> None:
    """There are no steps to hook into: EWC would silently do nothing."""

    class WithGradient(PromptedUsers):
        capabilities = ("gradient", "per_sample_loss")

    with pytest.raises(ConfigError, match=r"EWC cannot serve the model WithGradient.*trains its stages by itself"):
        Job(WithGradient, job.data, {**job.settings, "strategy": "EWC"}, job.components).walk(tmp_path)
