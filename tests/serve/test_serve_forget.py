"""Users forgotten: nothing of them is left in any file that a run keeps; items retired: never recommended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import run
from serve_helpers import SETTINGS, fresh
from test_serve_update import FIRST, NAMES, new_rows

import recbole_cl
from recbole_cl import checkpoint, cli
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.serve.forget import forget, retire
from recbole_cl.serve.update import update
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.load import SavedRun
from recbole_cl.training.versions import Versions

WHO = "forget-me-17"
CASES: dict[str, dict[str, Any]] = {
    "BPR and EWC": {"model": "BPR", "strategy": "EWC"},
    "LightGCN": {"model": "LightGCN", "stage_optimizer": "carry"},
    "DeepFM": {"model": "DeepFM", **SETTINGS["DeepFM"]},
    "SASRec and ADER": {"model": "SASRec", "strategy": "ADER"},
    "SASRec and replay": {"model": "SASRec", "strategy": "ERRandom", "er_memory_size": 400},
    "BPR and CCD": {"model": "BPR", "strategy": "CCD", "ccd_teacher_size": 8},
    "PCL": {"model": "PCL", **SETTINGS["PCL"]},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    """The planted log, in which u17 is called otherwise, lives in a town of its own, and has an odd history."""
    log = write_planted_drift(tmp_path_factory.mktemp("data"), n_stages=4)
    file = log.folder / log.name / f"{log.name}.inter"
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    for number, line in enumerate(lines):
        if line[0] == "u17":
            line[0], line[1] = WHO, f"i{(7 * number) % 40}"
    file.write_text("\n".join("\t".join(line) for line in lines) + "\n")
    users = dict.fromkeys(line[0] for line in lines[1:])
    rows = ["user_id:token\ttown:token\tage:float"]
    rows += [f"{user}\t{'lonely-hamlet' if user == WHO else f'town{n % 5}'}\t{20 + n}" for n, user in enumerate(users)]
    file.with_suffix(".user").write_text("\n".join(rows) + "\n")
    return log


COLUMNS = {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "user": ["user_id", "town", "age"]}}


def prepared(log: PlantedDrift, folder: Path, case: dict[str, Any]) -> Path:
    """Returns the folder of a run with a version after it."""
    settings = {key: value for key, value in case.items() if key != "model"}
    run(log, folder, case["model"], **FIRST, **COLUMNS, **settings)
    update(folder, new_rows(log, folder.parent / f"{folder.name}.csv"), columns=NAMES, guard="none")
    return folder


def states(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every checkpoint in a folder, by its path."""
    for path in sorted(folder.rglob("manifest.json")):
        if "store" not in path.parts:
            yield str(path.parent.relative_to(folder)), checkpoint.read(path.parent)


def files_with(folder: Path, needle: bytes) -> list[str]:
    """Returns the files that hold some bytes."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in paths if needle in path.read_bytes()]


def arrays(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the tensors and arrays of a state."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from arrays(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from arrays(inner, f"{path}/{number}")
    elif torch.is_tensor(value) or isinstance(value, np.ndarray):
        yield path, np.asarray(value)


def traces(folder: Path) -> dict[str, bytes]:
    """Returns what of the user stands in the files, as bytes: its names, its rows in tables, its history."""
    saved = SavedRun.open(folder)
    dataset = saved.stream.dataset
    number = dataset.field2token_id[dataset.uid_field][WHO]
    found = {"name": WHO.encode(), "town": b"lonely-hamlet"}
    for place, state in states(folder):
        for path, array in arrays({key: state[key] for key in ("model", "strategy", "carried", "previous")}):
            sizes = {stage.n_users for stage in saved.stream.stages}
            by_user = array.ndim == 2 and array.shape[0] in sizes and array.dtype.kind == "f"
            if "token_embedding_table" in path and array.ndim == 2:  # of all fields, users first
                by_user = array.shape[0] > number
            if by_user and len(np.unique(array[number])) > 3:
                found[f"{place}{path}"] = np.ascontiguousarray(array[number]).tobytes()
    table = saved.stream.table
    history = table.item[table.seq[table.ptr[number] : table.ptr[number + 1]]]
    found["history"] = history[:4].astype(np.int64).tobytes()
    return found


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left(log: PlantedDrift, tmp_path: Path, name: str) -> None:
    folder = prepared(log, tmp_path / "run", CASES[name])
    before = traces(folder)
    there = {what: files_with(folder, needle) for what, needle in before.items() if what != "history"}
    assert all(there.values()), "the traces are in the files as long as nobody is forgotten"
    assert len({path.split("/")[0] for path in there["name"]} & {"store"}) == 1
    if CASES[name]["model"] in ("BPR", "LightGCN", "DeepFM"):
        assert len(before) > 4, "a model of users has rows of theirs in more than one checkpoint"
    if name == "SASRec and replay":
        assert [path for path in files_with(folder, before["history"]) if "store" not in path]
    users = ["u1", "u2", "u3"]
    answers = recbole_cl.load(folder).recommend(users, 5).scores
    told = forget(folder, [WHO, "nobody"])
    assert (told.users, told.unknown, told.versions) == (1, 1, [0, 1]) and told.rows > 20
    for what, needle in before.items():
        assert files_with(folder, needle) == [], f"{what} is left"
    for version in (0, 1):
        saved = SavedRun.open(folder, version)
        gone = np.flatnonzero(np.char.startswith(saved.stream.dataset.field2id_token["user_id"], "[FORGOTTEN"))
        assert len(gone) == 1
        assert not np.isin(saved.stream.table.user, gone).any() and not saved.state["known"]["users"][gone].any()
        for stage in saved.stream.stages:
            for split in ("train", "valid", "test"):
                assert not np.isin(stage.split(split).user, gone).any()
        for path, array in arrays(saved.state["strategy"]):
            if path.rsplit("/", 1)[-1] in ("user", "user_id"):
                assert len(array) and not np.isin(array, gone).any()
    served = recbole_cl.load(folder)
    assert served.recommend(WHO)[0].status == "unknown" and len(served.ids.users) == 65
    if CASES[name]["model"] != "LightGCN":  # its graph has lost edges
        assert served.recommend(users, 5).scores == answers, "the others are answered as before"
    again = update(folder, later_rows(log, tmp_path / "later.csv"), columns=NAMES, guard="none")
    assert again.promoted and again.champion > 1
    assert recbole_cl.load(folder).recommend(users, 5)[0].items


def later_rows(log: PlantedDrift, path: Path) -> Path:
    """Writes rows after the log's end."""
    lines = [f"u{n % 30},i{(n * 7 + n // 30) % 40},{3_100_000 + n}" for n in range(150)]
    path.write_text("user,item,time\n" + "\n".join(lines) + "\n")
    return path


