"""Checkpoints that are damaged, mixed, foreign or wrong in what they hold: refused by name, and the one before used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import run, toy
from safetensors.torch import load_file, save_file

import recbole_cl
from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError
from recbole_cl.testing.toy import PlantedDrift

FILES = ("manifest.json", "state.json", "tensors.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlantedDrift, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("damage")
    log = toy(folder)
    return log, folder / "run", run(log, folder / "run", "BPR", strategy="EWC", checkpoint_keep=3)[1]


@pytest.fixture
def copied(finished: tuple[PlantedDrift, Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the run's folder, without its results: as if it had been killed before it wrote them."""
    shutil.copytree(finished[1], tmp_path / "run")
    for name in ("result.json", "records.csv", "report.html"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


def resumed(finished: tuple[PlantedDrift, Path, dict[str, Any]], folder: Path) -> dict[str, Any]:
    return run(finished[0], folder, "BPR", strategy="EWC", checkpoint_keep=3, resume=True)[1]


def hashed_anew(path: Path) -> None:
    """Writes the hashes of a checkpoint's files into its manifest, as somebody does who has repaired one."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def edited(change: Callable[[dict[str, Any]], Any], name: str = "state.json") -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))
        if name == "state.json":
            hashed_anew(path)

    return edit


def moved_weights(path: Path) -> None:
    tensors = load_file(str(path / "tensors.safetensors"))
    name = next(name for name in tensors if name.startswith("model/") and tensors[name].is_floating_point())
    save_file({**tensors, name: tensors[name] + 1}, str(path / "tensors.safetensors"))
    hashed_anew(path)


def one_bit(name: str, at: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[at // 8] ^= 1 << at % 8
        (path / name).write_bytes(data)

    return flip


def instead(make: Callable[[Path], Any], name: str = "manifest.json") -> Callable[[Path], None]:
    def put(path: Path) -> None:
        (path / name).rename(path / "aside")
        make(path / name)

    return put


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "stage 99": (edited(lambda s: s.update(stage=99)), "state.json is not what a run writes"),
    "no model": (edited(lambda s: s.pop("model")), "state.json is not what a run writes"),
    "no id": (edited(lambda s: s.pop("__checkpoint__")), "lacks the checkpoint's id"),
    "a list": (lambda p: ((p / "state.json").write_text("[1]"), hashed_anew(p)), "is not what a run writes"),
    "not JSON": (lambda p: ((p / "state.json").write_text("{"), hashed_anew(p)), "is not what a run writes"),
    "other weights": (moved_weights, "tensors.safetensors is not what a run writes"),
    "no tensors": (lambda p: ((p / "tensors.safetensors").write_bytes(b"1"), hashed_anew(p)), "is not what a run"),
    "no hashes": (edited(lambda m: m.pop("sha256"), "manifest.json"), "lacks the hashes"),
    "empty hashes": (edited(lambda m: m.update(sha256={}), "manifest.json"), "lacks the hashes"),
    "one hash": (edited(lambda m: m["sha256"].pop("state.json"), "manifest.json"), "lacks the hashes"),
    "hashes of numbers": (edited(lambda m: m.update(sha256=dict.fromkeys(FILES[1:], 1)), "manifest.json"), "lacks"),
    "other number": (edited(lambda m: m.update(number=3), "manifest.json"), "is that of checkpoint 3"),
    "version 1": (edited(lambda m: m.update(version=1), "manifest.json"), "format version 1, this is 2"),
    "version True": (edited(lambda m: m.update(version=True), "manifest.json"), "format version True"),
    "one bit": (one_bit("manifest.json", 333), "manifest.json|truncated|not written"),
    "binary": (lambda p: (p / "manifest.json").write_bytes(bytes(range(256))), "manifest.json is missing or broken"),
    "deep": (lambda p: (p / "manifest.json").write_text("[" * 200_000), "manifest.json is missing or broken"),
    "a pipe": (instead(os.mkfifo), "manifest.json is missing or broken"),
    "a folder": (instead(Path.mkdir), "manifest.json is missing or broken"),
    "a link": (instead(lambda p: p.symlink_to("aside")), "manifest.json is missing or broken"),
    "a pipe of state": (instead(os.mkfifo, "state.json"), "state.json is truncated"),
    "a link to tensors": (instead(lambda p: p.symlink_to("aside"), "tensors.safetensors"), "tensors.* is truncated"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copied: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    *_, before, last = checkpoint.numbered(copied / "checkpoints")
    damage(last)
    begun = time.monotonic()
    state, number, (warning,) = checkpoint.newest(copied / "checkpoints")
    assert time.monotonic() - begun < 10, "nobody waits for a pipe"
    assert state is not None and number == int(before.name)
    assert warning.startswith(f"checkpoint {last.name}: ") and warning.endswith("; the one before it is used")
    assert re.search(words, warning), warning
    for path in checkpoint.numbered(copied / "checkpoints")[:-1]:
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=f"checkpoint {last.name}"):
        checkpoint.newest(copied / "checkpoints")


def test_every_flipped_bit_is_found(copied: Path) -> None:
    """200 bits of the three files: the one before is used, with a word; never another error, never another state."""
    folder = copied / "checkpoints"
    *_, before, last = checkpoint.numbered(folder)
    expected = checkpoint.read(before)
    draw = random.Random(7)
    for n in range(210):
        path = last / FILES[n % 3]
        data = path.read_bytes()
        one_bit(path.name, draw.randrange(8 * len(data)))(last)
        state, number, warnings = checkpoint.newest(folder)
        assert state is not None and number == int(before.name) and state["stage"] == expected["stage"]
        assert len(warnings) == 1 and last.name in warnings[0]
        path.write_bytes(data)
    assert checkpoint.newest(folder)[1] == int(last.name)


@pytest.mark.parametrize("kind", ["stage 99", "one bit", "no hashes", "other weights", "a pipe"])
def test_a_run_that_finds_its_newest_checkpoint_damaged_gives_the_same_results(
    finished: tuple[PlantedDrift, Path, dict[str, Any]], copied: Path, kind: str
) -> None:
    last = checkpoint.numbered(copied / "checkpoints")[-1]
    DAMAGE[kind][0](last)
    result = resumed(finished, copied)
    assert result["matrix"] == finished[2]["matrix"]
    assert any(f"checkpoint {last.name}: " in warning for warning in result["warnings"])
    kept = checkpoint.numbered(copied / "checkpoints")
    assert checkpoint.read(kept[-1])["phase"] == "done", "the newest number is a whole one again"


def wrong(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, **changes}


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        inner = dict(state)
        state, at = inner, inner
        for key in keys[:-1]:
            at[key] = dict(at[key])
            at = at[key]
        del at[keys[-1]]
        return state

    return change


def other_shape(state: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: torch.zeros(3, 2) for name in state["model"]["tensors"]}
    return {**state, "model": {**state["model"], "tensors": tensors}}


CONTENT: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "stage 99": ("done", wrong(stage=99), "'stage' is 99"),
    "stage -1": ("done", wrong(stage=-1), "'stage' is -1"),
    "stage '2'": ("done", wrong(stage="2"), "'stage' is '2'"),
    "stage 1.5": ("done", wrong(stage=1.5), "'stage' is 1.5"),
    "stage True": ("done", wrong(stage=True), "'stage' is True"),
    "phase": ("done", wrong(phase="over"), "'phase' is 'over'"),
    "no journal": ("done", without("journal"), "lacks 'journal'"),
    "a list for the model": ("done", wrong(model=[1, 2]), "'model' is"),
    "other shapes": ("done", other_shape, "its content is not that of this run"),
    "no records": ("done", without("journal", "records"), "its content is not that of this run"),
    "no flags": ("done", without("known", "items"), "its content is not that of this run"),
    "no importances": ("done", wrong(strategy={"EWC": {"nonsense": 1}}), "."),
    "inside: no progress": ("train", without("progress"), "lacks 'progress'"),
    "inside: unknown progress": ("train", wrong(progress={"epoch": 1, "more": 2}), "its content is not that of this"),
    "inside: no optimiser": ("train", without("trainer", "own"), "its content is not that of this run"),
    "inside: generators": ("train", wrong(generators={"dropout": 1}), "its content is not that of this run"),
    "inside: random states": (
        "train",
        without("trainer", "randomness", "torch"),
        "its content is not that of this run",
    ),
    "inside: no loader": ("train", wrong(trainer={"own": 1, "loader": 2, "randomness": 3}), "its content is not that"),
}


@pytest.mark.parametrize("kind", list(CONTENT))
def test_bad_content_that_is_written_well_is_named_and_the_one_before_is_used(
    finished: tuple[PlantedDrift, Path, dict[str, Any]], copied: Path, kind: str
) -> None:
    phase, change, words = CONTENT[kind]
    folder = copied / "checkpoints"
    paths = checkpoint.numbered(folder)
    good = next(state for state in map(checkpoint.read, reversed(paths)) if state["phase"] == phase)
    number = int(paths[-1].name) + 1
    checkpoint.save(folder, number, change(good), keep=9)
    result = resumed(finished, copied)
    assert result["matrix"] == finished[2]["matrix"]
    (told,) = [warning for warning in result["warnings"] if f"{number:08d}" in warning]
    assert re.search(words, told), told
    assert told.endswith("the one before it is used")


def test_where_no_checkpoint_is_good_each_is_named(
    finished: tuple[PlantedDrift, Path, dict[str, Any]], copied: Path
) -> None:
    folder = copied / "checkpoints"
    for path in checkpoint.numbered(folder):
        checkpoint.save(folder, int(path.name), other_shape(checkpoint.read(path)), keep=9)
    names = [path.name for path in checkpoint.numbered(folder)]
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used") as told:
        resumed(finished, copied)
    assert all(name in str(told.value) for name in names)
    assert not (copied / "result.json").exists()


def test_state_of_one_checkpoint_and_tensors_of_another_are_refused_with_valid_hashes(copied: Path) -> None:
    *_, before, last = checkpoint.numbered(copied / "checkpoints")
    for name, told in (("tensors.safetensors", "tensors"), ("state.json", "state")):
        kept = {file: (last / file).read_bytes() for file in FILES}
        shutil.copy(before / name, last / name)
        hashed_anew(last)
        with pytest.raises(CheckpointError, match=f"checkpoint {last.name}: {told}.* is that of another checkpoint"):
            checkpoint.read(last)
        assert checkpoint.newest(copied / "checkpoints")[1] == int(before.name)
        for file, data in kept.items():
            (last / file).write_bytes(data)


def test_another_runs_checkpoint_is_refused_and_the_one_before_used(
    finished: tuple[PlantedDrift, Path, dict[str, Any]], copied: Path, tmp_path: Path
) -> None:
    run(finished[0], tmp_path / "other", "BPR", strategy="EWC", checkpoint_keep=3, seed=5, n_stages=3)
    theirs = checkpoint.numbered(tmp_path / "other" / "checkpoints")[-1]
    folder = copied / "checkpoints"
    number = int(checkpoint.numbered(folder)[-1].name) + 10
    shutil.copytree(theirs, folder / f"{number:08d}")
    checkpoint.save(folder, number + 1, checkpoint.read(theirs), keep=9)
    result = resumed(finished, copied)
    assert result["matrix"] == finished[2]["matrix"]
    renamed, foreign = (next(w for w in result["warnings"] if f"{n:08d}" in w) for n in (number, number + 1))
    assert "manifest.json is that of checkpoint" in renamed and "the folder was renamed" in renamed
    assert "the configuration has changed" in foreign and "seed was 5" in foreign


def test_a_version_with_bad_content_is_refused_when_it_is_loaded(copied: Path) -> None:
    folder = copied / "checkpoints"
    number = int(checkpoint.numbered(folder)[-1].name)
    state = checkpoint.read(folder / f"{number:08d}")
    checkpoint.save(folder, number, other_shape(state), keep=1)
    with pytest.raises(CheckpointError, match="its content is not that of this run"):
        recbole_cl.load(copied)
    checkpoint.save(folder, number, without("known")(state), keep=1)
    with pytest.raises(CheckpointError, match="lacks 'known'"):
        recbole_cl.load(copied)


@pytest.mark.parametrize("content", ["{}", '{"format": "recbole-cl versions", "champion": 0, "versions": [{}]}', "["])
def test_a_broken_list_of_versions_is_told(copied: Path, content: str) -> None:
    (copied / "versions").mkdir()
    (copied / "versions" / "index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"versions/index.json in .* is broken"):
        recbole_cl.load(copied)
    (copied / "versions" / "index.json").unlink()
    os.mkfifo(copied / "versions" / "index.json")
    with pytest.raises(CheckpointError, match=r"versions/index.json in .* is broken"):
        recbole_cl.load(copied)


def test_folders_that_only_look_like_numbers_are_none(tmp_path: Path) -> None:
    for name in ("²", "٣", "1a"):
        (tmp_path / name).mkdir()
    checkpoint.save(tmp_path, 100_000_000, {"a": 1}, 2)
    checkpoint.save(tmp_path, 99_999_999, {"a": 1}, 2)
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["99999999", "100000000"]
