"""Strategies under pytest-benchmark: ``python -m pytest tests/benchmarks -o addopts= --benchmark-only``.

The quoted ratios come from ``strategies.py``, which alternates the two sides. Cases beside Avalanche need
``pip install recbole-cl[peers]``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
cases = pytest.importorskip("strategies")
PEER = pytest.mark.skipif(cases.EWCPlugin is None, reason="Avalanche is not installed (recbole-cl[peers])")


@PEER
@pytest.mark.parametrize("batch_size", [1, 2048])
@pytest.mark.parametrize("side", ["ours", "avalanche"])
def test_fisher_of_mf(benchmark: Any, side: str, batch_size: int) -> None:
    ours, theirs, _ = cases.fisher_of_mf(1000, batch_size)
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=3)


@pytest.mark.parametrize(("model", "settings"), [("BPR", {}), ("SASRec", {}), ("SASRec", cases.PAIRS)])
@pytest.mark.parametrize("side", ["ours", "vmap", "loop"])
def test_fisher(benchmark: Any, side: str, model: str, settings: dict[str, Any]) -> None:
    benchmark.pedantic(getattr(cases.fisher_of(model, 32, **settings), side), rounds=3, warmup_rounds=1)


@PEER
@pytest.mark.parametrize("side", ["ours", "avalanche"])
def test_penalty_steps_with_eight_stages(benchmark: Any, side: str) -> None:
    ours, theirs = cases.penalty_step()
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=5)


@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_replay_draws_in_the_size_of_the_batch(benchmark: Any, size: int) -> None:
    benchmark.pedantic(lambda: cases.replay_microseconds(size, times=50), rounds=3)
