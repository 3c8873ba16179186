"""A model with a metric of its own (a negative log likelihood) and coarser identities of its items."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_reported, assert_resumes, matrix, write_log
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError, TrainingError
from recbole_cl.results import Records

N_GROUPS = 6


class Likely(SequentialRecommender):
    """Tells how likely the next item was, and which of six groups an item belongs to; every seventh has none."""

    defaults: ClassVar[dict[str, Any]] = {"loss_type": "CE"}
    own_metrics: ClassVar[dict[str, bool]] = {"NLL": False, "nearness": True}
    given: ClassVar[list[int]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)

    def logits(self, batch: Any) -> torch.Tensor:
        hidden = self.item_embedding(batch[self.ITEM_SEQ]).sum(1) / batch[self.ITEM_SEQ_LEN].unsqueeze(1)
        return hidden @ self.item_embedding.weight.T

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.logits(batch), batch[self.POS_ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(batch)

    def measure(self, batch: Any) -> dict[str, torch.Tensor]:
        self.given.append(len(batch[self.ITEM_SEQ_LEN]))
        found = F.cross_entropy(self.logits(batch), batch[self.POS_ITEM_ID], reduction="none")
        return {"NLL": found, "nearness": -found}

    def item_levels(self) -> dict[str, np.ndarray]:
        return {"code": np.where(np.arange(self.n_items) % 7 == 0, 0, np.arange(self.n_items) % N_GROUPS + 1)}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over a log, stopped early by its likelihood."""
    given = {"valid_metric": "nll", "metrics": ["Hit", "NDCG", "ItemCoverage"], "epochs": 3, "strata": "history_length"}
    return Job(Likely, write_log(tmp_path_factory.mktemp("log")).folder, given)


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk."""
    return job.walk(tmp_path_factory.mktemp("whole"))


def likelihoods(walk: Walk, s: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, by hand, the last model's likelihoods of the test targets of a stage, and which are not cold."""
    stage, table, model = walk.runner.stream.stages[s], walk.runner.stream.table, walk.runner.model.eval()
    values, warm = [], []
    for lo, hi, label in zip(stage.test.lo, stage.test.hi, stage.test.label, strict=True):
        history = table.item[table.seq[lo:hi]][-walk.runner.config["MAX_ITEM_LIST_LENGTH"] :]
        history = history[history < model.n_items]
        warm.append(len(history) > 0 and label < model.n_items and bool(walk.runner.known.items[label]))
        if not warm[-1]:
            values.append(np.nan)
            continue
        padded = np.pad(history, (0, walk.runner.config["MAX_ITEM_LIST_LENGTH"] - len(history)))
        batch = {model.ITEM_SEQ: torch.from_numpy(padded)[None], model.ITEM_SEQ_LEN: torch.tensor([len(history)])}
        with torch.no_grad():
            values.append(float(-model.logits(batch)[0].log_softmax(0)[label]))
    return np.array(values), np.array(warm)


def test_means_are_those_by_hand(whole: Walk) -> None:
    """Over the targets that are not cold, in all strata; the records say over how many."""
    records, strata = whole.runner.records, whole.result["strata"]["nll"]
    last, cold = len(whole.runner.stream) - 1, 0
    for s, stage in enumerate(whole.runner.stream.stages):
        values, warm = likelihoods(whole, s)
        # A batch and a single row need not round alike.
        assert matrix(whole, "nll")[-1, s] == pytest.approx(values[warm].mean(), rel=1e-5)
        assert matrix(whole, "nearness")[-1, s] == pytest.approx(-values[warm].mean(), rel=1e-5)
        length = stage.test.hi - stage.test.lo
        for stratum, flag in {
            "known": warm,
            "new_user": warm & (stage.test.user >= stage.first_new_user),
            "warm_item": warm & (stage.test.label < stage.first_new_item),
            "history_0_to_4": warm & (length < 5),
            "history_from_20": warm & (length >= 20),
        }.items():
            found = strata[stratum][last][s]
            assert found == (pytest.approx(values[flag].mean(), rel=1e-5) if flag.any() else None), stratum
        [record] = records.select(metric="nll", t=last, s=s, stratum="all")
        assert record.n == warm.sum()
        cold += (~warm).sum()
        [ranked] = records.select(metric="hit@5", t=last, s=s, stratum="all", level="item")
        assert ranked.n == len(warm), "rankings count cold targets as misses"
    assert cold, "no target is cold: the test could not fail"


def test_less_is_better(whole: Walk) -> None:
    """Early stopping, the best epoch and the summaries go by the direction that the model tells."""
    assert whole.result["primary_metric"] == "nll" and whole.runner.config["valid_metric_bigger"] is False
    improved = 0
    for stage in range(len(whole.runner.stream)):
        points = [point for point in whole.result["curves"] if point["stage"] == stage]
        best = math.inf
        for point in points:
            assert point["best"] == (point["valid"]["nll"] < best)
            improved += point["best"] and point["epoch"] > 0
            best = min(best, point["valid"]["nll"])
    assert improved, "no epoch was better than the one before"
    R = matrix(whole, "nll")
    forgotten = np.mean([R[-1, s] - R[s:-1, s].min() for s in range(len(R) - 1)])
    assert whole.result["summary"]["AF"]["nll"] == pytest.approx(forgotten)
    assert whole.result["summary"]["BWT"]["nll"] == pytest.approx(
        np.mean([R[s, s] - R[-1, s] for s in range(len(R) - 1)])
    )
    assert whole.result["summary"]["AF"]["nearness"] == pytest.approx(forgotten), "more of it is better"
    assert whole.result["summary"]["h_mean"]["nll"] is None
    assert whole.result["smaller_is_better"] == {
        "hit@5": False, "ndcg@5": False, "itemcoverage@5": False, "nll": True, "nearness": False
    }  # fmt: skip


