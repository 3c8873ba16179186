"""TaskStream against plain loops over the files, and what it refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from task_helpers import SETTINGS, START, TASKS, read_log, write_task_log

from recbole_cl.config import CLConfig, list_datasets
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.stream.stage import Targets
from recbole_cl.training.runner import Runner

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log."""
    return write_task_log(tmp_path_factory.mktemp("log"))


def stream(folder: Path, **changed: Any) -> Stream:
    """The stream of the log."""
    settings = {**SETTINGS, "data_path": str(folder), **changed}
    return build_stream(CLConfig(model="SASRec", dataset="tasks-log", config_dict=settings))


def told(found: Stream, targets: Targets) -> list[tuple[str, tuple[str, ...], int]]:
    """Returns (user, history of items, timestamp of the position) of each target, by token."""
    users, items = (found.dataset.field2id_token[name] for name in ("user_id", "item_id"))
    table = found.table
    return [
        (
            str(users[targets.user[n]]),
            tuple(str(items[table.item[p]]) for p in table.seq[targets.lo[n] : targets.hi[n]]),
            int(table.timestamp[targets.position[n]]),
        )
        for n in range(len(targets))
    ]


def parts_of(folder: Path) -> dict[str, list[tuple[str, list[tuple[str, str, float, int]]]]]:
    """Returns each user's interactions by a plain loop: (item, part, rating, time), the last two tenths held out."""
    inter, _, _ = read_log(folder)
    by_user: dict[str, list[Any]] = {}
    for user, item, rating, time in inter:
        by_user.setdefault(user, []).append((item, float(rating), int(time)))
    out = {}
    for user, rows in by_user.items():
        n = len(rows)
        held = max(int(n * 0.1 + 1e-9), 1)
        parts = ["train"] * (n - 2 * held) + ["valid"] * held + ["test"] * held
        out[user] = [(item, part, rating, time) for (item, rating, time), part in zip(rows, parts, strict=True)]
    return out


@pytest.mark.parametrize("task", [0, 1, 2])
def test_targets_of_the_next_item_equal_a_plain_loop(folder: Path, task: int) -> None:
    """Positions, histories, labels and splits of filtered and classified interactions."""
    found = stream(folder, task_train_per_user=None, task_eval_per_user=None)
    stage, (_, _, genres) = found.stages[task], read_log(folder)
    expected: dict[str, list[Any]] = {part: [] for part in SPLITS}
    labels: dict[str, list[str]] = {part: [] for part in SPLITS}
    for user, rows in parts_of(folder).items():
        for n, (item, part, rating, time) in enumerate(rows):
            if n and (task != 1 or rating == 5):
                expected[part].append((user, tuple(row[0] for row in rows[:n]), time))
                labels[part].append(genres[item][0].split()[0] if task == 2 else item)
    for part in SPLITS:
        targets = stage.split(part)
        order = np.argsort([row[2] for row in expected[part]], kind="stable")
        assert told(found, targets) == [expected[part][n] for n in order]
        names = stage.task.labels if task == 2 else found.dataset.field2id_token["item_id"]
        assert [str(names[label]) for label in targets.label] == [labels[part][n] for n in order]


def test_a_users_label_comes_after_the_training_part(folder: Path) -> None:
    """Each user is one target; nothing that is held out is in the history; users are dealt to the splits."""
    found = stream(folder)
    stage, (_, groups, _) = found.stages[3], read_log(folder)
    training = {user: tuple(row[0] for row in rows if row[1] == "train") for user, rows in parts_of(folder).items()}
    seen = []
    for part in SPLITS:
        targets = stage.split(part)
        for (user, history, _), label in zip(told(found, targets), targets.label, strict=True):
            assert history == training[user]
            assert stage.task.labels is not None and stage.task.labels[label] == groups[user][0]
            seen.append(user)
    assert sorted(seen) == sorted(training) and len(set(seen)) == len(seen)
    assert [len(stage.split(part)) for part in SPLITS] == [29, 3, 4]


