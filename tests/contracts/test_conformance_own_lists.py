"""A model that makes its lists itself (``recommend``), from the content of items, trained or not."""

from __future__ import annotations

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
from recbole_cl.evaluation.evaluator import Evaluator
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.composite import Composite
from recbole_cl.stream.stage import Stage

K, WIDEST = 5, 4


class OwnLists(SequentialRecommender):
    """Decodes the four allowed items nearest to the history; nothing at all after an item divisible by 7."""

    defaults: ClassVar[dict[str, Any]] = {"loss_type": "CE", "wrong": ""}
    scores_untrained_items = True
    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.wrong = config["wrong"]
        numbers = [int(str(token)[1:]) for token in dataset.field2id_token[self.ITEM_ID][1 : self.n_items]]
        content = torch.tensor([[math.cos(n), math.sin(n), math.cos(3 * n), n % 3 - 1.0] for n in numbers])
        self.register_buffer("content", torch.cat([torch.zeros(1, 4), content]), persistent=False)
        self.map = nn.Linear(4, 4)

    content: torch.Tensor

    def logits(self, batch: Any) -> torch.Tensor:
        hidden = self.content[batch[self.ITEM_SEQ]].sum(1) / batch[self.ITEM_SEQ_LEN].unsqueeze(1)
        return self.map(hidden) @ self.content.T

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.logits(batch), batch[self.POS_ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        self.asked.append(("scores", 0))
        return self.logits(batch)

    def recommend(
        self, batch: Any, k: int, allowed: torch.Tensor, excluded: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(("lists", k))
        scores = self.logits(batch).masked_fill(~allowed, -math.inf)
        scores[excluded] = -math.inf
        last = batch[self.ITEM_SEQ].gather(1, batch[self.ITEM_SEQ_LEN].unsqueeze(1) - 1)
        values, items = scores.masked_fill(last % 7 == 0, -math.inf).topk(WIDEST, dim=1)
        items = items.masked_fill(values.isinf(), 0)
        items, values = F.pad(items, (0, k - WIDEST)), F.pad(values, (0, k - WIDEST), value=-math.inf)
        filled = (items > 0).nonzero()
        if self.wrong and len(filled):
            row = int(filled[0, 0])
            if self.wrong == "outside":
                items[row, 0] = int((~allowed).nonzero()[-1])
            elif self.wrong == "twice":
                items[row, 1] = items[row, 0]
            elif self.wrong == "shape":
                return items[:, 1:], values
            elif self.wrong == "gap":
                items[row, 0], values[row, 0] = 0, -math.inf
            elif self.wrong == "order":
                values[row, 0] = values[row, 1] - 1
            elif self.wrong == "nan":
                values[row, 0] = math.nan
            elif self.wrong == "type":
                return items.float(), values
        return items, values


class Scored(OwnLists):
    """The same model without untrained items."""

    scores_untrained_items = False


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over a log, with rows for all items from the start."""
    metrics = ["Hit", "NDCG", "ItemCoverage"]
    return Job(OwnLists, write_log(tmp_path_factory.mktemp("log")).folder, {"metrics": metrics, "vocabulary": "global"})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk."""
    OwnLists.asked.clear()
    return job.walk(tmp_path_factory.mktemp("whole"))


def lists_by_hand(walk: Walk, stage: Stage, known: set[int] | None, repeat: bool = True) -> list[list[int]]:
    """Returns the last model's lists on the test targets of a stage, from its scores of all items."""
    table, model = walk.runner.stream.table, walk.runner.model.eval()
    lists = []
    for lo, hi, label in zip(stage.test.lo, stage.test.hi, stage.test.label, strict=True):
        earlier = table.item[table.seq[lo:hi]]
        history = earlier[-walk.runner.config["MAX_ITEM_LIST_LENGTH"] :]
        batch = {model.ITEM_SEQ: torch.from_numpy(history)[None], model.ITEM_SEQ_LEN: torch.tensor([len(history)])}
        with torch.no_grad():
            scores = model.logits(batch)[0].numpy()
        left_out = set() if repeat else set(earlier.tolist()) - {int(label)}
        allowed = [i for i in range(1, stage.catalogue) if i not in left_out and (known is None or i in known)]
        ranked = sorted(allowed, key=lambda i: -scores[i])[:WIDEST]
        lists.append([] if history[-1] % 7 == 0 else ranked)
    return lists


def test_the_model_learns_what_is_allowed_before_it_decodes(whole: Walk) -> None:
    """Hit, NDCG and coverage are those of its lists by hand; scores of all items are never asked for."""
    assert {what for what, _ in OwnLists.asked} == {"lists"} and {k for _, k in OwnLists.asked} == {K}
    hits = untrained = 0
    trained = whole.runner.known.items
    for stage in whole.runner.stream.stages:
        lists = lists_by_hand(whole, stage, None)
        hit = [int(label) in items for label, items in zip(stage.test.label, lists, strict=True)]
        gain = [
            1 / math.log2(items.index(int(label)) + 2) if int(label) in items else 0.0
            for label, items in zip(stage.test.label, lists, strict=True)
        ]
        assert matrix(whole, "hit@5")[-1, stage.index] == pytest.approx(np.mean(hit), abs=1e-9)
        assert matrix(whole, "ndcg@5")[-1, stage.index] == pytest.approx(np.mean(gain), abs=1e-9)
        covered = len({i for items in lists for i in items}) / stage.catalogue
        assert matrix(whole, "itemcoverage@5")[-1, stage.index] == pytest.approx(covered, abs=1e-9)
        hits += sum(hit)
        untrained += sum(not trained[i] for items in lists for i in items)
    assert hits and untrained, "the case that matters, untrained items in lists, did not occur"


def test_untrained_items_are_no_cold_targets(job: Job, whole: Walk, tmp_path: Path) -> None:
    """A target without a trained row is cold for a model of rows, and none for one of content."""
    assert all(cell["n_cold"] == 0 for cell in whole.result["cold"])
    plain = Job(Scored, job.data, job.settings).walk(tmp_path)
    assert any(cell["n_cold"] for cell in plain.result["cold"])
    trained = {int(i) for i in np.flatnonzero(plain.runner.known.items)}
    for stage in plain.runner.stream.stages:
        lists = lists_by_hand(plain, stage, trained)
        hit = [int(label) in items for label, items in zip(stage.test.label, lists, strict=True)]
        assert matrix(plain, "hit@5")[-1, stage.index] == pytest.approx(np.mean(hit), abs=1e-9)


def test_an_item_without_a_row_stays_cold(job: Job, tmp_path: Path) -> None:
    """Content does not help where the model has no row: items of later stages, and histories of such items alone."""
    grown = job.walk(tmp_path, vocabulary="growing", epochs=1)
    stages, table = grown.runner.stream.stages, grown.runner.stream.table
    cold = {(cell["t"], cell["s"]): cell["n_cold"] for cell in grown.result["cold"]}
    for (t, s), n_cold in cold.items():
        n, test = stages[t].n_items, stages[s].test
        blind = [
            (table.item[table.seq[max(lo, hi - 8) : hi]] >= n).all() for lo, hi in zip(test.lo, test.hi, strict=True)
        ]
        assert n_cold == int(((test.label >= n) | np.array(blind)).sum())
    assert cold[0, 2]


def test_what_is_not_recommended_again_is_excluded(job: Job, tmp_path: Path) -> None:
    walk = job.walk(tmp_path, repeatable=False, epochs=1)
    again = 0
    for stage in walk.runner.stream.stages:
        lists = lists_by_hand(walk, stage, None, repeat=False)
        hit = [int(label) in items for label, items in zip(stage.test.label, lists, strict=True)]
        assert matrix(walk, "hit@5")[-1, stage.index] == pytest.approx(np.mean(hit), abs=1e-9)
        again += lists != lists_by_hand(walk, stage, None)
    assert again, "no list holds an earlier item: the test could not fail"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("outside", r"returned item \d+, which is not among the \d+ allowed items"),
        ("twice", r"returned item \d+ twice in one list"),
        ("shape", r"returned items of shape \[\d+, 4\] instead of \[\d+, 5\]"),
        ("gap", "returned an item behind an empty slot"),
        ("order", "whose scores rise"),
        ("nan", "not finite where an item stands"),
        ("type", "of type torch.float32"),
    ],
)
def test_wrong_lists_are_told(whole: Walk, wrong: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = whole.runner
    monkeypatch.setattr(runner.model, "wrong", wrong)
    ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))
    with pytest.raises(TrainingError, match=message) as error:
        runner.evaluator.evaluate(ctx, runner.known, runner.stream.stages[1])
    assert "recommend() of OwnLists" in str(error.value)


