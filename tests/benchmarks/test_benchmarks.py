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
SIDES = pytest.mark.parametrize("side", ["ours", "recbole"])


def shared_logs() -> None:
    if not os.environ.get("RECBOLE_CL_DATA"):
        pytest.skip("RECBOLE_CL_DATA does not lead to the shared logs")


@SIDES
def test_ten_stages_of_sequences(benchmark: Any, side: str) -> None:
    shared_logs()
    ours, theirs = cases.augmentation()
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=3)


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@SIDES
def test_a_matrix_of_five_stages(benchmark: Any, side: str, model: str) -> None:
    ours, theirs, gap = cases.matrix_of_five(model)
    assert gap < 1e-6, "the two sides do not measure the same"
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=3)


@pytest.mark.parametrize("model", ["BPR", "LightGCN"])
@SIDES
def test_a_finetune_epoch(benchmark: Any, side: str, model: str) -> None:
    ours, theirs = cases.finetune_epoch(model)
    benchmark.pedantic(ours if side == "ours" else theirs, rounds=9)


@pytest.mark.parametrize("side", ["parted", "padded"])
def test_steps_on_short_sequences(benchmark: Any, side: str) -> None:
    shared_logs()
    parted, padded, _ = cases.epoch_of_short_sequences()
    benchmark.pedantic(parted if side == "parted" else padded, rounds=3)


@pytest.mark.parametrize("side", ["flags", "sorted"])
def test_views_of_five_stages(benchmark: Any, side: str, tmp_path: Path) -> None:
    shared_logs()
    flags, sorted_, _ = cases.views_of_five_stages(2, str(tmp_path))
    benchmark.pedantic(flags if side == "flags" else sorted_, rounds=3)


@SIDES
def test_import_and_configuration(benchmark: Any, side: str) -> None:
    from side_by_side import fresh

    benchmark.pedantic(fresh, (cases.OUR_START if side == "ours" else cases.RECBOLES_START,), rounds=3)


def test_memory_grows_with_the_interactions() -> None:
    small, few = cases.memory_of_windows(1)
    large, many = cases.memory_of_windows(3)
    assert large / many < 1.1 * small / few
