"""Strata that are chosen by a property: built in and another package's, without a look ahead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from run_helpers import ROOT, configure, run, toy

from recbole_cl.config.strata import make_strata
from recbole_cl.errors import ConfigError, TrainingError
from recbole_cl.evaluation.strata import Stratum, flags_of
from recbole_cl.evaluation.strata.base import TAKEN
from recbole_cl.registry import strata
from recbole_cl.results.strata import STRATA
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.stream.stage import Stage, Targets
from recbole_cl.stream.table import InteractionTable


class EvenUsers(Stratum):
    """Another package's: users of even and odd ids."""

    defaults = {"odd": True}

    def groups(self, stream: Stream, stage: Stage, targets: Targets) -> dict[str, np.ndarray]:
        even = targets.user % 2 == 0
        return {"users_even": even, "users_odd": ~even} if self.params["odd"] else {"users_even": even}


@pytest.fixture
def even() -> Iterator[None]:
    """The other package is installed."""
    strata.register("even_users")(EvenUsers)
    yield
    for table in (strata._members, strata._names):
        table.pop("even_users")


def test_names() -> None:
    assert set(TAKEN) == set(STRATA), "the names that every evaluation has"
    assert {"activity", "history_length"} <= set(strata.names())


def test_what_is_asked_for() -> None:
    assert make_strata([]) == make_strata(None) == []
    assert [type(s).__name__ for s in make_strata("activity")] == ["Activity"]
    [one, two] = make_strata({"History_Length": {"thresholds": [3]}, "activity": None})
    assert one.params == {"thresholds": [3]} and two.params == {}
    with pytest.raises(ConfigError, match=r"unknown stratum 'histori_length'.*history_length"):
        make_strata(["histori_length"])
    with pytest.raises(ConfigError, match="names 'activity' twice"):
        make_strata(["activity", "Activity"])
    with pytest.raises(ConfigError, match="Activity has no parameter 'thirds'"):
        make_strata({"activity": {"thirds": 3}})
    with pytest.raises(ConfigError, match="has the parameters 3"):
        make_strata({"activity": 3})
    for wrong in ([], [5, 5], [0, 3], [2.5], 7, [20, 5]):
        with pytest.raises(ConfigError, match="history_length has the thresholds"):
            make_strata({"history_length": {"thresholds": wrong}})


def test_the_configuration_refuses_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown stratum"):
        configure(toy(tmp_path), tmp_path / "run", strata=["nobody"])
    with pytest.raises(ConfigError, match="property 'strata' is 3"):
        configure(toy(tmp_path), tmp_path / "run", strata=3)


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    """The stream of the toy log."""
    return build_stream(configure(toy(tmp_path), tmp_path / "run", "SASRec"))


def test_history_length_by_hand(stream: Stream) -> None:
    table = stream.table
    for stage in stream.stages:
        found = make_strata({"history_length": {"thresholds": [6, 16]}})[0].groups(stream, stage, stage.test)
        assert list(found) == ["history_0_to_5", "history_6_to_15", "history_from_16"]
        for row, (user, position) in enumerate(zip(stage.test.user, stage.test.position, strict=True)):
            before = int(((table.user == user) & (np.arange(len(table)) < position)).sum())
            assert [bool(flag[row]) for flag in found.values()] == [before < 6, 6 <= before < 16, before >= 16]
    assert found["history_from_16"].any() and found["history_6_to_15"].any()


def test_activity_by_hand(stream: Stream) -> None:
    table = stream.table
    for stage in stream.stages:
        past = [int(p) for s in stream.stages[: stage.index + 1] for p in s.train.position]
        counts: dict[int, int] = {}
        for position in past:
            counts[int(table.user[position])] = counts.get(int(table.user[position]), 0) + 1
        ranked = sorted(counts.values())
        one, two = (ranked[int(np.ceil(len(ranked) * share)) - 1] for share in (1 / 3, 2 / 3))
        found = make_strata("activity")[0].groups(stream, stage, stage.test)
        for row, (user, position) in enumerate(zip(stage.test.user, stage.test.position, strict=True)):
            own = sum(table.user[p] == user and p < position for p in past)
            expected = [own <= one, one < own <= two, own > two]
            assert [bool(flag[row]) for flag in found.values()] == expected
    assert sum(flag.any() for flag in found.values()) > 1, "all users are alike: the test could not fail"


