"""A stream of two tasks with a classifier, as PCL needs it: a shared backbone, a head per task, a metric per column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import (
    FUSE,
    Job,
    Walk,
    assert_grows,
    assert_reported,
    assert_resumes,
    matrix,
    undecided,
    write_log,
)
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.stream.build import stages_of_slices
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices
from recbole_cl.stream.stage import Stage, Targets, Task

NEXT = Task(kind="next_item", name="next item", metrics=("hit", "ndcg"), primary="hit@5")
GROUP = Task(
    kind="classification",
    name="group of the user",
    n_labels=3,
    metrics=("accuracy", "macro_f1"),
    primary="accuracy",
    description="Tell the group that a user belongs to from what they took.",
)


class NextItemThenGroup(Scheduler):
    """Stage 0 is next-item prediction over the whole log, stage 1 the group of the same users; not slices of time."""

    defaults = {"n_stages": 2}
    tasks: ClassVar[tuple[Task, Task]] = (NEXT, GROUP)

    def assign(self, log: Log) -> Slices:
        return Slices(np.zeros(len(log), dtype=np.int64), ["next item"])

    def stages(self, table: Any, roles: np.ndarray, dataset: Any) -> list[Stage]:
        [first] = stages_of_slices(self.config, table, roles, dataset)
        users = np.flatnonzero(np.diff(table.ptr) > 0)
        # A label is a class from 0; RecBole's token 0 is padding.
        label = dataset.user_feat["group"].numpy()[users] - 1
        lo, hi = table.ptr[users], table.ptr[users + 1]
        targets = Targets(table.seq[hi - 1], users, lo, hi, label)
        part = np.arange(len(users)) % 5
        second = Stage(
            index=1,
            name="group",
            start=first.start,
            end=first.end,
            train=targets[part < 3],
            valid=targets[part == 3],
            test=targets[part == 4],
            task=self.tasks[1],
            n_users=table.n_users,
            n_items=table.n_items,
            catalogue=table.n_items,
            first_new_user=table.n_users,
            first_new_item=table.n_items,
        )
        return [replace(first, task=self.tasks[0]), second]


class TwoHeads(SequentialRecommender):
    """A mean of item embeddings, prompted by the task, with a head for each classification."""

    defaults = {"loss_type": "CE", "embedding_size": 12}
    asked: ClassVar[list[tuple[str, int]]] = []
    trained: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size = config["embedding_size"]
        self.tasks: list[Task] = [stage.task for stage in dataset.stream.stages]
        self.item_embedding = nn.Embedding(self.n_items, size, padding_idx=0)
        self.prompt = nn.Embedding(len(self.tasks), size)
        heads = {task.name: nn.Linear(size, task.n_labels) for task in self.tasks if task.kind == "classification"}
        self.heads = nn.ModuleDict(heads)

    def forward(self, batch: Any) -> torch.Tensor:
        items = batch[self.ITEM_SEQ]
        return self.item_embedding(items).sum(1) / batch[self.ITEM_SEQ_LEN].unsqueeze(1) + self.prompt(batch["_task"])

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        self.trained.append(tuple(batch["_task"].unique().tolist()))
        hidden, losses = self.forward(batch), []
        for number, task in enumerate(self.tasks):
            mine = batch["_task"] == number
            logits = self._logits(hidden[mine], task)
            losses.append(F.cross_entropy(logits, batch["_label"][mine], reduction="sum"))
        return torch.stack(losses).sum() / len(hidden)

    def _logits(self, hidden: torch.Tensor, task: Task) -> torch.Tensor:
        if task.kind == "classification":
            return self.heads[task.name](hidden)
        return hidden @ self.item_embedding.weight.T

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        self.asked.extend(("rank", int(task)) for task in batch["_task"].unique())
        return self._logits(self.forward(batch), self.tasks[0])

    def predict_task(self, batch: Any, task: Task) -> torch.Tensor:
        self.asked.extend((task.name, int(task_)) for task_ in batch["_task"].unique())
        return self._logits(self.forward(batch), task)


SETTINGS = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "user": ["user_id", "group"]},
    "scheduler": "NextItemThenGroup",
    "n_stages": 2,
    "epochs": 12,
    "train_batch_size": 32,
    "metrics": ["NDCG", "GiniIndex"],
    "valid_metric": "NDCG@5",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over a log whose users have groups."""
    return Job(TwoHeads, write_log(tmp_path_factory.mktemp("log")).folder, SETTINGS, {"schedulers": NextItemThenGroup})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk."""
    return job.walk(tmp_path_factory.mktemp("whole"))


def test_each_column_has_its_own_metric(whole: Walk) -> None:
    """Ranking metrics fill the first column, class metrics the second; ``primary`` joins them, both triangles."""
    assert set(whole.result["matrix"]) == {"hit@5", "ndcg@5", "primary", "accuracy", "macro_f1"}
    hit, accuracy, primary = (matrix(whole, name) for name in ("hit@5", "accuracy", "primary"))
    assert np.isnan(hit[:, 1]).all() and np.isnan(accuracy[:, 0]).all()
    assert np.isfinite(primary).all(), "a cell of either triangle is missing"
    np.testing.assert_array_equal(primary[:, 0], hit[:, 0])
    np.testing.assert_array_equal(primary[:, 1], accuracy[:, 1])
    assert whole.result["primary_metric"] == "primary"
    assert [stage["primary_metric"] for stage in whole.result["stages"]] == ["hit@5", "accuracy"]
    assert [stage["task"] for stage in whole.result["stages"]] == ["next item", "group of the user"]
    assert primary[1, 1] > 0.8, "the groups are plain to see from the items; the head did not learn them"
    # The reference of forward transfer is the second column's before anything was learnt.
    assert whole.result["reference"]["primary"][1] == whole.result["reference"]["accuracy"][1]


def test_hand_computed_accuracy(whole: Walk) -> None:
    """Accuracy and macro F1 of the last cell equal those of the model's answers, counted one by one."""
    runner = whole.runner
    stage = runner.stream.stages[1]
    table, model = runner.stream.table, runner.model.eval()
    length = runner.config["MAX_ITEM_LIST_LENGTH"]
    answers, near = [], 0
    for user in stage.test.user:
        history = table.item[table.seq[table.ptr[user] : table.ptr[user + 1]]][-length:]
        items = torch.zeros(1, length, dtype=torch.int64)
        items[0, : len(history)] = torch.from_numpy(history)
        row = {model.ITEM_SEQ: items, model.ITEM_SEQ_LEN: torch.tensor([len(history)]), "_task": torch.tensor([1])}
        logits = model.predict_task(row, stage.task)[0].detach()
        answers.append(int(logits.argmax()))
        near += undecided(logits, 1)
    truth = [int(runner.stream.dataset.user_feat["group"][user]) - 1 for user in stage.test.user]
    right = sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)
    # Rows whose answer hangs on rounding may be told otherwise in a batch.
    assert near <= 1 and matrix(whole, "accuracy")[1, 1] == pytest.approx(right, abs=near / len(truth) + 1e-12)
    f1 = []
    for label in sorted(set(truth)):
        both = sum(a == b == label for a, b in zip(answers, truth, strict=True))
        f1.append(2 * both / (answers.count(label) + truth.count(label)))
    assert matrix(whole, "macro_f1")[1, 1] == pytest.approx(sum(f1) / len(f1), abs=near + 1e-12)


