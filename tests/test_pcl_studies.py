"""The studies of PCL: orders of the tasks, cold items, user vectors for another model, plots; a run that is killed."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from run_helpers import ROOT, _yaml, but_for_a_near_tie
from task_helpers import SETTINGS, TASKS, read_log, write_task_log

from recbole_cl import checkpoint
from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.stream.batch import TARGETS, Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.loader import make_loader
from recbole_cl.study import plots, read_plan, walk, write_tables
from recbole_cl.study.orders import degradation, degradation_table
from recbole_cl.study.plan import PLOTS
from recbole_cl.study.probes import PARAMETERS, PROBES, run_probe
from recbole_cl.study.table import probe_rows, rows
from recbole_cl.study.universal import UserNetwork, standardised
from recbole_cl.training.runner import Runner
from recbole_cl.tree import tree_hash

N_ITEMS = 24
PRESET: dict[str, Any] = {
    "datasets": ["tasks-log"],
    "schedulers": ["TaskStream"],
    "models": ["SASRec"],
    "strategies": [{"PCL": {"model": "PCL", "strategy": "FineTune"}}],
    "seeds": [1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with ratings, genres and groups."""
    return write_task_log(tmp_path_factory.mktemp("log"))


def study(to: Path, folder: Path, report: Any, settings: Any = None, **preset: Any) -> Path:
    general = {**SETTINGS, "data_path": str(folder), "epochs": 1, **(settings or {})}
    path = to / "trial.yaml"
    asked = {**PRESET, "settings": general, **preset}
    path.write_text(yaml.safe_dump({"about": "A trial.", "report": report, "presets": {"laptop": asked}}))
    return path


def configured(folder: Path, to: Path, **changed: Any) -> CLConfig:
    settings = {**SETTINGS, "data_path": str(folder), "output_dir": str(to), **changed}
    config = CLConfig(model=settings.pop("model", "PCL"), dataset="tasks-log", config_dict=settings)
    config["saved"] = False
    return config


# -- what a study asks for ----------------------------------------------------------------------------------------


def test_all_orders_keep_the_first_task_first(tmp_path: Path, folder: Path) -> None:
    """Every permutation of the later tasks once, each in a folder of its own; a list is taken as it is."""
    cells = read_plan(study(tmp_path, folder, {}, orders="all", seeds=[1, 2]), "laptop").cells
    orders = [tuple(cell.settings["task_order"]) for cell in cells if cell.seed == 1]
    assert len(cells) == 12 and len(set(orders)) == 6 and {order[0] for order in orders} == {1}
    assert {frozenset(order) for order in orders} == {frozenset((1, 2, 3, 4))}
    assert cells[0].folder == "tasks-log/TaskStream/SASRec/PCL/1-2-3-4/seed1"
    assert len({cell.folder for cell in cells}) == 12
    few = read_plan(study(tmp_path, folder, {}, {"n_stages": 3}, orders="all"), "laptop").cells
    assert [cell.settings["task_order"] for cell in few] == [[1, 2, 3], [1, 3, 2]]
    own = read_plan(study(tmp_path, folder, {}, orders=[[1, 4], [1, 3]]), "laptop").cells
    assert [cell.labels["order"] for cell in own] == ["1-4", "1-3"]