def later_changed(stream: Stream, stage: Stage, seed: int) -> Stream:
    """The same stream, but for what happens after the last evaluated target: other items, users, stages' targets."""
    rng = np.random.default_rng(seed)
    end = int(stage.test.position.max()) + 1
    user, item = stream.table.user.copy(), stream.table.item.copy()
    user[end:], item[end:] = rng.permutation(user[end:]), rng.permutation(item[end:])
    table = dataclasses.replace(stream.table, user=user, item=item)
    none = Targets.concat([])
    stages = [
        s if s.index <= stage.index else dataclasses.replace(s, train=none, valid=none, test=none)
        for s in stream.stages
    ]
    return dataclasses.replace(stream, table=table, stages=stages)


@pytest.mark.parametrize("name", ["history_length", "activity"])
def test_nobody_looks_ahead(stream: Stream, name: str) -> None:
    """Neither what comes after the targets nor what they ask for changes a group."""
    stage = stream.stages[1]
    found = flags_of(make_strata(name), stream, stage, stage.test)
    for seed in range(3):
        other = later_changed(stream, stage, seed)
        assert (other.table.user != stream.table.user).any()
        asked = dataclasses.replace(stage.test, label=np.zeros_like(stage.test.label))
        again = flags_of(make_strata(name), other, stage, asked)
        assert found.keys() == again.keys()
        for group, flag in found.items():
            np.testing.assert_array_equal(flag, again[group])


def test_the_users_own_future_does_not_count() -> None:
    """A validation target may lie between training targets of its user: by then user 1 had done one thing, not five."""
    user = np.array([1, 1, 1, 1, 1, 1, 2, 2, 3])  # position 1 is the target
    train = SimpleNamespace(position=np.array([0, 2, 3, 4, 5, 6, 7, 8]))
    table = InteractionTable(user, np.ones(9, dtype=int), np.arange(9), np.zeros(9, dtype=int), 4, 2)
    stream: Any = SimpleNamespace(table=table, stages=[SimpleNamespace(index=0, train=train)])
    targets: Any = SimpleNamespace(user=np.array([1, 1, 2]), position=np.array([1, 6, 8]))
    found = make_strata("activity")[0].groups(stream, stream.stages[0], targets)  # terciles: 1 and 2
    assert found["activity_low"].tolist() == [True, False, False]
    assert found["activity_middle"].tolist() == [False, False, True]
    assert found["activity_high"].tolist() == [False, True, False]


@pytest.mark.usefixtures("even")
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_anothers_stratum_reaches_results_and_report(tmp_path: Path, model: str) -> None:
    runner, result = run(toy(tmp_path), tmp_path / "run", model, epochs=1, strata=["even_users", "activity"])
    plain = run(toy(tmp_path / "again"), tmp_path / "plain", model, epochs=1)[1]
    assert plain["matrix"] == result["matrix"] and plain["disparity"] == result["disparity"]
    asked = {"users_even", "users_odd", "activity_low", "activity_middle", "activity_high"}
    for metric, found in result["strata"].items():
        assert set(found) == {*plain["strata"][metric], *asked}
        assert {k: v for k, v in found.items() if k not in asked} == plain["strata"][metric]
    for s, stage in enumerate(runner.stream.stages):
        n = {r.stratum: r.n for r in runner.records.select(metric="ndcg@10", t=2, s=s)}
        users = stage.test.user if model == "SASRec" else np.unique(stage.test.user)
        assert n["users_even"] == (users % 2 == 0).sum() and n["users_even"] + n["users_odd"] == n["all"]
        assert sum(n.get(name, 0) for name in asked if name.startswith("activity")) == n["all"]
        whole = {r.stratum: r.value for r in runner.records.select(metric="ndcg@10", t=2, s=s)}
        mixed = (n["users_even"] * whole["users_even"] + n["users_odd"] * whole["users_odd"]) / n["all"]
        assert mixed == pytest.approx(whole["all"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "users even" in page and "activity low" in page


@pytest.mark.usefixtures("even")
def test_parameters_arrive(tmp_path: Path) -> None:
    _, result = run(toy(tmp_path), tmp_path / "run", epochs=1, n_stages=None, strata={"even_users": {"odd": False}})
    assert "users_even" in result["strata"]["ndcg@10"] and "users_odd" not in result["strata"]["ndcg@10"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"odd_one": np.ones(2, dtype=bool)}, r"group 'odd_one' has the shape \[2\]"),
        ({"odd_one": 1}, r"has the shape \[\]"),
        ({"known": None}, "has a name that another stratum has"),
    ],
)
def test_wrong_groups_are_told(stream: Stream, groups: dict[str, Any], message: str) -> None:
    class Wrong(Stratum):
        def groups(self, stream: Stream, stage: Stage, targets: Targets) -> dict[str, np.ndarray]:
            return {k: np.ones(len(targets), dtype=bool) if v is None else v for k, v in groups.items()}

    stage = stream.stages[0]
    with pytest.raises(TrainingError, match=message):
        flags_of([Wrong()], stream, stage, stage.test)


