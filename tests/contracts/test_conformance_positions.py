"""Side features joined by ``_position``, as LIBER needs them: a table of what was known before each interaction."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import (
    FUSE,
    START,
    Job,
    Walk,
    assert_grows,
    assert_reported,
    assert_resumes,
    matrix,
    write_atomic,
    write_log,
)
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from recbole_cl.stream.batch import POSITION, Batcher
from recbole_cl.stream.table import InteractionTable

SHIFTED = 2**40
"""Added to every position in one test, as in a log of more than 2**24 interactions."""


def past_features(table: InteractionTable) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of each position from its user's past, and the newest position read for each (-1 for none)."""
    features, newest = np.zeros((len(table), 3), dtype=np.float32), np.full(len(table), -1)
    for user in range(1, table.n_users):
        positions = table.seq[table.ptr[user] : table.ptr[user + 1]]
        for number, position in enumerate(positions[1:], start=1):
            past = positions[:number]
            gap = table.timestamp[position] - table.timestamp[past[-1]]
            features[position] = np.log1p(number), np.log1p(gap), len(set(table.item[past])) / number
            newest[position] = past[-1]
    return features, newest


class ByPosition:
    """Looks features up by ``_position`` and checks that every batch names the right interaction."""

    shift: ClassVar[int] = 0
    seen: ClassVar[dict[str, int]] = {}
    float_times_differ: ClassVar[int] = 0

    def join(self, dataset: Any) -> None:
        """Takes the table behind the positions from the stream."""
        self.table: InteractionTable = dataset.stream.table
        features, self.newest = past_features(self.table)
        # Not persistent: it is computed anew, and no part of the model that a checkpoint holds.
        self.register_buffer("features", torch.from_numpy(features), persistent=False)

    def look_up(self, batch: Any, where: str, targets: torch.Tensor | None) -> torch.Tensor:
        """Returns the rows' features, shape ``[B, 3]``.

        Args:
            batch: The batch.
            where: Name under which the rows are counted.
            targets: Item that each row's interaction has, where the batch tells it.
        """
        for name in ("_position", "_stage", "_timestamp", "_task"):
            assert batch[name].dtype == torch.int64, name
        position = batch["_position"] - self.shift
        at = position.numpy()
        users = batch[self.USER_ID].numpy()
        assert ((self.table.user[at] == users) | (users == 0)).all(), f"{where}: _position is another user's"
        if targets is not None:
            known = targets.numpy() > 0
            assert (self.table.item[at][known] == targets.numpy()[known]).all(), f"{where}: another interaction"
        assert (self.table.timestamp[at] == batch["_timestamp"].numpy()).all()
        assert (self.table.stage[at] == batch["_stage"].numpy()).all()
        assert (self.newest[at] < at).all(), f"{where}: reads the target or what comes after it"
        counts = ByPosition.seen
        counts[where] = counts.get(where, 0) + len(at)
        if "timestamp" in batch:
            ByPosition.float_times_differ += int((batch["timestamp"].double() != batch["_timestamp"].double()).sum())
        return self.features[position]


class SequenceWithFeatures(ByPosition, SequentialRecommender):
    """A mean of item embeddings plus a projection of the features of the target's position."""

    defaults = {"loss_type": "CE"}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)
        self.project = nn.Linear(3, 8)
        self.join(dataset)

    def hidden(self, batch: Any, where: str) -> torch.Tensor:
        items, length = batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]
        # In evaluation the target's item is in the row too: position and history have to agree with it.
        features = self.look_up(batch, where, batch[self.ITEM_ID])
        last = items.gather(1, length.unsqueeze(1) - 1).flatten().numpy()
        before = self.table.item[self.newest[(batch["_position"] - self.shift).numpy()]]
        assert ((last == before) | (before >= self.n_items) | (last == 0)).all(), "the history ends elsewhere"
        return self.item_embedding(items).sum(1) / length.unsqueeze(1) + self.project(features)

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.hidden(batch, "train") @ self.item_embedding.weight.T, batch[self.POS_ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.hidden(batch, "evaluate") @ self.item_embedding.weight.T


class PairWithFeatures(ByPosition, GeneralRecommender):
    """Scores a user and an item with the features of a position: from labels, from negatives, in full or sampled."""

    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.label_field = config["LABEL_FIELD"]
        self.drawn = config["train_neg_sample_args"]["distribution"] != "none"
        self.user_embedding = nn.Embedding(self.n_users, 8, padding_idx=0)
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)
        self.bias = nn.Linear(3, 8)
        self.join(dataset)

    def hidden(self, batch: Any, where: str, targets: torch.Tensor | None) -> torch.Tensor:
        return self.user_embedding(batch[self.USER_ID]) + self.bias(self.look_up(batch, where, targets))

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        label = batch[self.label_field]
        # A sampled item stands in the row of the target it was drawn for: the position is the target's.
        targets = torch.where(label > 0, batch[self.ITEM_ID], 0) if self.drawn else batch[self.ITEM_ID]
        hidden = self.hidden(batch, "train", targets)
        return F.binary_cross_entropy_with_logits((hidden * self.item_embedding(batch[self.ITEM_ID])).sum(1), label)

    def predict(self, batch: Any) -> torch.Tensor:
        hidden = self.hidden(batch, "evaluate", batch[self.ITEM_ID])
        return torch.sigmoid((hidden * self.item_embedding(batch[self.ITEM_ID])).sum(1))

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.hidden(batch, "rank", None) @ self.item_embedding.weight.T


