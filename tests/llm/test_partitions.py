"""Partitions close once, never inside a run of equal times, and nobody sees one that is not past."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_cl.errors import ConfigError
from recbole_cl.llm.partitions import Partitioner, Partitions, Rules, cut, visible

RULES = st.builds(
    Rules,
    st.integers(1, 6),
    st.one_of(st.none(), st.floats(0.5, 9.0)),
) | st.builds(Rules, st.none(), st.floats(0.5, 9.0))
GAPS = st.lists(st.sampled_from([0, 0, 0, 1, 2, 7]), max_size=40)


def by_hand(times: list[int], rules: Rules) -> list[int]:
    """The rules as a loop over events."""
    ends, begin = [], 0
    for i, time in enumerate(times):
        if i == begin:
            continue
        full = rules.size is not None and i - begin >= rules.size
        old = rules.seconds is not None and time > times[begin] + rules.seconds
        if (full or old) and time != times[i - 1]:
            ends.append(i)
            begin = i
    return ends


def test_the_picture_of_the_module() -> None:
    assert cut(np.array([1, 2, 2, 2, 3, 5, 5, 6]), Rules(3)).tolist() == [4, 7]
    assert cut(np.array([1, 2, 2, 2]), Rules(3)).tolist() == []
    assert cut(np.array([1, 2, 2, 2]), Rules(3), now=2).tolist() == []
    assert cut(np.array([1, 2, 2, 2]), Rules(3), now=3).tolist() == [4]


@settings(max_examples=200, deadline=None)
@given(GAPS, RULES)
def test_partitions_are_those_of_a_loop_over_events(gaps: list[int], rules: Rules) -> None:
    times = np.cumsum(gaps)
    assert cut(times, rules).tolist() == by_hand(times.tolist(), rules)


@settings(max_examples=200, deadline=None)
@given(GAPS, RULES, st.data())
def test_a_log_in_pieces_gives_the_partitions_of_the_whole(gaps: list[int], rules: Rules, data: st.DataObject) -> None:
    times = np.cumsum(gaps)
    ends = cut(times, rules).tolist()
    memory, found, at = Partitioner(rules), [], 0
    while at < len(times):
        step = data.draw(st.integers(1, 5))
        found += memory.feed(times[at : at + step])
        at += step
    assert found == list(zip([0, *ends], ends, strict=False))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 1, 3])), max_size=80), RULES, st.booleans())
def test_no_sample_sees_what_is_not_past(events: list[tuple[int, int]], rules: Rules, shuffled: bool) -> None:
    """Random logs full of ties; also streams whose stages are not in the order of time (domains)."""
    user = np.array([u for u, _ in events], dtype=np.int64)
    time = np.cumsum([gap for _, gap in events]).astype(np.int64)
    if shuffled and len(time):
        time = np.roll(time, len(time) // 2)
    seq = np.argsort(user, kind="stable")
    ptr = np.r_[0, np.cumsum(np.bincount(user, minlength=5))]
    parts = Partitions.of(seq, ptr, time, rules)
    position = np.arange(len(user))
    counts = visible(parts, user, position, time)
    for p in position:
        own = np.flatnonzero(parts.user == user[p])
        for place, row in enumerate(own):
            inside = seq[parts.begin[row] : parts.end[row]]
            past = bool((time[inside] < time[p]).all() and (inside < p).all())
            if place < counts[p]:
                assert past, "a sample sees a partition that is not strictly past"
            elif not shuffled:
                assert not past, "a past partition is hidden"
        assert (parts.closer[own[: counts[p]]] <= p).all(), "it is seen before it has closed"
    for row in range(len(parts)):  # immutable: a range of one user's sequence, closed by another time
        assert (user[seq[parts.begin[row] : parts.end[row]]] == parts.user[row]).all()
        assert time[parts.closer[row]] != time[parts.last[row]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 7))
def test_calls_are_bounded(gaps: list[int], size: int) -> None:
    n = len(gaps)
    m = len(cut(np.cumsum(gaps), Rules(size)))
    assert max(0, 2 * m - 1) <= max(0, 2 * (n // size) - 1)


def test_rules_that_close_nothing_are_refused() -> None:
    for wrong in ((None, None), (0, None), (None, 0.0)):
        with pytest.raises(ConfigError, match="liber_partition"):
            Rules(*wrong)
