"""LIBER end to end on a small log: who sees what, no knowledge is the backbone, killed and resumed to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liber_helpers import LABELLED, OWN, RUNS, Counted, Job, Log, assert_same_walk, job, seen_by_hand, write_liber_log

from recbole_cl.config import get_model_class
from recbole_cl.errors import ConfigError
from recbole_cl.llm.clients.offline import Offline
from recbole_cl.model.liber import COUNT, USER
from recbole_cl.model.liber_fusion import InterestFusion
from recbole_cl.registry import llm_clients
from recbole_cl.stream.batch import LO, POSITION, TARGETS
from recbole_cl.stream.stage import Targets


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return write_liber_log(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("backbone", ["DeepFM", "DIN", "SASRec"])
@pytest.mark.parametrize("vectors", ["none", "zeros"])
def test_without_knowledge_it_is_the_backbone_bit_for_bit(
    backbone: str, vectors: str, log: Log, tmp_path: Path
) -> None:
    """'none' for all; vectors of zeros for those that the knowledge joins beside what they have."""
    if (backbone, vectors) == ("DeepFM", "zeros"):
        pytest.skip("a field more: the perceptron is wider and is drawn otherwise")
    plain = Job(get_model_class(backbone), log.folder, {**RUNS[backbone], "epochs": 1}).walk(tmp_path / "plain")
    wrapped = job(backbone, log, liber_vectors=vectors).walk(tmp_path / "wrapped")
    assert wrapped.result["matrix"] == plain.result["matrix"]
    inner = wrapped.runner.model.backbone.state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in plain.runner.model.state_dict().items())


@pytest.mark.parametrize("backbone", ["DeepFM", "DIN", "SASRec"])
def test_knowledge_is_the_past_of_each_row(backbone: str, log: Log, tmp_path: Path) -> None:
    """Rows and windows see what had closed strictly before; knowledge changes the answers and is told in the report."""
    walk = job(backbone, log).walk(tmp_path)
    model, ctx = walk.runner.model, walk.runner.standing(2)
    targets = Targets.concat([ctx.stage.train, ctx.stage.test])[::7]
    rows = ctx.batcher.rows(targets, evaluation=True)
    expected = [seen_by_hand(walk, int(u), int(p)) for u, p in zip(targets.user, targets.position, strict=True)]
    assert rows[COUNT].tolist() == expected and max(expected) > 3
    if backbone == "SASRec":
        from recbole_cl.stream.batch import Windows

        table = walk.runner.stream.table
        train = ctx.stage.train
        supervised = np.zeros(len(table.seq), dtype=bool)
        supervised[train.hi] = True
        windows = Windows(train, supervised, 8, 8)
        batch = ctx.batcher.window_rows(windows, np.arange(len(windows)))
        checked = 0
        for row in range(0, len(windows), 3):
            for column in torch.nonzero(batch[TARGETS][row]).flatten().tolist():
                position = int(table.seq[int(batch[LO][row]) + column + 1])
                assert table.item[position] == batch[TARGETS][row, column]
                user = int(batch[USER][row, column])
                assert int(batch[COUNT][row, column]) == seen_by_hand(walk, user, position)
                checked += 1
        assert checked > 20
    model.eval()
    with torch.no_grad():
        told = model.predict(rows)
        model._summaries, model._shifts = -model._summaries, model._shifts * 2
        assert not torch.equal(told, model.predict(rows)), "the knowledge does not matter"
    report = next(r for r in walk.result["reports"] if r["who"] == "Counted" and r["stage"] == 2)
    numbers, table = report["numbers"], report["tables"]["What the language model costs"]
    parts = walk.runner.model._learner.history.partitions
    n = np.bincount(walk.runner.stream.table.user)
    assert numbers["calls"] == sum(row["calls"] for row in table) <= sum(max(0, 2 * (k // 5) - 1) for k in n)
    assert numbers["calls, asked anew at each behaviour"] == len(walk.runner.stream.table) == n.sum()
    assert 0 < numbers["partitions"] <= len(parts) and all(row["tokens read"] > 0 for row in table)
    with sqlite3.connect(tmp_path / "run" / "knowledge" / "answers.sqlite") as cache:
        assert cache.execute("SELECT COUNT(*) FROM answers").fetchone()[0] <= numbers["calls"]
    assert {cost["llm_calls_made"] for cost in walk.result["cost"][1:]} <= {0}, "evaluated on all stages: asked at once"


def test_a_stage_pays_for_the_partitions_that_close_in_it(log: Log, tmp_path: Path) -> None:
    """With the diagonal alone, later partitions are not asked for before their stage."""
    walk = job("DeepFM", log, matrix_cells="diagonal").walk(tmp_path)
    made = [cost["llm_calls_made"] for cost in walk.result["cost"]]
    assert all(calls > 0 for calls in made)
    tables = [r["tables"]["What the language model costs"] for r in walk.result["reports"] if r["who"] == "Counted"]
    assert [row["calls"] for row in tables[0]][1:] != [row["calls"] for row in tables[2]][1:]
    whole = job("DeepFM", log).walk(tmp_path / "whole")
    everything = {(int(u), int(n)): (s, d) for u, n, s, d in zip(*(
        getattr(whole.runner.model.knowledge, name) for name in ("user", "number", "summary", "shift")
    ), strict=True)}  # fmt: skip
    own = walk.runner.model.knowledge
    for u, n, s, d in zip(own.user, own.number, own.summary, own.shift, strict=True):
        for one, two in zip(everything[int(u), int(n)], (s, d), strict=True):
            assert torch.allclose(one, two, atol=1e-5), "what came later changed what was known"


@pytest.mark.parametrize("backbone", ["DeepFM", "DIN", "SASRec"])
def test_killed_in_training_it_ends_with_the_same_bits(backbone: str, log: Log, tmp_path: Path) -> None:
    run = job(backbone, log, epochs=2)
    whole = run.walk(tmp_path / "whole")
    state = run.killed(tmp_path / "killed", whole.ticks // 2)
    assert state["phase"] == "train" and "knowledge" in state["side_stores"]
    again = run.walk(tmp_path / "killed", resume=True)
    assert 0 < again.ticks < whole.ticks
    assert_same_walk(whole, again)
    assert again.result["reports"][-1]["numbers"] == whole.result["reports"][-1]["numbers"]


class Slow(Offline):
    """The offline client, a call at a time, slowly enough to be killed."""

    prefix = "slow"
    instant = False
    defaults = {"slow_clauses": 8, "slow_min_count": 2}

    def ask(self, request: Any) -> Any:
        time.sleep(0.01)
        return super().ask(request)


def _prepare(run: Job, folder: Path) -> None:
    llm_clients.register("slow")(Slow)
    run.walk(folder)


def test_killed_while_it_prepares_it_ends_with_the_same_bits(log: Log, tmp_path: Path) -> None:
    """Answers that were committed are not asked for again; at most the calls on their way are."""
    llm_clients.register("slow")(Slow)
    try:
        run = job("DeepFM", log, liber_client="slow", liber_concurrency=2)
        whole = run.walk(tmp_path / "whole")
        process = multiprocessing.get_context("fork").Process(target=_prepare, args=(run, tmp_path / "killed"))
        process.start()
        cache = tmp_path / "killed" / "run" / "knowledge" / "answers.sqlite"
        while not cache.exists() or (committed := _count(cache)) < 20:
            time.sleep(0.02)
            assert process.is_alive(), "it was over before it could be killed"
        os.kill(int(process.pid or 0), signal.SIGKILL)
        process.join()
        committed = _count(cache)
        again = run.walk(tmp_path / "killed", resume=True)
        assert_same_walk(whole, again)
        made, before = (w.result["cost"][0]["llm_calls_made"] for w in (again, whole))
        assert made == before - committed > 0
    finally:
        for table in (llm_clients._members, llm_clients._names):
            table.pop("slow")


def _count(cache: Path) -> int:
    try:
        with sqlite3.connect(cache) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.Error:
        return 0


@pytest.mark.parametrize("backbone", ["DCNV2", "AutoInt", "xDeepFM", "FM", "WideDeep", "NFM", "DIEN"])
def test_further_backbones(backbone: str, log: Log, tmp_path: Path) -> None:
    settings = RUNS["DIN"] if backbone == "DIEN" else LABELLED
    run = Job(Counted, log.folder, {**settings, **OWN, "liber_backbone": backbone, "n_stages": 2})
    walk = run.walk(tmp_path)
    assert np.isfinite(walk.result["matrix"]["auc"][1][1])
    first = walk.runner.model.fusion.first.weight
    assert first.grad is not None


@pytest.mark.parametrize("backbone", ["LR", "FFM", "FwFM", "DSSM"])
def test_backbones_that_no_gradient_reaches_are_refused(backbone: str, log: Log, tmp_path: Path) -> None:
    run = Job(Counted, log.folder, {**LABELLED, **OWN, "liber_backbone": backbone})
    with pytest.raises(ConfigError, match=f"liber_backbone: '{backbone}' cannot take the knowledge in"):
        run.walk(tmp_path)


def test_fusion_by_hand() -> None:
    """Against a loop over rows and partitions; zero vectors and no partition give exactly zero."""
    torch.manual_seed(0)
    fusion = InterestFusion(4, 6, 3, zero=False)
    torch.nn.init.normal_(fusion.age)
    tables = torch.randn(9, 4), torch.randn(9, 4)
    start, count = torch.tensor([0, 5, 0, 5, 3]), torch.tensor([3, 4, 2, 1, 0])
    query = torch.randn(5, 4)
    for asked in (None, query):
        found = fusion(tables, start, count, asked)
        for row in range(5):
            parts = []
            for which, skip in ((0, 0), (1, 1)):
                own = tables[which][int(start[row]) + skip : int(start[row] + count[row])]
                if not len(own):
                    parts.append(torch.zeros(4))
                    continue
                logits = own @ fusion.query[which] + fusion.age[which][torch.arange(len(own)).flip(0)]
                if asked is not None:
                    logits = logits + own @ asked[row] / 2
                parts.append(logits.softmax(0) @ own)
            expected = fusion.last(torch.relu(fusion.first(torch.cat(parts))))
            assert torch.allclose(found[row], expected, atol=1e-6)
        assert (found[4] == 0).all()
    zeros = torch.zeros(9, 4), torch.zeros(9, 4)
    assert (fusion(zeros, start, count) == 0).all()


def test_titles_and_ids_stay_what_they_are(log: Log, tmp_path: Path) -> None:
    """A title that asks for something stays inside its marks; ids never stand in a prompt; only allowed columns do."""
    walk = job("DeepFM", log, liber_user_fields=["group"], n_stages=2).walk(tmp_path)
    history = walk.runner.model._learner.history
    prompts = [request.prompt for request in history.summaries(range(len(history.partitions)))]
    assert prompts and all("group: " in prompt for prompt in prompts)
    evil = [p for p in prompts if "Ignore the instructions" in p]
    assert evil and len(evil) < len(prompts)
    for prompt in prompts:
        assert prompt.count("<<<") == prompt.count(">>>") == 1
        assert "u1" not in prompt.replace("Title", "") and "item_id" not in prompt
    for key, fields, words in (
        ("liber_item_fields", ["item_id"], "is an id, which never leaves"),
        ("liber_item_fields", ["tagz"], "is no column of log.item; did you mean 'tags'"),
    ):
        with pytest.raises(ConfigError, match=words):
            job("DeepFM", log, **{key: fields}).walk(tmp_path / "refused")


def test_rows_carry_the_position(log: Log, tmp_path: Path) -> None:
    """A negative's row, a copy of its positive's, sees the same partitions."""
    walk = job("SASRec", log, loss_type="BPR", train_positions="last").walk(tmp_path)
    ctx = walk.runner.standing(2)
    rows = ctx.batcher.rows(ctx.stage.train)
    assert (rows[COUNT] >= 0).all() and len(rows[POSITION]) == len(rows[USER])