def test_what_is_held_out_once_is_held_out_always(folder: Path) -> None:
    """No task trains on an interaction that any task is tested on, and no history of training holds one."""
    found = stream(folder)
    held = {int(p) for stage in found.stages[:3] for part in ("valid", "test") for p in stage.split(part).position}
    table = found.table
    for stage in found.stages:
        if stage.task.kind == "next_item" or stage.index == 2:
            assert not held & {int(p) for p in stage.train.position}
        for lo, hi in zip(stage.train.lo, stage.train.hi, strict=True):
            assert not held & {int(p) for p in table.seq[lo:hi]}
    assert len({(stage.n_users, stage.n_items) for stage in found.stages}) == 1


def test_the_newest_targets_of_a_user_are_kept(folder: Path) -> None:
    """``task_train_per_user`` and ``task_eval_per_user`` count back from the end; the first task trains on all."""
    whole, few = stream(folder, task_train_per_user=None, task_eval_per_user=None), stream(folder)
    assert len(few.stages[0].train) == len(whole.stages[0].train)
    for stage, all_of in zip(few.stages[1:3], whole.stages[1:3], strict=True):
        for part, most in (("train", 4), ("valid", 1), ("test", 1)):
            kept, every = stage.split(part), all_of.split(part)
            for user in np.unique(every.user):
                newest = sorted(every.position[every.user == user])[-most:]
                assert sorted(kept.position[kept.user == user]) == newest
    own = stream(folder, tasks=[TASKS[0], {**TASKS[1], "train_per_user": 1}])
    assert np.bincount(own.stages[1].train.user).max() == 1


def test_filters(folder: Path) -> None:
    """Numbers, names, names of several values, and whether the user had the item before; by plain loops."""
    _, users, genres = read_log(folder)
    repeated: dict[tuple[str, int], bool] = {}
    for user, rows in parts_of(folder).items():
        for n, (item, _, _, time) in enumerate(rows):
            repeated[user, time] = item in [row[0] for row in rows[:n]]
    rows = [
        (u, item, rating, time) for u, r in parts_of(folder).items() for n, (item, _, rating, time) in enumerate(r) if n
    ]
    cases = {
        ("rating", ">=", 4): lambda u, i, r, t: r >= 4,
        ("rating", "in", (3, 5)): lambda u, i, r, t: r in (3, 5),
        ("rating", "not in", (3, 5)): lambda u, i, r, t: r not in (3, 5),
        ("group", "!=", "g1"): lambda u, i, r, t: users[u][0] != "g1",
        ("age", "<", 30): lambda u, i, r, t: int(users[u][1]) < 30,
        ("genre", "in", ("of2", "late")): lambda u, i, r, t: bool({"of2", "late"} & set(genres[i][0].split())),
        ("genre", "!=", "of2"): lambda u, i, r, t: "of2" not in genres[i][0].split(),
        ("_repeat", "==", 1): lambda u, i, r, t: repeated[u, t],
    }
    tasks = [TASKS[0]]
    for number, (field, op, value) in enumerate(cases):
        asked = list(value) if isinstance(value, tuple) else value
        tasks.append({"name": f"task {number}", "filter": [{"field": field, "op": op, "value": asked}]})
    found = stream(folder, tasks=tasks, task_train_per_user=None, task_eval_per_user=None)
    for stage, meets in zip(found.stages[1:], cases.values(), strict=True):
        have = sorted(time for part in SPLITS for _, _, time in told(found, stage.split(part)))
        assert have == sorted(row[3] for row in rows if meets(*row)), stage.name


def test_bins_and_numbers_of_classes(folder: Path) -> None:
    """Ages are cut at the edges, left closed; ``classes`` keeps the most frequent of training and says so."""
    edges = [20, 40]
    tasks = [
        TASKS[0],
        {"name": "age", "kind": "classification", "target": "age", "bins": edges},
        {"name": "stars", "kind": "classification", "target": "rating", "classes": 2},
    ]
    found = stream(folder, tasks=tasks)
    _, users, _ = read_log(folder)
    age, stars = found.stages[1:]
    assert age.task.labels == ("below 20", "20 to below 40", "40 and above")
    for (user, _, _), label in zip(told(found, age.train), age.train.label, strict=True):
        assert label == sum(int(users[user][1]) >= edge for edge in edges)
    assert stars.task.n_labels == 2 and stars.task.labels is not None and "5" in stars.task.labels
    assert any("'stars'" in warning and "left out" in warning for warning in found.warnings)


