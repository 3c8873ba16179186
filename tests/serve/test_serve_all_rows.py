"""``serve: True``: after the evaluated walk, the model that is served is trained on every interaction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import configure, run
from serve_helpers import SETTINGS
from task_helpers import SETTINGS as TASK_SETTINGS
from task_helpers import write_task_log

import recbole_cl
from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.stream.build import build_stream
from recbole_cl.testing.toy import write_planted_drift
from recbole_cl.training.all_rows import all_rows, best_epochs
from recbole_cl.training.runner import Runner


@pytest.mark.parametrize("model", ["SASRec", "BPR", "LightGCN", "DeepFM", "PCL"])
def test_the_figures_stay_and_the_served_model_knows_every_row(tmp_path: Path, model: str) -> None:
    log = write_planted_drift(tmp_path / "data")
    more = SETTINGS.get(model, {})
    _, plain = run(log, tmp_path / "plain", model, **more)
    _, served = run(log, tmp_path / "served", model, serve=True, **more)
    assert served["matrix"] == plain["matrix"], "the evaluated walk is not touched"
    assert served["curves"] == plain["curves"] or [c["valid"] for c in served["curves"]] == [
        c["valid"] for c in plain["curves"]
    ]
    assert any("trained on all" in warning for warning in served["warnings"])
    (told,) = [one for one in served["reports"] if one["who"] == "served model"]
    assert told["numbers"]["rows"] >= sum(s["n_train"] + s["n_valid"] + s["n_test"] for s in served["stages"])
    loaded = recbole_cl.load(tmp_path / "served")
    assert loaded.position.all_rows and not recbole_cl.load(tmp_path / "plain").position.all_rows
    for stage in loaded.stream.stages:
        assert not len(stage.valid) and not len(stage.test)
    positions = np.concatenate([stage.train.position for stage in loaded.stream.stages])
    assert len(np.unique(positions)) == len(positions)
    if not loaded.sequential:  # a sequential model has no target without a history
        assert len(positions) == len(loaded.stream.table)
    assert loaded.ids.users.trained[1:].all() and loaded.ids.items.trained[1:].all()


def test_new_users_of_the_held_out_end_are_served(tmp_path: Path) -> None:
    log = write_planted_drift(tmp_path / "data")
    file = tmp_path / "data" / log.name / f"{log.name}.inter"
    lines = file.read_text().splitlines()
    late = int(lines[-1].split()[-1])
    file.write_text("\n".join([*lines, f"late\ti1\t{late}", f"late\tnewest\t{late}"]) + "\n")
    run(log, tmp_path / "run", "BPR", serve=True)
    served = recbole_cl.load(tmp_path / "run")
    assert served.recommend("late", filter_seen=True)[0].items
    assert served.ids.items.status(int(served.ids.items.ids(["newest"])[0])) == "known"


def test_each_pass_trains_as_many_epochs_as_were_best() -> None:
    def point(stage: int, epoch: int, best: bool, name: str = "train") -> dict[str, Any]:
        return {"stage": stage, "pass": name, "epoch": epoch, "best": best}

    curves = [point(0, 0, True), point(0, 1, True), point(0, 2, False), point(1, 0, False), point(1, 1, False)]
    curves += [point(1, 0, True, "second"), point(1, 1, False, "second")]
    assert best_epochs(curves) == {(0, "train"): 2, (1, "train"): 2, (1, "second"): 1}


def test_the_slice_behind_the_last_stage_is_trained_on(tmp_path: Path) -> None:
    log = write_planted_drift(tmp_path / "data")
    config = configure(log, tmp_path / "run", "BPR", stage_split="next_stage")
    stream = build_stream(config)
    whole = all_rows(config, stream)
    positions = np.concatenate([stage.train.position for stage in whole.stages])
    assert sorted(positions.tolist()) == list(range(len(stream.table)))
    assert [len(stage.train) for stage in whole.stages] == [384, 912]
    assert whole.stages[-1].n_items == stream.table.n_items
    assert len(stream.stages[0].test), "the stream itself stays as it is"


def test_rows_of_a_stage_are_those_that_it_may_know(tmp_path: Path) -> None:
    """No stage has rows for users and items of a later one."""
    log = write_planted_drift(tmp_path / "data")
    config = configure(log, tmp_path / "run", "BPR")
    stream = build_stream(config)
    for stage in all_rows(config, stream).stages:
        inside = stream.table.stage <= stage.index
        assert stage.n_users == 1 + stream.table.user[inside].max()
        assert stage.n_items == 1 + stream.table.item[inside].max()


def test_tasks_are_trained_on_all_their_rows(tmp_path: Path) -> None:
    data = write_task_log(tmp_path)
    settings = {**TASK_SETTINGS, "data_path": str(data), "output_dir": str(tmp_path / "run"), "epochs": 1}
    config = CLConfig(model="PCL", dataset="tasks-log", config_dict={**settings, "serve": True})
    config["saved"] = True
    result = Runner(config).run()
    served = recbole_cl.load(tmp_path / "run")
    for stage, told in zip(served.stream.stages, result["stages"], strict=True):
        assert len(stage.train) == told["n_train"] + told["n_valid"] + told["n_test"]
    assert served.recommend("u1", 3, task="next item")[0].items


def test_a_finished_run_is_made_to_serve_on_resume(tmp_path: Path) -> None:
    log = write_planted_drift(tmp_path / "data")
    run(log, tmp_path / "run", "BPR")
    run(log, tmp_path / "run", "BPR", serve=True, resume=True)
    served = recbole_cl.load(tmp_path / "run")
    assert served.position.all_rows
    manifest = tmp_path / "run" / "versions" / "00000000" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    run(log, tmp_path / "run", "BPR", serve=True, resume=True)
    assert manifest.stat().st_mtime_ns == before, "it is not trained twice"
    straight, _ = tmp_path / "straight", run(log, tmp_path / "straight", "BPR", serve=True)
    answers = recbole_cl.load(straight).recommend(["u1", "u2"], 5)
    assert answers.scores == served.recommend(["u1", "u2"], 5).scores


def test_what_keeps_no_model_cannot_serve(tmp_path: Path) -> None:
    log = write_planted_drift(tmp_path / "data")
    config = configure(log, tmp_path / "run", "BPR", serve=True, epochs=1)
    config["saved"] = False
    with pytest.raises(ConfigError, match="serve: True keeps a model"):
        Runner(config).run()
