"""LIBER under continual strategies: importances, replayed rows, and teachers that know what they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liber_helpers import Log, assert_same_walk, job, seen_by_hand, write_liber_log
from recbole.data.interaction import Interaction

from recbole_cl.model.liber import COUNT, USER
from recbole_cl.strategy.lwf import LwF
from recbole_cl.strategy.parts.teacher import TeacherRows
from recbole_cl.stream.batch import LO, TARGETS
from recbole_cl.stream.loader import make_loader


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return write_liber_log(tmp_path_factory.mktemp("data"))


def test_a_teacher_has_the_knowledge_of_each_position(log: Log, tmp_path: Path) -> None:
    """LwF on windows: what it compares is what either model answers to each position, row by row."""
    walk = job("SASRec", log, strategy="LwF", n_stages=2, hidden_dropout_prob=0.0, attn_dropout_prob=0.0).walk(tmp_path)
    ctx = walk.runner.standing(1)
    for model in (ctx.model, ctx.previous_model):
        model.eval()
        torch.nn.init.normal_(model.fusion.last.weight)
    ctx.loader = make_loader(ctx, ctx.stage.train, "test")
    batch = next(iter(ctx.loader)).to(ctx.device)
    assert TARGETS in batch
    strategy: Any = LwF({"lambda": 1.0, "temperature": 2.0})
    teacher: Any = ctx.previous_model
    known = TeacherRows(ctx, teacher)
    with torch.no_grad():
        old, at = known.positions(batch, batch[TARGETS] > 0)
        term = float(strategy.positions(ctx, known, batch))
    table, n_items = walk.runner.stream.table, ctx.stream.stages[0].n_items
    new_logits, old_logits, seen = [], [], 0
    for row, column in at.nonzero().tolist():
        position = int(table.seq[int(batch[LO][row]) + column + 1])
        user = int(batch[USER][row, column])
        sequence = batch["item_id_list"][row, : column + 1]
        readable = sequence[sequence < n_items]
        count = seen_by_hand(walk, user, position)
        seen += count > 0
        for model, items, logits in ((ctx.model, sequence, new_logits), (teacher, readable, old_logits)):
            padded = torch.zeros(1, 8, dtype=torch.int64)
            padded[0, : len(items)] = items
            one = Interaction({
                "item_id_list": padded, "item_length": torch.tensor([len(items)]), "item_id": torch.ones(1).long(),
                USER: torch.tensor([user]), COUNT: torch.tensor([count]),
            })  # fmt: skip
            with torch.no_grad():
                logits.append(model.full_sort_predict(one).view(1, -1)[:, 1:n_items])
    assert seen > 20
    student, answer = torch.cat(new_logits) / 2, torch.cat(old_logits) / 2
    kl = (answer.softmax(1) * (answer.log_softmax(1) - student.log_softmax(1))).sum(1).mean()
    assert term == pytest.approx(4 * float(kl), rel=1e-4)
    assert old.shape[0] == int(at.sum())


@pytest.mark.parametrize(
    ("backbone", "strategy"), [("DeepFM", "EWC"), ("DeepFM", "ERRandom"), ("DeepFM", "LwF"), ("SASRec", "LwF")]
)
def test_under_continual_strategies(backbone: str, strategy: str, log: Log, tmp_path: Path) -> None:
    """Importances, replayed rows and a teacher of the stage before, which knows the partitions that it was given.

    What a strategy does reaches the fusion, too; with LwF, killed inside the second stage it ends with the same bits.
    """
    run = job(backbone, log, strategy=strategy, n_stages=2, learning_rate=0.005)
    walk = run.walk(tmp_path / "one")
    plain = job(backbone, log, n_stages=2, learning_rate=0.005).walk(tmp_path / "plain")
    metric = "auc" if backbone == "DeepFM" else "ndcg@5"
    assert np.isfinite(walk.result["matrix"][metric][1]).all()
    with_it, without = (w.runner.model.fusion.first.weight for w in (walk, plain))
    assert not torch.equal(with_it, without), "the strategy does not reach the fusion"
    terms = {name for curve in walk.result["curves"] for name in curve.get("terms", {})}
    assert terms or strategy == "ERRandom"
    if strategy == "LwF":
        run.killed(tmp_path / "killed", walk.ticks - 2)
        assert_same_walk(walk, run.walk(tmp_path / "killed", resume=True))
    ctx = walk.runner.standing(1)
    previous: Any = ctx.previous_model
    assert len(previous.knowledge) == len(previous._summaries) > 0