def test_a_number_on_an_edge_belongs_above_it(folder: Path, tmp_path: Path) -> None:
    """1.65 is no float32: read as one it lies below the edge of 1.65 in double precision."""
    (tmp_path / "tasks-log").mkdir()
    for suffix in ("inter", "user"):
        source = folder / "tasks-log" / f"tasks-log.{suffix}"
        (tmp_path / "tasks-log" / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    rows = [(f"i{item}", 1.65 if item % 2 else 4.95, "g") for item in range(24)]
    write_rows(tmp_path, "item", "item_id:token price:float genre:token_seq", rows)
    tasks = [TASKS[0], {"name": "price", "kind": "classification", "target": "price", "bins": [1.65, 4.95]}]
    found = stream(tmp_path, tasks=tasks).stages[1]
    assert found.task.labels == ("1.65 to below 4.95", "4.95 and above") and set(found.train.label) == {0, 1}


def test_order_number_and_fingerprint(folder: Path) -> None:
    """``task_order`` permutes the stages, ``n_stages`` keeps the first; a task's users do not depend on its place."""
    plain, turned = stream(folder), stream(folder, task_order=[1, 4, 2])
    assert [stage.name for stage in turned.stages] == [TASKS[k]["name"] for k in (0, 3, 1)]
    np.testing.assert_array_equal(turned.stages[1].test.user, plain.stages[3].test.user)
    assert [stage.index for stage in turned.stages] == [0, 1, 2]
    assert set(turned.stages[2].train.task.tolist()) == {2}
    assert len(stream(folder, n_stages=2)) == 2
    assert turned.fingerprint() != plain.fingerprint()


TWO = [{"field": "rating", "op": "==", "value": 5}]


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ({"name": "a", "kind": "next"}, ConfigError, "did you mean 'next_item'"),
        ({"name": "a", "fliter": TWO}, ConfigError, "did you mean 'filter'"),
        ({"kind": "next_item"}, ConfigError, "at least a name"),
        ({"name": "next item"}, ConfigError, "two of them are named 'next item'"),
        ({"name": "a", "kind": "classification"}, ConfigError, "needs target"),
        ({"name": "a", "target": "genre"}, ConfigError, "belongs to kind: classification"),
        ({"name": "a", "filter": {"field": "rating", "op": "=~", "value": 5}}, ConfigError, "op is '=~'"),
        ({"name": "a", "filter": {"field": "rating", "op": "in", "value": 5}}, ConfigError, "take a list"),
        ({"name": "a", "filter": {"field": "rating"}}, ConfigError, "not of the form"),
        ({"name": "a", "filter": {"field": "ratings", "op": ">", "value": 1}}, ConfigError, "did you mean 'rating'"),
        ({"name": "a", "filter": {"field": "rating", "op": ">", "value": "x"}}, ConfigError, "compares the number"),
        ({"name": "a", "filter": {"field": "genre", "op": "==", "value": "lte"}}, ConfigError, "did you mean 'late'"),
        ({"name": "a", "attributes": ["group"]}, ConfigError, "attributes are those of items"),
        ({"name": "a", "train_per_user": 0}, ConfigError, "train_per_user is 0"),
        ({"name": "a", "candidates": "few"}, ConfigError, "candidates is 'few'"),
        ({"name": "a", "kind": "classification", "target": "age", "bins": [3, 1]}, ConfigError, "increasing"),
        ({"name": "a", "kind": "classification", "target": "group", "bins": [3]}, ConfigError, "bins cut numbers"),
        ({"name": "a", "kind": "classification", "target": "colour"}, ConfigError, "no column of tasks-log.inter"),
        (
            {"name": "a", "filter": {"field": "rating", "op": ">", "value": 9}},
            DataError,
            "'a' has no training target; no interactions of the log meet rating > 9; loosen its filter",
        ),
        (
            {"name": "a", "kind": "classification", "target": "rating", "filter": TWO},
            DataError,
            "single class '5'",
        ),
        ({"name": "a", "kind": "classification", "target": "age"}, DataError, "occurs in no training target"),
        ({"name": "a", "filter": 5}, ConfigError, "'a': the filter 5 is no condition; write {field"),
        ({"name": "a", "filter": "rating > 3"}, ConfigError, "'a': the filter 'rating > 3' is no condition; write"),
        ({"name": "a", "filter": ["rating > 3"]}, ConfigError, "'a': the filter 'rating > 3' is not of the form"),
        (
            {"name": "a", "filter": {"field": "rating", "op": ["=="], "value": 5}},
            ConfigError,
            r"op is \['=='\]; it must",
        ),
        ({"name": "a", "filter": {"field": "rating", "op": "in", "value": []}}, ConfigError, "at least one value"),
        (
            {"name": "a", "filter": {"field": "age", "op": ">=", "value": "forty"}},
            ConfigError,
            "'a': the filter age >= forty orders numbers, but 'forty' is none; write a number or use op '=='",
        ),
        (
            {"name": "a", "filter": {"field": "group", "op": ">=", "value": 3}},
            ConfigError,
            "'a': the filter group >= 3 orders numbers, but group holds words, such as 'g[012]'; use op '=='",
        ),
        (
            {"name": "a", "filter": {"field": "rating", "op": "in", "value": [5, "x"]}},
            ConfigError,
            "'x' is none; write",
        ),
        ({"name": "a", "attributes": 5}, ConfigError, "'a': attributes is 5; it must be a list of columns"),
        ({"name": "a", "attributes": [5]}, ConfigError, r"'a': attributes is \[5\]; it must be a list of columns"),
        ({"name": "a", "metric": 5}, ConfigError, "'a': metric is 5; it must be a name such as hit@5"),
        (
            {"name": "a", "kind": "classification", "target": "genre", "bins": [3]},
            ConfigError,
            "'a': bins cut numbers, but genre holds words, such as 'early'; leave bins out",
        ),
        (
            {"name": "a", "kind": "classification", "target": "genre", "candidates": "targets"},
            ConfigError,
            "'a': candidates is 'targets', but a classification ranks no items; leave candidates out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, task: dict[str, Any], error: type[Exception], words: str) -> None:
    """The message names task, field and remedy, and no code is ever run."""
    with pytest.raises(error, match=words):
        stream(folder, tasks=[TASKS[0], task])


def test_why_there_is_no_training_target(folder: Path) -> None:
    """Interactions that meet the filter but come first of all, or are held out, are told from none."""
    early = [{"field": "timestamp", "op": "<", "value": START + 36}]  # everybody's first interaction
    with pytest.raises(
        DataError, match=r"36 interactions of the log meet timestamp < .*, none of them in training and"
    ):
        stream(folder, tasks=[TASKS[0], {"name": "a", "filter": early}])
    with pytest.raises(ConfigError, match="'a' reads 'rating' as the file has it; take it out of discretization"):
        stream(
            folder,
            tasks=[TASKS[0], {"name": "a", "filter": TWO}],
            numerical_features=["rating"],
            discretization={"rating": {"method": "LD"}},
        )


def write_rows(folder: Path, suffix: str, header: str, rows: list[tuple[Any, ...]]) -> None:
    """Writes one of the atomic files of a log."""
    lines = ["\t".join(header.split()), *("\t".join(map(str, row)) for row in rows)]
    (folder / "tasks-log" / f"tasks-log.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log with columns that have gaps: every third user, item and interaction has no value."""
    folder = write_task_log(tmp_path_factory.mktemp("gaps"))
    inter, users, items = read_log(folder)
    told = [(*row, "" if number % 3 == 0 else number % 5) for number, row in enumerate(inter)]
    write_rows(folder, "inter", "user_id:token item_id:token rating:float timestamp:float mood:float", told)
    people = [(u, g, age, "" if int(u[1:]) % 3 == 0 else age) for u, (g, age, _) in users.items()]
    write_rows(folder, "user", "user_id:token group:token age:token years:float", people)
    things = [
        (i, genres, "" if k % 3 == 0 else genres.split()[0], "" if k % 3 == 0 else k, "" if k % 3 == 0 else f"{k} {-k}")
        for k, (i, (genres,)) in enumerate(items.items())
    ]
    write_rows(folder, "item", "item_id:token genre:token_seq half:token size:float both:float_seq", things)
    return folder


SIZE = {f"i{k}": None if k % 3 == 0 else k for k in range(24)}
WHOLE = {"task_train_per_user": None, "task_eval_per_user": None}


@pytest.mark.parametrize("features", [[], ["size", "rating"]])
def test_a_missing_number_meets_no_condition(gaps: Path, features: list[str]) -> None:
    """RecBole puts the mean into gaps; a filter does not take it for a value, and says how many have none."""
    cases: list[tuple[str, str, Any, Any]] = [
        ("size", ">", -1, lambda k: k is not None),
        ("size", "<", 12, lambda k: k is not None and k < 12),
        ("size", "in", [1, 2, 4], lambda k: k in (1, 2, 4)),
        ("size", "!=", 4, lambda k: k != 4),
        ("size", "not in", [4, 5], lambda k: k not in (4, 5)),
        ("both", "<", 1, lambda k: k is not None),
        ("both", "==", -4, lambda k: k == 4),
        ("both", "!=", 0, lambda k: True),
        ("rating", "!=", 1, lambda k: True),
        ("half", "==", "early", lambda k: k is not None and k % 8 < 4),
        ("half", "!=", "early", lambda k: k is None or k % 8 >= 4),
    ]
    tasks = [
        {"name": f"task {n}", "filter": {"field": f, "op": op, "value": v}} for n, (f, op, v, _) in enumerate(cases)
    ]
    found = stream(gaps, tasks=[TASKS[0], *tasks], numerical_features=features, load_col=None, **WHOLE)
    rows = [(item, time) for r in parts_of_gaps(gaps).values() for item, time in r[1:]]
    without = sum(SIZE[item] is None for r in parts_of_gaps(gaps).values() for item, _ in r)
    total = len(found.table)
    for stage, (field, op, _, meets) in zip(found.stages[1:], cases, strict=True):
        have = sorted(time for part in SPLITS for _, _, time in told(found, stage.split(part)))
        assert have == sorted(time for item, time in rows if meets(SIZE[item])), stage.name
        verb = "keeps" if op in ("!=", "not in") else "leaves out"
        words = f"'{stage.name}': {without} of {total} interactions have no {field}; the filter {field} {op} "
        warned = any(words in warning and f"{verb} them" in warning for warning in found.warnings)
        assert warned == (field != "rating"), stage.name


def parts_of_gaps(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Returns each user's interactions: (item, time)."""
    by_user: dict[str, list[tuple[str, int]]] = {}
    for user, item, _, time, *_ in read_log(folder)[0]:
        by_user.setdefault(user, []).append((item, int(time)))
    return by_user


def test_a_missing_number_is_no_label(gaps: Path) -> None:
    """Of users, items and interactions, with bins and without: like a missing word, left out with a warning."""
    tasks: list[dict[str, Any]] = [
        {"name": "years", "kind": "classification", "target": "years", "bins": [30, 45]},
        {"name": "size", "kind": "classification", "target": "size", "bins": [12]},
        {"name": "plain size", "kind": "classification", "target": "size", "classes": 20},
        {"name": "mood", "kind": "classification", "target": "mood"},
        {"name": "half", "kind": "classification", "target": "half"},
        {"name": "both", "kind": "classification", "target": "both", "bins": [12]},
    ]
    found = stream(gaps, tasks=[TASKS[0], *tasks], **WHOLE)
    inter, users, _ = read_log(gaps)
    years, mood = (
        {u: row[2] for u, row in users.items()},
        {int(row[3]): row[4] if len(row) > 4 else "" for row in inter},
    )
    item_at = {(row[0], int(row[3])): row[1] for row in inter}
    for stage in found.stages[1:]:
        seen = 0
        for part in SPLITS:
            targets = stage.split(part)
            for (user, _, time), label in zip(told(found, targets), targets.label, strict=True):
                assert stage.task.labels is not None
                size, seen, name = SIZE[item_at[user, time]], seen + 1, stage.task.labels[label]
                if stage.name == "years":
                    assert years[user]
                    assert label == sum(int(years[user]) >= edge for edge in (30, 45))
                elif stage.name == "mood":
                    assert mood[time] == name
                else:
                    assert size is not None
                    if stage.name in ("size", "both"):
                        assert label == int(size >= 12)
                    if stage.name == "plain size":
                        assert name == str(size)
        assert seen > 10
        lost = (36 if stage.name == "years" else len(inter) - 36) - seen
        words = f"'{stage.name}': {lost} of {lost + seen} targets have no label or none of its"
        assert lost and any(words in warning for warning in found.warnings), stage.name
    with pytest.raises(DataError, match="its training targets hold no label"):
        nothing = [{"field": "user_id", "op": "in", "value": ["u0", "u3"]}]
        stream(gaps, tasks=[TASKS[0], {**tasks[0], "filter": nothing}])


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log with a ``phase``: ``old`` in the first half of a user's interactions, then ``new``, ``end`` at last."""
    folder = write_task_log(tmp_path_factory.mktemp("turning"))
    inter = []
    for user, rows in parts_of(folder).items():
        for n, (item, part, rating, time) in enumerate(rows):
            phase = "old" if n < 6 else "new" if part == "train" or user != "u0" else "end"
            inter.append((user, item, rating, time, phase, f"{phase}{n % 2}" if n < 6 else "new0" if n % 3 else "new1"))
    write_rows(
        folder, "inter", "user_id:token item_id:token rating:float timestamp:float phase:token fine:token", inter
    )
    return folder


def test_classes_are_those_of_the_targets_that_are_kept(turning: Path) -> None:
    """Checks and class lists look at the newest training targets, after ``train_per_user``, and at no others."""
    phase = {"name": "phase", "kind": "classification", "target": "phase"}
    started = {"name": "phase", "kind": "classification", "target": "phase", "classes": 3}
    assert stream(turning, tasks=[TASKS[0], started], **WHOLE).stages[1].task.labels == ("old", "new")
    for task in (phase, started):  # the newest two of everybody are new
        with pytest.raises(DataError, match=r"its 72 training targets hold the single class 'new'; .* train_per_user"):
            stream(turning, tasks=[TASKS[0], {**task, "train_per_user": 2}])
    with pytest.raises(DataError, match="the class 'end' is to be predicted but occurs in no training target; set"):
        stream(turning, tasks=[TASKS[0], phase], **WHOLE)
    # of all, old ones are the most frequent; of the newest three, new ones
    fine = {"name": "fine", "kind": "classification", "target": "fine", "classes": 2}
    whole, few = (stream(turning, tasks=[TASKS[0], {**fine, **own}], **WHOLE) for own in ({}, {"train_per_user": 3}))
    assert set(whole.stages[1].task.labels or ()) == {"new0", "old1"}
    assert set(few.stages[1].task.labels or ()) == {"new0", "new1"}
    for part in SPLITS:
        labels = few.stages[1].split(part).label
        assert len(labels) and set(labels.tolist()) == {0, 1}, part
    newest = stream(turning, tasks=[TASKS[0], {"name": "all", "train_per_user": 3}], **WHOLE).stages[1].train
    assert set(few.stages[1].train.position.tolist()) <= set(newest.position.tolist())


def test_other_refusals(folder: Path, tmp_path: Path) -> None:
    """Properties around the tasks."""
    with pytest.raises(ConfigError, match="brings none"):
        stream(folder, tasks=None)
    with pytest.raises(ConfigError, match="task_order"):
        stream(folder, task_order=[1, 1])
    with pytest.raises(ConfigError, match=r"task_class_positions: 'al' .*did you mean 'all'"):
        stream(folder, task_class_positions="al")
    with pytest.raises(ConfigError, match="task_eval_per_user"):
        stream(folder, task_eval_per_user=0)
    with pytest.raises(ConfigError, match="next_stage has no meaning"):
        stream(folder, stage_split="next_stage")
    with pytest.raises(ConfigError, match="normalize_all"):
        stream(folder, normalize_all=True)
    file = tmp_path / "mine.yaml"
    file.write_text("tasks:\n  - {name: only}\n", encoding="utf-8")
    assert [stage.name for stage in stream(folder, tasks=str(file)).stages] == ["only"]


def test_candidates_are_the_tasks_own(folder: Path, tmp_path: Path) -> None:
    """``candidates: targets`` ranks and samples among the items of the task's training targets, and no others."""
    tasks = [TASKS[0], {**TASKS[1], "candidates": "targets"}]
    for mode in ("full", "uni6"):
        settings = {**SETTINGS, "tasks": tasks, "epochs": 1, "data_path": str(folder), "output_dir": str(tmp_path)}
        config = CLConfig(model="SASRec", dataset="tasks-log", config_dict={**settings, "eval_args": {"mode": mode}})
        config["saved"] = False
        runner = Ranked(config)
        runner.run()
        five = set(runner.stream.stages[1].train.label.tolist())
        assert runner.seen[-1] <= five and not runner.seen[-2] <= five, mode


class Ranked(Runner):
    """Keeps the items that were candidates or recommended, at every evaluation."""

    seen: list[set[int]]

    def _evaluate_all(self, ctx: Any) -> None:
        self.seen = []
        for stage in self.stream.stages:
            rows = self.evaluator._rows_of(stage, "test")
            outcome = self.evaluator.evaluate(ctx, self.known, stage)
            assert outcome.recommended is not None
            drawn = outcome.recommended if rows.candidates is None else rows.candidates
            self.seen.append({int(item) for item in [*outcome.recommended.flat, *drawn.flat] if item})


@pytest.mark.skipif(not os.environ.get("RECBOLE_CL_DATA"), reason="RECBOLE_CL_DATA does not lead to the shared logs")
@pytest.mark.parametrize(("dataset", "n_tasks"), [("online-retail", 5), ("lastfm-tags", 4)])
def test_presets_of_real_logs(dataset: str, n_tasks: int) -> None:
    """Every task has targets in each split, and classes that training knows."""
    if dataset not in list_datasets():
        pytest.skip(f"{dataset} is not among the shared logs")
    found = build_stream(CLConfig(model="SASRec", dataset=dataset, config_dict={"scheduler": "TaskStream"}))
    assert len(found) == n_tasks
    for stage in found.stages:
        assert all(len(stage.split(part)) > 100 for part in SPLITS), stage.name
        assert stage.task.kind == "next_item" or set(stage.test.label) <= set(stage.train.label)


def test_the_preset_of_ml_100k() -> None:
    """The five tasks of the paper's MovieLens table and the age of the user; columns are loaded by themselves."""
    config = CLConfig(model="SASRec", dataset="ml-100k", config_dict={"scheduler": "TaskStream"})
    found = build_stream(config)
    kinds = [stage.task.kind for stage in found.stages]
    assert kinds == ["next_item"] * 3 + ["classification"] * 2
    rating = found.dataset.inter_feat["rating"].numpy()
    for stage, stars in ((found.stages[1], 4), (found.stages[2], 5)):
        for part in SPLITS:
            assert set(rating[stage.split(part).position]) == {stars}
    assert found.stages[4].task.n_labels == 7 and len(found.stages[4].test) == 94
    assert all(stage.task.description for stage in found.stages)
