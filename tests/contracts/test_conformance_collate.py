"""A model that adds columns of its own to its batches: one hook for training, evaluation and replayed rows.

The model reads the item before each target and the days since, which it looks up by the range of the history; whatever
it is given is compared with what a plain loop over the log finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import FUSE, Job, assert_resumes, matrix, write_log
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import BPR

from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import contract
from recbole_cl.model.sasrec import SASRec
from recbole_cl.stream.batch import HI, LO, POSITION, TARGETS, Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.stage import Targets
from recbole_cl.training.stage_models import StageModels

BEFORE, WAITED = "_before", "_waited"


def before_by_hand(batcher: Any, position: int) -> tuple[int, int]:
    """Returns the newest item of the user before a position, 0 without one, and the time since."""
    table = batcher.table
    earlier = np.flatnonzero(table.user[:position] == table.user[position])
    if not len(earlier):
        return 0, 0
    return int(table.item[earlier[-1]]), int(table.timestamp[position] - table.timestamp[earlier[-1]])


class Follows:
    """Mixin with the two columns; it compares each batch with the loop and counts where batches come from."""

    seen: ClassVar[dict[str, int]] = {}
    made: ClassVar[list[tuple[bool, int]]] = []

    def collate(self, batcher: Any, rows: Interaction, targets: Targets, evaluation: bool) -> Interaction:
        assert len(targets) == len(rows)
        assert targets.hi.tolist() == rows[HI].tolist() and targets.lo.tolist() == rows[LO].tolist()
        table, some = batcher.table, targets.hi > targets.lo
        last = table.seq[np.where(some, targets.hi - 1, 0)]
        item = np.where(some, table.item[last], 0)
        waited = np.where(some, table.timestamp[targets.position] - table.timestamp[last], 0)
        rows.interaction[BEFORE] = torch.from_numpy(np.where(item < batcher.n_items, item, 0) if evaluation else item)
        rows.interaction[WAITED] = torch.from_numpy(waited)
        self.made.append((evaluation, len(rows)))
        self.batcher = batcher
        return rows

    def look(self, batch: Any, where: str) -> None:
        """Compares the columns of a batch with the loop."""
        stages = set()
        for position, item, waited in zip(*(batch[name].tolist() for name in (POSITION, BEFORE, WAITED)), strict=True):
            expected = before_by_hand(self.batcher, position)
            assert (item, waited) == (expected[0] if expected[0] < self.batcher.n_items else 0, expected[1])
            stages.add(int(self.batcher.table.stage[position]))
        self.seen[where] = self.seen.get(where, 0) + len(batch[POSITION])
        if where == "loss" and len(stages) > 1:
            self.seen["replayed"] = self.seen.get("replayed", 0) + 1

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        self.look(batch, "loss")
        return super().calculate_loss(batch)  # type: ignore[misc, no-any-return]

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        self.look(batch, "scores")
        return super().full_sort_predict(batch)  # type: ignore[misc, no-any-return]


class AfterBPR(Follows, BPR):
    """BPR whose users are also where they are: the item before is added to them."""

    def get_user_embedding(self, user: torch.Tensor) -> torch.Tensor:
        return self.user_embedding(user) + self.here

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        self.here = self.item_embedding(batch[BEFORE])
        return super().calculate_loss(batch)

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        self.here = self.item_embedding(batch[BEFORE])
        return super().full_sort_predict(batch)


class AfterSASRec(Follows, SASRec):
    """SASRec on windows, which have the columns of their last target."""

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        assert TARGETS in batch
        return super().calculate_loss(batch)


@pytest.fixture(autouse=True)
def anew() -> None:
    """Nothing is counted yet."""
    Follows.seen.clear()
    Follows.made.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the log."""
    return write_log(tmp_path_factory.mktemp("log")).folder


@pytest.mark.parametrize("model", [AfterBPR, AfterSASRec])
def test_the_columns_are_there_in_training_evaluation_and_replay(data: Path, tmp_path: Path, model: type) -> None:
    """In every batch that the model is given, and right; a walk that is killed goes on to the same bits."""
    job = Job(model, data, {"strategy": "ERRandom"})
    whole = job.walk(tmp_path / "whole")
    assert all(Follows.seen.get(where, 0) > 10 for where in ("loss", "scores", "replayed")), Follows.seen
    assert {evaluation for evaluation, _ in Follows.made} == {False, True}
    assert np.isfinite(matrix(whole, "hit@5")).all()
    held = whole.runner.strategy.members[0].memory.columns
    assert POSITION in held and BEFORE not in held  # what a model adds is as it is when a row is replayed
    assert_resumes(job, tmp_path / "killed", whole, whole.ticks // 2, stage=1)


@pytest.mark.parametrize("model", [BPR, SASRec])
def test_without_the_hook_nothing_changes(
    data: Path, tmp_path: Path, model: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract's neutral hook, and none, give the same bits."""
    job = Job(model, data, {"strategy": "ERRandom", "epochs": 1})
    plain = job.walk(tmp_path / "plain")
    context = StageModels.context

    def with_collate(self: Any, *args: Any) -> Any:
        ctx = context(self, *args)
        assert ctx.batcher.collate is None
        ctx.batcher.collate = contract(ctx.model).collate
        return ctx

    monkeypatch.setattr(StageModels, "context", with_collate)
    assert job.walk(tmp_path / "asked").result["matrix"] == plain.result["matrix"]


def test_columns_of_another_length_are_refused(data: Path, tmp_path: Path) -> None:
    """The message names the column and its length."""
    config = Job(AfterBPR, data).config(tmp_path)
    stream = build_stream(config)
    stage = stream.stages[0]
    batcher = Batcher(config, stream, stream.view(0), stage.n_users, stage.n_items)

    def short(batcher: Any, rows: Interaction, targets: Targets, evaluation: bool) -> Interaction:
        rows.interaction["_own"] = torch.zeros(len(rows) - 1)
        return rows

    batcher.collate = short
    with pytest.raises(ConfigError, match=rf"given {len(stage.train)} rows .*'_own' \({len(stage.train) - 1}\)"):
        batcher.rows(stage.train)


def test_parity_knows_no_columns_of_a_model(data: Path, tmp_path: Path) -> None:
    """RecBole's loader makes the batches there: it is said before training, not by a missing column."""
    with pytest.raises(ConfigError, match="'parity' is 'recbole', but model 'AfterBPR' adds columns"):
        Job(AfterBPR, data).walk(tmp_path, parity="recbole", n_stages=1, checkpoint_steps=None)