@pytest.mark.parametrize(
    ("report", "preset", "words"),
    [
        ({}, {"orders": "every"}, "orders is 'every'; give all, or a list of orders"),
        ({}, {"orders": [[1, "two"]]}, "give all, or a list of orders"),
        ({}, {"orders": "all", "schedulers": ["TimeSlices"]}, "a scheduler is 'TimeSlices'; use TaskStream"),
        ({}, {"orders": "all", "settings": {"task_order": [1, 2]}}, "task_order and orders are both set"),
        ({}, {"orders": "all", "settings": {"tasks": [{"name": str(k)} for k in range(9)]}}, "all are 40320"),
        ({"plots": ["curve"]}, {}, "plots holds 'curve', .*did you mean 'curves'"),
        ({"plots": "curves"}, {}, "plots is 'curves'; give a list of curves, orders, probe"),
        ({"plots": ["orders"]}, {}, "the preset has no 'orders' for; add it"),
        ({"strata": ["new"]}, {}, "strata holds 'new', which is none of"),
        ({}, {"probe": "universel"}, "unknown probe 'universel'; did you mean 'universal'"),
        ({}, {"probe": {"universal": {"hiden": 3}}}, "no parameter 'hiden'; did you mean 'hidden'"),
        ({}, {"probe": {"universal": {"epochs": 0}}}, "'epochs' is 0; it must be an integer of at least 1"),
        ({}, {"probe": 3}, "probe is 3; give a name"),
    ],
)
def test_what_a_study_may_not_ask(tmp_path: Path, folder: Path, report: Any, preset: Any, words: str) -> None:
    """Field, value and remedy, before anything runs."""
    with pytest.raises(ConfigError, match=words):
        read_plan(study(tmp_path, folder, report, **preset), "laptop")


def test_a_probe_is_part_of_what_a_folder_belongs_to(tmp_path: Path, folder: Path) -> None:
    """Its parameters, defaults included, are in the hash; cells without one keep the hash that they had."""
    assert set(PROBES) == set(PARAMETERS) and set(plots.KINDS) == set(PLOTS)
    plain = read_plan(study(tmp_path, folder, {}), "laptop").cells[0]
    named = read_plan(study(tmp_path, folder, {}, probe="universal"), "laptop").cells[0]
    same = read_plan(study(tmp_path, folder, {}, probe={"universal": {"hidden": 64}}), "laptop").cells[0]
    wider = read_plan(study(tmp_path, folder, {}, probe={"universal": {"hidden": 65}}), "laptop").cells[0]
    assert len({plain.digest, named.digest, wider.digest}) == 3 and same.digest == named.digest
    import hashlib

    told = json.dumps(dict(plain.settings), sort_keys=True, default=str)
    assert plain.digest == hashlib.blake2b(told.encode(), digest_size=12).hexdigest()


# -- what the order costs -----------------------------------------------------------------------------------------


def test_degradation_by_hand() -> None:
    """Seeds are averaged first, then the best order's mean is compared with the worst one's."""
    frame = pd.DataFrame(
        [
            ("PCL", "1-2-3", 1, 0.5, 0.20, 0.9),
            ("PCL", "1-2-3", 2, 0.5, 0.40, 0.9),  # mean 0.3
            ("PCL", "1-3-2", 1, 0.5, 0.10, 0.6),
            ("PCL", "1-3-2", 2, 0.5, 0.30, 0.9),  # means 0.2 and 0.75
        ],
        columns=["strategy", "order", "seed", "last:one", "last:two", "last:three"],
    )
    found = degradation(frame).set_index("task")
    assert found.loc["one", "loss"] == 0.0
    assert found.loc["two", "loss"] == pytest.approx(100 / 3) and found.loc["two", "best_order"] == "1-2-3"
    assert (
        found.loc["three", "loss"] == pytest.approx(100 * 0.15 / 0.9) and found.loc["three", "worst_order"] == "1-3-2"
    )
    assert "mean of the later tasks* | | | | | | 25.00 |" in degradation_table(frame)[-2]
    frame["order"] = ["1-2-3", "1-2-3", "2-1-3", "2-1-3"]
    assert "*mean* | | | | | | 16.67 |" in degradation_table(frame)[-2]


# -- cold items ---------------------------------------------------------------------------------------------------


def cold_tokens(stream: Any) -> set[str]:
    """Items that only the second task knows."""
    first, second = stream.stages[0].n_items, stream.stages[1].n_items
    return set(stream.dataset.field2id_token["item_id"][first:second])


