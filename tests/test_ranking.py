"""Lists of items from scores and limits, without a stage: what the evaluator and a serving side share."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.model.abstract_recommender import GeneralRecommender
from run_helpers import configure, toy

from recbole_cl.evaluation import ranking
from recbole_cl.evaluation.ranking import Way, bound_of, choose_way, limit, scores_of, scores_of_prefixes, top_items
from recbole_cl.model.contract import ContinualModel
from recbole_cl.rng import ModelRandomness
from recbole_cl.stream.build import build_stream
from recbole_cl.training.runner import Runner


def by_hand(scores: Any, allowed: Any, excluded: Any, candidates: Any, k: int) -> list[list[int]]:
    """The same lists by loops."""
    lists = []
    for row, own in enumerate(scores):
        left_out = {int(i) for r, i in zip(*excluded, strict=True) if r == row}
        ranked = [
            i
            for i in sorted(range(len(own)), key=lambda i: -own[i])
            if allowed[i] and i not in left_out and np.isfinite(own[i]) and (candidates is None or i in candidates[row])
        ]
        lists.append((ranked + [0] * k)[:k])
    return lists


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_lists_equal_those_by_loops(seed: int, sampled: bool, kind: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    rows, n, k = 4, int(rng.integers(3, 12)), int(rng.integers(1, 5))
    scores = rng.permutation(rows * n).reshape(rows, n).astype(float)
    scores[rng.random(scores.shape) < 0.2] = -np.inf  # what the model itself does not score
    allowed = rng.random(n) < 0.7
    allowed[0] = False
    pairs = rng.integers(0, rows, 6), rng.integers(1, n, 6)
    candidates = rng.integers(0, n, (rows, 4)) if sampled else None
    limited = limit(
        torch.tensor(scores, dtype=kind),
        bound_of(torch.from_numpy(allowed)),
        (torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])),
        None if candidates is None else torch.from_numpy(candidates),
    )
    items, values = top_items(limited, k)
    width = min(k, n)
    assert items.tolist() == [own[:width] for own in by_hand(scores, allowed, pairs, candidates, k)]
    assert ((items == 0) == torch.isinf(values)).all()


def test_the_room_knows_no_stage() -> None:
    """What serves a model has none."""
    source = Path(inspect.getfile(ranking)).read_text(encoding="utf-8")
    modules = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not [m for m in modules if m and m.startswith(("recbole_cl.stream", "recbole_cl.strategy"))]


class Plain(GeneralRecommender):
    """A model that has nothing of its own."""

    def full_sort_predict(self, interaction: Any) -> Any:
        """Everything."""


class Pairwise(GeneralRecommender):
    """A model without scores of all items."""


class Candidates(ContinualModel, Plain):
    """A model that scores given items."""

    def scores(self, batch: Any, items: torch.Tensor) -> torch.Tensor:
        return items.double()


class Queries(Candidates):
    """A model with outputs apart."""

    def scores_by_queries(self) -> bool:
        return True


class Prefixes(Queries):
    """A model that shares prefixes."""

    def shares_prefixes(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("model", "candidates", "adjusted", "histories", "way"),
    [
        (Plain, False, False, True, Way.FULL),
        (Plain, True, False, True, Way.FULL),
        (Pairwise, True, False, True, Way.GIVEN),
        (Pairwise, False, False, True, Way.FULL),
        (Candidates, True, True, True, Way.GIVEN),
        (Candidates, False, False, True, Way.FULL),
        (Queries, False, False, True, Way.QUERIES),
        (Queries, False, True, True, Way.FULL),
        (Prefixes, False, False, True, Way.PREFIXES),
        (Prefixes, False, False, False, Way.QUERIES),
        (Prefixes, True, False, True, Way.GIVEN),
    ],
)
def test_the_shortest_way_is_chosen(model: type, candidates: bool, adjusted: bool, histories: bool, way: Way) -> None:
    assert choose_way(model.__new__(model), candidates, adjusted, histories) is way


def test_all_ways_give_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SASRec by its prefixes, as all scores and as scores of candidates; parts are cut small.

    Passes of other shapes need not round alike, so that the ways agree within the precision of float32.
    """
    monkeypatch.setattr(ranking, "SCORES_IN_CACHE", 100)
    config = configure(toy(tmp_path), tmp_path / "run", "SASRec")
    runner = Runner(config)
    runner.begin(build_stream(config))
    view, targets = runner.stream.view(1), runner.stream.stages[1].test
    ctx = runner.state.models.context(1, runner.build_model(view, ModelRandomness(3)).eval(), view)
    batch = ctx.batcher.rows(targets, evaluation=True)
    every = torch.arange(ctx.batcher.n_items).expand(len(targets), -1)
    with torch.no_grad():
        [(whole, full)] = list(scores_of(Way.FULL, ctx.model, ctx.batcher, batch))
        parts = list(scores_of_prefixes(ctx.model, ctx.batcher, targets))
        [(_, given)] = list(scores_of(Way.GIVEN, ctx.model, ctx.batcher, batch, every))
    assert whole == slice(0, len(targets)) and len(parts) > 1
    torch.testing.assert_close(torch.cat([scores for _, scores in parts]), full, rtol=1e-5, atol=1e-6)
    assert [i for part, _ in parts for i in range(len(targets))[part]] == list(range(len(targets)))
    torch.testing.assert_close(given[:, 1:], full[:, 1:], rtol=1e-5, atol=1e-6)