def test_records_by_metric(whole: Walk) -> None:
    """Every number says how it was scored: ranked in full, or against a label."""
    records = whole.runner.records
    assert {r.mode for r in records.select(metric="hit@5", s=0) if r.t >= 0} == {"full"}
    assert {r.mode for r in records.select(metric="accuracy", s=1) if r.t >= 0} == {"labeled"}
    assert not records.select(metric="hit@5", s=1) and not records.select(metric="accuracy", s=0)
    assert {r.stratum for r in records.select(metric="accuracy")} >= {"all", "known", "warm_user"}


def best_epoch(walk: Walk, stage: int) -> int:
    """Returns the epoch whose weights a stage kept."""
    return max(c["epoch"] for c in walk.result["curves"] if c["stage"] == stage and c["best"])


@pytest.mark.parametrize(("stage", "metric"), [(0, "hit@5"), (1, "accuracy")])
def test_early_stopping_by_the_stages_own_metric(whole: Walk, stage: int, metric: str) -> None:
    """A stage keeps the epoch that is best by its own primary metric."""
    curve = [c["valid"] for c in whole.result["curves"] if c["stage"] == stage]
    other = {"hit@5": "accuracy", "accuracy": "hit@5"}[metric]
    assert all(metric in valid and other not in valid for valid in curve)
    values = [valid[metric] for valid in curve]
    best = max(values)
    # RecBole's early stopping takes an equal later epoch, too.
    assert best_epoch(whole, stage) == max(i for i, value in enumerate(values) if value == best)