LABELLED = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]},
    "threshold": {"rating": 3},
    "train_neg_sample_args": None,
    "metrics": ["AUC", "LogLoss"],
    "valid_metric": "AUC",
    "eval_args": {"mode": "labeled"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a log with ratings."""
    log = write_log(tmp_path_factory.mktemp("log"))
    rated = [(*row, 1 + (number * 7 + int(row[1][1:])) % 5) for number, row in enumerate(log.rows)]
    header = ["user_id:token", "item_id:token", "timestamp:float", "rating:float"]
    write_atomic(log.folder / "log" / "log.inter", header, rated)
    return log.folder


@pytest.fixture(autouse=True)
def counts() -> None:
    """Empties the counters."""
    ByPosition.seen.clear()
    ByPosition.float_times_differ = 0


@pytest.fixture(scope="module")
def job(folder: Path) -> Job:
    """The sequential model."""
    return Job(SequenceWithFeatures, folder)


def assert_counts(walk: Walk, where: str) -> None:
    """Asserts that every training target of every epoch was looked up, and that every test target was."""
    stages, curves = walk.runner.stream.stages, walk.result["curves"]
    epochs = [sum(c["stage"] == s for c in curves) for s in range(len(stages))]
    trained = sum(n * len(stage.train) for n, stage in zip(epochs, stages, strict=True))
    assert ByPosition.seen["train"] >= trained > 0
    assert ByPosition.seen[where] > 0


def test_every_batch_names_its_interaction(job: Job, folder: Path, tmp_path: Path) -> None:
    """Positions, stages and timestamps are exact in each batch; RecBole's own timestamps are not."""
    walk = job.walk(tmp_path / "walk")
    assert_counts(walk, "evaluate")
    table = walk.runner.stream.table
    written = [int(line.split("\t")[2]) for line in (folder / "log" / "log.inter").read_text().splitlines()[1:]]
    assert table.timestamp.dtype == np.int64 and table.timestamp.tolist() == sorted(written)
    assert min(written) == START > 2**24
    assert ByPosition.float_times_differ > 0, "float32 held these timestamps: the test could not fail"
    assert not any("features" in name for name in walk.runner.model.state_dict())
    assert_grows(walk)
    assert np.isfinite(matrix(walk, "ndcg@5")).all()
    assert_reported(walk)
    assert_resumes(job, tmp_path, walk, walk.ticks // 2, stage=1)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (LABELLED, "evaluate"),
        ({"epochs": 1}, "rank"),
        ({"epochs": 1, "eval_args": {"mode": "uni20"}}, "rank"),
    ],
    ids=["labelled", "negatives", "sampled"],
)
def test_pairs(folder: Path, tmp_path: Path, settings: dict[str, Any], where: str) -> None:
    """Labelled rows, rows with negatives, and one ranked row a user: all name an interaction of their user."""
    walk = Job(PairWithFeatures, folder, settings).walk(tmp_path)
    assert_counts(walk, where)
    assert np.isfinite(matrix(walk, walk.result["primary_metric"])).all()


def test_a_ranked_row_reads_nothing_that_it_is_tested_on(folder: Path, tmp_path: Path) -> None:
    """General models rank once for all test targets of a user: the row stands where the first of them does."""
    walk = Job(PairWithFeatures, folder, {"epochs": 1}).walk(tmp_path)
    model, several = walk.runner.model, 0
    for stage in walk.runner.stream.stages:
        rows = walk.runner.evaluator._rows_of(stage, "test").targets
        for user, position in zip(rows.user, rows.position, strict=True):
            tested = stage.test.position[stage.test.user == user]
            assert position == tested.min() and model.newest[position] < tested.min()
            several += len(tested) > 1
    assert several


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (SequenceWithFeatures, {}),
        (SequenceWithFeatures, {"strategy": {"ERRandom": {"memory_size": 40, "batch_size": 8}}}),
        (PairWithFeatures, {"eval_args": {"mode": "uni20"}}),
        (PairWithFeatures, {**LABELLED, "eval_args": {"mode": "uni20"}}),
    ],
    ids=["sequential", "replayed", "sampled", "values"],
)
def test_large_positions_are_exact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: type, settings: dict[str, Any]
) -> None:
    """Positions beyond 2**24 come through loaders, replay, negatives, candidates and evaluation unrounded."""
    original = Batcher.__init__

    def shifted(self: Batcher, *given: Any) -> None:
        original(self, *given)
        self.table_columns[POSITION] = self.table_columns[POSITION] + SHIFTED

    monkeypatch.setattr(Batcher, "__init__", shifted)
    monkeypatch.setattr(ByPosition, "shift", SHIFTED)
    if settings.get("metrics") and settings["eval_args"]["mode"] == "uni20":
        # Candidates of a labelled row stand in the target's row: the position is the target's, the item is not.
        monkeypatch.setattr(
            PairWithFeatures, "predict", lambda m, b: torch.sigmoid(m.hidden(b, "evaluate", None).sum(1))
        )
    Job(model, folder, {**settings, "epochs": 1}).walk(tmp_path)
    assert ByPosition.seen["train"] > 0
