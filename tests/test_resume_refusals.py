"""What a run may go on over, and what it never overwrites."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import SMALL, arguments, command, configure, run, toy

import recbole_cl
from recbole_cl import checkpoint
from recbole_cl.config import CLConfig
from recbole_cl.errors import CheckpointError, ConfigError, DataError
from recbole_cl.stream.build import build_stream
from recbole_cl.training.runner import Runner

RESULTS = ("result.json", "records.csv", "report.html")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- all that is read ---------------------------------------------------------------------------------------------


def lines(path: Path, change: Callable[[list[str]], Any]) -> None:
    head, *rows = path.read_text().splitlines()
    cells = [row.split("\t") for row in rows]
    for row in cells:
        change(row)
    path.write_text("\n".join([head, *("\t".join(row) for row in cells)]) + "\n")


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A log with labels, features of items and users, a social network and a knowledge graph."""
    folder = tmp_path / "data" / "rich"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(3)
    pairs = [(u, i) for u in range(20) for i in draw.permutation(12)[:9]]
    rows = [
        f"u{u}\ti{i}\t{draw.integers(1, 6)}\t{t}" for t, (u, i) in enumerate(sorted(pairs, key=lambda _: draw.random()))
    ]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "rich.inter").write_text("\n".join([head, *rows]) + "\n")
    items = [f"i{i}\tc{i % 3}\t{i / 2}\ta b" for i in range(12)]
    (folder / "rich.item").write_text(
        "\n".join(["item_id:token\tcat:token\tprice:float\twords:token_seq", *items]) + "\n"
    )
    users = [f"u{u}\tj{u % 4}" for u in range(20)]
    (folder / "rich.user").write_text("\n".join(["user_id:token\tjob:token", *users]) + "\n")
    (folder / "rich.kg").write_text(
        "\n".join(
            ["head_id:token\trelation_id:token\ttail_id:token", *(f"e{i}\tr0\te{(i + 1) % 12}" for i in range(12))]
        )
    )
    (folder / "rich.link").write_text(
        "\n".join(["item_id:token\tentity_id:token", *(f"i{i}\te{i}" for i in range(12))])
    )
    return folder


