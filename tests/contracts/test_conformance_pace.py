"""Accumulated gradients, warm-up and a schedule in a run that is killed; who cannot have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conformance_helpers import FUSE, Job, Walk, assert_resumes, write_log
from recbole.model.general_recommender.bpr import BPR

from recbole_cl import checkpoint
from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import ContinualModel
from recbole_cl.strategy.context import StageContext


class Paced(ContinualModel, BPR):
    """BPR whose users learn at another rate than its items."""

    defaults = {"embedding_size": 8}

    def parameter_groups(self, ctx: StageContext, learning_rate: float) -> list[dict[str, Any]]:
        users = {"params": [self.user_embedding.weight], "lr": 0.5 * learning_rate}
        return [users, {"params": [self.item_embedding.weight]}]

    def calculate_loss(self, interaction: Any) -> Any:
        FUSE.tick()
        return super().calculate_loss(interaction)


class PacedAlone(Paced):
    """Trains its stages by itself."""

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> Any:
        return object()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model under a strategy that keeps the data gradients apart; three batches a step, the last step has fewer."""
    log = write_log(tmp_path_factory.mktemp("log"))
    settings = {"accumulate_gradients": 3, "warmup": 4, "lr_schedule": "cosine", "checkpoint_steps": 1}
    more = {"strategy": ["SI", {"ERRandom": {"batch_size": 8}}], "train_batch_size": 32, "checkpoint_keep": 100}
    return Job(Paced, log.folder, {**settings, **more})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk."""
    return job.walk(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [5, 7, 11])
def test_killed_between_the_batches_of_a_step(step: int, job: Job, whole: Walk, tmp_path: Path) -> None:
    """What the killed process had added up of a step is computed again; rates go on at the step where they were."""
    per_epoch = [-(-len(stage.train) // 32) for stage in whole.runner.stream.stages]
    assert per_epoch[1] % 3, "every step has three batches: the test asks for less than it could"
    again = assert_resumes(job, tmp_path, whole, 2 * per_epoch[0] + step, stage=1)
    assert again.result["curves"] and whole.ticks == 2 * sum(per_epoch)


def test_a_step_has_three_batches(whole: Walk) -> None:
    """Checkpoints count steps, not batches."""
    states = [checkpoint.read(path) for path in checkpoint.numbered(whole.runner.folder / "checkpoints")]
    for stage in whole.runner.stream.stages:
        batches = -(-len(stage.train) // 32)
        steps = -(-batches // 3)
        inside = [s["progress"]["step"] for s in states if s["phase"] == "train" and s["stage"] == stage.index]
        assert sorted(set(inside)) == list(range(1, 2 * steps + 1))


@pytest.mark.parametrize("asked", [{"accumulate_gradients": 2}, {"warmup": 10}, {"lr_schedule": "linear"}])
def test_a_trainer_of_its_own_refuses_them(asked: dict[str, Any], job: Job, tmp_path: Path) -> None:
    """The model's own loop would not read them."""
    name = next(iter(asked))
    with pytest.raises(ConfigError, match=f"property '{name}' has no effect on the model PacedAlone"):
        Job(PacedAlone, job.data, asked).walk(tmp_path)
