"""A model that scores only the items it decodes, as a generative recommender does: -inf is never recommended."""

from __future__ import annotations

import math
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

from recbole_cl.stream.stage import Stage

K = 5


class Decoder(SequentialRecommender):
    """Scores the four items nearest to the history and no other; nothing at all after an item divisible by 7."""

    defaults = {"loss_type": "CE", "ties": False}
    decoded = 4
    calls: ClassVar[list[str]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.ties = config["ties"]
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)

    def logits(self, batch: Any) -> torch.Tensor:
        hidden = self.item_embedding(batch[self.ITEM_SEQ]).sum(1) / batch[self.ITEM_SEQ_LEN].unsqueeze(1)
        return hidden @ self.item_embedding.weight.T

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.logits(batch), batch[self.POS_ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        self.calls.append("full")
        values, items = self.logits(batch)[:, 1:].topk(self.decoded, dim=1)
        out = torch.full((len(batch[self.ITEM_SEQ_LEN]), self.n_items), -math.inf)
        out.scatter_(1, items + 1, torch.zeros_like(values) if self.ties else values)
        last = batch[self.ITEM_SEQ].gather(1, batch[self.ITEM_SEQ_LEN].unsqueeze(1) - 1)
        return out.masked_fill(last % 7 == 0, -math.inf)

    def scores(self, batch: Any, items: torch.Tensor) -> torch.Tensor:
        self.calls.append("given")
        # A sum of log-probabilities need not have the precision of the evaluator's table.
        return F.log_softmax(self.logits(batch), dim=1).gather(1, items).double()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over a log."""
    metrics = ["Hit", "NDCG", "MRR", "Recall", "Precision", "ItemCoverage"]
    return Job(Decoder, write_log(tmp_path_factory.mktemp("log")).folder, {"metrics": metrics})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk, ranked in full."""
    return job.walk(tmp_path_factory.mktemp("whole"))


def known_items(walk: Walk, upto: int) -> set[int]:
    """Returns the items in training targets, or their histories, of the stages up to one."""
    table, found = walk.runner.stream.table, set()
    for stage in walk.runner.stream.stages[: upto + 1]:
        for lo, hi, label in zip(stage.train.lo, stage.train.hi, stage.train.label, strict=True):
            found |= {int(label), *table.item[table.seq[lo:hi]].tolist()}
    return found


def row_of(walk: Walk, stage: Stage, number: int) -> dict[str, torch.Tensor] | None:
    """Returns the batch of one test target by hand; ``None`` where the model knows nothing of its history."""
    table, model, length = walk.runner.stream.table, walk.runner.model, walk.runner.config["MAX_ITEM_LIST_LENGTH"]
    history = table.item[table.seq[stage.test.lo[number] : stage.test.hi[number]]][-length:]
    history = history[history < model.n_items]
    if not len(history):
        return None
    items = torch.zeros(1, length, dtype=torch.int64)
    items[0, : len(history)] = torch.from_numpy(history)
    return {model.ITEM_SEQ: items, model.ITEM_SEQ_LEN: torch.tensor([len(history)])}


def by_hand(walk: Walk, stage: Stage) -> tuple[dict[str, float], list[list[int]], int, set[int]]:
    """Returns the last model's metrics on a stage, its lists, and the hits that filling up with -inf would give.

    At last the numbers of the rows whose list hangs on rounding: in a batch they may be told otherwise.
    """
    last = len(walk.runner.stream) - 1
    known, model = known_items(walk, last), walk.runner.model.eval()
    sums = dict.fromkeys(("hit", "ndcg", "mrr", "recall", "precision"), 0.0)
    lists, filled_hits, near = [], 0, set[int]()
    for number, label in enumerate(stage.test.label):
        row = row_of(walk, stage, number)
        if row is None:
            lists.append([])
            continue
        with torch.no_grad():
            scores = model.full_sort_predict(row)[0]
            if undecided(model.logits(row)[0, 1:], model.decoded):
                near.add(number)
        allowed = [i for i in range(1, model.n_items) if i in known and i < stage.catalogue]
        finite = [i for i in allowed if math.isfinite(scores[i])]
        ranked = sorted(finite, key=lambda i: -float(scores[i]))[:K]
        lists.append(ranked)
        filled = ranked + [i for i in range(1, model.n_items) if i not in ranked][: K - len(ranked)]
        filled_hits += int(label) in filled
        if int(label) in ranked:
            rank = ranked.index(int(label))
            for name, value in (
                ("hit", 1.0), ("ndcg", 1 / math.log2(rank + 2)), ("mrr", 1 / (rank + 1)), ("recall", 1.0),
                ("precision", 1 / K),
            ):  # fmt: skip
                sums[name] += value
    assert len(near) <= 1, "rounding must not decide the test"
    return {name: value / len(stage.test) for name, value in sums.items()}, lists, filled_hits, near


def test_metrics_equal_those_by_hand(whole: Walk) -> None:
    """Hit, NDCG, MRR, Recall and Precision of the last row of the matrix, target by target."""
    short = hits = 0
    for stage in whole.runner.stream.stages:
        expected, lists, _, near = by_hand(whole, stage)
        close = len(near) / len(stage.test) + 1e-9
        for name, value in expected.items():
            assert matrix(whole, f"{name}@5")[-1, stage.index] == pytest.approx(value, abs=close), (name, stage.index)
        short += sum(len(items) < K for items in lists)
        hits += expected["hit"]
        # An empty slot is no item: it adds nothing to the coverage.
        covered = len({i for items in lists for i in items}) / stage.catalogue
        close = len(near) / stage.catalogue + 1e-9
        assert matrix(whole, "itemcoverage@5")[-1, stage.index] == pytest.approx(covered, abs=close)
    assert short and hits, "the case that matters, fewer than k items and some hits, did not occur"


def test_ties_at_minus_infinity_are_no_hits(job: Job, tmp_path: Path) -> None:
    """With all decoded items tied, and all others tied at -inf, only decoded targets count."""
    walk = job.walk(tmp_path, ties=True, epochs=1)
    trap = 0
    for stage in walk.runner.stream.stages:
        expected, lists, filled_hits, near = by_hand(walk, stage)
        close = len(near) / len(stage.test) + 1e-9
        assert matrix(walk, "hit@5")[-1, stage.index] == pytest.approx(expected["hit"], abs=close)
        trap += filled_hits - round(expected["hit"] * len(stage.test))
        outcome = walk.runner.evaluator.evaluate(
            walk.runner.state.models.context(2, walk.runner.model, walk.runner.stream.view(2)), walk.runner.known, stage
        )
        assert outcome.recommended is not None
        for number, (row, items) in enumerate(zip(outcome.recommended, lists, strict=True)):
            assert set(row[row > 0].tolist()) == set(items) or number in near
    assert trap > 0, "no target lies where lists would be filled up: the test could not fail"


def test_given_candidates_are_scored(job: Job, tmp_path: Path) -> None:
    """Under sampled ranking ``scores`` is asked, nothing is decoded, and the ranks equal those by hand."""
    Decoder.calls.clear()
    mode = {"valid": "uni20", "test": "uni20"}
    walk = job.walk(tmp_path, eval_args={"mode": mode}, metrics=["Hit", "NDCG"])
    assert set(Decoder.calls) == {"given"}
    known, model = known_items(walk, 2), walk.runner.model.eval()
    finite = 0
    for stage in walk.runner.stream.stages:
        candidates = walk.runner.evaluator._rows_of(stage, "test").candidates
        assert candidates.shape == (len(stage.test), 21)
        assert (candidates[:, 0] == stage.test.label).all() and (candidates < stage.catalogue).all()
        hit = ndcg = 0.0
        near = 0
        for number, label in enumerate(stage.test.label):
            assert label not in candidates[number, 1:]
            row = row_of(walk, stage, number)
            if row is None or int(label) not in known:
                continue
            choices = sorted({int(i) for i in candidates[number] if int(i) in known})
            with torch.no_grad():
                values = model.scores(row, torch.tensor([choices]))[0].float()  # as the evaluator compares them
            mine = values[choices.index(int(label))]
            assert (values == mine).sum() == 1, "a tie, whose order is nobody's promise"
            near += int(((values - mine).abs() < 1e-5).sum()) > 1  # in a batch these may round to another order
            rank = int((values > mine).sum())
            finite += 1
            hit += rank < K
            ndcg += 1 / math.log2(rank + 2) if rank < K else 0.0
        close = near / len(stage.test) + 1e-9
        assert near <= 1 and matrix(walk, "hit@5")[-1, stage.index] == pytest.approx(hit / len(stage.test), abs=close)
        assert matrix(walk, "ndcg@5")[-1, stage.index] == pytest.approx(ndcg / len(stage.test), abs=close)
    assert finite


def test_it_grows_resumes_and_reports(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Both triangles are filled; a walk killed inside stage 1 resumes to the same bits."""
    assert np.isfinite(matrix(whole, "hit@5")).all()
    assert_grows(whole)
    assert_resumes(job, tmp_path, whole, whole.ticks // 2, stage=1)
    assert_reported(whole)