def test_histories_are_those_of_the_others(log: PlantedDrift, tmp_path: Path) -> None:
    """The stream that is left is the stream of a log without the user, but for the numbers of ids."""
    folder = prepared(log, tmp_path / "run", {"model": "SASRec", "strategy": "ADER"})
    before = SavedRun.open(folder)
    forget(folder, [WHO])
    after = SavedRun.open(folder)
    number = before.stream.dataset.field2token_id["user_id"][WHO]

    def told(saved: SavedRun, split: str, stage: int) -> list[Any]:
        table, targets = saved.stream.table, saved.stream.stages[stage].split(split)
        rows = zip(targets.position, targets.user, targets.lo, targets.hi, targets.label, strict=True)
        return [
            (int(u), table.item[p], int(label), table.timestamp[p], table.item[table.seq[lo:hi]].tolist())
            for p, u, lo, hi, label in rows
            if u != number
        ]

    for stage in range(len(after.stream)):
        for split in ("train", "valid", "test"):
            assert told(after, split, stage) == told(before, split, stage)
    old, new = (saved.state["strategy"]["ADER"]["exemplars"] for saved in (before, after))
    kept = old["user"] != number
    assert 0 < len(new["user"]) == kept.sum() < len(kept)
    tables = before.stream.table, after.stream.table
    for name in ("lo", "hi", "position"):
        assert not np.array_equal(old[name][kept], new[name]), "they move"
    for at, to in zip(np.flatnonzero(kept), range(len(new["user"])), strict=True):
        first, second = (
            table.item[table.seq[memory["lo"][row] : memory["hi"][row]]].tolist()
            for table, memory, row in ((tables[0], old, at), (tables[1], new, to))
        )
        assert first == second and tables[1].item[new["position"][to]] == new["label"][to]


def test_a_returning_user_is_a_new_one(log: PlantedDrift, tmp_path: Path) -> None:
    folder = prepared(log, tmp_path / "run", {"model": "BPR"})
    (tmp_path / "who.txt").write_text(f"{WHO}\n")
    path = later_rows(log, tmp_path / "later.csv")
    path.write_text(path.read_text() + f"{WHO},i1,3100900\n")
    told = update(folder, path, columns=NAMES, guard="none", without=[WHO])
    assert "1 rows of users who are to be forgotten are left out" in told.notes[-1] and told.rows["used"] == 150
    path = tmp_path / "only.csv"
    path.write_text(f"user,item,time\n{WHO},i1,3200000\n")
    with pytest.raises(DataError, match="all 1 rows are of users who are to be forgotten"):
        update(folder, path, columns=NAMES, without=[WHO])
    forget(folder, [WHO])
    path.write_text("user,item,time\n" + "".join(f"{WHO},i{n},{3_200_000 + n}\n" for n in range(20)))
    assert update(folder, path, columns=NAMES, guard="none").rows["new_users"] == 1
    assert recbole_cl.load(folder).recommend(WHO, 3)[0].items


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from recbole_cl import disk
from recbole_cl.serve.forget import forget
base, root, count, at = Path(sys.argv[1]), Path(sys.argv[2]), 0, -1

def counted(module, name):
    inner = getattr(module, name)
    def call(*arguments, **more):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **more)
    setattr(module, name, call)

for module, name in ((os, "replace"), (shutil, "rmtree"), (disk, "write_tensors")):
    counted(module, name)

