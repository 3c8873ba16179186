"""The real logs, where they are at hand (RECBOLE_CL_DATA); ml-100k comes with RecBole."""

from __future__ import annotations

import time

import numpy as np
import pytest
from stream_helpers import real, stream_of

from recbole_cl.errors import DataError
from recbole_cl.stream.build import Stream

ADER = [23105, 20659, 22219, 21031, 40817, 37808, 41454, 51056, 61739, 63854, 38562, 49385, 54699, 55965, 44874, 60878]
"""Test predictions of cycles 1 to 16: the published ones are the first three and the last."""


def predicted(stream: Stream) -> list[int]:
    """For each stage, test targets with a known item and a known item in their history."""
    table, counts = stream.table, []
    for stage in stream.stages:
        seen = np.r_[0, np.cumsum(table.item[table.seq] < stage.n_items)]
        test = stage.test
        counts.append(int(((test.label < stage.n_items) & (seen[test.hi] > seen[test.lo])).sum()))
    return counts


def test_diginetica_has_aders_test_predictions() -> None:
    real("diginetica-weeks")
    started = time.perf_counter()
    protocol = {
        "dataset": "diginetica-weeks",
        "n_stages": None,
        "scheduler": "Periods",
        "stage_split": "next_stage",
        "valid_split": "random",
        "stage_ratios": [0.9, 0.1, 0],
        "history": "stage",
    }
    _, stream = stream_of(None, **protocol)
    assert time.perf_counter() - started < 30  # 4 s where this was written; RecBole's own reader alone takes that
    assert [stage.name for stage in stream.stages] == [f"period {k}" for k in range(16)]
    # ADER drops test actions on unseen items, then sessions of length 1, and cuts sessions at the week's border.
    assert predicted(stream) == ADER
    # The same by its own recipe, from the table alone.
    table = stream.table
    for cycle, want in enumerate(ADER, start=1):
        known = np.zeros(table.n_items, dtype=bool)
        known[table.item[table.stage < cycle]] = True
        rows = np.flatnonzero((table.stage == cycle) & known[table.item])
        _, lengths = np.unique(table.user[rows], return_counts=True)
        assert int((lengths - 1).sum()) == want
    for stage in stream.stages:
        assert stage.n_items == stage.first_new_item  # ADER ranks over all items of the training weeks
        assert len(stage.valid) == pytest.approx(0.1 * (len(stage.train) + len(stage.valid)), rel=0.05)


def test_history_across_weeks_is_what_differs() -> None:
    real("diginetica-weeks")
    _, stream = stream_of(
        None,
        dataset="diginetica-weeks",
        n_stages=3,
        scheduler="Periods",
        stage_split="next_stage",
        valid_split="random",
    )
    # 548 sessions span two weeks: with history: all their first action of the later one is a target, too.
    assert predicted(stream) == [23192, 20714, 22267]


def test_lastfm_has_four_rows_of_another_century() -> None:
    real("lastfm-tags")
    _, stream = stream_of(None, dataset="lastfm-tags", model="BPR")
    told = next(told for told in stream.warnings if "far outside" in told)
    assert "4 of 71064" in told and "1956-06-01" in told and "1979-05-01" in told
    assert "time_range: [1122854400, 1304899200]" in told
    assert any("3 of 71064 values of 'timestamp' are negative" in told for told in stream.warnings)
    with pytest.raises(DataError, match=r"stage 2 \(slice 2\) holds no interaction; .*time_range"):
        stream_of(None, dataset="lastfm-tags", model="BPR", stage_by="time", n_stages=5)
    _, stream = stream_of(
        None, dataset="lastfm-tags", model="BPR", stage_by="time", n_stages=5, time_range=[1122854400, 1304899200]
    )
    assert len(stream.table) == 71060 and all(len(stage.train) for stage in stream.stages)


def test_the_other_logs_have_their_sizes() -> None:
    for dataset, rows, users, items in (
        ("online-retail", 397924, 4339, 3665),
        ("amazon-videogames", 231780, 24303, 10672),
    ):
        real(dataset)
        _, stream = stream_of(None, dataset=dataset)
        table = stream.table
        assert (len(table), table.n_users - 1, table.n_items - 1) == (rows, users, items)
        for stage in stream.stages:
            train, test = table.timestamp[stage.train.position], table.timestamp[stage.test.position]
            assert train.max() < test.min()
            assert stage.train.label.max() < stage.n_items <= stage.catalogue


def test_ml_100k_is_whole() -> None:
    _, stream = stream_of(None, dataset="ml-100k", model="BPR", n_stages=5)
    assert sum(len(stage.split(name)) for stage in stream.stages for name in ("train", "valid", "test")) == 100_000
    assert stream.stages[-1].n_users <= 944 and stream.table.n_items == 1683
