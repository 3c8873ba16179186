"""A frozen base with an adapter per stage, as PESO needs it: the base is referred to by its hash, never stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance_helpers import (
    FUSE,
    SMALL,
    Job,
    Walk,
    assert_grows,
    assert_reported,
    assert_resumes,
    assert_same_walk,
    checkpoints,
    matrix,
    write_log,
)
from recbole.model.abstract_recommender import SequentialRecommender
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext

WIDTH, HIDDEN = 16, 1024


class LowRank(nn.Module):
    """An adapter of rank 2: starts as zero, as LoRA does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.b = nn.Parameter(torch.zeros(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.T @ self.b.T


class FrozenBase(SequentialRecommender):
    """A frozen two-layer base from a file between the item embeddings and an output layer tied to them."""

    defaults = {"loss_type": "CE"}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.base_file = Path(config["base_file"])
        self.item_embedding = nn.Embedding(self.n_items, WIDTH, padding_idx=0)
        self.output = nn.Linear(WIDTH, self.n_items, bias=False)
        self.output.weight = self.item_embedding.weight
        # Owned, though its name begins as the base's does.
        self.base_scale = nn.Parameter(torch.ones(WIDTH))
        self.base = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.base.load_state_dict(load_file(self.base_file))
        self.base.requires_grad_(False)
        self.adapters = nn.ModuleList()

    def frozen_bases(self) -> dict[str, dict[str, str]]:
        digest = hashlib.sha256(self.base_file.read_bytes()).hexdigest()
        return {"base": {"source": self.base_file.name, "sha256": digest}}

    def forward(self, batch: Any) -> torch.Tensor:
        hidden = self.item_embedding(batch[self.ITEM_SEQ]).sum(1) / batch[self.ITEM_SEQ_LEN].unsqueeze(1)
        return self.base(hidden) * self.base_scale + sum(adapter(hidden) for adapter in self.adapters)

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.output(self.forward(batch)), batch[self.POS_ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.output(self.forward(batch))


class AdapterPerStage(Strategy):
    """One adapter for each stage so far, of which the newest trains; items stay near their last embedding."""

    defaults = {"pull": 0.1}
    prefix = "adapterperstage"

    def prepare_model(self, ctx: StageContext) -> None:
        while len(ctx.model.adapters) <= ctx.index:
            ctx.model.adapters.append(LowRank(WIDTH))
        for adapter in ctx.model.adapters[:-1]:
            adapter.requires_grad_(False)

    def loss_terms(self, ctx: StageContext, batch: Any) -> Mapping[str, torch.Tensor]:
        previous = ctx.previous_model
        if previous is None:
            return {}
        assert len(previous.adapters) == ctx.index
        old = previous.item_embedding.weight
        return {"pull": self.params["pull"] * (ctx.model.item_embedding.weight[: len(old)] - old).square().sum()}


def write_base(path: Path, seed: int = 0) -> Path:
    """Writes a base."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    save_file(base.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over its base."""
    log = write_log(tmp_path_factory.mktemp("log"))
    base = write_base(log.folder / "base.safetensors")
    settings = {"strategy": "AdapterPerStage", "base_file": str(base), "checkpoint_keep": 100}
    return Job(FrozenBase, log.folder, settings, {"strategies": AdapterPerStage})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk; it must leave the global random state alone."""
    before = torch.get_rng_state()
    walk = job.walk(tmp_path_factory.mktemp("whole"))
    assert torch.equal(torch.get_rng_state(), before), "adapters were drawn from the global generator"
    return walk


def states(walk: Walk) -> list[dict[str, Any]]:
    """Returns every checkpoint."""
    return [checkpoint.read(path) for path in checkpoints(walk)]


def test_both_triangles_and_growth(whole: Walk) -> None:
    """Every cell of the matrix is filled, rows grow, one adapter a stage, the newest alone trains beside the items."""
    assert not torch.from_numpy(matrix(whole, "ndcg@5")).isnan().any()
    assert_grows(whole)
    model = whole.runner.model
    assert len(model.adapters) == 3 and model.output.weight is model.item_embedding.weight
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"item_embedding.weight", "base_scale", "adapters.2.a", "adapters.2.b"}
    assert any(c["terms"].get("pull", 0) > 0 for c in whole.result["curves"]), "previous_model never pulled"


def test_the_base_is_not_in_a_checkpoint(whole: Walk, job: Job) -> None:
    """No key below ``base``, no file as large as the base; the base's source and hash instead."""
    base = Path(job.settings["base_file"])
    told = {"base": {"source": base.name, "sha256": hashlib.sha256(base.read_bytes()).hexdigest()}}
    assert checkpoints(whole)
    for path in checkpoints(whole):
        with safe_open(path / "tensors.safetensors", framework="pt") as file:
            keys = list(file.keys())
        assert [k for k in keys if "base" in k.split("/")[-1].split(".")] == []
        assert "model/tensors/base_scale" in keys, "a parameter of the model's own was taken for a part of the base"
        assert (path / "tensors.safetensors").stat().st_size < base.stat().st_size
        assert json.loads((path / "state.json").read_text())["model"]["bases"] == told


def test_tied_tensors_are_stored_once(whole: Walk) -> None:
    """The item table and the output layer are one tensor in every copy of the model that a checkpoint holds."""
    newest = next(path for path, s in zip(checkpoints(whole)[::-1], states(whole)[::-1], strict=True) if "trainer" in s)
    with safe_open(newest / "tensors.safetensors", framework="pt") as file:
        tables = [k for k in file.keys() if k.endswith(("item_embedding.weight", "output.weight"))]  # noqa: SIM118
    copies = [key.rsplit("/", 1)[0] for key in tables if "/optimizer/" not in key]
    assert {"model/tensors", "stage_start/model/tensors", "previous/model/tensors"} <= set(copies)
    assert len(copies) == len(set(copies)), f"stored twice: {sorted(tables)}"
    held = checkpoint.read(newest)["model"]["tensors"]
    assert torch.equal(held["output.weight"], held["item_embedding.weight"])


def test_older_adapters_stay(whole: Walk) -> None:
    """An adapter has, at the end of the stream, the bits that it had at the end of its stage, and it did learn."""
    ends = {s["stage"]: s for s in states(whole) if s["phase"] == "done"}
    final = whole.runner.model.state_dict()
    for stage in (0, 1):
        held = ends[stage]["model"]["tensors"]
        assert not any(name.startswith(f"adapters.{stage + 1}.") for name in held)
        for name in (f"adapters.{stage}.a", f"adapters.{stage}.b"):
            assert torch.equal(held[name], final[name])
        assert held[f"adapters.{stage}.b"].abs().sum() > 0


def test_the_optimiser_holds_what_trains(whole: Walk) -> None:
    """No moments of the base or of older adapters."""
    last = [s for s in states(whole) if "trainer" in s and s["stage"] == 2][-1]
    assert set(last["trainer"]["own"]["optimizer"]) == {
        "item_embedding.weight", "base_scale", "adapters.2.a", "adapters.2.b",
    }  # fmt: skip


def test_another_base_is_refused_and_the_right_one_resumes(job: Job, whole: Walk, tmp_path: Path) -> None:
    """A resumed run over a base of another hash is refused by its name; over its own base it gives the same bits."""
    base = Path(job.settings["base_file"])
    right = base.read_bytes()
    state = job.killed(tmp_path, whole.ticks // 2)
    assert (state["phase"], state["stage"]) == ("train", 1)
    wrong = write_base(tmp_path / "wrong", seed=1).read_bytes()
    base.write_bytes(wrong)
    try:
        with pytest.raises(CheckpointError, match=r"base.safetensors") as refused:
            job.walk(tmp_path, resume=True)
    finally:
        base.write_bytes(right)
    assert "of property 'base_file' has changed since the checkpoint" in str(refused.value)
    assert_same_walk(whole, job.walk(tmp_path, resume=True))


def test_a_finished_stage_resumes_too(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Killed in the first step of a stage, the walk goes on from the end of the stage before."""
    first = [c for c in whole.result["curves"] if c["stage"] == 0]
    steps = len(first) * -(-len(whole.runner.stream.stages[0].train) // SMALL["train_batch_size"])
    state = job.killed(tmp_path, steps + 1)
    assert (state["phase"], state["stage"]) == ("done", 0)
    assert_same_walk(whole, job.walk(tmp_path, resume=True))


def test_it_reports(whole: Walk) -> None:
    """The costs count what trains and what is stored apart from all parameters."""
    assert_reported(whole)
    cost = whole.result["cost"][-1]
    assert cost["trainable_parameters"] < cost["parameters"] / 10


def test_kill_late(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Killed in the last stage, with two frozen adapters behind it."""
    assert_resumes(job, tmp_path, whole, whole.ticks - 2, stage=2)