def test_training_stops_where_it_gets_worse(job: Job, tmp_path: Path) -> None:
    """With a rate that overshoots, epochs after the first do not improve, and are told as such."""
    walk = job.walk(tmp_path, learning_rate=3.0, epochs=8, stopping_step=1, n_stages=1)
    valid = [point["valid"]["nll"] for point in walk.result["curves"]]
    best = int(np.argmin(valid))
    assert len(valid) < 8 and all(v > valid[best] for v in valid[best + 1 :]) and len(valid) == best + 3


def test_names_of_own_metrics(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 'NLL', which the model measures anyway"):
        job.config(tmp_path, metrics=["NDCG", "NLL"])
    with pytest.raises(ConfigError, match="set valid_metric to one of hit@5, nll, nearness"):
        job.config(tmp_path, metrics=["hit"], valid_metric="nil")
    Taken = type("Taken", (Likely,), {"own_metrics": {"recall@3": True}})
    with pytest.raises(ConfigError, match="'recall@3', which is one of RecBole's"):
        Job(Taken, job.data, job.settings).config(tmp_path)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"NLL": torch.zeros(1)}, "nll is .*, not a number for each of the"),
        ({}, "nll is nothing, not a number for each of the"),
        (None, "nll is not finite"),
    ],
)
def test_wrong_measures_are_told(whole: Walk, measured: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = whole.runner
    ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))

    def wrong(self: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"NLL": torch.full((len(batch[self.ITEM_SEQ_LEN]),), math.nan)} if measured is None else measured

    monkeypatch.setattr(Likely, "measure", wrong)
    with pytest.raises(TrainingError, match=message) as error:
        runner.evaluator.evaluate(ctx, runner.known, runner.stream.stages[1])
    assert "measure() of Likely on stage 2 (test)" in str(error.value)


# -- levels -------------------------------------------------------------------------------------------------------


def test_levels_equal_those_by_hand(whole: Walk) -> None:
    """Hit and NDCG of groups; what is told of items is not touched."""
    runner, more = whole.runner, 0
    n = runner.model.n_items  # a negative id: a group of its own
    group = [i if i % 7 and i < n else -i for i in range(runner.stream.table.n_items)]
    group = [g if g <= 0 else 10_000 + g % N_GROUPS for g in group]
    ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))
    for s, stage in enumerate(runner.stream.stages):
        outcome = runner.evaluator.evaluate(ctx, runner.known, stage)
        hits, gains = [], []
        assert outcome.recommended is not None
        for items, label in zip(outcome.recommended, stage.test.label, strict=True):
            ranked = list(dict.fromkeys(group[i] for i in items if i))
            hits.append(group[label] in ranked)
            gains.append(1 / math.log2(ranked.index(group[label]) + 2) if hits[-1] else 0.0)
        found = {m: whole.result["levels"]["code"][m][2][s] for m in ("hit@5", "ndcg@5")}
        assert found == {"hit@5": pytest.approx(np.mean(hits)), "ndcg@5": pytest.approx(np.mean(gains))}
        assert set(whole.result["levels"]["code"]) == set(found), "coverage and likelihoods are of items alone"
        more += found["hit@5"] > matrix(whole, "hit@5")[2, s]
        [record] = runner.records.select(metric="hit@5", t=2, s=s, level="code", stratum="new_user")
        new = stage.test.user >= stage.first_new_user
        assert record.n == new.sum() and record.value == pytest.approx(np.mean(np.array(hits)[new]))
        [known] = runner.records.select(metric="hit@5", t=2, s=s, level="code", stratum="known")
        _, warm = likelihoods(whole, s)
        assert known.n == warm.sum() and known.value == pytest.approx(np.mean(np.array(hits)[warm]))
    assert more, "groups are not hit more often than items: the test could not fail"


def test_items_are_told_as_without_levels(job: Job, whole: Walk, tmp_path: Path) -> None:
    Flat = type("Likely", (Likely,), {"item_levels": lambda self: {}, "own_metrics": {}})
    plain = Job(Flat, job.data, job.settings).walk(tmp_path, valid_metric="NDCG@5", epochs=1)
    levelled = job.walk(tmp_path / "levelled", valid_metric="NDCG@5", epochs=1)
    assert "levels" not in plain.result and "levels" in levelled.result
    for metric in ("hit@5", "ndcg@5", "itemcoverage@5"):
        assert plain.result["matrix"][metric] == levelled.result["matrix"][metric]
        assert plain.result["strata"][metric] == levelled.result["strata"][metric]
    assert plain.result["disparity"] == levelled.result["disparity"]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"code": np.zeros(3, dtype=int)}, r"level 'code' has the shape \[3\]"),
        ({"code": np.zeros(1000)}, "type float64"),
        ({"item": np.zeros(3, dtype=int)}, "is the name of the items themselves"),
    ],
)
def test_wrong_levels_are_told(whole: Walk, levels: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = whole.runner
    ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))
    monkeypatch.setattr(Likely, "item_levels", lambda _: levels)
    with pytest.raises(TrainingError, match=message):
        runner.evaluator.evaluate(ctx, runner.known, runner.stream.stages[1])


def test_it_resumes_and_reports(job: Job, whole: Walk, tmp_path: Path) -> None:
    again = assert_resumes(job, tmp_path, whole, whole.ticks // 2, stage=1)
    assert again.result["levels"] == whole.result["levels"]
    page = assert_reported(whole)
    assert "nll" in page and "history from 20" in page
    read = Records.from_csv(whole.runner.folder / "records.csv")
    assert read.levels() == ["code"]
    told = json.loads((whole.runner.folder / "result.json").read_text())
    assert told["levels"] == whole.result["levels"]
