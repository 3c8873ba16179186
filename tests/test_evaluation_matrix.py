"""The summaries of R[t, s]: golden values by hand, brute-force loops as reference, and properties."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recbole_cl.results import ResultMatrix, smaller_is_better, summarise, summarise_all
from recbole_cl.results import measures as m
from recbole_cl.results.matrix import SUMMARIES

# Rows: trained up to stage 1, 2, 3. Stage 2 gains after it was first trained on, stage 1 is forgotten.
R = np.array(
    [
        [0.50, 0.20, 0.10],
        [0.60, 0.40, 0.25],
        [0.30, 0.45, 0.55],
    ]
)
B = np.array([0.05, 0.08, 0.02])

scores = st.integers(1, 6).flatmap(
    lambda t: arrays(np.float64, (t, t), elements=st.floats(0, 1, allow_nan=False, width=32))
)


def brute(r: np.ndarray, b: np.ndarray | None = None) -> dict[str, float]:
    """The formulas of the spec as plain loops with stages counted from 1."""
    n = len(r)

    def at(t: int, s: int) -> float:
        return float(r[t - 1, s - 1])

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    found = {
        "LA": mean([at(s, s) for s in range(1, n + 1)]),
        "plasticity": mean([at(s, s) for s in range(1, n + 1)]),
        "final_average": mean([at(n, s) for s in range(1, n + 1)]),
        "average_over_time": mean([mean([at(t, s) for s in range(1, t + 1)]) for t in range(1, n + 1)]),
    }
    if n > 1:
        old = range(1, n)
        found["AF"] = mean([max(at(t, s) for t in range(s, n)) - at(n, s) for s in old])
        found["BWT"] = mean([at(n, s) - at(s, s) for s in old])
        found["next_stage"] = mean([at(s, s + 1) for s in old])
        found["stability"] = mean([at(n, s) for s in old])
        total = found["stability"] + found["plasticity"]
        found["h_mean"] = 2 * found["stability"] * found["plasticity"] / total if total else 0.0
        if b is not None:
            found["FWT"] = mean([at(s - 1, s) - float(b[s - 1]) for s in range(2, n + 1)])
    return found


def test_golden_values() -> None:
    found = {name: s.value for name, s in summarise(R, B).items()}
    # AF: stage 1 max(0.50, 0.60) - 0.30 = 0.30, stage 2 max(0.40) - 0.45 = -0.05.
    assert found["AF"] == pytest.approx((0.30 - 0.05) / 2)
    assert found["BWT"] == pytest.approx((-0.20 + 0.05) / 2)
    assert found["FWT"] == pytest.approx(((0.20 - 0.08) + (0.25 - 0.02)) / 2)
    assert found["LA"] == pytest.approx((0.50 + 0.40 + 0.55) / 3)
    assert found["next_stage"] == pytest.approx((0.20 + 0.25) / 2)
    assert found["final_average"] == pytest.approx((0.30 + 0.45 + 0.55) / 3)
    assert found["average_over_time"] == pytest.approx((0.50 + 0.50 + 1.30 / 3) / 3)
    assert found["stability"] == pytest.approx(0.375)
    assert found["plasticity"] == found["LA"]
    assert found["h_mean"] == pytest.approx(2 * 0.375 * found["LA"] / (0.375 + found["LA"]))
    assert list(found) == list(SUMMARIES)
    assert all(s.reason is None for s in summarise(R, B).values())


def test_definitions_of_forgetting_differ() -> None:
    """The same matrix under the names other libraries use: why the formula stands beside the number."""
    last = len(R) - 1
    ours = m.average_forgetting(R)
    first_minus_last = np.mean([R[s, s] - R[last, s] for s in range(last)])
    max_with_last = np.mean([R[s:, s].max() - R[last, s] for s in range(last)])
    clamped = np.mean([max(R[s:last, s].max() - R[last, s], 0.0) for s in range(last)])
    assert ours.value == pytest.approx(0.125)
    assert first_minus_last == pytest.approx(0.075)
    # Including the last row is the same as clamping each stage at zero: gains on old stages can no longer be seen.
    assert max_with_last == clamped == pytest.approx(0.15)
    assert ours.formula == "mean_{s<T} (max_{s<=t<=T-1} R[t,s] - R[T,s])"
    assert first_minus_last == pytest.approx(-m.backward_transfer(R).value)


def test_rows_before_a_stage_was_seen_are_not_forgotten() -> None:
    r = R.copy()
    r[0, 1] = 0.99  # R[1,2]: before stage 2 was trained on
    assert m.average_forgetting(r).value == m.average_forgetting(R).value


@settings(deadline=None)
@given(scores, st.data())
def test_equals_brute_force(r: np.ndarray, data: st.DataObject) -> None:
    b = data.draw(arrays(np.float64, len(r), elements=st.floats(0, 1, width=32)))
    expected = brute(r, b)
    for name, found in summarise(r, b).items():
        if name in expected:
            assert found.value == pytest.approx(expected[name], abs=1e-12), name
        else:
            assert found.value is None and "two stages" in (found.reason or "")


@settings(deadline=None)
@given(scores)
def test_smaller_is_better_flips_the_sign_and_keeps_the_levels(r: np.ndarray) -> None:
    gain, loss = summarise(r, r[0]), summarise(-r, -r[0], smaller_is_better=True)
    for name in ("AF", "BWT", "FWT"):
        assert gain[name].value == (pytest.approx(loss[name].value) if loss[name].value is not None else None)
    for name in ("LA", "next_stage", "final_average", "average_over_time"):
        assert gain[name].value is None or gain[name].value == pytest.approx(-loss[name].value)
    assert loss["h_mean"].value is None


def test_smaller_is_better_golden() -> None:
    loss = np.array([[1.0, 3.0], [1.5, 0.8]])
    found = summarise(loss, [4.0, 3.5], smaller_is_better=True)
    assert found["AF"].value == pytest.approx(0.5)  # the loss on stage 1 rose from 1.0 to 1.5: forgotten
    assert found["BWT"].value == pytest.approx(-0.5)
    assert found["FWT"].value == pytest.approx(0.5)  # 3.0 before training, the reference 3.5: a gain
    assert found["AF"].formula == "mean_{s<T} (R[T,s] - min_{s<=t<=T-1} R[t,s])"
    assert ResultMatrix(loss, smaller_is_better=True).summarise()["AF"].value == pytest.approx(0.5)


@settings(deadline=None)
@given(st.integers(2, 6), st.floats(0, 1, width=32))
def test_constant_matrix(n: int, value: float) -> None:
    found = summarise(np.full((n, n), value), np.full(n, value))
    for name in ("AF", "BWT", "FWT"):
        assert found[name].value == 0.0
    for name in ("LA", "next_stage", "final_average", "average_over_time", "stability", "h_mean"):
        assert found[name].value == pytest.approx(value)


@settings(deadline=None)
@given(scores)
def test_forgetting_bounds_backward_transfer(r: np.ndarray) -> None:
    """The maximum is at least the diagonal, so AF >= -BWT; where nothing is lost after its stage, BWT >= 0."""
    af, bwt = m.average_forgetting(r).value, m.backward_transfer(r).value
    if af is not None and bwt is not None:
        assert af >= -bwt - 1e-12
    rising = np.sort(r, axis=0)
    assert len(r) == 1 or m.backward_transfer(rising).value >= 0 >= m.average_forgetting(rising).value


@settings(deadline=None)
@given(scores, st.data())
def test_permutation_of_old_stages(r: np.ndarray, data: st.DataObject) -> None:
    """Means over stages do not care about the order of the old ones, where the formula has no order in it."""
    order = [*data.draw(st.permutations(range(len(r) - 1))), len(r) - 1]
    before, after = summarise(r), summarise(r[np.ix_(order, order)])
    for name in ("BWT", "LA", "final_average", "stability", "plasticity", "h_mean"):
        if before[name].value is None:
            assert after[name].value is None
        else:
            assert after[name].value == pytest.approx(before[name].value)


@settings(deadline=None)
@given(scores, st.floats(0.1, 10), st.floats(-5, 5))
def test_shift_and_scale(r: np.ndarray, scale: float, shift: float) -> None:
    """Differences scale and do not see a shift; levels follow both."""
    for name, found in summarise(r * scale + shift, r[0] * scale + shift).items():
        before = summarise(r, r[0])[name].value
        if before is None or name == "h_mean":
            continue
        moved = before * scale + (0 if name in ("AF", "BWT", "FWT") else shift)
        assert found.value == pytest.approx(moved, abs=1e-6)


def test_one_stage() -> None:
    found = summarise([[0.4]], [0.1])
    for name in ("AF", "BWT", "FWT", "next_stage", "stability", "h_mean"):
        assert found[name].value is None
        assert "at least two stages" in found[name].reason
    assert found["LA"].value == found["final_average"].value == found["average_over_time"].value == 0.4


def test_stage_without_test_is_left_out_and_named() -> None:
    r = R.copy()
    r[:, 0] = np.nan
    found = summarise(r, B)
    assert found["AF"].value == pytest.approx(-0.05)
    assert found["AF"].reason == "stage 1 left out: R[s,s] is null (no test targets, or not evaluated)"
    assert found["LA"].value == pytest.approx((0.40 + 0.55) / 2)
    assert found["average_over_time"].value == pytest.approx((0.40 + (0.45 + 0.55) / 2) / 2)
    assert found["h_mean"].reason == found["AF"].reason
    assert found["FWT"].reason is None, "column 1 is not in FWT"
    r[:, 1] = np.nan
    assert summarise(r, B)["FWT"].value == pytest.approx(0.25 - 0.02)
    assert "stage 2 left out" in summarise(r, B)["FWT"].reason
    assert m.average_forgetting(r).value is None
    assert "stages 1, 2 left out" in m.average_forgetting(r).reason


def test_next_stage_split_has_no_forgetting() -> None:
    """Targets of s are trained on in the stage after: the cells from there on are null."""
    r = [[0.5, 0.2, 0.1], [None, 0.4, 0.3], [None, None, 0.6]]
    found = summarise(r, B)
    assert found["AF"].value is None and found["BWT"].value is None
    assert "R[2,1], R[3,1], R[3,2] are null" in found["AF"].reason
    assert "trained on by then" in found["BWT"].reason
    assert found["LA"].value == pytest.approx(0.5)
    assert found["next_stage"].value == pytest.approx(0.25)
    # Null from the diagonal down (the test of a model is the next stage itself): next-stage and FWT still stand.
    r = [[None, 0.2, 0.1], [None, None, 0.3], [None, None, None]]
    found = summarise(r, B)
    assert found["next_stage"].value == pytest.approx(0.25)
    assert found["FWT"].value == pytest.approx((0.12 + 0.28) / 2)
    assert found["LA"].value is None and "stages 1, 2, 3 left out" in found["LA"].reason
    assert found["average_over_time"].value is None


def test_all_null_and_missing_reference() -> None:
    assert all(s.value is None and s.reason for s in summarise(np.full((3, 3), np.nan), B).values())
    assert m.forward_transfer(R, None).reason == "no reference b[s] was run"
    assert m.forward_transfer(R, [None, None, 0.02]).reason == "the reference b[2] is null"
    assert m.forward_transfer(R, [None, 0.08, 0.02]).value is not None, "b[1] is not used"
    with pytest.raises(ValueError, match="one value for each of the 3 stages"):
        m.forward_transfer(R, [0.1, 0.2])


@pytest.mark.parametrize("bad", [[[0.1, 0.2]], [], [0.1], np.zeros((2, 2, 2)), [[np.inf]]])
def test_refuses_what_is_no_matrix(bad: object) -> None:
    with pytest.raises(ValueError, match="result matrix"):
        summarise(bad)  # type: ignore[arg-type]


def test_h_mean() -> None:
    assert m.h_mean(np.zeros((2, 2))).value == 0.0
    assert m.h_mean(R * 10).value is None
    assert "[0, 1]" in m.h_mean(R * 10).reason
    assert m.h_mean(np.full((2, 2), 1e-200)).value == pytest.approx(1e-200)


def test_result_matrix_is_checked_and_frozen() -> None:
    source = R.copy()
    matrix = ResultMatrix(source)
    source[0, 0] = 9.0
    assert matrix.values[0, 0] == 0.5 and matrix.n_stages == 3
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 1.0
    assert ResultMatrix([[None, 0.1], [0.2, 0.3]]).to_list()[0] == [None, 0.1]  # type: ignore[arg-type]
    assert matrix.summarise(B) == summarise(R, B)


def test_direction_of_a_metric() -> None:
    assert [smaller_is_better(n) for n in ("LogLoss", "RMSE", "mae", "NDCG@10", "GiniIndex@5")] == [1, 1, 1, 0, 1]


def test_summarise_all_has_the_shape_of_result_json() -> None:
    found = summarise_all({"RMSE": R, "NDCG@10": R}, {"NDCG@10": B})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found["summary"]) == list(SUMMARIES)
    assert found["summary"]["AF"]["NDCG@10"] == pytest.approx(0.125)
    assert list(found["summary"]["AF"]) == ["RMSE", "NDCG@10"]
    assert found["formulas"]["AF"].startswith("mean_{s<T} (max")
    assert "for RMSE: mean_{s<T} (R[T,s] - min" in found["formulas"]["AF"]
    assert found["formulas"]["LA"] == "mean_s R[s,s]"
    assert found["reasons"]["FWT"] == {"RMSE": "no reference b[s] was run"}
    assert "AF" not in found["reasons"]
    assert summarise_all({})["summary"]["AF"] == {}


def test_docstrings_state_the_formula_that_is_printed() -> None:
    """A formula in a docstring that differs from the one printed would be worse than none."""
    for function, name in (
        (m.average_forgetting, "AF"),
        (m.backward_transfer, "BWT"),
        (m.forward_transfer, "FWT"),
        (m.learning_accuracy, "LA"),
        (m.next_stage, "next_stage"),
        (m.final_average, "final_average"),
        (m.average_over_time, "average_over_time"),
        (m.stability, "stability"),
        (m.plasticity, "plasticity"),
    ):
        text = "".join((function.__doc__ or "").split())
        for smaller in (False, True):
            formula = summarise(R, B, smaller)[name].formula
            assert "".join(formula.split()).strip("()") in text, formula
    assert not math.isnan(summarise(R, B)["AF"].value or 0)