INTER = ["user_id", "item_id", "rating", "timestamp"]
LOADED = {"inter": INTER, "item": ["item_id", "cat", "price", "words"], "user": ["user_id", "job"]}
KG = {"inter": INTER, "kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}


def put(place: int, value: Callable[[list[str]], str]) -> Callable[[list[str]], None]:
    def change(row: list[str]) -> None:
        row[place] = value(row)

    return change


SWAP = {"e1": "e2", "e2": "e1"}
CHANGES: dict[str, tuple[str, str, Callable[[list[str]], Any], dict[str, Any]]] = {
    "labels": ("DeepFM", "inter", put(2, lambda row: str(6 - int(row[2]))), {"threshold": {"rating": 4}}),
    "times": ("BPR", "inter", put(3, lambda row: str(int(row[3]) + 1)), {}),
    "a token of an item": ("SASRecF", "item", put(1, lambda row: "c0" if row[0] == "i1" else row[1]), {}),
    "other words for the same ids": ("DeepFM", "item", put(1, lambda row: "x" + row[1]), {}),
    "a number of an item": ("DeepFM", "item", put(2, lambda row: str(float(row[2]) + (row[0] == "i3"))), {}),
    "a sequence of an item": ("DeepFM", "item", put(3, lambda row: "b a" if row[0] == "i3" else row[3]), {}),
    "a user": ("DeepFM", "user", put(1, lambda row: "j0" if row[0] == "u1" else row[1]), {}),
    "the graph": ("CFKG", "kg", put(2, lambda row: "e5" if row[0] == "e0" else row[2]), {"load_col": KG}),
    "a link": ("CFKG", "link", put(1, lambda row: SWAP.get(row[1], row[1])), {"load_col": KG}),
}
CHANGES["a token of an item"][3]["selected_features"] = ["cat"]


@pytest.mark.parametrize("kind", list(CHANGES))
def test_whatever_is_read_is_in_the_fingerprint(rich: Path, kind: str) -> None:
    model, suffix, change, more = CHANGES[kind]
    given = {**SMALL, "data_path": str(rich.parent), "n_stages": 3, "load_col": LOADED, **more}

    def stream() -> str:
        return build_stream(CLConfig(model=model, dataset="rich", config_dict=given)).fingerprint()

    before = stream()
    assert stream() == before, "the same files give the same hash"
    lines(rich / f"rich.{suffix}", change)
    assert stream() != before


@pytest.mark.parametrize("kind", ["labels", "a token of an item"])
def test_resume_over_changed_labels_or_features_is_refused(rich: Path, tmp_path: Path, kind: str) -> None:
    model, suffix, change, more = CHANGES[kind]
    given = {**SMALL, "data_path": str(rich.parent), "n_stages": 3, "load_col": LOADED, "epochs": 1, **more}

    def again(**other: Any) -> dict[str, Any]:
        settings = {**given, "output_dir": str(tmp_path / "run"), **other}
        return Runner(CLConfig(model=model, dataset="rich", config_dict=settings)).run()

    again()
    before = contents(tmp_path / "run")
    lines(rich / f"rich.{suffix}", change)
    with pytest.raises(CheckpointError, match="the log of interactions has changed since the checkpoint, or one of"):
        again(resume=True)
    assert contents(tmp_path / "run") == before, "a refused run leaves everything as it was"


def test_a_column_that_is_not_read_may_change(rich: Path, tmp_path: Path) -> None:
    given = {**SMALL, "data_path": str(rich.parent), "n_stages": 3, "epochs": 1, "output_dir": str(tmp_path / "run")}
    whole = Runner(CLConfig(model="BPR", dataset="rich", config_dict=given)).run()
    lines(rich / "rich.item", CHANGES["a number of an item"][2])
    resumed = Runner(CLConfig(model="BPR", dataset="rich", config_dict={**given, "resume": True})).run()
    assert resumed["matrix"] == whole["matrix"]


def test_a_file_that_a_property_names_must_stay_what_it_was(tmp_path: Path) -> None:
    log = toy(tmp_path)
    notes = tmp_path / "notes.txt"
    notes.write_text("one")
    config = configure(log, tmp_path / "run", "BPR", epochs=1)
    config["of_another_package"] = str(notes)
    Runner(config).run()

    def again() -> dict[str, Any]:
        config = configure(log, tmp_path / "run", "BPR", epochs=1, resume=True)
        config["of_another_package"] = str(notes)
        return Runner(config).run()

    again()
    notes.write_text("two")
    with pytest.raises(CheckpointError, match=r"notes\.txt of property 'of_another_package' has changed"):
        again()
    notes.unlink()
    with pytest.raises(CheckpointError, match=r"notes\.txt of property 'of_another_package' is not there any more"):
        again()


# -- the program --------------------------------------------------------------------------------------------------


def test_another_version_of_the_program_is_told(tmp_path: Path) -> None:
    log = toy(tmp_path)
    whole = run(log, tmp_path / "run", "BPR", epochs=1)[1]
    last = checkpoint.numbered(tmp_path / "run" / "checkpoints")[-1]
    state = checkpoint.read(last)
    assert state["versions"]["torch"] == whole["versions"]["torch"] and "recbole" in state["versions"]
    state["versions"] = {**state["versions"], "recbole-cl": "0.0.9", "torch": "2.0.0"}
    number = int(last.name)
    checkpoint.save(last.parent, number, {**state, "stage": 1}, keep=9)  # of the last stage nothing is known yet
    shutil.rmtree(tmp_path / "aside", ignore_errors=True)
    resumed = run(log, tmp_path / "run", "BPR", epochs=1, resume=True)[1]
    (told,) = [warning for warning in resumed["warnings"] if "other versions" in warning]
    assert "recbole-cl was 0.0.9, is 0.1.0" in told and "torch was 2.0.0, is" in told and "pandas" not in told


# -- what is never overwritten ------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is_by_resume(tmp_path: Path) -> None:
    log = toy(tmp_path)
    whole = run(log, tmp_path / "run", "BPR", epochs=1)[1]
    before = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in RESULTS}
    kept = contents(tmp_path / "run")
    again = run(log, tmp_path / "run", "BPR", epochs=1, resume=True)[1]
    assert json.loads(json.dumps(whole)) == again
    assert contents(tmp_path / "run") == kept
    assert {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in RESULTS} == before
    (tmp_path / "run" / "report.html").unlink()
    run(log, tmp_path / "run", "BPR", epochs=1, resume=True)
    assert contents(tmp_path / "run").keys() == kept.keys(), "a page that was removed is drawn again"


