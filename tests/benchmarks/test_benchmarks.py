"""The comparisons under pytest-benchmark: ``python -m pytest tests/benchmarks -o addopts= --benchmark-only``.

The quoted ratios come from ``report.py``, which alternates the two sides.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
cases = pytest.importorskip("cases")


@pytest.mark.parametrize("side", ["ours", "recbole"])
def test_ten_stages_of_sequences(benchmark: Any, side: str) -> None:
    if not os.environ.get("RECBOLE_CL_DATA"):
        pytest.skip("RECBOLE_CL_DATA does not lead to the shared logs")
    ours, theirs = cases.augmentation()
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=3)


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize("side", ["ours", "recbole"])
def test_a_matrix_of_five_stages(benchmark: Any, side: str, model: str) -> None:
    ours, theirs = cases.matrix_of_five(model)
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=3)


@pytest.mark.parametrize("model", ["BPR", "LightGCN"])
@pytest.mark.parametrize("side", ["ours", "recbole"])
def test_a_finetune_epoch(benchmark: Any, side: str, model: str) -> None:
    ours, theirs = cases.finetune_epoch(model)
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=9)
