"""The section of what models and strategies tell of themselves."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from report_fixture import make_result
from test_report import EVIL, SECTIONS, Page, check

from recbole_cl.report import page

REPORTS: list[dict[str, Any]] = [
    {
        "stage": stage,
        "who": "Mine",
        "numbers": {"texts": 1200 + stage, "mean norm": 0.25 * (stage + 1), "nothing": None},
        "tables": {"Users asked": [{"user": f"u{n}", "reached": 0.5, "said": "word " * 20} for n in range(9)]},
        "figures": {"Loss by round": {"server": [[n, 1 / (n + stage + 1)] for n in range(5)], "client": [[0, 1.0]]}},
    }
    for stage in range(3)
] + [{"stage": 1, "who": "EWC", "numbers": {"importance": 3.5}}]


def told(reports: Any, stages: int = 3) -> Page:
    """Returns a page with reports, its other parts checked."""
    found = page({**make_result(stages), "reports": reports})
    kept, SECTIONS[:] = list(SECTIONS), [*SECTIONS[:9], "reports", *SECTIONS[9:]]
    try:
        return check(found)
    finally:
        SECTIONS[:] = kept


@pytest.mark.parametrize(
    "reports", [None, [], [{"stage": 0, "who": "Mine"}], [{"stage": 0, "who": "A", "numbers": {}}]]
)
def test_nothing_is_shown_where_nobody_tells(reports: Any) -> None:
    """No heading, no entry in the menu."""
    html = page({**make_result(3), "reports": reports})
    check(html)
    assert "Reports" not in html.split("<main>")[0]


def test_numbers_tables_and_lines() -> None:
    """Stages of one teller stand together; whole numbers are counts, others scores, null a dash."""
    read = told(REPORTS)
    words = [word.strip() for word in read.words]
    at = words.index("Mine")
    assert words.index("EWC", at) < words.index("Warnings (2)", at)
    assert words[at + 1 : at + 5] == ["stage", "texts", "mean norm", "nothing"]
    assert words[at + 5 : at + 9] == ["1 2011-01", "1,200", "0.2500", "-"]
    assert words.count("u8") == 3 and words.count("reached") == 1, "one table a title, its stages below one another"
    (name,) = [name for name in read.figures if name.startswith("reports")]
    drawn = read.figures[name]["data"]
    assert [trace["name"] for trace in drawn[:3]] == ["stage 1 2011-01", "stage 1 2011-01", "stage 2 2011-03"]
    assert [trace["showlegend"] for trace in drawn] == [True, False] * 3, "one entry a stage"
    assert "solid: server; dash: client" in words
    assert drawn[2]["x"] == [0, 1, 2, 3, 4] and drawn[2]["y"] == [1 / (n + 2) for n in range(5)]
    assert drawn[0]["line"]["color"] == drawn[1]["line"]["color"] != drawn[2]["line"]["color"]
    assert drawn[0]["line"]["dash"] != drawn[1]["line"]["dash"]


def test_many_numbers_stand_below_one_another() -> None:
    """A table of twenty columns would be wider than any page."""
    numbers = {f"number {n}": n for n in range(20)}
    read = told([{"stage": stage, "who": "Mine", "numbers": numbers} for stage in range(3)])
    words = [word.strip() for word in read.words]
    at = words.index("number 7")
    assert words[at + 1 : at + 4] == ["7", "7", "7"]


def test_plotly_takes_the_figures() -> None:
    """Plotly's Python side checks every key."""
    import plotly.graph_objects as go

    for name, figure in told(REPORTS).figures.items():
        assert go.Figure(figure).data is not None, name


def test_text_never_becomes_markup() -> None:
    """Names, titles, columns, lines and cells are escaped, in figures too."""
    evil = {
        "stage": 0,
        "who": EVIL,
        "numbers": {EVIL: 1.0},
        "tables": {EVIL: [{EVIL: EVIL}]},
        "figures": {EVIL: {EVIL: [[EVIL, 1.0], [EVIL, 2.0]], "b": [[1, 2]]}},
    }
    read = told([evil, {**evil, "stage": 1}])
    assert "img" not in {tag for tag, _ in read.elements}
    assert not re.search("<script|<img", json.dumps(read.figures))


@pytest.mark.parametrize(
    "broken",
    [
        [1, None, "x"],
        [{"stage": None, "who": None, "numbers": {"a": 1}}],
        [{"stage": 99, "who": "A", "numbers": {"a": float("nan")}, "tables": [1], "figures": {"t": {"l": [1, [2]]}}}],
        [{"stage": 0, "who": "A", "numbers": {"a": 1}, "tables": {"t": [1, {}]}, "figures": {"t": [1]}}],
    ],
)
def test_a_file_from_elsewhere_breaks_nothing(broken: Any) -> None:
    """A page is made of whatever a result.json holds."""
    assert "<html" in page({**make_result(2), "reports": broken})