def test_a_finished_run_whose_last_checkpoint_is_damaged_keeps_its_results_aside(tmp_path: Path) -> None:
    log = toy(tmp_path)
    run(log, tmp_path / "run", "BPR")
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in RESULTS}
    (checkpoint.numbered(tmp_path / "run" / "checkpoints")[-1] / "manifest.json").write_text("")
    again = run(log, tmp_path / "run", "BPR", resume=True)[1]
    assert {name: (tmp_path / "run" / "earlier-1" / name).read_bytes() for name in RESULTS} == kept
    assert again["matrix"] == json.loads(kept["result.json"])["matrix"]


def test_a_run_without_checkpoints_keeps_its_results_aside(tmp_path: Path) -> None:
    log = toy(tmp_path)
    config = configure(log, tmp_path / "run", "BPR", epochs=1)
    config["saved"] = False
    Runner(config).run()
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in RESULTS}
    run(log, tmp_path / "run", "BPR", epochs=1, resume=True, seed=3)
    assert {name: (tmp_path / "run" / "earlier-1" / name).read_bytes() for name in RESULTS} == kept
    assert json.loads((tmp_path / "run" / "result.json").read_text())["seed"] == 3


REFUSED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "configuration": ({"learning_rate": -1}, ConfigError),
    "data": ({"n_stages": 100_000, "scheduler": "TimeSlices", "boundaries": None}, DataError),
    "serving": ({"serve": True, "parity": "recbole"}, ConfigError),
    "strategy": ({"strategy": "LwF", "model": "Pop"}, ConfigError),
    "resume": ({"resume": True, "seed": 77}, CheckpointError),
    "base": ({"base_run": "nowhere", "seed": 77}, CheckpointError),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_refused_run_moves_nothing(tmp_path: Path, kind: str) -> None:
    log = toy(tmp_path)
    run(log, tmp_path / "run", "BPR", epochs=1, serve=True)
    before = contents(tmp_path / "run")
    change, error = REFUSED[kind]
    model = change.get("model", "BPR")
    with pytest.raises(error):
        run(log, tmp_path / "run", model, epochs=1, **{k: v for k, v in change.items() if k != "model"})
    after = contents(tmp_path / "run")
    assert {name: after.get(name) for name in before} == before
    assert all(name.startswith("store/") for name in after.keys() - before.keys())
    assert recbole_cl.load(tmp_path / "run").recommend("u1", 3)[0].items


def test_a_new_run_moves_what_was_there_once_it_has_something_to_save(tmp_path: Path) -> None:
    log = toy(tmp_path)
    run(log, tmp_path / "run", "BPR", epochs=1)
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in RESULTS}
    done = command(*arguments(log, tmp_path / "run", model="BPR", epochs=1, seed=9), cwd=tmp_path)
    assert done.returncode == 0 and "the results of an earlier run were moved to" in done.stderr
    assert {name: (tmp_path / "run" / "earlier-1" / name).read_bytes() for name in RESULTS} == kept
