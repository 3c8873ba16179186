"""Steps-to-95 %, exposure disparity, strata and records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import run, toy

from recbole_cl.errors import CheckpointError, DataError
from recbole_cl.evaluation.metrics import constant_answer
from recbole_cl.results import (
    STRATA,
    Records,
    exposure_disparity,
    head_mask,
    mean_by_stratum,
    stage_curve,
    steps_to_95,
    strata_masks,
)
from recbole_cl.stream.stage import Stage, Targets, Task

# --------------------------------------------------------------------------------------------------------------
# Steps-to-95 %


def test_steps_golden() -> None:
    curve = [(0, 0.10), (100, 0.50), (200, 0.76), (300, 0.80), (400, 0.79)]
    assert steps_to_95(curve) == 200  # 0.95 * 0.80 = 0.76: reached exactly
    assert steps_to_95(curve, share=1.0) == 300
    assert steps_to_95(curve, share=0.5) == 100
    assert steps_to_95([(0, 0.8), (100, 0.8)]) == 0


def test_steps_where_smaller_is_better() -> None:
    curve = [(100, 2.0), (200, 1.04), (300, 1.0)]
    assert steps_to_95(curve, smaller_is_better=True) == 200  # 1.0 / 0.95 = 1.0526...
    assert steps_to_95([(1, 1.0), (2, 0.0)], smaller_is_better=True) == 2
    assert steps_to_95([(1, 1.0), (2, -1.0)], smaller_is_better=True) is None


def test_steps_without_an_answer() -> None:
    assert steps_to_95([]) is None
    assert steps_to_95([(10, None), (20, float("nan"))]) is None
    assert steps_to_95([(10, 0.0), (20, 0.0)]) is None
    assert steps_to_95([(10, None), (20, 0.5)]) == 20
    with pytest.raises(ValueError, match="must not decrease"):
        steps_to_95([(20, 0.1), (10, 0.2)])
    with pytest.raises(ValueError, match="share"):
        steps_to_95([(20, 0.1)], share=0.0)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20), st.floats(0.1, 1))
def test_steps_equals_brute_force(values: list[float], share: float) -> None:
    curve = [(10 * (i + 1), v) for i, v in enumerate(values)]
    expected = min(n for n, v in curve if v >= share * max(values))
    assert steps_to_95(curve, share) == expected
    assert steps_to_95(curve, share) <= steps_to_95(curve, 1.0)


def test_stage_curve_picks_one_stage() -> None:
    curves = [
        {"stage": 0, "pass": "main", "targets": 10, "valid": {"NDCG@10": 0.1}},
        {"stage": 0, "pass": "main", "targets": 20, "valid": None},
        {"stage": 0, "pass": "again", "targets": 30, "valid": {"NDCG@10": 0.3}},
        {"stage": 1, "pass": "main", "targets": 40, "valid": {"NDCG@10": 0.4}},
    ]
    assert stage_curve(curves, 0, "ndcg@10") == [(10, 0.1), (30, 0.3)]
    assert stage_curve(curves, 0, "NDCG@10", "again") == [(30, 0.3)]
    assert stage_curve(curves, 2, "NDCG@10") == []


# --------------------------------------------------------------------------------------------------------------
# Exposure


def test_exposure_golden() -> None:
    head = np.array([False, True, False, False, False])  # items 1..4, one of them head
    lists = np.array([[1, 2], [1, 3], [1, 0]])  # 5 recommendations, 3 of the head item
    values = [1.0, 0.0, 0.5, np.nan]
    found = exposure_disparity(
        lists, head, user_values=values, active_users=[True, True, False, True], users=[7, 7, 8, 9]
    )
    assert found["share_head"] == 0.6 and found["share_tail"] == 0.4
    assert found["exp_head"] == pytest.approx(0.6 / 0.25)
    assert found["exp_tail"] == pytest.approx(0.4 / 0.75)
    assert found["item_disparity"] == pytest.approx(2.4 - 0.4 / 0.75)
    assert (found["n_head_items"], found["n_tail_items"], found["n_recommendations"]) == (1, 3, 5)
    # User 7 counts once with the mean 0.5; user 9 was not evaluated.
    assert found["exp_active"] == 0.5 and found["exp_inactive"] == 0.5
    assert found["user_disparity"] == 0.0
    assert (found["n_active_users"], found["n_inactive_users"]) == (1, 1)
    assert json.loads(json.dumps(found)) == found
    assert "catalogue" in found["definition_items"]


def test_exposure_in_proportion_is_no_disparity() -> None:
    head = np.array([False, True, False, False, False])
    assert exposure_disparity([[1, 2, 3, 4]], head)["item_disparity"] == pytest.approx(0.0)


def test_exposure_of_nothing() -> None:
    found = exposure_disparity(np.zeros((3, 2), int), np.array([False, True, True]))
    assert found["item_disparity"] is None and found["exp_head"] is None and found["n_recommendations"] == 0
    assert found["user_disparity"] is None
    no_tail = exposure_disparity([[1, 2]], np.array([False, True, True]))
    assert no_tail["exp_head"] == 1.0 and no_tail["exp_tail"] is None and no_tail["item_disparity"] is None
    only_active = exposure_disparity([[1]], [False, True], user_values=[0.5], active_users=[True])
    assert only_active["exp_active"] == 0.5 and only_active["user_disparity"] is None
    none = exposure_disparity([[1]], [False, True], user_values=[np.nan], active_users=[True])
    assert none["user_disparity"] is None and none["n_active_users"] == 0


def test_exposure_over_a_growing_catalogue() -> None:
    head = np.array([False, True, False, False, False])
    catalogue = np.array([True, True, True, False, False])  # item 0 is padding, whatever the mask says
    found = exposure_disparity([[1, 2]], head, catalogue)
    assert found["n_head_items"] == 1 and found["n_tail_items"] == 1
    assert found["item_disparity"] == 0.0
    with pytest.raises(ValueError, match="item 3 is recommended but not in the catalogue of 2 items"):
        exposure_disparity([[1, 3]], head, catalogue)
    with pytest.raises(ValueError, match="item 9"):
        exposure_disparity([[9]], head)
    with pytest.raises(ValueError, match="item -1"):
        exposure_disparity([[-1]], head)


def test_exposure_refuses_shapes() -> None:
    with pytest.raises(ValueError, match="needs active_users"):
        exposure_disparity([[1]], [False, True], user_values=[0.1])
    with pytest.raises(ValueError, match="one value a row"):
        exposure_disparity([[1]], [False, True], user_values=[0.1], active_users=[True, False])
    with pytest.raises(ValueError, match="both active and inactive"):
        exposure_disparity([[1]], [False, True], user_values=[0.1, 0.2], active_users=[True, False], users=[4, 4])
    with pytest.raises(ValueError, match="catalogue has shape"):
        exposure_disparity([[1]], [False, True], catalogue=[True])


def test_head_mask() -> None:
    assert head_mask([0, 5, 1, 5, 2, 0]).tolist() == [False, True, False, False, False, False]
    assert head_mask([0, 5, 1, 5, 2, 0], 0.5).tolist() == [False, True, False, True, False, False]
    assert head_mask(np.arange(16), 0.2).sum() == 3  # 0.2 * 15 is 3.0000000000000004 in floats
    assert not head_mask([0, 0]).any()
    with pytest.raises(ValueError, match="head_ratio"):
        head_mask([1], 1.0)


# --------------------------------------------------------------------------------------------------------------
# Strata


def test_strata() -> None:
    masks = strata_masks([True, False, False], [False, True, False], [True, True, False])
    assert list(masks) == list(STRATA)
    means = mean_by_stratum([0.1, np.nan, 0.5], masks)
    assert means["all"] == (pytest.approx(0.3), 2)
    assert means["new_user"] == (0.1, 1) and means["warm_user"] == (0.5, 1)
    assert means["new_item"].value is None and means["new_item"].n == 0
    assert means["known"] == (0.5, 1) and means["cold"] == (0.1, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1)), max_size=30))
def test_strata_partition(rows: list[tuple[bool, bool, bool, float]]) -> None:
    users, items, cold, values = ([row[i] for row in rows] for i in range(4))
    masks = strata_masks(users, items, cold)
    means = mean_by_stratum(values, masks)
    for one, other in (("warm_user", "new_user"), ("warm_item", "new_item"), ("known", "cold")):
        assert not (masks[one] & masks[other]).any() and (masks[one] | masks[other]).all()
        total = sum(means[g].n * (means[g].value or 0) for g in (one, other))
        assert total == pytest.approx(sum(values))
        assert means[one].n + means[other].n == means["all"].n == len(rows)


def test_strata_refuse_lengths() -> None:
    with pytest.raises(ValueError, match="one flag a target"):
        strata_masks([True], [True, False], [True])
    with pytest.raises(ValueError, match="'all'"):
        mean_by_stratum([0.1], strata_masks([True, True], [True, True], [True, True]))


# --------------------------------------------------------------------------------------------------------------
# Records


def filled() -> Records:
    records = Records()
    records.add(metric="NDCG@10", t=-1, s=1, value=0.01, n=7, mode="reference")
    for t in range(2):
        for s in range(2):
            records.add(metric="NDCG@10", t=t, s=s, value=0.1 * (t + 1) + 0.01 / 3 * s, n=10 + s)
    records.add(metric="NDCG@10", t=1, s=0, value=None, n=0, stratum="new_user")
    records.add(metric="Hit@10", t=0, s=0, value=1.0, n=10, split="valid")
    return records


def test_matrix_is_a_view() -> None:
    records = filled()
    assert records.matrix("NDCG@10").tolist() == [[0.1, 0.1 + 0.01 / 3], [0.2, 0.2 + 0.01 / 3]]
    assert records.matrix("NDCG@10", field="n").tolist() == [[10, 11], [10, 11]]
    assert np.isnan(records.matrix("NDCG@10", stratum="new_user")).all()
    assert records.matrix("NDCG@10", n_stages=3).shape == (3, 3)
    assert np.isnan(records.matrix("nothing")).all()
    assert records.metrics() == ["NDCG@10", "Hit@10"] and records.modes() == ["full"]
    assert records.strata() == ["all", "new_user"]
    reference = records.reference("NDCG@10")
    assert reference is not None and np.isnan(reference[0]) and reference[1] == 0.01
    assert records.reference("Hit@10") is None
    with pytest.raises(ValueError, match="beyond the 1 stages"):
        records.matrix("NDCG@10", n_stages=1)
    with pytest.raises(ValueError, match="no field 'who'"):
        records.select(who=1)


def test_several_modes_must_be_named() -> None:
    records = filled()
    records.add(metric="NDCG@10", t=0, s=0, value=0.9, n=10, mode="uni100")
    with pytest.raises(ValueError, match=r"full, uni100"):
        records.matrix("NDCG@10")
    assert records.matrix("NDCG@10", mode="uni100")[0, 0] == 0.9
    assert records.matrix("NDCG@10", mode="full")[0, 0] == 0.1


def test_no_duplicates() -> None:
    records = filled()
    size = len(records)
    records.add(metric="NDCG@10", t=0, s=0, value=0.1, n=10)
    records.add(metric="NDCG@10", t=1, s=0, value=float("nan"), n=0, stratum="new_user")
    assert len(records) == size
    with pytest.raises(ValueError, match=r"is 0\.1 over 10 targets already, not 0\.2"):
        records.add(metric="NDCG@10", t=0, s=0, value=0.2, n=10)
    with pytest.raises(ValueError, match="already"):
        records.add(metric="NDCG@10", t=0, s=0, value=0.1, n=11)


@pytest.mark.parametrize(
    "bad",
    [
        {"t": -2, "s": 0, "value": 0.1},
        {"t": 0, "s": -1, "value": 0.1},
        {"t": -1, "s": 0, "value": 0.1},
        {"t": 0, "s": 0, "value": 0.1, "mode": "reference"},
        {"t": 0, "s": 0, "value": float("inf")},
    ],
)
def test_records_refuse(bad: dict) -> None:
    with pytest.raises(ValueError):
        Records().add(metric="x", **bad)


def test_csv_round_trip(tmp_path: Path) -> None:
    records = filled()
    path = records.to_csv(tmp_path / "records.csv")
    assert path.read_text().splitlines()[0] == "split,mode,stratum,level,metric,t,s,value,n"
    assert Records.from_csv(path) == records
    path.write_text("split,mode\n")
    with pytest.raises(DataError, match="no column stratum"):
        Records.from_csv(path)
    lines = ["split,mode,stratum,level,metric,t,s,value,n", "test,full,all,item,NDCG,0,zero,0.1,3"]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 2"):
        Records.from_csv(path)


def test_state_round_trip() -> None:
    records = filled()
    state = json.loads(json.dumps(records.state_dict(), allow_nan=False))
    other = Records()
    other.add(metric="old", t=0, s=0, value=0.5)
    other.load_state_dict(state)
    assert other == records and other.metrics() == ["NDCG@10", "Hit@10"]
    with pytest.raises(CheckpointError, match="lacks rows"):
        other.load_state_dict({"columns": state["columns"]})
    with pytest.raises(CheckpointError, match="lacks value"):
        other.load_state_dict({"columns": [c for c in state["columns"] if c != "value"], "rows": []})
    with pytest.raises(CheckpointError, match="holds the row"):
        other.load_state_dict({"columns": state["columns"], "rows": [[1]]})
    assert other == records, "a failed load leaves what was there"
    assert (records == 3) is False


def test_the_constant_answer_by_hand() -> None:
    """Class 1 is the most frequent in training; two of three test targets have it."""

    def targets(*labels: int) -> Targets:
        zeros = np.zeros(len(labels), dtype=np.int64)
        return Targets(zeros, zeros, zeros, zeros, np.array(labels), zeros)

    task = Task("classification", "class")
    stage = Stage(0, "class", 0, 1, targets(0, 1, 1), targets(0), targets(1, 0, 1), task=task)
    assert constant_answer("accuracy", stage) == pytest.approx(2 / 3)
    assert constant_answer("macro_f1", stage) == pytest.approx((0 + 2 * 2 / (2 + 3)) / 2)
    assert constant_answer("accuracy", dataclasses.replace(stage, task=Task("next_item", "items"))) is None
    assert constant_answer("accuracy", dataclasses.replace(stage, train=targets())) is None


def test_exposure_counts_what_was_trained_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head items and active users of a stage are those of its own and earlier training targets, never of later ones."""
    from recbole_cl.results import journal

    told: list[tuple[np.ndarray, np.ndarray]] = []
    original = journal.exposure_disparity

    def look(recommended: Any, head: Any, catalogue: Any, values: Any, active: Any, users: Any) -> Any:
        told.append((head, active))
        return original(recommended, head, catalogue, values, active, users)

    monkeypatch.setattr(journal, "exposure_disparity", look)
    runner, _ = run(toy(tmp_path), tmp_path / "run", "BPR", epochs=1)
    table, ratio = runner.stream.table, runner.config["head_ratio"]

    def masks(upto: int) -> tuple[np.ndarray, np.ndarray]:
        items, users = np.zeros(table.n_items, dtype=int), np.zeros(table.n_users, dtype=int)
        for stage in runner.stream.stages[: upto + 1]:
            for position in stage.train.position:
                items[table.item[position]] += 1
                users[table.user[position]] += 1
        return head_mask(items, ratio), head_mask(users, ratio)

    assert len(told) == len(runner.stream.stages) == 3
    for index, (head, active) in enumerate(told):
        expected, often = masks(index)
        assert (head == expected).all()
        tested = np.unique(runner.stream.stages[index].test.user)
        assert (np.sort(active) == np.sort(often[tested])).all()
    assert (masks(0)[0] != masks(2)[0]).any(), "the head never changes: the future could not be told from the past"