def items_of(stream: Any, targets: Any) -> list[tuple[str, list[str], str]]:
    """User, history and target of each row, as tokens."""
    table, names = stream.table, stream.dataset.field2id_token["item_id"]
    users = stream.dataset.field2id_token["user_id"]
    return [
        (users[u], [names[i] for i in table.item[table.seq[lo:hi]]], names[label])
        for u, lo, hi, label in zip(targets.user, targets.lo, targets.hi, targets.label, strict=True)
    ]


def test_cold_items_are_nowhere_in_the_first_task(folder: Path, tmp_path: Path) -> None:
    """Targets, histories, rows and negatives of the first task, against the log itself read without the cold items."""
    config = configured(folder, tmp_path, task_cold_items=0.5)
    stream = build_stream(config)
    first, second = stream.stages[:2]
    cold = cold_tokens(stream)
    assert len(cold) == N_ITEMS // 2 and first.n_items == 1 + N_ITEMS // 2
    assert (second.first_new_item, second.n_new_items) == (first.n_items, N_ITEMS // 2)
    plain = build_stream(configured(folder, tmp_path))
    inter, _, _ = read_log(folder)
    logged: dict[str, list[str]] = {}
    for user, item, *_ in inter:
        logged.setdefault(user, []).append(item)
    for split in ("train", "valid", "test"):
        found = items_of(stream, first.split(split))
        assert found and not any(target in cold or cold & set(history) for _, history, target in found)
        for user, history, target in found:  # it ends where a log without the cold items would end it
            warm = [item for item in logged[user] if item not in cold]
            assert any(warm[:k] == history and warm[k] == target for k in range(len(warm))), (user, history, target)
    # A training target is hidden because it is cold, or has nothing warm before it, and for no other reason.
    kept = {(user, target, len(history)) for user, history, target in items_of(stream, first.train)}
    wanted = set()
    for user, history, target in items_of(plain, plain.stages[0].train):
        warm = [item for item in history if item not in cold]
        if target not in cold and warm:
            wanted.add((user, target, len(warm)))
    assert kept == wanted
    for later in (1, 2, 3):  # the other tasks are those of a stream without cold items
        for split in ("train", "valid", "test"):
            one, two = (items_of(s, s.stages[later].split(split)) for s in (stream, plain))
            if stream.stages[later].task.kind == "classification":
                one, two = [row[:2] for row in one], [row[:2] for row in two]
            assert sorted(one) == sorted(two)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_batches_of_the_first_task_hold_warm_ids_only(folder: Path, tmp_path: Path, positions: str) -> None:
    """Windows over all positions and rows; inputs, targets and negatives."""
    config = configured(folder, tmp_path, task_cold_items=0.5, train_positions=positions)
    runner = Runner(config)
    stream = runner.begin(build_stream(config)).stream
    stage = stream.stages[0]
    model = config.model_class(config, stream.view(0))
    context = runner.state.models.context(0, model, stream.view(0))
    negatives: set[int] = set()
    for _ in range(5):
        for batch in make_loader(context, stage.train, "test"):
            for name in ("item_id", "item_id_list", "neg_item_id", TARGETS, "neg_" + TARGETS):
                if name in batch:
                    assert int(batch[name].max()) < stage.n_items, name
                    negatives |= set(batch[name].flatten().tolist()) if name.startswith("neg") else set()
    assert negatives - {0} == set(range(1, stage.n_items))
    rows = Batcher(config, stream, stream.view(0), stage.n_users, stage.n_items).rows(stage.test, evaluation=True)
    assert int(rows["item_id_list"].max()) < stage.n_items


def test_the_draw_of_cold_items(folder: Path, tmp_path: Path) -> None:
    """By the seed; as many as asked; none by default, and then the stream is the one without the property."""
    drawn = [
        cold_tokens(build_stream(configured(folder, tmp_path, task_cold_items=share, seed=seed)))
        for share, seed in ((0.5, 1), (0.5, 1), (0.5, 2), (0.25, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[3]) == 6
    zero = build_stream(configured(folder, tmp_path, task_cold_items=0.0))
    assert zero.stages[0].n_items == zero.stages[1].n_items and zero.stages[0].items is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"task_cold_items": 1.0}, "task_cold_items: 1.0 must be a share"),
        ({"task_cold_items": "half"}, "task_cold_items"),
        ({"task_cold_items": 0.5, "task_order": [4, 1]}, "put a next_item task first"),
        ({"task_cold_items": 0.5, "n_stages": 1}, "have a second task"),
        ({"task_cold_items": 0.5, "vocabulary": "global"}, "vocabulary: global"),
        ({"pcl_prompts": False, "pcl_contextual": False}, "leaves the task 'next five-star item' nothing to train"),
    ],
)
def test_cold_items_and_prompts_that_make_no_sense(
    folder: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Runner(configured(folder, tmp_path, epochs=1, **changed)).run()


class Kept(Runner):
    """Keeps the model's tensors at the end of each task."""

    def _evaluate_all(self, ctx: Any) -> None:
        super()._evaluate_all(ctx)
        self.ends = getattr(self, "ends", [])
        self.ends.append({name: tensor.detach().clone() for name, tensor in ctx.model.state_dict().items()})


def walked(folder: Path, to: Path, **changed: Any) -> Kept:
    runner = Kept(configured(folder, to, learning_rate=0.02, task_cold_items=0.5, **changed))
    runner.run()
    return runner


def test_only_what_should_trains_with_cold_items(folder: Path, tmp_path: Path) -> None:
    """With prompts and without: which tensors move in the second task; the first task's answers and bytes stay."""
    own = {"pcl_attributes": False, "task_order": [1, 2, 3]}
    prompted = walked(folder, tmp_path / "a", **own)
    bare = walked(folder, tmp_path / "b", pcl_prompts=False, pcl_contextual=False, **own)
    table = "backbone.item_embedding.weight"
    for runner in (prompted, bare):
        warm = runner.stream.stages[0].n_items
        one, two, three = runner.ends
        assert one[table].shape[0] == warm < two[table].shape[0]
        assert torch.equal(two[table][:warm], one[table]) and torch.equal(three[table], two[table])
        assert not torch.equal(two[table][warm:], runner.model.__class__(runner.config, runner.stream.view(1))
                               .backbone.item_embedding.weight[warm:])  # fmt: skip
        same = [name for name in one if name.startswith("backbone.") and name != table]
        assert same and all(torch.equal(one[name], three[name]) for name in same)
        matrix = runner.journal.result(tmp_path)["matrix"]["primary"]
        same = but_for_a_near_tie(matrix[0][0], len(runner.stream.stages[0].test))  # the table has grown since
        assert matrix[1][0] == same and matrix[2][0] == same
    # What is compared shares the very same pretrained backbone.
    shared = [name for name in prompted.ends[0] if name.startswith("backbone.")]
    assert all(torch.equal(prompted.ends[0][name], bare.ends[0][name]) for name in shared)
    assert not [name for name in bare.ends[0] if name.startswith(("prompts.", "contextual."))]
    moved = {name for name in prompted.ends[0] if not torch.equal(prompted.ends[0][name], prompted.ends[1][name])
             if name != table}  # fmt: skip
    assert "prompts.0" in moved and not any(name.startswith("heads") for name in moved)
    strata = prompted.journal.result(tmp_path)["strata"]["primary"]
    assert strata["new_item"][1][1] is not None and strata["new_item"][2][1] is not None


def test_the_first_task_learns_nothing_of_cold_items(folder: Path, tmp_path: Path) -> None:
    """Another log, in which cold items have changed places, gives the first task's backbone the same bytes."""
    config = configured(folder, tmp_path, task_cold_items=0.5, n_stages=2, epochs=1)
    cold = sorted(cold_tokens(build_stream(config)))
    swapped = dict(zip(cold, [*cold[1:], cold[0]], strict=True))
    other = write_task_log(tmp_path / "other")
    file = other / "tasks-log" / "tasks-log.inter"
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    changed = ["\t".join([user, swapped.get(item, item), *rest]) for user, item, *rest in lines]
    file.write_text("\n".join(changed) + "\n", encoding="utf-8")
    hashes = []
    for data in (folder, other):
        runner = walked(data, tmp_path / data.name, n_stages=2, epochs=1)
        hashes.append(tree_hash({k: v for k, v in runner.ends[0].items() if k.startswith("backbone.")}))
        assert cold_tokens(runner.stream) == set(cold)
    assert hashes[0] == hashes[1]


# -- user vectors for another model -------------------------------------------------------------------------------


def test_the_network_is_one_over_one_hot_users_and_vectors() -> None:
    """Against a dense layer on the concatenation; statistics are those of the training rows."""
    torch.manual_seed(0)
    network = UserNetwork(5, 3, 7, 2)
    assert network.of_user is not None and not network.of_user.weight.any()  # who is not trained adds nothing
    torch.nn.init.normal_(network.of_user.weight)
    users, vectors = torch.tensor([4, 0, 2]), torch.randn(3, 3)
    joined = torch.cat([torch.nn.functional.one_hot(users, 5).float(), vectors], dim=1)
    weight = torch.cat([network.of_user.weight.T, network.of_vector.weight], dim=1)
    expected = torch.relu(joined @ weight.T + network.of_vector.bias) @ network.last.weight.T + network.last.bias
    torch.testing.assert_close(network(users, vectors), expected)
    features = {"train": torch.tensor([[1.0], [3.0]]), "test": torch.tensor([[5.0]])}
    assert standardised(features)["test"].item() == pytest.approx((5 - 2) / math.sqrt(2))


@pytest.fixture(scope="module")
def learnt(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    runner = Runner(configured(folder, tmp_path_factory.mktemp("run"), epochs=6, learning_rate=0.02))
    runner.run()
    return runner


def test_user_vectors_tell_the_group(learnt: Runner) -> None:
    """The group is the cluster of items: the model's vectors tell it, random ones do not."""
    probe = {"name": "universal", "hidden": 16, "epochs": 30, "learning_rate": 0.01, "batch_size": 8, "one_hot": True}
    found = run_probe(probe, learnt)
    variants = found["variants"]
    assert list(variants) == ["prompted tasks", "first task alone", "random vectors"]
    assert [variants[name]["width"] for name in variants] == [32, 16, 32]
    chance = max(np.bincount(learnt.stream.stages[-1].test.label)) / found["n_test"]
    for name in ("prompted tasks", "first task alone"):
        assert variants[name]["accuracy"] > max(chance, variants["random vectors"]["accuracy"])
    assert all(len(own["curve"]) == 30 for own in variants.values())
    level = max(variants["first task alone"]["curve"])
    for own in variants.values():
        reached = own["epochs_to_level"]
        assert (reached is None) == (max(own["curve"]) < level)
        assert reached is None or (
            own["curve"][reached - 1] >= level and max(own["curve"][: reached - 1], default=0) < level
        )
    assert run_probe(probe, learnt) == found  # nothing is drawn from anybody else's generator


def test_which_vectors_the_network_is_given(learnt: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those under each task's own prompts but the last one's, row by row; all three kinds of the same users."""
    module = importlib.import_module("recbole_cl.study.universal")
    given: list[Any] = []

    def kept(features: Any, users: Any, labels: Any, *_: Any) -> dict[str, Any]:
        given.append((features, users, labels))
        return {"curve": [0.0]}

    monkeypatch.setattr(module, "_train", kept)
    monkeypatch.setattr(module, "standardised", lambda features: features)
    probe = {"name": "universal", **{k: v for k, (v, _) in PARAMETERS["universal"].items()}}
    run_probe(probe, learnt)
    stage, stream = learnt.stream.stages[-1], learnt.stream
    batcher = Batcher(learnt.config, stream, stream.view(3), stage.n_users, stage.n_items)
    for split in ("train", "valid", "test"):
        batch = batcher.rows(stage.split(split), evaluation=True)
        with torch.no_grad():
            one, two, three = (learnt.model.eval().represent(batch, task) for task in range(3))
        torch.testing.assert_close(given[0][0][split], torch.cat([two, three], dim=1))
        torch.testing.assert_close(given[1][0][split], one)
        assert not torch.allclose(one, two, atol=1e-3) and not torch.allclose(two, three, atol=1e-3)
        assert given[2][0][split].shape == given[0][0][split].shape
        assert all(torch.equal(users[split], batch["user_id"]) for _, users, _ in given)
    parts = [set(stage.split(split).user.tolist()) for split in ("train", "valid", "test")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    run_probe({**probe, "one_hot": False}, learnt)
    assert given[-1][1] is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "MultiTask"}, "has no represent_all"),
        ({"task_order": [1, 4, 2]}, "is no classification; put one last"),
        ({"task_order": [1, 4]}, "needs three"),
    ],
)
def test_what_the_probe_refuses(folder: Path, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    runner = Runner(configured(folder, tmp_path, epochs=1, **changed))
    runner.run()
    with pytest.raises(ConfigError, match=words):
        run_probe({"name": "universal", **{k: v for k, (v, _) in PARAMETERS["universal"].items()}}, runner)


# -- plots --------------------------------------------------------------------------------------------------------


def ran(strategy: str, curves: list[list[float | None]], order: str | None = None, **more: Any) -> Any:
    """A finished cell: a list of validation values for each stage."""
    from recbole_cl.study.plan import Cell

    labels = {"dataset": "log", "scheduler": "TaskStream", "model": "M", "strategy": strategy}
    points = [
        {"stage": s, "valid": None if value is None else {"hit@5": value}, "pass": "train", "epoch": e}
        for s, values in enumerate(curves)
        for e, value in enumerate(values)
    ]
    stages = [{"name": f"task {s}", "primary_metric": "Hit@5"} for s in range(len(curves))]
    return Cell({**labels, **({"order": order} if order else {})}, 1, {}), {"curves": points, "stages": stages, **more}


def test_learning_curves_are_means_of_runs_that_keep_their_best() -> None:
    """By hand: a run that stopped keeps its best value; epochs that were not validated are left out."""
    group = [
        ran("A", [[0.1, 0.4, 0.3], [0.5, None, 0.7]]),
        ran("A", [[0.2, 0.2, 0.2, 0.6, 0.8], [0.5, 0.5]]),
        ran("B <b>", [[0.9], [0.1]]),
    ]
    figure = plots.curves(group)
    assert figure is not None
    drawn = {(t["name"], t["xaxis"]): t for t in figure["data"] if t["mode"] != "none"}
    assert drawn["A", "x"]["y"] == pytest.approx([0.15, 0.3, 0.25, 0.5, 0.6])
    assert drawn["A", "x"]["x"] == [1, 2, 3, 4, 5] and drawn["A", "x2"]["y"] == pytest.approx([0.5, 0.6])
    assert drawn["B &lt;b&gt;", "x"]["y"] == [0.9]
    band = next(t for t in figure["data"] if t["mode"] == "none" and t["xaxis"] == "x")
    assert band["y"] == pytest.approx([0.2, 0.4, 0.3, 0.6, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1])
    assert [t["showlegend"] for t in drawn.values()] == [True, True, False, False]
    assert drawn["A", "x"]["line"] == drawn["A", "x2"]["line"] != drawn["B &lt;b&gt;", "x"]["line"]
    assert {"xaxis", "xaxis2", "yaxis", "yaxis2"} <= set(figure["layout"])
    assert plots.curves([ran("A", [[None]])]) is None


def test_orders_are_drawn_with_their_places() -> None:
    """A point an order, in the colour of the place; a task that always has the same place is left out."""
    group = []
    for order, names, last in (("1-2-3", "abc", [1.0, 0.2, 0.3]), ("1-3-2", "acb", [1.0, 0.4, 0.6])):
        stages = [{"name": name, "primary_metric": "hit@5"} for name in names]
        own = {"matrix": {"hit@5": [[None] * 3, last]}, "primary_metric": "hit@5", "stages": stages}
        cell, result = ran("PCL", [[0.1]], order)
        group.append((cell, {**result, **own}))
    figure = plots.orders(group)
    assert figure is not None and [n["text"] for n in figure["layout"]["annotations"]] == ["<b>b</b>", "<b>c</b>"]
    points = {(t["xaxis"], x): (y, t["name"]) for t in figure["data"] for x, y in zip(t["x"], t["y"], strict=True)}
    assert points["x", "1-2-3"] == (0.2, "as task 2") and points["x", "1-3-2"] == (0.6, "as task 3")
    assert points["x2", "1-2-3"] == (0.3, "as task 3") and points["x2", "1-3-2"] == (0.4, "as task 2")
    assert plots.orders(group[:1]) is None


# -- a whole study ------------------------------------------------------------------------------------------------


def test_a_study_with_everything(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two orders, a probe that fails at first, tables and plots; what was trained is not trained again."""
    walking = importlib.import_module("recbole_cl.study.walk")
    path = study(
        tmp_path,
        folder,
        {"summaries": ["last"], "plots": ["curves", "orders", "probe"], "strata": ["new_item"]},
        {"task_cold_items": 0.5},
        orders=[[1, 2, 3, 4], [1, 3, 2, 4]],
        probe={"universal": {"epochs": 3}},
    )
    plan, out = read_plan(path, "laptop"), tmp_path / "out"

    def run(cell: Any) -> str:
        return str(
            walking.run_cell(dict(cell.settings), str(out / cell.folder), cell.digest, 1, dict(cell.probe))["state"]
        )

    def broken(*_: Any) -> None:
        raise ConfigError("probe universal: broken")

    with monkeypatch.context() as patch:
        patch.setattr(walking, "run_probe", broken)
        assert run(plan.cells[0]) == "failed" and walking.state(plan.cells[0], out) == "open"
    with monkeypatch.context() as patch:  # resumed behind the last task: only the probe is left
        patch.setattr(Runner, "_stage", broken)
        assert run(plan.cells[0]) == "done"
    assert run(plan.cells[1]) == "done" and walk(plan, out) == []
    frame = rows(plan, out)
    assert list(frame["order"]) == ["1-2-3-4", "1-3-2-4"]
    assert frame["last:next item"].nunique() == 1  # the first task knows nothing of the order
    assert list(frame["last:next five-star item, new_item"].notna()) == [True, False]  # the second task brings them
    assert "last:next item, new_item" not in frame
    assert len(probe_rows(plan, out)) == 6
    drawn: list[str] = []
    draw = plots._png
    monkeypatch.setattr(
        plots,
        "_png",
        lambda figure, to: drawn.append(to.name) or (draw(figure, to) if to.name == "probe.png" else None),
    )  # a browser is started for each
    text = write_tables(plan, out)
    assert drawn == ["curves.png", "orders.png", "probe.png"]
    for words in (
        "| PCL, 1-3-2-4 | 1 |",
        "What the order costs",
        "| SASRec | PCL | prompted tasks | 2 |",
        "next five-star",
    ):
        assert words in text, words
    head = next(line for line in text.splitlines() if line.startswith("| strategy | seeds | next item"))
    assert head.endswith("| training, s | peak, MB | #B | #F | trainable parameters | bytes per task |")
    constant = next(line for line in text.splitlines() if line.startswith("| *most frequent class* |"))
    stages = json.loads((out / plan.cells[0].folder / "result.json").read_text(encoding="utf-8"))["stages"]
    told = {s["name"]: f"{s['constant_answer']:.4f}" for s in stages if "constant_answer" in s}
    assert len(told) == 2 and all(0 <= float(value) < 1 for value in told.values())
    assert [cell for cell in constant.split(" | ")[2:6] if cell.strip()] == [
        told[name] for name in head.split(" | ")[2:6] if name in told
    ]
    page = (out / "plots.html").read_text(encoding="utf-8")
    assert page.count('class="figure"') == 3 and "validation hit@5" in page and "as task 3" in page
    assert "Content-Security-Policy" in page and "http-equiv" in page
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page).group(1))  # type: ignore[union-attr]
    assert set(figures) == {"curves", "orders", "probe"}
    try:
        import kaleido  # noqa: F401
    except ImportError:
        pytest.skip("kaleido is not installed: no PNG")
    file = out / "probe.png"
    if not file.is_file():
        pytest.skip("there is no browser to draw a PNG with")
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 5000


# -- a run that is killed -----------------------------------------------------------------------------------------


def test_a_run_killed_in_the_third_task_goes_on(folder: Path, tmp_path: Path) -> None:
    """SIGKILL to a real process while task 3 trains; resumed, every figure and tensor is that of one left alone."""
    given = {**SETTINGS, "data_path": str(folder), "epochs": 3, "stopping_step": 9, "checkpoint_steps": 3}
    del given["tasks"]
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(yaml.safe_dump({"tasks": TASKS}), encoding="utf-8")

    def words(to: str, **more: Any) -> list[str]:
        settings = {**given, "tasks": str(tasks), "output_dir": str(tmp_path / to), **more}
        told = [f"--{key}={_yaml(value)}" for key, value in settings.items()]
        return [sys.executable, str(ROOT / "run_recbole_cl.py"), "--model=PCL", "--dataset=tasks-log", *told]

    how: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    saved = tmp_path / "cut" / "checkpoints"

    def where() -> tuple[int, str, int]:
        for file in reversed(checkpoint.numbered(saved)):
            try:
                state = json.loads((file / "state.json").read_text(encoding="utf-8"))
                return state["stage"], state["phase"], (state.get("progress") or {}).get("epoch", 0)
            except (OSError, ValueError, KeyError):
                continue
        return -1, "", 0

    process = subprocess.Popen(words("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        stage, phase, epoch = where()
        if stage >= 2 and phase == "train" and epoch >= 1:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait(60)
    assert process.returncode == -signal.SIGKILL
    state, _, _ = checkpoint.newest(saved)
    assert state is not None and (state["stage"], state["phase"]) == (2, "train")
    own = {**{k: v for k, v in given.items() if k != "data_path"}, "tasks": str(tasks)}
    cut = configured(folder, tmp_path / "cut", **own, resume=True)
    cut["saved"] = True
    again, whole = Runner(cut), Runner(configured(folder, tmp_path / "whole", **own))
    again.run()
    expected = json.loads(json.dumps(whole.run()))
    found = json.loads((tmp_path / "cut" / "result.json").read_text(encoding="utf-8"))
    for key in ("matrix", "strata", "steps_to_95", "summary"):
        assert found[key] == expected[key], key
    timeless = [[{k: v for k, v in c.items() if k != "seconds"} for c in r["curves"]] for r in (found, expected)]
    assert timeless[0] == timeless[1]
    tensors = again.model.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_what_adding_a_task_costs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of sums, differences with Student's interval, and how many tasks keep to the aim."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    from adding_a_task import Added, told

    def side(first: float, second: float, third: float, seconds: float) -> list[Added]:
        return [Added(name, "hit@5", x, seconds) for name, x in (("a", first), ("b", second), ("c", third))]

    pairs = [
        (side(0.50, 0.30, 0.20, 1.0), side(0.40, 0.35, 0.90, 5.0)),
        (side(0.60, 0.40, 0.21, 1.0), side(0.40, 0.40, 0.90, 7.0)),
    ]
    rows, sentence = told("log", pairs)
    # Differences of task a are .1 and .2: t(1, 97.5 %) = 12.706, standard error .05.
    assert rows[0] == "| a (hit@5) | 0.5500 | 0.4000 | +0.1500 ± 0.6353 | 1.0 | 6.0 | 6.0 |"
    assert "FineAll 6.0 times" in sentence and "at least 5 times in 3 of 3 tasks" in sentence
    assert "no worse in the mean in 1 of these" in sentence and sentence.endswith("by more than the interval in 2")
