"""Schedulers: exact stages on hand-made logs, and what holds for every log."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_helpers import Plain, configure, stream_of, tokens, write

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.registry import schedulers
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.schedulers.base import Log, Slices, parse_time


def cut(scheduler: str, time: Any, user: Any = None, frame: Any = None, **properties: Any) -> Slices:
    time = np.asarray(time, dtype=np.float64)
    user = np.zeros(len(time), dtype=np.int64) if user is None else np.asarray(user)
    config = Plain({"stage_split": "tail", "stage_by": "count", "base_ratio": 0.6, "n_stages": None} | properties)
    log = Log(user, np.arange(len(time)), time, pd.DataFrame(frame or {"timestamp": time}))
    return schedulers.get(scheduler)(config).assign(log)


def test_time_slices_by_count_cuts_at_rounded_shares() -> None:
    slices = cut("TimeSlices", range(10), n_stages=3)
    assert slices.stage.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]  # cuts at round(3.33) and round(6.67)
    assert slices.names == ["slice 1", "slice 2", "slice 3"]
    # The file's order does not matter, the time does.
    assert cut("TimeSlices", range(9, -1, -1), n_stages=2).stage.tolist() == [1] * 5 + [0] * 5


def test_time_slices_by_time_are_half_open_but_for_the_last() -> None:
    assert cut("TimeSlices", [0, 1, 4, 5, 6, 10], n_stages=2, stage_by="time").stage.tolist() == [0, 0, 0, 1, 1, 1]
    assert cut("TimeSlices", [10, 0, 9, 100], n_stages=2, stage_by="time").stage.tolist() == [0, 0, 0, 1]


def test_ties_at_a_cut_go_to_the_earlier_stage() -> None:
    time = [0, 1, 2, 2, 2, 2, 6, 7]  # the cut of two halves lies inside the run of 2
    assert cut("TimeSlices", time, n_stages=2).stage.tolist() == [0] * 6 + [1] * 2
    assert cut("BaseThenIncrements", time, n_stages=2, base_ratio=0.4).stage.tolist() == [0] * 6 + [1] * 2
    assert cut("Boundaries", time, boundaries=[2]).stage.tolist() == [0, 0] + [1] * 6  # [2, ..) is the later one


def test_base_then_increments() -> None:
    slices = cut("BaseThenIncrements", range(20), n_stages=5, base_ratio=0.6)
    assert slices.stage.tolist() == [0] * 12 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 2
    assert slices.names == ["base", "increment 1", "increment 2", "increment 3", "increment 4"]
    assert cut("BaseThenIncrements", range(5), n_stages=1).stage.tolist() == [0] * 5


@pytest.mark.parametrize("scheduler", ["TimeSlices", "BaseThenIncrements", "UserDisjoint"])
def test_next_stage_takes_one_slice_more(scheduler: str) -> None:
    slices = cut(scheduler, range(40), user=range(40), n_stages=3, stage_split="next_stage")
    assert sorted(set(slices.stage.tolist())) == [0, 1, 2, 3] and len(slices.names) == 4


def test_boundaries_by_timestamp_and_by_date() -> None:
    march = int(pd.Timestamp("2011-03-01", tz="UTC").timestamp())
    time = [march - 1, march, march + 1, march + 86400]
    assert cut("Boundaries", time, boundaries=["2011-03-01"]).stage.tolist() == [0, 1, 1, 1]
    assert cut("Boundaries", time, boundaries=[march, "2011-03-02"]).stage.tolist() == [0, 1, 1, 2]
    assert parse_time("2011-03-01T01:00:00+01:00", "x") == march  # a zone that is given counts
    assert cut("Boundaries", time, boundaries=[march]).names == [f"before {march}", f"from {march}"]


@pytest.mark.parametrize("bad", [[3, 3], [4, 2], ["2012-01-01", "2011-01-01"]])
def test_boundaries_must_increase(bad: list[Any]) -> None:
    with pytest.raises(ConfigError, match="boundaries"):
        cut("Boundaries", range(5), boundaries=bad)


@pytest.mark.parametrize("bad", ["soon", "", None, float("nan"), float("inf"), [], True, "NaT"])
def test_a_time_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"time_range: .* neither a timestamp nor an ISO date"):
        parse_time(bad, "time_range")


def test_boundaries_and_n_stages_may_not_contradict() -> None:
    with pytest.raises(ConfigError, match="n_stages: 5 contradicts 1 boundaries, which make 2 stages"):
        cut("Boundaries", range(5), boundaries=[2], n_stages=5)
    with pytest.raises(ConfigError, match="which make 1 stages"):
        cut("Boundaries", range(5), boundaries=[2], n_stages=2, stage_split="next_stage")
    assert cut("Boundaries", range(5), boundaries=[2], n_stages=2).stage.max() == 1
    with pytest.raises(ConfigError, match=r"boundaries: .* needs a list"):
        cut("Boundaries", range(5), boundaries=None)


def test_periods_of_numbers_and_of_words() -> None:
    numbers = {"week": [10, 2, 2, 9, 10]}
    slices = cut("Periods", range(5), frame=numbers, period_field="week")
    assert slices.stage.tolist() == [2, 0, 0, 1, 2] and slices.names == ["period 2", "period 9", "period 10"]
    texts = cut("Periods", range(5), frame={"week": ["10", "2", "2", "9", "10"]}, period_field="week")
    assert texts.stage.tolist() == [2, 0, 0, 1, 2]  # a token column of numbers is ordered as numbers, too
    words = cut("Periods", range(3), frame={"week": ["b", "a", "10"]}, period_field="week")
    assert words.names == ["10", "a", "b"] and words.stage.tolist() == [2, 1, 0]


def test_periods_keeps_the_first_so_many() -> None:
    week = {"week": [0, 1, 2, 3]}
    assert cut("Periods", range(4), frame=week, period_field="week", n_stages=2).stage.tolist() == [0, 1, -1, -1]
    prequential = cut("Periods", range(4), frame=week, period_field="week", n_stages=2, stage_split="next_stage")
    assert prequential.stage.tolist() == [0, 1, 2, -1] and len(prequential.names) == 3
    assert cut("Periods", range(4), frame=week, period_field="week", n_stages=9).names[-1] == "period 3"


def test_periods_left_out_are_counted(tmp_path: Path) -> None:
    rows = [(f"u{k % 3}", f"i{k % 4}", k, k // 10) for k in range(40)]
    write(tmp_path, rows, "user_id:token\titem_id:token\ttimestamp:float\tweek:float")
    _, stream = stream_of(tmp_path, scheduler="Periods", period_field="week", n_stages=3)
    assert len(stream) == 3 and len(stream.table) == 30
    assert any("10 interactions of later periods are left out" in told for told in stream.warnings)


@pytest.mark.parametrize("scheduler", ["Periods", "Domains"])
def test_period_field_missing_or_with_gaps(scheduler: str) -> None:
    with pytest.raises(ConfigError, match=f"period_field: the scheduler {scheduler} needs the column"):
        cut(scheduler, range(3))
    with pytest.raises(ConfigError, match=r"period_field: 'weak' is no column .*week.* load_col"):
        cut(scheduler, range(3), frame={"week": [1, 2, 3]}, period_field="weak")
    with pytest.raises(DataError, match="period_field: 2 interactions have no 'week'"):
        cut(scheduler, range(3), frame={"week": [1, np.nan, np.nan]}, period_field="week")


def test_domains_in_the_order_of_first_appearance() -> None:
    frame = {"shop": ["a", "c", "a", "b", "c"]}
    slices = cut("Domains", [5, 4, 3, 9, 1], frame=frame, period_field="shop")
    assert slices.names == ["c", "a", "b"]  # c at time 1, a at 3, b at 9
    assert slices.stage.tolist() == [1, 0, 1, 2, 0]
    fewer = cut("Domains", [5, 4, 3, 9, 1], frame=frame, period_field="shop", n_stages=2)
    assert fewer.stage.tolist() == [1, 0, 1, -1, 0] and fewer.names == ["c", "a"]


def test_domains_by_a_column_of_the_item_file(tmp_path: Path) -> None:
    rows = [(f"u{k % 5}", f"i{k % 8}", k) for k in range(80)]
    write(tmp_path, rows)
    write(
        tmp_path,
        [(f"i{k}", "toys games" if k % 2 else "books") for k in range(8)],
        "item_id:token\tkind:token_seq",
        "item",
    )
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind"]}
    config = configure(tmp_path, scheduler="Domains", n_stages=None, load_col=load)
    config["period_field"] = "kind"
    stream = build_stream(config)
    assert [stage.name for stage in stream.stages] == ["books", "toys games"]
    table = stream.table
    for stage in (0, 1):
        odd = {int(t[1:]) % 2 for t in tokens(stream, "item_id", table.item[table.stage == stage])}
        assert odd == {stage}


def test_user_disjoint_by_first_interaction() -> None:
    #        a  a  b  c  a  d  d  e  e  f    first seen a, b, c, d, e, f with 3, 1, 1, 2, 2, 1 rows
    user = [0, 0, 1, 2, 0, 3, 3, 4, 4, 5]
    slices = cut("UserDisjoint", range(10), user=user, n_stages=3, base_ratio=0.5)
    # cuts at 5 and 7.5; middles a 1.5, b 3.5, c 4.5, d 6, e 8, f 9.5
    assert slices.stage.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert slices.names == ["users 1", "users 2", "users 3"]


def test_fewer_interactions_than_slices() -> None:
    for scheduler in ("TimeSlices", "BaseThenIncrements", "UserDisjoint"):
        with pytest.raises(DataError, match=r"n_stages: 4 slices were asked of 3 interactions; lower n_stages"):
            cut(scheduler, range(3), user=range(3), n_stages=4)


logs = st.lists(st.tuples(st.integers(0, 6), st.integers(-3, 12)), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(logs, st.integers(1, 5), st.sampled_from(["tail", "next_stage"]), st.floats(0.05, 0.95), st.data())
def test_every_scheduler_partitions_the_log(
    rows: list[tuple[int, int]], n_stages: int, split: str, base: float, data: st.DataObject
) -> None:
    user, time = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    n_slices = n_stages + (split == "next_stage")
    common: dict[str, Any] = {"n_stages": n_stages, "stage_split": split, "base_ratio": base}
    if len(rows) >= n_slices:
        for scheduler, more in (
            ("TimeSlices", {}),
            ("TimeSlices", {"stage_by": "time"}),
            ("BaseThenIncrements", {}),
            ("UserDisjoint", {}),
        ):
            slices = cut(scheduler, time, user, **common, **more)
            assert slices.stage.shape == time.shape and len(slices.names) == n_slices
            assert slices.stage.min() >= 0 and slices.stage.max() < n_slices
            if scheduler == "UserDisjoint":
                assert all(len(set(slices.stage[user == u])) == 1 for u in set(user.tolist()))
                continue
            # Nothing later before something earlier, and equal times together: stages are separated strictly.
            order = np.argsort(slices.stage, kind="stable")
            for a, b in itertools.pairwise(order):
                if slices.stage[a] != slices.stage[b]:
                    assert time[slices.stage == slices.stage[a]].max() < time[slices.stage == slices.stage[b]].min()
    edges = sorted(data.draw(st.sets(st.integers(-4, 13), min_size=1, max_size=4)))
    stage = cut("Boundaries", time, user, boundaries=edges).stage
    assert stage.tolist() == [sum(t >= edge for edge in edges) for t in time]
    for scheduler in ("Periods", "Domains"):
        slices = cut(scheduler, time, user, frame={"part": user}, period_field="part")
        assert [slices.names[s] for s in slices.stage] == [
            f"period {u}" if scheduler == "Periods" else str(u) for u in user
        ]
        assert sorted(set(slices.stage.tolist())) == list(range(len(set(user.tolist()))))


def test_rows_of_the_stream_are_sorted_and_complete(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [
        (f"u{u}", f"i{k}", t)
        for k, (u, t) in enumerate(zip(rng.integers(0, 9, 200), rng.integers(0, 50, 200), strict=True))
    ]
    write(tmp_path, rows)
    for scheduler in ("TimeSlices", "BaseThenIncrements", "UserDisjoint"):
        _, stream = stream_of(tmp_path, scheduler=scheduler)
        table = stream.table
        assert (np.diff(table.stage) >= 0).all()
        for stage in range(3):
            assert (np.diff(table.timestamp[table.stage == stage]) >= 0).all()
        told = sorted(
            zip(
                tokens(stream, "user_id", table.user),
                tokens(stream, "item_id", table.item),
                table.timestamp.tolist(),
                strict=True,
            )
        )
        assert told == sorted(rows)
        # Equal times keep the file's order; items are numbered by line here.
        for stage in range(3):
            here = [
                (t, int(i[1:]))
                for t, i in zip(
                    table.timestamp[table.stage == stage],
                    tokens(stream, "item_id", table.item[table.stage == stage]),
                    strict=True,
                )
            ]
            assert here == sorted(here)