def test_the_stratum_of_the_page_runs(tmp_path: Path) -> None:
    """docs/results.md writes one."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    [code] = [c for c in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "strata.register" in c]
    try:
        exec(compile(code, "results.md", "exec"), {"__name__": "page"})
        _, result = run(toy(tmp_path), tmp_path / "run", epochs=1, strata={"weekend": None})
    finally:
        for table in (strata._members, strata._names):
            table.pop("weekend", None)
    assert {"weekend", "weekday"} <= set(result["strata"]["ndcg@10"])
    # Stage 2 of the toy log begins on day 23.1 of 1970, a Saturday, and takes some minutes.
    assert result["strata"]["ndcg@10"]["weekend"][2][2] == result["matrix"]["ndcg@10"][2][2]


def test_interests_by_hand() -> None:
    """Stable, seasonal, rapid and short histories; words without a count do not matter, and nothing later does."""
    stratum = make_strata({"interests": {"block": 2, "similar": 0.7}})[0]
    # Items 1 and 2 are of word 1, items 3 and 4 of word 2, item 5 of both, item 6 of none.
    words = np.array([[0, 0], [1, 0], [1, 0], [2, 0], [2, 0], [1, 2], [0, 0]])
    stories = {
        "stable": [1, 2, 2, 1], "seasonal": [1, 2, 3, 4, 2, 2], "rapid": [1, 2, 1, 1, 3, 4], "short": [1, 2, 3],
        "none": [6, 6, 6, 6], "mixed": [5, 5, 1, 3],
    }  # fmt: skip
    expected = ["stable", "seasonal", "rapid", "short", "rapid", "stable"]
    item = np.concatenate([*stories.values(), [3] * 4])
    seq, ends = np.arange(len(item)), np.cumsum([len(story) for story in stories.values()])
    lo = np.r_[0, ends[:-1]]
    table = SimpleNamespace(item=item, seq=seq)
    stratum.words = lambda dataset: words  # type: ignore[attr-defined]
    stream: Any = SimpleNamespace(table=table, dataset=None)
    zeros = np.zeros(len(lo), dtype=np.int64)
    found = stratum.groups(stream, SimpleNamespace(), Targets(zeros, zeros, lo, ends, zeros))  # type: ignore[arg-type]
    for row, name in enumerate(expected):
        assert {group for group, flag in found.items() if flag[row]} == {f"interests_{name}"}, list(stories)[row]


def test_interests_of_a_real_log(tmp_path: Path) -> None:
    """The column of items is found, or named, or asked for; every row is in one group."""
    log = toy(tmp_path)
    items = sorted(
        {row.split("\t")[1] for row in (log.folder / log.name / f"{log.name}.inter").read_text().splitlines()[1:]}
    )
    lines = [f"{i}\tkind{n % 3}\t{n % 7}" for n, i in enumerate(items)]
    header = "item_id:token\tkind:token_seq\tprice:float\n"
    (log.folder / log.name / f"{log.name}.item").write_text(header + "\n".join(lines) + "\n")
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind", "price"]}
    chosen = {"interests": {"block": 3}}
    runner, result = run(log, tmp_path / "run", load_col=columns, strata=chosen, epochs=1)
    groups = [name for name in result["strata"]["ndcg@10"] if name.startswith("interests_")]
    assert len(groups) >= 2
    stage = runner.stream.stages[-1]
    flags = flags_of(make_strata(chosen), runner.stream, stage, stage.test)
    assert (np.stack(list(flags.values())).sum(0) == 1).all() and flags["interests_stable"].any()
    with pytest.raises(ConfigError, match=r"interests has the field 'kin'; name a column of items.*\(kind\)"):
        flags_of(make_strata({"interests": {"field": "kin"}}), runner.stream, stage, stage.test)
    with pytest.raises(ConfigError, match="interests has block 0"):
        make_strata({"interests": {"block": 0}})
    with pytest.raises(ConfigError, match="interests has similar 2"):
        make_strata({"interests": {"similar": 2}})
