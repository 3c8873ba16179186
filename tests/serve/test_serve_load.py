"""A saved run is loaded without its log, from another place, in another process, and answers as it did."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import run
from serve_helpers import MODELS, SETTINGS, answers, fresh, same_ranking

import recbole_cl
from recbole_cl.config.restore import RestoredConfig
from recbole_cl.errors import CheckpointError
from recbole_cl.results.journal import settings
from recbole_cl.testing.toy import write_planted_drift
from recbole_cl.training.load import SavedRun


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run of each model, moved, its log removed; and what model and evaluator said in its own process."""
    root = tmp_path_factory.mktemp("runs")
    log = write_planted_drift(root / "data")
    found: dict[str, Any] = {"root": root}
    for model in MODELS:
        runner, _ = run(log, root / "made" / model, model, **SETTINGS.get(model, {}))
        ctx = runner.standing(len(runner.stream) - 1)
        outcome = runner.evaluator.evaluate(ctx, runner.known, runner.stream.stages[-1])
        np.savez(root / f"{model}.npz", recommended=outcome.recommended, **answers(ctx))
        found[model] = {"folder": root / "moved" / model, "settings": settings(runner.config)}
    shutil.move(root / "made", root / "moved")
    shutil.rmtree(root / "data")
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_fresh_process_gives_the_bits_and_the_evaluators_ranking(runs: dict[str, Any], model: str) -> None:
    root, folder = runs["root"], runs[model]["folder"]
    elsewhere = root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    out, told = root / f"{model}-asked.npz", root / f"{model}.npz"
    code = "import sys; from serve_helpers import ask; ask(*sys.argv[1:])"
    done = fresh(code, str(folder), str(out), str(told), cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    before, after = np.load(told), np.load(out)
    for name in ("hash", "predict", "full"):
        assert (name in before) == (name in after)
        if name in before:
            assert np.array_equal(before[name], after[name]), f"{name} of {model} differs after load"
    assert len(before["recommended"]) > 20
    assert same_ranking(after["lists"], after["scores"], before["recommended"])


@pytest.mark.parametrize("model", MODELS)
def test_the_settings_come_back(runs: dict[str, Any], model: str) -> None:
    assert settings(SavedRun.open(runs[model]["folder"]).config) == runs[model]["settings"]


def test_a_wrong_ranking_is_seen() -> None:
    """The comparison above is worth what it finds."""
    lists, scores = np.array([[3, 1, 2, 4]]), np.array([[0.9, 0.5, 0.5, 0.1]])
    assert same_ranking(lists, scores, np.array([[3, 2, 1, 4]]))
    assert not same_ranking(lists, scores, np.array([[1, 3, 2, 4]]))
    assert not same_ranking(lists, scores, np.array([[3, 7, 2, 4]]))


# -- stores and checkpoints that are not whole --------------------------------------------------------------------


@pytest.fixture
def copy(runs: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of a run that may be broken."""
    return Path(shutil.copytree(runs["BPR"]["folder"], tmp_path / "copy"))


def store_of(folder: Path) -> Path:
    """Returns the one store of a run."""
    (store,) = (folder / "store").iterdir()
    return store


def test_a_store_is_written_once_and_named_by_its_content(runs: dict[str, Any]) -> None:
    names = {model: store_of(runs[model]["folder"]).name for model in MODELS}
    assert names["BPR"] == names["LightGCN"] == names["DeepFM"], "the same log, the same store"
    assert names["SASRec"] != names["BPR"], "RecBole's sequential dataset has columns of its own"


def test_a_truncated_store_is_refused_by_name(copy: Path) -> None:
    file = store_of(copy) / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"store {store_of(copy).name}.*tensors.safetensors is truncated"):
        recbole_cl.load(copy)


def test_a_changed_store_is_refused(copy: Path) -> None:
    file = store_of(copy) / "state.json"
    file.write_text(file.read_text().replace('"u7"', '"x7"'))
    with pytest.raises(CheckpointError, match=r"state.json is truncated or was changed"):
        recbole_cl.load(copy)


def test_a_store_of_other_rows_is_refused(copy: Path, runs: dict[str, Any], tmp_path: Path) -> None:
    """Whole and of the right kind, but not what the checkpoint was trained over."""
    other, _ = run(write_planted_drift(tmp_path / "other", seed=5), tmp_path / "run", "BPR")
    mine = store_of(copy)
    shutil.rmtree(mine)
    shutil.copytree(store_of(other.folder), mine)
    with pytest.raises(CheckpointError, match="is that of another log"):
        recbole_cl.load(copy)


def test_a_missing_store_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "store")
    with pytest.raises(CheckpointError, match=r"store/\w+ is missing.*copy the whole folder"):
        recbole_cl.load(copy)


def test_a_run_that_was_interrupted_is_refused(copy: Path, runs: dict[str, Any], tmp_path: Path) -> None:
    log = write_planted_drift(tmp_path / "data")
    run(log, tmp_path / "run", "BPR", checkpoint_keep=100)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for path in newest[-1:]:
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"interrupted in stage 3.*--resume=True"):
        recbole_cl.load(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        recbole_cl.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no trained model"):
        recbole_cl.load(tmp_path)


def test_a_pickle_in_a_checkpoint_does_not_run(copy: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "boom",))

    checkpoint = sorted((copy / "checkpoints").iterdir())[-1]
    (checkpoint / "tensors.safetensors").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = (checkpoint / "tensors.safetensors").read_bytes()
    manifest["sha256"]["tensors.safetensors"] = hashlib.sha256(data).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not what a run writes"):
        recbole_cl.load(copy)
    assert not (tmp_path / "boom").exists()


def test_a_foreign_model_class_is_not_imported(copy: Path) -> None:
    """The name of a class in the settings is compared, never imported."""
    saved = SavedRun.open(copy)
    told = {**saved.state["config"], "model": "Evil", "model_class": "os.system"}
    with pytest.raises(CheckpointError, match=r"nobody here answers to the model 'Evil' \(os.system\)"):
        RestoredConfig(told)
    with pytest.raises(CheckpointError, match=r"but 'BPR' is recbole\.model"):
        RestoredConfig({**saved.state["config"], "model_class": "os.system"})
