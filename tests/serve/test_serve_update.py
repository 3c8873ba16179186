"""An update is one more stage: the same bits as a run that had the rows from the start; worse models are not served."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import configure, run
from serve_helpers import MODELS, SETTINGS, fresh
from task_helpers import SETTINGS as TASK_SETTINGS
from task_helpers import write_task_log

import recbole_cl
from recbole_cl import cli, disk
from recbole_cl.config import CLConfig
from recbole_cl.errors import CheckpointError, ConfigError, DataError, OutputError
from recbole_cl.model.state import owned_state
from recbole_cl.serve.update import Update, judged, update
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.extend import extended
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner
from recbole_cl.training.versions import Versions, locked
from recbole_cl.tree import tree_hash

NAMES = {"user": "user", "item": "item", "time": "time"}
FIRST = {"time_range": [0, 2_999_999], "boundaries": [1_000_000, 2_000_000]}
"""The first three of the log's four stages."""


def new_rows(log: PlantedDrift, path: Path, since: int = 3_000_000, until: int = 4_000_000) -> Path:
    """Writes the rows of the last stage as somebody's export."""
    lines = (log.folder / log.name / f"{log.name}.inter").read_text().splitlines()[1:]
    chosen = [line for line in lines if since <= int(line.split("\t")[2]) < until]
    path.write_text("user,item,time\n" + "\n".join(line.replace("\t", ",") for line in chosen) + "\n")
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("data"), n_stages=4)