def child(point):
    global at, count
    folder = Path(shutil.copytree(base, root / f"killed-{point}"))
    pid = os.fork()
    if pid == 0:
        count, at = 0, point
        forget(folder, ["forget-me-17"])
        (root / "steps").write_text(str(count))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) == (point > 0), (point, status)

child(-1)
steps = int((root / "steps").read_text())
assert steps > 8
points = sorted({1, 3, steps // 2, steps - 3, steps})
for point in points:
    child(point)
print(*points)
"""


def test_killed_at_any_step_it_is_finished_by_the_same_command(log: PlantedDrift, tmp_path: Path) -> None:
    """SIGKILL before each step that touches the disk."""
    base = prepared(log, tmp_path / "run", {"model": "BPR"})
    needles = traces(base)
    (tmp_path / "killed").mkdir()
    done = fresh(KILLED, str(base), str(tmp_path / "killed"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for at in done.stdout.split():
        folder = tmp_path / "killed" / f"killed-{at}"
        assert recbole_cl.load(folder).recommend("u1", 3)[0].items, "it can be served as it lies there"
        forget(folder, [WHO])
        assert all(files_with(folder, needle) == [] for needle in needles.values())
        assert recbole_cl.load(folder).recommend("u1", 3)[0].items


def test_runs_moved_aside_and_kept_first_stages(log: PlantedDrift, tmp_path: Path) -> None:
    folder = prepared(log, tmp_path / "run", {"model": "BPR"})
    run(log, folder, "BPR", **FIRST, **COLUMNS, keep_base=True, serve=True)
    assert (folder / "earlier-1" / "versions").is_dir() and (folder / "base").is_dir()
    told = forget(folder, [WHO])
    assert told.users == 1 and files_with(folder, WHO.encode()) == [] and not (folder / "base").exists()
    assert recbole_cl.load(folder / "earlier-1").position.version == 1
    assert recbole_cl.load(folder).position.all_rows


# -- items --------------------------------------------------------------------------------------------------------


def test_retired_items_are_never_recommended(log: PlantedDrift, tmp_path: Path, capsys: Any) -> None:
    folder = prepared(log, tmp_path / "run", {"model": "SASRec"})
    served = recbole_cl.load(folder)
    items, scores = served.recommend("u1", 44)[0].items, served.score([("u1", "i3")]).values
    near = served.similar_items("i5", 43).items
    file = tmp_path / "gone.txt"
    file.write_text("\n".join([*items[:3], near[0], "not-there-yet"]) + "\n")
    assert cli.main(["update", str(folder), "--retire", str(file)]) == 0
    gone = {*items[:3], near[0]}
    for version in (0, 1):  # whichever version is served
        served = recbole_cl.load(folder, version=version)
        assert served.retired == gone | {"not-there-yet"}
        assert not gone & set(served.recommend("u1", 100)[0].items)
        assert not gone & set(served.recommend("u1", 100, allowed=items[:5])[0].items)
        assert not gone & set(served.similar_items("i5", 100).items)
    assert served.recommend("u1", 44)[0].items == [item for item in items if item not in gone]
    assert served.similar_items(near[0], 3).items, "its neighbours may be asked for"
    assert np.array_equal(served.score([("u1", "i3")]).values, scores), "rows are kept"
    only = served.recommend("u1", 3, allowed=[items[0]])[0]
    assert only.items == [] and "retired" in str(only.reason)
    path = later_rows(log, tmp_path / "later.csv")
    update(folder, path, columns=NAMES, guard="none")
    assert not gone & set(recbole_cl.load(folder).recommend("u1", 100)[0].items), "an update keeps the list"
    file.write_text(f"{items[0]}\n")
    assert cli.main(["update", str(folder), "--restore", str(file)]) == 0
    assert items[0] in recbole_cl.load(folder).recommend("u1", 100)[0].items
    assert json.loads((folder / "versions" / "index.json").read_text())["retired"][-1] == "not-there-yet"


def test_lists_that_make_no_sense(log: PlantedDrift, tmp_path: Path, capsys: Any) -> None:
    folder = prepared(log, tmp_path / "run", {"model": "BPR"})
    assert cli.main(["update", str(folder)]) == 2
    assert "give --new-data FILE, or --retire, --restore or --forget" in capsys.readouterr().err
    assert cli.main(["update", str(folder), "--forget", str(tmp_path / "no.txt")]) == 2
    assert "--forget: " in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n\n")
    assert cli.main(["update", str(folder), "--retire", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt is empty" in capsys.readouterr().err
    (tmp_path / "who.txt").write_text(f"{WHO}\n")
    assert cli.main(["update", str(folder), "--forget", str(tmp_path / "who.txt"), "--dry-run"]) == 2
    assert files_with(folder, WHO.encode()), "nothing has changed"
    assert cli.main(["update", str(folder), "--forget", str(tmp_path / "who.txt")]) == 0
    assert files_with(folder, WHO.encode()) == []
    with pytest.raises(ConfigError, match="is in use by"):
        from recbole_cl.training.versions import locked

        with locked(folder):
            retire(folder, ["i1"])
    assert Versions.of(folder).retired == []
