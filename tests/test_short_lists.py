"""Lists shorter than k: an empty slot is no item, in none of the metrics of lists."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recbole_cl.evaluation.metrics import _of_lists
from recbole_cl.results import exposure_disparity

CONFIG = {"topk": [1, 3], "metric_decimal_place": 12, "tail_ratio": 0.5}
TOP = np.array([[1, 2, 3], [1, 0, 0], [4, 1, 0], [0, 0, 0]])
COUNTS = {1: 6, 2: 2, 3: 1, 4: 0}
"""Training interactions of the items; the tail, half of the four items, is 4 and 3."""


def told(name: str, top: np.ndarray = TOP, **changed: Any) -> dict[str, float]:
    items = np.repeat(list(COUNTS), list(COUNTS.values()))
    stream: Any = SimpleNamespace(table=SimpleNamespace(item=items))
    stage: Any = SimpleNamespace(catalogue=5, train=SimpleNamespace(position=np.arange(len(items))))
    return _of_lists({**CONFIG, **changed}, stream, stage, name, top)


def test_by_hand() -> None:
    """Item 1 stands in three slots, 2, 3 and 4 in one each: six slots, three rows that have any."""
    p = np.array([3, 1, 1, 1]) / 6
    expected = {
        "itemcoverage": 4 / 5,
        "averagepopularity": ((6 + 2 + 1) / 3 + 6 + (0 + 6) / 2) / 3,
        "tailpercentage": (1 / 3 + 0 + 1 / 2) / 3,
        "shannonentropy": -(p * np.log(p)).sum() / 4,  # RecBole divides by the number of items recommended
        # sum over the catalogue of 5 in rising order of (2 i - 5 - 1) count_i, over 5 items times 6 slots
        "giniindex": (-4 * 0 - 2 * 1 + 0 * 1 + 2 * 1 + 4 * 3) / (5 * 6),
    }
    for name, value in expected.items():
        assert told(name)[f"{name}@3"] == pytest.approx(value), name


def test_the_first_place_is_that_of_full_lists() -> None:
    """Three rows have a first item: 1, 1 and 4."""
    p = np.array([2, 1]) / 3
    expected = {
        "itemcoverage": 2 / 5,
        "averagepopularity": 12 / 3,
        "tailpercentage": 1 / 3,
        "shannonentropy": -(p * np.log(p)).sum() / 2,
        "giniindex": (2 * 1 + 4 * 2) / (5 * 3),
    }
    for name, value in expected.items():
        assert told(name)[f"{name}@1"] == pytest.approx(value), name
        # Exactly the same: RecBole's own numbers stay where lists are full.
        assert told(name)[f"{name}@1"] == told(name, TOP[:3, :1], topk=[1])[f"{name}@1"]


@pytest.mark.parametrize("name", ["itemcoverage", "averagepopularity", "tailpercentage", "shannonentropy", "giniindex"])
def test_slots_that_nobody_fills_change_nothing(name: str) -> None:
    """Lists of two, of which two were wanted, and the same lists where three were."""
    short, full = np.array([[1, 2, 0], [4, 3, 0]]), np.array([[1, 2], [4, 3]])
    assert told(name, short)[f"{name}@3"] == pytest.approx(told(name, full, topk=[2])[f"{name}@2"])
    assert told(name, np.zeros((2, 3), dtype=int)) == {}


def test_exposure_counts_slots_with_items() -> None:
    head = np.array([False, True, False, False, False])
    found = exposure_disparity(TOP, head)
    assert found["n_recommendations"] == 6 and found["share_head"] == pytest.approx(3 / 6)
    assert math.isclose(found["exp_head"], 0.5 / 0.25)
