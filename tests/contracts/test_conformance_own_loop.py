"""A loop of the model's own that samples its targets and asks for the strategies' loss terms, as ProtoFed-SP does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_resumes, write_log
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from recbole_cl import checkpoint
from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import ContinualModel
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import POSITION
from recbole_cl.stream.stage import Targets
from recbole_cl.training.runner import Runner


class Loop:
    """SGD over a drawn part of each batch; counts what it used, and adds the terms of the strategies."""

    epochs = 4

    def __init__(self, model: Sampling, ctx: StageContext, learning_rate: float) -> None:
        self.model, self.ctx = model, ctx
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
        self.n_targets = 0

    def train_epoch(self, loader: Any, epoch: int) -> float:
        ctx, model, total, self.n_targets = self.ctx, self.model, 0.0, 0
        generator = ctx.generator("loop/targets")
        for batch in loader:
            FUSE.tick()
            chosen = torch.from_numpy(generator.random(len(batch)) < model.share)
            if not chosen.any():
                continue
            batch = batch[chosen]
            loss = model.calculate_loss(batch)
            terms = ctx.strategy.loss_terms(ctx, batch)
            for name, term in terms.items():
                ctx.log(name, term.detach())
            self.optimizer.zero_grad()
            sum(terms.values(), loss).backward()  # type: ignore[union-attr]
            self.optimizer.step()
            self.n_targets += len(batch)
            model.used[batch[POSITION].numpy()] = True
            total += float(loss.detach())
        model.epochs_used.append((ctx.index, epoch, self.n_targets, model.used.copy()))
        return total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Plain SGD keeps nothing."""


class Sampling(ContinualModel, GeneralRecommender):
    """Factorisation on drawn pairs; it knows which targets it has seen."""

    input_type = InputType.PAIRWISE
    defaults = {"share": 0.1}
    strategy_hooks = frozenset({"loss_terms"})
    epochs_used: ClassVar[list[tuple[int, int, int, np.ndarray]]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.share = float(config["share"])
        self.user_embedding = nn.Embedding(self.n_users, 8, padding_idx=0)
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)
        self.used = np.zeros(len(dataset.stream.table.item), dtype=bool)

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> Loop:
        return Loop(self, ctx, learning_rate)

    def learned(self, ctx: StageContext, targets: Targets) -> Targets:
        return targets[self.used[targets.position]]

    def owned_state(self) -> dict[str, Any]:
        return {"used": self.used.copy()}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        self.used = np.array(state["used"])

    def predict(self, batch: Any) -> torch.Tensor:
        return (self.user_embedding(batch[self.USER_ID]) * self.item_embedding(batch[self.ITEM_ID])).sum(1)

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        users = self.user_embedding(batch[self.USER_ID])
        items = self.item_embedding(batch[self.ITEM_ID]) - self.item_embedding(batch[self.NEG_ITEM_ID])
        return -F.logsigmoid((users * items).sum(1)).mean()

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.user_embedding(batch[self.USER_ID]) @ self.item_embedding.weight.T


