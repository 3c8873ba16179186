"""Evaluation against plain loops: ranking scopes, masks, cold targets, strata, purity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import configure, run, toy

from recbole_cl.evaluation.evaluator import Evaluator, Known
from recbole_cl.evaluation.rows import allowed_items, build_rows
from recbole_cl.model.state import owned_state
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.composite import Composite
from recbole_cl.stream.build import build_stream
from recbole_cl.training.runner import Runner
from recbole_cl.tree import tree_hash


def prepared(tmp_path: Path, model: str, trained: int, **properties: Any) -> tuple[Any, ...]:
    """An untrained model of a stage whose training targets count as known."""
    config = configure(toy(tmp_path), tmp_path / "run", model, topk=[3, 5], **properties)
    stream = build_stream(config)
    runner = Runner(config)
    runner.begin(stream)
    view = stream.view(trained)
    net = runner.build_model(view, ModelRandomness(3))
    ctx = runner.state.models.context(trained, net, view)
    known = Known.nothing(stream.table)
    for stage in stream.stages[: trained + 1]:
        known.learn(stream.table, stage.train, model == "SASRec", None)
    return config, stream, net, ctx, known


def brute(
    config: Any, stream: Any, net: Any, ctx: Any, known: Known, s: int, scope: str, drop: bool
) -> dict[str, float]:
    """NDCG@5 and Recall@5 by loops over users (general) or targets (sequential)."""
    stage, table = stream.stages[s], stream.table
    sequential = config["MODEL_TYPE"].name == "SEQUENTIAL"
    groups: dict[int, list[int]] = {}
    for number, position in enumerate(stage.test.position):
        groups.setdefault(number if sequential else int(table.user[position]), []).append(int(position))
    recalls, ndcgs = [], []
    for positions in groups.values():
        user = int(table.user[positions[0]])
        earlier = [p for p in range(len(table)) if table.user[p] == user and p < min(positions)]
        held = {int(p) for p in stage.test.position}
        before = [p for p in range(len(table)) if table.user[p] == user and table.stage[p] <= s and p not in held]
        if sequential:
            history = [int(table.item[p]) for p in earlier][-10:]
            history = [i for i in history if i < stage_items(ctx)]
            row = torch.zeros(1, 10, dtype=torch.int64)
            row[0, : len(history)] = torch.tensor(history)
            batch = {"item_id_list": row, "item_length": torch.tensor([max(len(history), 1)])}
            cold_user = not history
        else:
            batch = {"user_id": torch.tensor([min(user, ctx.batcher.n_users - 1)])}
            cold_user = not known.users[user]
        scores = net.full_sort_predict(batch).flatten().detach().numpy().copy()
        for item in range(len(scores)):
            inside = {"seen": item < stage.catalogue and known.items[item], "trained": known.items[item], "all": True}
            if item == 0 or not inside[scope]:
                scores[item] = -np.inf
        positives = sorted({int(table.item[p]) for p in positions})
        if not sequential:
            for p in before:
                if int(table.item[p]) not in positives and table.item[p] < len(scores):
                    scores[table.item[p]] = -np.inf
        cold = {i for i in positives if cold_user or i >= len(scores) or not known.items[i]}
        if drop:
            positives = [i for i in positives if i not in cold]
        if not positives:
            continue
        ranking = [i for i in np.argsort(-scores, kind="stable") if np.isfinite(scores[i])][:5]
        hits = [not cold_user and i in positives and i not in cold for i in ranking]
        recalls.append(sum(hits) / len(positives))
        ideal = sum(1 / np.log2(k + 2) for k in range(min(len(positives), 5)))
        ndcgs.append(sum(hit / np.log2(k + 2) for k, hit in enumerate(hits)) / ideal)
    return {"recall@5": float(np.mean(recalls)), "ndcg@5": float(np.mean(ndcgs)), "n": len(recalls)}


def stage_items(ctx: Any) -> int:
    return int(ctx.batcher.n_items)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("scope", ["seen", "trained", "all"])
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_metrics_equal_plain_loops(tmp_path: Path, model: str, scope: str, drop: bool) -> None:
    config, stream, net, ctx, known = prepared(
        tmp_path, model, 1, candidates=scope, cold_targets="drop" if drop else "keep", valid_metric="NDCG@5"
    )
    evaluator = Evaluator(config, stream, Composite([]))
    cold = 0
    for s in range(3):
        outcome = evaluator.evaluate(ctx, known, stream.stages[s])
        expected = brute(config, stream, net.eval(), ctx, known, s, scope, drop)
        assert outcome.n == expected["n"]
        assert outcome.metrics["recall@5"] == pytest.approx(expected["recall@5"], abs=1e-9)
        assert outcome.metrics["ndcg@5"] == pytest.approx(expected["ndcg@5"], abs=1e-9)
        cold += outcome.n_cold
    assert cold > 0, "the toy stream must have targets that a model of stage 1 does not know"


def test_earlier_positives_are_masked_for_general_models_only(tmp_path: Path) -> None:
    for model, repeat in (("BPR", False), ("BPR", True), ("SASRec", False)):
        config, stream, _, ctx, known = prepared(
            tmp_path / f"{model}{repeat}", model, 0, repeatable="auto" if not repeat else True, valid_metric="NDCG@5"
        )
        outcome = Evaluator(config, stream, Composite([])).evaluate(ctx, known, stream.stages[0])
        assert outcome.recommended is not None and outcome.users is not None
        table = stream.table
        repeated = 0
        for user, items in zip(outcome.users, outcome.recommended, strict=True):
            own = table.item[(table.user == user) & (np.arange(len(table)) < stream.stages[0].test.position.min())]
            repeated += len(np.intersect1d(own, items[items > 0]))
        assert (repeated == 0) == (model == "BPR" and not repeat)


def test_sampled_candidates_are_the_same_for_every_trained_stage(tmp_path: Path) -> None:
    config, stream, _, _, _ = prepared(tmp_path, "SASRec", 1, eval_args={"mode": "uni10"}, valid_metric="NDCG@5")
    evaluator = Evaluator(config, stream, Composite([]))
    rows = evaluator._rows_of(stream.stages[1], "test")
    assert rows.candidates is not None and rows.candidates.shape[1] == 11
    np.testing.assert_array_equal(rows.candidates[:, 0], stream.stages[1].test.label)
    for row in rows.candidates:
        assert row[0] not in row[1:] and (row > 0).all() and row.max() < stream.stages[1].catalogue
    again = Evaluator(config, stream, Composite([]))._rows_of(stream.stages[1], "test")
    np.testing.assert_array_equal(rows.candidates, again.candidates)


def test_evaluation_is_pure_and_draws_from_its_own_state(tmp_path: Path) -> None:
    config, stream, net, ctx, known = prepared(tmp_path, "SASRec", 2, valid_metric="NDCG@5")
    evaluator = Evaluator(config, stream, Composite([]))
    net.train()
    before, torch_state = tree_hash(owned_state(net)), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first = evaluator.evaluate(ctx, known, stream.stages[1]).metrics
    second = evaluator.evaluate(ctx, known, stream.stages[1]).metrics
    assert first == second and net.training
    assert tree_hash(owned_state(net)) == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]


def test_evaluation_does_not_draw_the_graphs_of_training(tmp_path: Path) -> None:
    """SGL's ``train()`` draws two graphs from numpy's global generator; a module in eval mode stays in it."""
    config, stream, net, ctx, known = prepared(tmp_path, "SGL", 2, valid_metric="NDCG@5")
    net.train()
    net.user_embedding.eval()
    graphs, numpy_state = (net.sub_graph1, net.sub_graph2), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    Evaluator(config, stream, Composite([])).evaluate(ctx, known, stream.stages[1])
    assert net.training and not net.user_embedding.training
    assert net.sub_graph1 is graphs[0] and net.sub_graph2 is graphs[1]
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]


def test_graph_caches_do_not_leave_metrics_unchanged(tmp_path: Path) -> None:
    config, stream, net, ctx, known = prepared(tmp_path, "LightGCN", 0, valid_metric="NDCG@5")
    evaluator = Evaluator(config, stream, Composite([]))
    first = evaluator.evaluate(ctx, known, stream.stages[0]).recommended
    with torch.no_grad():
        net.user_embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    second = evaluator.evaluate(ctx, known, stream.stages[0]).recommended
    assert first is not None and second is not None and (first != second).any()


def test_strata_split_the_targets(tmp_path: Path) -> None:
    _, result = run(toy(tmp_path), tmp_path / "run", "SASRec", epochs=1)
    runner, _ = run(toy(tmp_path / "again"), tmp_path / "run2", "BPR", epochs=1)
    records = runner.records
    for s in range(3):
        n = {r.stratum: r.n for r in records.select(metric="ndcg@10", t=2, s=s)}
        assert n.get("warm_user", 0) + n["new_user"] == n["all"]  # nobody is warm in the first stage
    assert n["new_user"] > 0
    assert set(result["strata"]["ndcg@10"]) == {"known", "warm_user", "new_user", "warm_item", "new_item"}


@pytest.mark.parametrize(
    "metric", ["ItemCoverage", "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage", "GAUC", "MAP"]
)
def test_other_metrics_of_recbole_compute(tmp_path: Path, metric: str) -> None:
    _, result = run(toy(tmp_path), tmp_path / "run", "BPR", epochs=1, metrics=[metric, "NDCG"], valid_metric="NDCG@10")
    found = [m for m in result["matrix"] if m.startswith(metric.lower())]
    assert found and all(v is not None and np.isfinite(v) for row in result["matrix"][found[0]] for v in row)


def test_gauc_equals_pairwise_count(tmp_path: Path) -> None:
    config, stream, net, ctx, known = prepared(
        tmp_path, "SASRec", 2, metrics=["GAUC", "NDCG"], valid_metric="NDCG@5", candidates="all"
    )
    stage = stream.stages[2]
    outcome = Evaluator(config, stream, Composite([])).evaluate(ctx, known, stage)
    values = []
    for row in range(len(stage.test)):
        target = int(stage.test.label[row])
        batch = ctx.batcher.rows(stage.test[row : row + 1], evaluation=True)
        scores = net.eval().full_sort_predict(batch).flatten()[1:]
        if not known.items[target]:
            values.append(0.0)
            continue
        own = scores[target - 1]
        others = torch.cat([scores[: target - 1], scores[target:]])
        values.append(float(((others < own).float() + 0.5 * (others == own).float()).mean()))
    assert outcome.metrics["gauc"] == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_gauc_weighs_rows_by_their_positives(tmp_path: Path, model: str) -> None:
    """Pair by pair, target by target; a row of a general model has several, and counts as often."""
    config, stream, net, ctx, _ = prepared(
        tmp_path, model, 2, metrics=["GAUC", "NDCG"], valid_metric="NDCG@5", candidates="all", repeatable=True,
        stage_ratios=[0.4, 0.1, 0.5],
    )  # fmt: skip
    stage, known = stream.stages[1], Known.everything(stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
    stage = replace(stage, test=stage.test[np.arange(len(stage.test)) % 5 < 3])  # not as many of each user
    rows = build_rows(config, stream, stage, "test")
    batch = ctx.batcher.rows(rows.targets, evaluation=True)
    with torch.no_grad():
        scores = net.eval().full_sort_predict(batch).view(len(rows.targets), -1)[:, : ctx.batcher.n_items].numpy()
    areas, counts = [], []
    for row in range(len(rows.targets)):
        own = sorted({int(i) for i in rows.item[rows.row == row]})
        others = [i for i in range(1, ctx.batcher.n_items) if i not in own]
        areas.append(np.mean([[float(scores[row, i] > scores[row, j]) for j in others] for i in own]))
        counts.append(len(own))
    outcome = Evaluator(config, stream, Composite([])).evaluate(ctx, known, stage)
    assert outcome.metrics["gauc"] == pytest.approx(np.average(areas, weights=counts), abs=1e-6)
    plain = abs(float(np.mean(areas)) - np.average(areas, weights=counts))
    assert (max(counts) > min(counts) and plain > 1e-4) == (model == "BPR"), "weights could not be told from none"


def test_strata_of_items_count_their_own_positives(tmp_path: Path) -> None:
    """Recall of warm and of new items, row by row: hits and positives of the stratum alone, rows that have any."""
    config, stream, _, ctx, known = prepared(
        tmp_path, "BPR", 2, metrics=["Recall", "NDCG"], valid_metric="NDCG@5", stage_ratios=[0.4, 0.1, 0.5]
    )
    stage = stream.stages[2]
    outcome = Evaluator(config, stream, Composite([])).evaluate(ctx, known, stage)
    assert outcome.recommended is not None and outcome.users is not None
    shares: dict[str, list[float]] = {"warm_item": [], "new_item": []}
    mixed = 0
    for user, items in zip(outcome.users, outcome.recommended, strict=True):
        asked = {int(i) for i in stage.test.label[stage.test.user == user]}
        parts = {"warm_item": {i for i in asked if i < stage.first_new_item}}
        parts["new_item"] = asked - parts["warm_item"]
        mixed += all(parts.values())
        for name, part in parts.items():
            if part:
                shares[name].append(len(part & set(items.tolist())) / len(part))
    for name, values in shares.items():
        metrics, n = outcome.strata[name]
        assert (n, metrics["recall@5"]) == (len(values), pytest.approx(np.mean(values), abs=1e-9)), name
        assert np.mean(values) > 0
    assert mixed, "a row with positives of both kinds is what a wrong denominator would show in"


@pytest.mark.parametrize("scope", ["seen", "trained", "all"])
def test_untrained_rows_are_no_candidates(scope: str) -> None:
    """An item with a row that was never trained is ranked under ``all`` alone, one of the future under none but it."""
    known = Known(np.ones(3, dtype=bool), np.array([False, True, False, True, True, True]))
    stage: Any = SimpleNamespace(catalogue=5, items=None)
    found = np.flatnonzero(allowed_items({"candidates": scope}, known, stage, 6))
    assert found.tolist() == {"seen": [1, 3, 4], "trained": [1, 3, 4, 5], "all": [1, 2, 3, 4, 5]}[scope]
    stage.items = np.array([3, 5])
    asked = np.flatnonzero(allowed_items({"candidates": scope}, known, stage, 6))
    assert asked.tolist() == [i for i in found if i in (3, 5)]
    few = np.flatnonzero(allowed_items({"candidates": scope}, known, SimpleNamespace(catalogue=9, items=None), 4))  # type: ignore[arg-type]
    assert few.tolist() == [i for i in (1, 2, 3) if scope == "all" or i != 2], "no more than the model has rows for"


@pytest.mark.parametrize("sequential", [False, True])
def test_a_sequential_model_knows_the_items_of_histories(tmp_path: Path, sequential: bool) -> None:
    """Its targets' items, and those of the histories before them, each by a loop; a general model reads no history."""
    stream = build_stream(configure(toy(tmp_path), tmp_path / "run", "SASRec", history="all"))
    table, targets = stream.table, stream.stages[1].train[np.arange(5)]
    known = Known.nothing(table)
    known.learn(table, targets, sequential, None)
    own = {int(i) for i in targets.label}
    read = {int(i) for lo, hi in zip(targets.lo, targets.hi, strict=True) for i in table.item[table.seq[lo:hi]]}
    assert set(np.flatnonzero(known.items).tolist()) == (own | read if sequential else own)
    assert set(np.flatnonzero(known.users).tolist()) == {int(u) for u in targets.user}
    assert read - own, "histories hold nothing that targets do not: the test could not fail"