def test_an_excluded_item_is_told(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = job.walk(tmp_path, repeatable=False, epochs=1)
    plain = OwnLists.recommend
    none = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    monkeypatch.setattr(OwnLists, "recommend", lambda self, batch, k, allowed, _: plain(self, batch, k, allowed, none))
    ctx = walk.runner.state.models.context(2, walk.runner.model, walk.runner.stream.view(2))
    with pytest.raises(TrainingError, match="in a row that it is excluded from"):
        walk.runner.evaluator.evaluate(ctx, walk.runner.known, walk.runner.stream.stages[2])


class Shifting(Strategy):
    """Lifts the scores of one item."""

    def adjust_scores(self, ctx: Any, batch: Any, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 3] += 100.0
        return scores


def test_scores_are_asked_for_where_lists_do_not_serve(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Where a strategy adjusts scores, or candidates are sampled, the model's own lists are of no use."""
    runner = whole.runner
    ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))
    adjusting = Evaluator(runner.config, runner.stream, Composite([Shifting()]))
    OwnLists.asked.clear()
    outcome = adjusting.evaluate(ctx, runner.known, runner.stream.stages[2])
    assert {what for what, _ in OwnLists.asked} == {"scores"}
    assert outcome.recommended is not None and (outcome.recommended[:, 0] == 3).all()
    OwnLists.asked.clear()
    job.walk(tmp_path, eval_args={"mode": "uni20"}, epochs=1)
    assert {what for what, _ in OwnLists.asked} == {"scores"}


def test_gauc_needs_scores(job: Job, whole: Walk, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GAUC needs the scores of all items, but OwnLists makes its lists itself"):
        job.walk(tmp_path, metrics=["NDCG", "GAUC"])
    assert not (tmp_path / "run" / "result.json").exists()
    runner = whole.runner
    runner.config["metrics"] = ["NDCG", "GAUC"]
    try:
        ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))
        with pytest.raises(ConfigError, match="GAUC needs the scores"):
            runner.evaluator.evaluate(ctx, runner.known, runner.stream.stages[2])
    finally:
        runner.config["metrics"] = ["Hit", "NDCG", "ItemCoverage"]


def test_it_resumes_and_reports(job: Job, whole: Walk, tmp_path: Path) -> None:
    assert_resumes(job, tmp_path, whole, whole.ticks // 2, stage=1)
    assert_reported(whole)
