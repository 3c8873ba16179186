"""TaskStream against plain loops over the files, and what it refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from task_helpers import SETTINGS, TASKS, read_log, write_task_log

from recbole_cl.config import CLConfig, list_datasets
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.runner import Runner
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.stage import Stream, Targets

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
        ({"name": "a", "filter": {"field": "rating", "op": ">", "value": 9}}, DataError, "no training target"),
        (
            {"name": "a", "kind": "classification", "target": "rating", "filter": TWO},
            DataError,
            "single class '5'",
        ),
        ({"name": "a", "kind": "classification", "target": "age"}, DataError, "occurs in no training target"),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, task: dict[str, Any], error: type[Exception], words: str) -> None:
    """The message names task, field and remedy, and no code is ever run."""
    with pytest.raises(error, match=words):
        stream(folder, tasks=[TASKS[0], task])


def test_other_refusals(folder: Path, tmp_path: Path) -> None:
    """Properties around the tasks."""
    with pytest.raises(ConfigError, match="brings none"):
        stream(folder, tasks=None)
    with pytest.raises(ConfigError, match="task_order"):
        stream(folder, task_order=[1, 1])
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