class Pull(Strategy):
    """Half lambda times the squared distance from the weights of the stage before, of rows that were there."""

    prefix = "pull"
    defaults = {"lambda": 1.0}

    def loss_terms(self, ctx: StageContext, batch: Any) -> dict[str, torch.Tensor]:
        previous: Any = ctx.previous_model
        if previous is None:
            return {}
        gaps = [(ctx.model.get_parameter(n)[: len(old)] - old).square().sum() for n, old in previous.named_parameters()]
        return {"pull": self.params["lambda"] / 2 * sum(gaps)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the log."""
    return write_log(tmp_path_factory.mktemp("log")).folder


def job_of(data: Path, strategy: Any = "FineTune", **settings: Any) -> Job:
    """Returns the model over the log, under a strategy."""
    given = {"learning_rate": 0.5, "strategy": strategy, "checkpoint_keep": 100, **settings}
    return Job(Sampling, data, given, {"strategies": Pull})


def walked(job: Job, folder: Path) -> tuple[Walk, list[tuple[int, int, int, np.ndarray]]]:
    """Returns a walk and what each of its epochs used."""
    Sampling.epochs_used.clear()
    return job.walk(folder), list(Sampling.epochs_used)


# -- what was used ------------------------------------------------------------------------------------------------


def test_curves_count_what_was_used(data: Path, tmp_path: Path) -> None:
    """The targets of a curve are those that the loop drew, not those of the loader."""
    walk, epochs = walked(job_of(data), tmp_path)
    for stage in range(3):
        curve = [c["targets"] for c in walk.result["curves"] if c["stage"] == stage]
        used = np.cumsum([n for index, _, n, _ in epochs if index == stage])
        assert curve == used.tolist()
        assert 0 < curve[-1] < Loop.epochs * len(walk.runner.stream.stages[stage].train) / 4


def test_what_was_not_drawn_is_cold(data: Path, tmp_path: Path) -> None:
    """Users and items of targets drawn up to the best epoch are known, and no others; the rest counts as cold."""
    walk, epochs = walked(job_of(data, share=0.05), tmp_path)
    table, stages = walk.runner.stream.table, walk.runner.stream.stages
    users, items, drawn_later = set(), set(), 0
    for stage in stages:
        curve = [c for c in walk.result["curves"] if c["stage"] == stage.index]
        best = max(c["epoch"] for c in curve if c["best"])
        upto = {epoch: used for index, epoch, _, used in epochs if index == stage.index}
        own = stage.train.position[upto[best][stage.train.position]]
        drawn_later += int(upto[Loop.epochs - 1][stage.train.position].sum()) - len(own)
        users |= set(table.user[own])
        items |= set(table.item[own])
        # A general model answers each user's test items together: a row for each of them.
        tested = stage.test
        cold = sum(u not in users or i not in items for u, i in zip(tested.user, tested.label, strict=True))
        told = next(c for c in walk.result["cold"] if c["t"] == c["s"] == stage.index)
        assert told["n_cold"] == cold
        assert 0 < cold < len(tested)
    known = walk.runner.known
    assert set(np.flatnonzero(known.users)) == users and set(np.flatnonzero(known.items)) == items
    assert drawn_later > 0, "every stage was best at its last epoch: the test asks for nothing"


def test_nothing_is_known_before_an_epoch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pass begins, its targets are not known yet; after an epoch those that it drew are."""
    found: list[tuple[int, int, int]] = []
    original = Loop.train_epoch
    runner: list[Any] = []
    monkeypatch.setattr("conformance_helpers.Runner", lambda config: runner.append(Runner(config)) or runner[-1])

    def look(loop: Loop, loader: Any, epoch: int) -> float:
        known, table = runner[-1].known, loop.ctx.stream.table
        own = loop.model.used & (table.stage <= loop.ctx.index)
        found.append((epoch, int(known.items.sum()), len(set(table.item[own]))))
        return original(loop, loader, epoch)

    monkeypatch.setattr(Loop, "train_epoch", look)
    job_of(data, eval_step=0).walk(tmp_path)
    assert found[0] == (0, 0, 0)
    assert all(known == used for _, known, used in found) and found[1][1] > 0


# -- terms of strategies ------------------------------------------------------------------------------------------


def test_a_strategys_terms_act_in_the_own_loop(data: Path, tmp_path: Path) -> None:
    """The pull is logged, falls with nothing to hold on to in the first stage, and holds the weights after it."""
    free, _ = walked(job_of(data, {"Pull": {"lambda": 0.0}}), tmp_path / "free")
    held, _ = walked(job_of(data, {"Pull": {"lambda": 0.3}}), tmp_path / "held")
    plain, _ = walked(job_of(data), tmp_path / "plain")
    weights = [walk.runner.model.item_embedding.weight for walk in (free, held, plain)]
    assert torch.equal(weights[0], weights[2]), "a term of strength 0 changed bits"
    assert not torch.equal(weights[1], weights[2])
    pulls = [c["terms"].get("pull", 0.0) for c in held.result["curves"]]
    assert max(pulls[: Loop.epochs]) == 0.0 < min(pulls[Loop.epochs :])
    assert _moved(held) < _moved(plain) / 2


def _moved(walk: Walk) -> float:
    """Returns the squared way of the old rows in the last stage."""
    ends = [checkpoint.read(path) for path in checkpoint.numbered(walk.runner.folder / "checkpoints")]
    old, new = (next(s for s in ends if s["phase"] == "done" and s["stage"] == stage) for stage in (1, 2))
    before, after = old["model"]["tensors"], new["model"]["tensors"]
    return float(sum((after[name][: len(p)] - p).square().sum() for name, p in before.items()))


def test_distillation_serves_it_too(data: Path, tmp_path: Path) -> None:
    """LwF takes part by loss terms alone, so it runs in a loop that asks for them."""
    walk, _ = walked(job_of(data, "LwF"), tmp_path)
    logged = [sum(c["terms"].values()) for c in walk.result["curves"]]
    assert max(logged[: Loop.epochs]) == 0.0 < min(logged[Loop.epochs :])


@pytest.mark.parametrize("strategy", ["SI", "ERRandom"])
def test_other_hooks_are_refused_by_name(strategy: str, data: Path, tmp_path: Path) -> None:
    """A strategy that needs steps or rows of its own would silently do half of its work."""
    with pytest.raises(ConfigError, match=rf"strategy: {strategy} cannot serve the model Sampling.*by itself"):
        job_of(data, ["Pull", strategy]).walk(tmp_path)


def test_without_the_hook_terms_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that does not ask for terms says so, and is not run without them."""
    monkeypatch.setattr(Sampling, "strategy_hooks", frozenset())
    with pytest.raises(ConfigError, match=r"strategy: Pull cannot serve the model Sampling"):
        job_of(data, "Pull").walk(tmp_path)


def test_killed_between_two_epochs(data: Path, tmp_path: Path) -> None:
    """What was used is state: resumed, the same targets are known, counted and cold."""
    job = job_of(data, {"Pull": {"lambda": 0.3}}, share=0.05)
    whole = job.walk(tmp_path / "whole")
    again = assert_resumes(job, tmp_path / "killed", whole, whole.ticks // 2, stage=1)
    assert np.array_equal(again.runner.known.items, whole.runner.known.items)
    assert np.array_equal(again.runner.known.users, whole.runner.known.users)