@pytest.fixture(scope="module")
def base(log: PlantedDrift, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of BPR over the first three stages."""
    folder = tmp_path_factory.mktemp("base") / "run"
    run(log, folder, "BPR", **FIRST)
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of it that may be updated."""
    return Path(shutil.copytree(base, tmp_path / "run"))


def told(path: Path) -> dict[str, bytes]:
    """Everything in a folder but locks."""
    return {str(p): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock"}


# -- the same as a run that had the rows from the start -----------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_an_update_has_the_bits_of_a_longer_run(log: PlantedDrift, tmp_path: Path, model: str) -> None:
    more = SETTINGS.get(model, {})
    run(log, tmp_path / "run", model, **FIRST, **more)
    whole, result = run(log, tmp_path / "whole", model, **more)
    done = update(tmp_path / "run", new_rows(log, tmp_path / "new.csv"), columns=NAMES, margin=1.0)
    assert done.promoted and done.rows["new_users"] == 6 and done.rows["new_items"] == 4
    loaded = recbole_cl.load(tmp_path / "run")
    assert loaded.stream.fingerprint() == whole.stream.fingerprint(), "stages, ids and targets are the same"
    if model == "PCL":  # what it draws for all tasks at once depends on how many there are
        assert len(loaded.model.prompts) == len(whole.model.prompts) == 3
        return
    assert tree_hash(owned_state(loaded.model)) == tree_hash(owned_state(whole.model))
    assert done.new == pytest.approx(result["matrix"]["ndcg@10"][3][3], abs=1e-6)
    assert done.old == pytest.approx(result["matrix"]["ndcg@10"][2][3], abs=1e-6)


def test_strategies_go_on_with_what_they_know(log: PlantedDrift, tmp_path: Path) -> None:
    for name, model, strategy in (("ewc", "BPR", "EWC"), ("ader", "SASRec", "ADER")):
        run(log, tmp_path / name, model, strategy=strategy, **FIRST)
        whole, _ = run(log, tmp_path / f"{name}-whole", model, strategy=strategy)
        update(tmp_path / name, new_rows(log, tmp_path / "new.csv"), columns=NAMES, guard="none")
        loaded = recbole_cl.load(tmp_path / name)
        assert tree_hash(owned_state(loaded.model)) == tree_hash(owned_state(whole.model)), strategy


def test_updates_follow_each_other(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    cuts = [3_000_000, 3_000_200, 3_000_400, 4_000_000]
    for number, (since, until) in enumerate(itertools.pairwise(cuts)):
        path = new_rows(log, tmp_path / f"day{number}.csv", since, until)
        assert update(folder, path, columns=NAMES, margin=1.0).champion == number + 1
    served = recbole_cl.load(folder)
    assert served.position.stage == 6 and served.position.version == 3 and len(served.stream.table) == 1824
    times = served.stream.dataset.raw_time
    assert (np.diff(times) >= 0).all()


def test_another_strategy_and_other_epochs(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    path = new_rows(log, tmp_path / "new.csv")
    update(folder, path, {"strategy": "EWC", "ewc_lambda": 7.0, "epochs": 1}, columns=NAMES, margin=1.0)
    served = recbole_cl.load(folder)
    assert served.config.strategy_specs()[0][1]["lambda"] == 7.0 and served.config["epochs"] == 1
    assert served.saved.state["strategy"]["EWC"], "it has begun to remember"
    with pytest.raises(ConfigError, match="'embedding_size' cannot change in an update"):
        update(folder, path, {"embedding_size": 8}, columns=NAMES)
    with pytest.raises(ConfigError, match="'epochs' is -1"):
        update(folder, path, {"epochs": -1}, columns=NAMES)
    with pytest.raises(ConfigError, match="unknown strategy 'EWK'"):
        update(folder, path, {"strategy": "EWK"}, columns=NAMES)


def test_a_stream_of_tasks_gets_another_task(tmp_path: Path) -> None:
    data = write_task_log(tmp_path)
    settings = {**TASK_SETTINGS, "data_path": str(data), "output_dir": str(tmp_path / "run"), "epochs": 1}
    config = CLConfig(model="PCL", dataset="tasks-log", config_dict=settings)
    config["saved"] = True
    Runner(config).run()
    before = recbole_cl.load(tmp_path / "run").recommend("u1", 5, task="next item")[0]
    lines = [f"u{n},i{(n + step) % 24},5,{2_000_000 + 40 * step + n}" for step in range(4) for n in range(30)]
    (tmp_path / "new.csv").write_text("user,item,rating,time\n" + "\n".join(lines) + "\n")
    done = update(tmp_path / "run", tmp_path / "new.csv", columns=NAMES, guard="none")
    assert done.promoted
    served = recbole_cl.load(tmp_path / "run")
    assert served.stream.stages[-1].name == "update 5" and len(served.model.tasks) == 5
    history = served.saved.versions  # a task that has ended answers as it did, for the same history
    old = recbole_cl.load(tmp_path / "run", version=0)
    asked = [["i1", "i2", "i3"]]
    assert history.champion == 1
    assert served.recommend(asked, 5, task="next item")[0] == old.recommend(asked, 5, task="next item")[0]
    assert before.items


# -- served from all rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_what_serves_all_rows_goes_on_doing_so(log: PlantedDrift, tmp_path: Path, model: str) -> None:
    run(log, tmp_path / "run", model, serve=True, **FIRST)
    update(tmp_path / "run", new_rows(log, tmp_path / "new.csv"), columns=NAMES, margin=1.0)
    served = recbole_cl.load(tmp_path / "run")
    assert served.position.all_rows and not any(len(stage.test) for stage in served.stream.stages)
    assert served.ids.users.trained[1:].all() and served.ids.items.trained[1:].all()


# -- the guard ----------------------------------------------------------------------------------------------------


def test_a_worse_model_is_not_served(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    before = told(folder)
    path = new_rows(log, tmp_path / "new.csv")
    done = update(
        folder,
        path,
        {"learning_rate": 30.0, "epochs": 1, "eval_step": 0, "stage_optimizer": "reset"},
        columns=NAMES,
        margin=0.0,
    )
    assert not done.promoted and done.champion == 0
    assert done.old is not None and done.new is not None and done.new < done.old
    assert "worse by more than the margin" in done.reason
    after = told(folder)
    assert {name: after[name] for name in before} == before, "nothing that was there has changed"
    assert recbole_cl.load(folder).position.version == 0


def test_a_challenger_is_kept_compared_and_promoted(
    log: PlantedDrift, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version that is worse, or that is meant to wait, is there and is not served until somebody says so."""
    bad = {"learning_rate": 30.0, "epochs": 1, "eval_step": 0, "stage_optimizer": "reset"}
    path = new_rows(log, tmp_path / "new.csv")
    zero = recbole_cl.load(folder).recommend("u1", 5)[0]
    worse = update(folder, path, bad, columns=NAMES, margin=0.0)
    assert (worse.champion, worse.challenger) == (0, 1) and not worse.promoted
    assert recbole_cl.load(folder).recommend("u1", 5)[0] == zero
    good = update(folder, path, columns=NAMES, margin=1.0, as_challenger=True)
    assert (good.champion, good.challenger) == (0, 2) and good.reason.startswith("kept as the challenger, as asked")
    versions = Versions.of(folder)
    assert [entry["number"] for entry in versions.entries] == [0, 2], "one challenger at a time"
    assert (versions.champion, versions.challenger, versions.entry(2)["parent"]) == (0, 2, 0)
    assert versions.entry(2)["new"] > worse.new and not (folder / "versions" / "00000001").exists()
    challenger = recbole_cl.load(folder, version=2)
    assert challenger.position.version == 2 and challenger.recommend("u1", 5)[0] != zero
    assert cli.main(["versions", str(folder)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("*   0") and second.startswith("    2") and second.endswith("challenger")
    assert cli.main(["versions", str(folder), "--promote", "7"]) == 2 and Versions.of(folder).champion == 0
    assert cli.main(["versions", str(folder), "--promote", "2", "--json"]) == 0
    told_now = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told_now["champion"], told_now["challenger"]) == (2, None)
    assert recbole_cl.load(folder).recommend("u1", 5)[0] == challenger.recommend("u1", 5)[0]
    assert Versions.of(folder).roll_back() == 0
    # An update goes on from the champion, and a challenger is kept however many come after it.
    update(folder, path, columns=NAMES, margin=1.0, as_challenger=True)
    for number in range(3):
        updated(folder, log, tmp_path / "n.csv", number, keep=2)
    numbers = [entry["number"] for entry in Versions.of(folder).entries]
    assert numbers == [3, 5, 6] and Versions.of(folder).challenger == 3


def test_the_margin_is_a_share_of_the_old_figure() -> None:
    assert judged("ndcg@10", 0.5, 0.46, 0.1)[0] and not judged("ndcg@10", 0.5, 0.44, 0.1)[0]
    assert judged("logloss", 0.5, 0.54, 0.1)[0] and not judged("logloss", 0.5, 0.56, 0.1)[0]
    assert not judged("ndcg@10", None, None, 0.1)[0] and judged(None, None, None, 0.1)[0]


def test_a_dry_run_changes_nothing(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    before = told(folder)
    done = update(folder, new_rows(log, tmp_path / "new.csv"), columns=NAMES, margin=1.0, dry_run=True)
    assert not done.promoted and done.reason.startswith("dry run, nothing has changed; it would be promoted")
    assert told(folder) == before and done.new is not None


def test_too_few_rows_to_compare(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text("user,item,time\nu1,i1,3000001\nu2,i2,3000002\n")
    done = update(folder, path, columns=NAMES)
    assert not done.promoted and "too few to hold some out" in done.reason
    assert update(folder, path, columns=NAMES, guard="none").promoted
    with pytest.raises(ConfigError, match=r"'ndgc@10' is no metric.*did you mean 'ndcg@10'"):
        update(folder, new_rows(log, tmp_path / "n.csv"), columns=NAMES, guard="ndgc@10")


# -- files that make no sense -------------------------------------------------------------------------------------


BROKEN: list[tuple[str, Callable[[Path, PlantedDrift], Any], str]] = [
    ("columns", lambda p, log: p.write_text("who,item,time\na,b,1\n"), "there is no column 'user'"),
    ("empty", lambda p, log: p.write_text("user,item,time\n"), "holds no interaction"),
    ("nothing", lambda p, log: p.write_text(""), "it is empty"),
    ("twice", lambda p, log: new_rows(log, p, 2_000_000, 3_000_000), "are in the run's log already"),
    ("older", lambda p, log: p.write_text("user,item,time\nu1,i2,1500000\n"), "give a file with later rows"),
    (
        "ids",
        lambda p, log: p.write_text("user,item,time\n" + "".join(f"{n},{n},30000{n}0\n" for n in range(10, 40))),
        "not one of its 30 items .* is known to the run.*--new-ids",
    ),
    ("clock", lambda p, log: p.write_text("user,item,time\nu1,i2,1714564800\n"), "54 years after the end.*--unit"),
    ("broken", lambda p, log: p.write_text("user,item,time\nu1,i2,3000000\nu1,i3,tomorrow\n"), "line 3: 'tomorrow'"),
]


@pytest.mark.parametrize(("make", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_files_that_make_no_sense_change_nothing(
    log: PlantedDrift, folder: Path, tmp_path: Path, make: Callable[[Path, PlantedDrift], Any], message: str
) -> None:
    before = told(folder)
    make(tmp_path / "new.csv", log)
    with pytest.raises(DataError, match=message):
        update(folder, tmp_path / "new.csv", columns=NAMES)
    assert told(folder) == before


def test_what_is_partly_old_is_left_out_and_told(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    path = new_rows(log, tmp_path / "new.csv", 2_000_000)
    path.write_text(path.read_text() + "u1,i39,100\nu1,i39,3000900\nu1,i39,3000900\n")
    done = update(folder, path, columns=NAMES, margin=1.0)
    assert done.rows["read"] == 480 + 528 + 3 and done.rows["duplicates"] == 480 and done.rows["older"] == 1
    assert done.rows["used"] == 530 and len(done.notes) == 3
    assert "480 of 1011 rows are in the log already" in done.notes[0]


def test_new_items_only_may_be_meant(folder: Path, tmp_path: Path) -> None:
    lines = "".join(f"u{n % 7},new{n % 5},{3_000_000 + n}\n" for n in range(60))
    (tmp_path / "new.csv").write_text("user,item,time\n" + lines)
    assert update(folder, tmp_path / "new.csv", columns=NAMES, new_ids=True, guard="none").rows["new_items"] == 5


# -- versions -----------------------------------------------------------------------------------------------------


def updated(folder: Path, log: PlantedDrift, path: Path, number: int, **more: Any) -> Update:
    start = 3_000_000 + 60 * number
    return update(folder, new_rows(log, path, start, start + 60), columns=NAMES, guard="none", **more)


def test_a_rollback_serves_the_one_before(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    zero = recbole_cl.load(folder).recommend("u1", 5)[0]
    one_rolled = Versions.of(folder)
    with pytest.raises(ConfigError, match="has no champion before it"):
        one_rolled.roll_back()
    updated(folder, log, tmp_path / "a.csv", 0)
    one = recbole_cl.load(folder).recommend("u1", 5)[0]
    updated(folder, log, tmp_path / "b.csv", 1)
    assert Versions.of(folder).champion == 2
    assert Versions.of(folder).roll_back() == 1
    assert recbole_cl.load(folder).recommend("u1", 5)[0] == one
    assert Versions.of(folder).roll_back() == 0
    assert recbole_cl.load(folder).recommend("u1", 5)[0] == zero
    assert recbole_cl.load(folder, version=2).position.version == 2
    assert Versions.of(folder).roll_back(2) == 2
    with pytest.raises(ConfigError, match="version 9 is not there"):
        Versions.of(folder).roll_back(9)
    # An update goes on from the champion, and its number is a new one.
    Versions.of(folder).roll_back(1)
    assert updated(folder, log, tmp_path / "c.csv", 2).champion == 3
    entries = Versions.of(folder).entries
    assert [(entry["number"], entry["parent"]) for entry in entries] == [(0, None), (1, 0), (2, 1), (3, 1)]


def test_only_so_many_versions_are_kept(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        updated(folder, log, tmp_path / "n.csv", number, keep=2)
    versions = Versions.of(folder)
    assert [entry["number"] for entry in versions.entries] == [3, 4] and versions.champion == 4
    kept = sorted(path.name for path in (folder / "versions").iterdir() if path.is_dir())
    assert kept == ["00000003", "00000004"]
    stores = {path.name for path in (folder / "store").iterdir()}
    assert {entry["store"] for entry in versions.entries} < stores
    assert len(stores) == 3, "two versions', and that of the run's own checkpoints"
    assert versions.roll_back() == 3 and recbole_cl.load(folder).position.version == 3


def test_a_broken_version_is_told_and_can_be_left(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    updated(folder, log, tmp_path / "n.csv", 0)
    file = folder / "versions" / "00000001" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"version 1: .*truncated.*serve version 0 with recbole-cl rollback"):
        recbole_cl.load(folder)
    Versions.of(folder).roll_back()
    assert recbole_cl.load(folder).position.version == 0
    (folder / "versions" / "index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"versions/index.json in .* is broken"):
        recbole_cl.load(folder)


def test_two_updates_at_a_time_are_refused(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    with locked(folder), pytest.raises(ConfigError, match=r"is in use by .a change of its versions"):
        updated(folder, log, tmp_path / "n.csv", 0)
    assert updated(folder, log, tmp_path / "n.csv", 0).promoted


def test_a_new_run_in_the_same_folder_moves_versions_aside(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    updated(folder, log, tmp_path / "n.csv", 0)
    run(log, folder, "BPR", **FIRST)
    assert recbole_cl.load(folder).position.version == 0
    assert recbole_cl.load(folder / "earlier-1").position.version == 1, "what was moved aside is whole"


# -- killed at any point ------------------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys
import torch
torch.set_num_threads(1)
from recbole_cl import disk
from recbole_cl.serve.update import update
from recbole_cl.training import runner, versions

folder, new, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
count = 0

def counted(module, name):
    inner = getattr(module, name)
    def call(*arguments, **more):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **more)
    setattr(module, name, call)

for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (disk, "write_tensors"),
                     (runner.Runner, "_stage")):
    counted(module, name)
update(folder, new, columns={"user": "user", "item": "item", "time": "time"}, guard="none", keep=2)
print(count)
"""


def test_a_killed_update_leaves_a_champion(log: PlantedDrift, base: Path, tmp_path: Path) -> None:
    """SIGKILL before each step that touches the disk: the champion is the old one or the new one, and whole."""
    prepared = Path(shutil.copytree(base, tmp_path / "prepared"))
    updated(prepared, log, tmp_path / "first.csv", 0)
    path = new_rows(log, tmp_path / "new.csv", 3_000_060, 3_000_300)
    whole = Path(shutil.copytree(prepared, tmp_path / "whole"))
    done = fresh(KILLED, str(whole), str(path), "-1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout.split()[-1])
    assert steps > 12
    before = recbole_cl.load(prepared).recommend("u1", 5)[0]
    after = recbole_cl.load(whole).recommend("u1", 5)[0]
    assert before != after
    seen = []
    for at in sorted({*range(1, steps + 1, 4), steps - 2, steps - 1, steps}):
        folder = Path(shutil.copytree(prepared, tmp_path / f"killed-{at}"))
        done = fresh(KILLED, str(folder), str(path), str(at), cwd=tmp_path)
        assert done.returncode == -9, (at, done.stderr)
        served = recbole_cl.load(folder)
        answer = served.recommend("u1", 5)[0]
        assert answer == (before if served.position.version == 1 else after)
        seen.append(served.position.version)
        # The next update goes through, and clears away what was left.
        again = update(folder, path, columns=NAMES, guard="none", keep=2) if seen[-1] == 1 else None
        assert again is None or recbole_cl.load(folder).recommend("u1", 5)[0] == after
        listed = {f"{entry['number']:08d}" for entry in Versions.of(folder).entries}
        if again is not None:
            assert {p.name for p in (folder / "versions").iterdir() if p.is_dir()} == listed
            assert not [p for p in (folder / "store").iterdir() if p.name.startswith(".")]
        shutil.rmtree(folder)
    assert seen == sorted(seen) and seen[0] == 1, "old until the rename, new from there on"


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_leaves_the_champion(
    log: PlantedDrift, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The disk is full while the store, or the version, is written."""
    whole, calls = disk.write_tensors, []

    def full(path: Path, *more: Any) -> None:
        calls.append(path)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, *more)

    monkeypatch.setattr(disk, "write_tensors", full)
    with pytest.raises(OutputError, match="the disk is full"):
        updated(folder, log, tmp_path / "n.csv", 0)
    assert recbole_cl.load(folder).position.version == 0
    assert updated(folder, log, tmp_path / "n.csv", 0).champion == 1
    assert not [path for path in (folder / "store").iterdir() if path.name.startswith(".")]


def test_an_update_is_json(log: PlantedDrift, folder: Path, tmp_path: Path) -> None:
    done = update(folder, new_rows(log, tmp_path / "new.csv"), columns=NAMES, margin=1.0)
    assert json.loads(json.dumps(done.to_dict()))["champion"] == 1


def test_settings_of_a_run_that_cannot_be_continued(log: PlantedDrift, tmp_path: Path) -> None:
    config = configure(
        log, tmp_path / "run", "BPR", scheduler="TimeSlices", n_stages=1, boundaries=None, parity="recbole"
    )
    stream = build_stream(config)
    with pytest.raises(ConfigError, match="parity: the run cannot be updated"):
        extended(config, stream, None, "update")  # type: ignore[arg-type]
