"""A model that lives on from stage to stage, its adapters below the prefix of its base, as PESO needs it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_grows, assert_resumes, assert_same_walk, checkpoints, write_log
from recbole.model.abstract_recommender import SequentialRecommender
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError
from recbole_cl.model.contract import ContinualModel
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.vocabulary import Growth, item_axis

WIDTH, HIDDEN = 8, 512
NAMES = {"base.up.weight", "base.down.weight", "base.scale"}
"""The tensors of the base's file; ``base.up.adapter`` and ``base.head`` lie beside them and are the run's own."""


class Adapted(nn.Module):
    """A frozen layer with an adapter inside, as peft puts it there."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_out, n_in), requires_grad=False)
        self.adapter = nn.ParameterDict(
            {"a": torch.randn(2, n_in) / n_in**0.5, "b": torch.zeros(n_out, 2)},
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + x @ self.adapter["a"].T @ self.adapter["b"].T


class Base(nn.Module):
    """Two adapted layers, a frozen buffer, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = Adapted(WIDTH, HIDDEN), Adapted(HIDDEN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.scale * self.down(F.gelu(self.up(x))))


class LivesOn(ContinualModel, SequentialRecommender):
    """Reads its base once a process; items get rows as they come."""

    defaults = {"loss_type": "CE", "base_file": None}
    built: ClassVar[list[int]] = []
    stages: ClassVar[list[tuple[int, int, int]]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.base_file = Path(config["base_file"])
        self.item_embedding = nn.Embedding(self.n_items, WIDTH, padding_idx=0)
        self.base = Base()
        self.base.load_state_dict(load_file(self.base_file), strict=False)
        self.built.append(self.n_items)

    def grow_in_place(self, view: Any, users: tuple[int, int], items: tuple[int, int]) -> Growth:
        drawn = nn.Embedding(items[1], WIDTH, padding_idx=0)  # drawn: a resumed run has to draw the same
        with torch.no_grad():
            drawn.weight[: items[0]] = self.item_embedding.weight
        self.item_embedding, self.n_items = drawn, items[1]
        axes = (item_axis(), (("none", WIDTH),))
        return Growth(users, items, {"item_embedding.weight": axes})

    def prepare_stage(self, ctx: StageContext) -> None:
        self.stages.append((ctx.index, id(self), self.n_items))

    def frozen_bases(self) -> dict[str, dict[str, Any]]:
        digest = hashlib.sha256(self.base_file.read_bytes()).hexdigest()
        return {"base": {"source": self.base_file.name, "sha256": digest, "names": sorted(NAMES)}}

    def forward(self, batch: Any) -> torch.Tensor:
        hidden = self.item_embedding(batch[self.ITEM_SEQ]).sum(1) / batch[self.ITEM_SEQ_LEN].unsqueeze(1)
        return self.base(hidden) @ self.item_embedding.weight.T

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.forward(batch), batch[self.POS_ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.forward(batch)


class Sized(Strategy):
    """Notes the model's numbers of rows when it adds structure, and a tensor that grows with the items."""

    seen: ClassVar[list[tuple[int, int]]] = []

    def prepare_model(self, ctx: StageContext) -> None:
        self.seen.append((ctx.model.n_items, ctx.stage.n_items))

    def begin_stage(self, ctx: StageContext) -> None:
        if not hasattr(self, "mean"):
            self.mean = torch.zeros_like(ctx.model.item_embedding.weight)

    def end_stage(self, ctx: StageContext) -> None:
        self.mean = (self.mean + ctx.model.item_embedding.weight.detach()) / 2

    def grow(self, growth: Growth) -> None:
        self.mean = growth.expand("item_embedding.weight", self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean = state["mean"].clone()


def write_base(path: Path, seed: int = 0) -> Path:
    """Writes a base's file: the frozen tensors and no adapter."""
    torch.manual_seed(seed)
    shapes = {"up.weight": (HIDDEN, WIDTH), "down.weight": (WIDTH, HIDDEN), "scale": (WIDTH,)}
    save_file({name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over its base; the optimiser's moments go on from stage to stage."""
    log = write_log(tmp_path_factory.mktemp("log"))
    base = write_base(log.folder / "base.safetensors")
    settings = {"base_file": str(base), "stage_optimizer": "carry", "strategy": "Sized", "checkpoint_keep": 100}
    return Job(LivesOn, log.folder, {**settings, "matrix_cells": "diagonal"}, {"strategies": Sized})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk."""
    for noted in (LivesOn.built, LivesOn.stages, Sized.seen):
        noted.clear()
    return job.walk(tmp_path_factory.mktemp("whole"))


def test_it_is_made_once(whole: Walk) -> None:
    """One model serves all stages; strategies see it with the stage's rows, and their tensors grow with its own."""
    stages = whole.runner.stream.stages
    assert LivesOn.built == [stages[0].n_items]
    assert [(index, n) for index, _, n in LivesOn.stages] == [(s.index, s.n_items) for s in stages]
    assert len({identity for _, identity, _ in LivesOn.stages}) == 1
    assert Sized.seen == [(s.n_items, s.n_items) for s in stages]
    assert_grows(whole)
    assert whole.runner.strategy.members[0].mean.shape == whole.runner.model.item_embedding.weight.shape


def test_moments_live_on(whole: Walk) -> None:
    """Adam counts on over the stages, with rows of zeros for new items."""
    states = [checkpoint.read(path) for path in checkpoints(whole)]
    first = next(s for s in states if s["phase"] == "train" and s["stage"] == 1)
    moments = first["trainer"]["own"]["optimizer"]["item_embedding.weight"]
    steps = 2 * -(-len(whole.runner.stream.stages[0].train) // 64)
    assert int(moments["step"]) == steps + first["progress"]["step"]
    assert len(moments["exp_avg"]) == whole.runner.stream.stages[1].n_items


def test_adapters_are_kept_and_the_base_is_not(whole: Walk, job: Job) -> None:
    """Of the tensors below the base's prefix, checkpoints hold those that are not its own."""
    base = Path(job.settings["base_file"])
    told = {"base": {"source": base.name, "sha256": hashlib.sha256(base.read_bytes()).hexdigest()}}
    own = {f"base.{layer}.adapter.{name}" for layer in ("up", "down") for name in "ab"}
    own |= {"base.head.weight", "base.head.bias", "item_embedding.weight"}
    for path in checkpoints(whole):
        state = checkpoint.read(path)
        assert set(state["model"]["tensors"]) == own
        assert state["model"]["bases"] == told
        with safe_open(path / "tensors.safetensors", framework="pt") as file:
            below = {key.rpartition("/")[2] for key in file.keys()}  # noqa: SIM118
        assert not below & NAMES, "a tensor of the base is in a checkpoint, in some copy"
        assert (path / "tensors.safetensors").stat().st_size < 12 * base.stat().st_size
    assert own <= below
    adapters = whole.runner.model.base.up.adapter["b"], whole.runner.model.base.down.adapter["b"]
    assert all(bool(b.abs().sum() > 0) for b in adapters), "the adapters did not learn"


@pytest.mark.parametrize("part", [0.6, 0.7, 0.9])
def test_killed_and_resumed(part: float, job: Job, whole: Walk, tmp_path: Path) -> None:
    """A resumed run makes the model anew in the stage where it broke off, and has the bits of one that lived on."""
    step = int(part * whole.ticks)
    LivesOn.built.clear()
    again = assert_resumes(job, tmp_path, whole, step, stage=1 if part < 0.8 else 2)
    assert len(LivesOn.built) == 1
    assert again.result["cost"][-1]["parameters"] == whole.result["cost"][-1]["parameters"]


def test_killed_between_two_stages(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Killed before the first checkpoint of a stage, it is made with the rows of the stage before, and grows then."""
    steps = 2 * -(-len(whole.runner.stream.stages[0].train) // 64)
    state = job.killed(tmp_path, steps + 1)
    assert (state["phase"], state["stage"]) == ("done", 0)
    LivesOn.built.clear()
    again = job.walk(tmp_path, resume=True)
    assert LivesOn.built == [whole.runner.stream.stages[0].n_items]
    assert_same_walk(whole, again)


def test_another_base_is_refused(job: Job, whole: Walk, tmp_path: Path) -> None:
    """A base of another hash is refused by its name; nothing is loaded half."""
    base = Path(job.settings["base_file"])
    right = base.read_bytes()
    job.killed(tmp_path, whole.ticks // 2)
    base.write_bytes(write_base(tmp_path / "wrong", seed=1).read_bytes())
    try:
        with pytest.raises(CheckpointError, match=r"base.safetensors of property 'base_file' has changed"):
            job.walk(tmp_path, resume=True)
    finally:
        base.write_bytes(right)


def test_it_may_begin_anew(job: Job, tmp_path: Path) -> None:
    """Living on is no reason to refuse a full retraining: each stage begins with new weights of the stage's size."""
    walk = job.walk(tmp_path, strategy=["FullRetrain", "Sized"], epochs=1)
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    for state in (s for s in states if s["phase"] == "train"):
        steps = {int(moments["step"]) for moments in state["trainer"]["own"]["optimizer"].values()}
        assert steps == {state["progress"]["step"]}
    assert all(row[stage] is not None for stage, row in enumerate(walk.result["matrix"]["ndcg@5"]))
