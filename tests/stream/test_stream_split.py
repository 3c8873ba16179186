"""Roles of interactions against plain loops, and held-out targets that stay held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_helpers import Plain, random_rows, stream_of, write

from recbole_cl.errors import DataError
from recbole_cl.stream.split import roles
from recbole_cl.stream.table import NONE, TEST, TRAIN, VALID

SPLITS = ("tail", "user_tail", "leave_one_out", "next_stage")


def properties(**given: Any) -> Plain:
    return Plain(
        {"stage_split": "tail", "valid_split": "tail", "stage_ratios": [0.8, 0.1, 0.1], "min_user_inter": 0, "seed": 3}
        | given
    )


def reference(user: list[int], time: list[int], stage: list[int], config: Plain) -> list[int]:
    """The roles, written as loops; without ``valid_split: random``."""
    share = list(config["stage_ratios"])
    if config["stage_split"] == "next_stage":
        share[2] = 0
    total = sum(share)
    out = [NONE] * len(user)
    for s in sorted(set(stage)):
        rows = [k for k in range(len(user)) if stage[k] == s]
        rows = [
            k
            for k in rows
            if sum(user[j] == user[k] and stage[j] == s for j in range(len(user))) >= config["min_user_inter"]
        ]
        if config["stage_split"] in ("tail", "next_stage"):
            cuts = []
            for upto in (share[0], share[0] + share[1]):
                cut = round(upto / total * len(rows))  # Python and numpy round halves to even
                while 0 < cut < len(rows) and time[rows[cut]] == time[rows[cut - 1]]:
                    cut += 1
                cuts.append(cut)
            for place, k in enumerate(rows):
                out[k] = TRAIN if place < cuts[0] else VALID if place < cuts[1] else TEST
            continue
        for u in {user[k] for k in rows}:
            own = [k for k in rows if user[k] == u]
            n = len(own)
            if config["stage_split"] == "leave_one_out":
                tests, valids = int(n >= 2 and share[2] > 0), int(n >= 3 and share[1] > 0)
            else:
                tests = max(int(n * share[2] / total + 1e-9), share[2] > 0) if n >= 2 else 0
                valids = max(int(n * share[1] / total + 1e-9), share[1] > 0) if n >= 3 else 0
            for place, k in enumerate(own):
                left = n - 1 - place
                out[k] = TEST if left < tests else VALID if left < tests + valids else TRAIN
    return out


def test_tail_of_a_hand_made_stage() -> None:
    config = properties()
    time = np.arange(10.0)
    got = roles(config, np.zeros(10, int), time, np.zeros(10, int))
    assert got.tolist() == [TRAIN] * 8 + [VALID, TEST]
    time[8] = 7  # ties at a cut go to the earlier part
    assert roles(config, np.zeros(10, int), time, np.zeros(10, int)).tolist() == [TRAIN] * 9 + [TEST]
    time[9] = 7
    assert roles(config, np.zeros(10, int), time, np.zeros(10, int)).tolist() == [TRAIN] * 10


def test_user_tail_and_leave_one_out_by_hand() -> None:
    user = np.array([0, 0, 0, 0, 1, 1, 2])
    zero = np.zeros(7, int)
    one = roles(properties(stage_split="leave_one_out"), user, zero, zero)
    assert one.tolist() == [TRAIN, TRAIN, VALID, TEST, TRAIN, TEST, TRAIN]
    half = roles(properties(stage_split="user_tail", stage_ratios=[0.5, 0.0, 0.5]), user, zero, zero)
    assert half.tolist() == [TRAIN, TRAIN, TEST, TEST, TRAIN, TEST, TRAIN]
    # 100 * 0.29 is 28.999... in floating point
    many = roles(
        properties(stage_split="user_tail", stage_ratios=[0.71, 0, 0.29]),
        np.zeros(100, int),
        np.arange(100),
        np.zeros(100, int),
    )
    assert (many == TEST).sum() == 29


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=50),
    st.sampled_from(SPLITS),
    st.sampled_from([[0.8, 0.1, 0.1], [8, 1, 1], [0.5, 0.25, 0.25], [0.9, 0.1, 0], [0.6, 0, 0.4]]),
    st.integers(0, 4),
)
def test_roles_equal_plain_loops(rows: list[tuple[int, int, int]], split: str, ratios: list[float], least: int) -> None:
    stage, time, user = (list(column) for column in zip(*sorted(rows, key=lambda r: r[:2]), strict=True))
    config = properties(stage_split=split, stage_ratios=ratios, min_user_inter=least)
    got = roles(config, np.array(user), np.array(time, float), np.array(stage))
    assert got.tolist() == reference(user, time, stage, config)


@pytest.mark.parametrize("split", SPLITS)
def test_random_validation_takes_its_share_of_what_is_not_tested(split: str) -> None:
    rng = np.random.default_rng(0)
    user, stage = rng.integers(0, 6, 300), np.repeat([0, 1, 2], 100)
    time = np.sort(rng.integers(0, 900, 300)).astype(float)
    config = properties(stage_split=split, min_user_inter=10)
    tail, random = (roles(Plain(config | {"valid_split": how}), user, time, stage) for how in ("tail", "random"))
    assert ((tail == TEST) == (random == TEST)).all() and ((tail == NONE) == (random == NONE)).all()
    for s in range(3):
        kept = np.isin(random[stage == s], (TRAIN, VALID))
        share = 0.1 / 0.9  # of what is left after the test, and all of it under next_stage
        assert (random[stage == s] == VALID).sum() == round(share * kept.sum())
    assert (random != tail).any()
    again = roles(Plain(config | {"valid_split": "random"}), user, time, stage)
    assert (again == random).all()
    other = roles(Plain(config | {"valid_split": "random", "seed": 4}), user, time, stage)
    assert (other != random).any()


@pytest.mark.parametrize("valid", ["tail", "random"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_held_out_targets_are_never_trained(tmp_path: Path, split: str, valid: str, model: str) -> None:
    write(tmp_path, random_rows())
    _, stream = stream_of(tmp_path, model=model, stage_split=split, valid_split=valid)
    trained = [set(stage.train.position.tolist()) for stage in stream.stages]
    for stage in stream.stages:
        assert not set(stage.valid.position.tolist()).intersection(*[set().union(*trained)])
        assert not set(stage.valid.position.tolist()) & set(stage.test.position.tolist())
        overlap = [k for k, past in enumerate(trained) if past & set(stage.test.position.tolist())]
        if split == "next_stage":
            assert stage.tested_until == stage.index
            assert stage.evaluable(stage.index) and not stage.evaluable(stage.index + 1)
            assert overlap == ([stage.index + 1] if stage.index + 1 < len(stream) else [])
        else:
            assert stage.tested_until is None and not overlap and stage.evaluable(len(stream) - 1)


def test_next_stage_tests_on_the_whole_next_slice(tmp_path: Path) -> None:
    write(tmp_path, random_rows())
    _, stream = stream_of(tmp_path, model="BPR", stage_split="next_stage", n_stages=3, stage_ratios=[0.9, 0.1, 0])
    assert len(stream) == 3 and stream.table.stage.max() == 3
    for stage in stream.stages:
        assert stage.test.position.tolist() == np.flatnonzero(stream.table.stage == stage.index + 1).tolist()


def test_users_with_few_interactions_are_history_only(tmp_path: Path) -> None:
    write(tmp_path, random_rows())
    _, stream = stream_of(tmp_path, model="BPR", min_user_inter=6)
    table = stream.table
    left_out = 0
    for stage in stream.stages:
        counts = np.bincount(table.user[table.stage == stage.index], minlength=table.n_users)
        targets = np.concatenate([stage.split(name).position for name in ("train", "valid", "test")])
        here = np.flatnonzero(table.stage == stage.index)
        assert sorted(targets.tolist()) == here[counts[table.user[here]] >= 6].tolist()
        left_out += len(here) - len(targets)
    assert left_out > 0
    with pytest.raises(DataError, match="no training target; lower n_stages or min_user_inter"):
        stream_of(tmp_path, model="BPR", min_user_inter=100)