def test_direction_is_the_stages_own(job: Job, tmp_path: Path) -> None:
    """Under a ``valid_metric`` of which less is better, accuracy is still the better the more there is of it."""
    walk = job.walk(tmp_path, valid_metric="GiniIndex@5", epochs=8, learning_rate=0.05)
    values = [c["valid"]["accuracy"] for c in walk.result["curves"] if c["stage"] == 1]
    assert values[-1] > values[0]
    assert best_epoch(walk, 1) == max(i for i, value in enumerate(values) if value == max(values))


def test_which_task_a_prediction_answers_for(job: Job, tmp_path: Path) -> None:
    """``task_id: given`` asks for the evaluated stage, ``latest`` for the trained one; training rows have their own."""
    TwoHeads.asked.clear()
    TwoHeads.trained.clear()
    job.walk(tmp_path / "given", task_id="given", epochs=1)
    assert set(TwoHeads.asked) == {("rank", 0), (GROUP.name, 1)}
    # All rows lie in slice 0 of the table: only the targets know which task they are of.
    assert set(TwoHeads.trained) == {(0,), (1,)}
    TwoHeads.asked.clear()
    job.walk(tmp_path / "latest", task_id="latest", epochs=1)
    assert set(TwoHeads.asked) == {("rank", 0), ("rank", 1), (GROUP.name, 0), (GROUP.name, 1)}


def test_replayed_rows_keep_their_task(job: Job, tmp_path: Path) -> None:
    """Rows of the first task that are replayed in the second still say so, and keep their own labels."""
    TwoHeads.trained.clear()
    job.walk(tmp_path, strategy={"ERRandom": {"memory_size": 50, "batch_size": 16}}, epochs=1)
    assert set(TwoHeads.trained) == {(0,), (0, 1)}


def test_it_grows_resumes_and_reports(job: Job, whole: Walk, tmp_path: Path) -> None:
    """What first occurs among held-out targets of task 1 has a row in task 2; a killed walk gives the same bits."""
    assert_grows(whole)
    epochs = len([c for c in whole.result["curves"] if c["stage"] == 0])
    steps = epochs * -(-len(whole.runner.stream.stages[0].train) // SETTINGS["train_batch_size"]) + 3
    assert_resumes(job, tmp_path, whole, steps, stage=1)
    page = assert_reported(whole)
    assert "accuracy" in page and GROUP.name in page


@pytest.mark.parametrize(
    ("task", "model", "told"),
    [
        (replace(GROUP, primary="hit@5"), TwoHeads, "'hit@5' is not computed"),
        (replace(GROUP, metrics=("acuracy",), primary=None), TwoHeads, "did you mean 'accuracy'"),
        (GROUP, "SASRec", "SASRec has no predict_task"),
    ],
)
def test_a_task_that_cannot_be_answered_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, model: Any, told: str
) -> None:
    """An unknown metric, a primary that nobody computes, a model without a classifier: named before training."""
    monkeypatch.setattr(NextItemThenGroup, "tasks", (NEXT, task))
    before = FUSE.ticks
    with pytest.raises(ConfigError, match=told):
        replace(job, model=model).walk(tmp_path)
    assert FUSE.ticks == before
