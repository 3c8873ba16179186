"""Studies: what a file asks for, what is run and what is not run again, what the tables say."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_helpers import SMALL, toy
from scipy import stats

from recbole_cl import cli
from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.study import list_studies, plots, read_plan, walk, write_tables
from recbole_cl.study.table import mean_and_interval, rows
from recbole_cl.study.walk import run_cell, state
from recbole_cl.testing.toy import PlantedDrift


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("planted"))


def study(folder: Path, log: PlantedDrift, **changed: Any) -> Path:
    settings = {**log.settings(), **SMALL, "epochs": 1, "data_path": str(log.settings()["data_path"])}
    preset = {
        "datasets": [log.name],
        "schedulers": [settings["scheduler"]],
        "models": ["BPR"],
        "strategies": ["FineTune", {"EWC weak": {"strategy": "EWC", "ewc_lambda": 0.5}}],
        "seeds": [1, 2],
        "settings": settings,
        **changed,
    }
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump({"about": "A trial.", "presets": {"laptop": preset}}), encoding="utf-8")
    return path


# -- the plan -----------------------------------------------------------------------------------------------------


def test_cells_are_the_product_and_later_axes_win(tmp_path: Path, log: PlantedDrift) -> None:
    path = study(
        tmp_path,
        log,
        datasets=[{log.name: {"epochs": 3, "topk": [5]}}],
        models=["BPR", {"SASRec": {"epochs": 4}}],
        strategies=["FineTune", {"EWC weak": {"strategy": "EWC", "ewc_lambda": 0.5}}],
    )
    plan = read_plan(path, "laptop")
    assert len(plan.cells) == 2 * 2 * 2 and len({cell.folder for cell in plan.cells}) == 8
    by = {cell.folder: cell.settings for cell in plan.cells}
    weak = by[f"{log.name}/Boundaries/SASRec/EWC_weak/seed2"]
    assert (weak["strategy"], weak["ewc_lambda"], weak["seed"], weak["epochs"]) == ("EWC", 0.5, 2, 4)
    plain = by[f"{log.name}/Boundaries/BPR/FineTune/seed1"]
    assert (plain["epochs"], plain["topk"], plain["scheduler"]) == (3, [5], "Boundaries")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seeds": 3}, "seeds is 3; give a list"),
        ({"models": None}, "models is None; give a list of names"),
        ({"strategies": [["EWC"]]}, "strategies holds"),
        ({"strategies": ["EWC", "EWC"]}, "two runs are called"),
        ({"modles": ["BPR"]}, "unknown key 'modles'; did you mean 'models'?"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, log: PlantedDrift, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?").replace("[", r"\[")):
        read_plan(study(tmp_path, log, **changed), "laptop")


def test_unknown_names_suggest_the_nearest(tmp_path: Path, log: PlantedDrift) -> None:
    with pytest.raises(ConfigError, match="no preset 'labtop'; did you mean 'laptop'"):
        read_plan(study(tmp_path, log), "labtop")
    with pytest.raises(ConfigError, match="unknown study"):
        read_plan("nothing-of-the-kind", "laptop")


@pytest.mark.parametrize("name", list_studies())
def test_the_studies_of_the_package_can_be_read(name: str) -> None:
    for preset in ("laptop", "full"):
        plan = read_plan(name, preset)
        assert plan.about
        logs = {cell.settings["dataset"] for cell in plan.cells}
        if logs != {"ml-100k"} and not os.environ.get("RECBOLE_CL_DATA"):
            pytest.skip("RECBOLE_CL_DATA does not lead to the shared logs")
        seen = set()
        for cell in plan.cells:  # every method and model once
            key = (cell.labels["model"], cell.labels["strategy"])
            if key not in seen:
                seen.add(key)
                given = {k: v for k, v in cell.settings.items() if k not in ("model", "dataset")}
                CLConfig(cell.settings["model"], cell.settings["dataset"], config_dict=given)


# -- the walk -----------------------------------------------------------------------------------------------------


def test_runs_once_refuses_and_tells(tmp_path: Path, log: PlantedDrift) -> None:
    """Two models in two processes; what is done is not run again; a refusal is an answer with its reason."""
    path = study(tmp_path, log, models=["BPR", "SASRec"], strategies=["FineTune", "PersonalizedImitation"], seeds=[1])
    plan, out = read_plan(path, "laptop"), tmp_path / "out"
    assert walk(plan, out, jobs=2) == []
    assert [state(cell, out) for cell in plan.cells] == ["done", "done", "done", "refused"]
    done = [out / cell.folder / "result.json" for cell in plan.cells[:3]]
    times = [file.stat().st_mtime_ns for file in done]
    assert walk(plan, out, jobs=2) == []
    assert [file.stat().st_mtime_ns for file in done] == times
    text = write_tables(plan, out)
    assert "### BPR on" in text and "| PersonalizedImitation | - | refused" in text
    assert "PersonalizedImitation cannot serve the model SASRec" in text
    assert "most frequent class" not in text, "no column is a classification"
    assert (out / "table.csv").read_text(encoding="utf-8").count("\n") == 1 + len(plan.cells)
    with pytest.raises(ConfigError, match="another --output_dir"):
        walk(read_plan(study(tmp_path, log, seeds=[1], settings={**SMALL, "epochs": 2}), "laptop"), out)


def test_a_failure_is_told_and_the_others_run(tmp_path: Path, log: PlantedDrift) -> None:
    plan = read_plan(study(tmp_path, log, seeds=[1], models=[{"BPR": {"learning_rate": 1e30}}, "LightGCN"]), "laptop")
    failures = walk(plan, tmp_path / "out")
    assert len(failures) == 2 and all("BPR" in told and "learning_rate" in told for told in failures)
    assert [state(cell, tmp_path / "out") for cell in plan.cells] == ["open", "open", "done", "done"]
    assert "2 not run yet" in write_tables(plan, tmp_path / "out")


def test_a_killed_study_goes_on(tmp_path: Path, log: PlantedDrift) -> None:
    """SIGKILL to the study, the same command again: every number is that of a study that was left alone."""
    path = study(tmp_path, log, seeds=[1, 2], models=["SASRec"], settings={**log.settings(), **SMALL, "epochs": 4})
    plan, whole = read_plan(path, "laptop"), tmp_path / "whole"
    words = [sys.executable, "-m", "recbole_cl.cli", "study", str(path), "--output_dir", str(tmp_path / "cut")]
    given: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": tmp_path}
    with subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL, **given) as process:
        second = tmp_path / "cut" / plan.cells[1].folder / "checkpoints"
        until = time.monotonic() + 120
        while not (second.is_dir() and list(second.glob("0*"))) and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
        process.wait()
        for _ in range(600):  # the process that ran the cell ends, too: it would write beside the next one
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("a process of the killed study goes on")
    assert state(plan.cells[1], tmp_path / "cut") == "open"
    again = subprocess.run(words, capture_output=True, text=True, timeout=300, **given)
    assert again.returncode == 0, again.stderr
    for cell in plan.cells:
        run_cell(dict(cell.settings), str(whole / cell.folder), cell.digest, 1)
    one, two = (rows(plan, folder) for folder in (whole, tmp_path / "cut"))
    numbers = [name for name in one if ":" in name]
    assert numbers and one[numbers].equals(two[numbers])


# -- the tables ---------------------------------------------------------------------------------------------------


def test_interval_is_students() -> None:
    values = [0.1, 0.2, 0.4]
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
    assert mean == pytest.approx((low + high) / 2) and half == pytest.approx((high - low) / 2)
    assert math.isnan(mean_and_interval([0.3])[1]) and mean_and_interval([0.3, None])[0] == 0.3


def test_table_holds_the_means_of_the_results(
    tmp_path: Path, log: PlantedDrift, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = study(tmp_path, log, strategies=["FineTune"]), tmp_path / "out"
    assert cli.main(["study", str(path), "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    files = [out / cell.folder / "result.json" for cell in read_plan(path, "laptop").cells]
    assert len(list(out.glob("plotly-*.min.js"))) == 1
    assert all(file.with_name("report.html").stat().st_size < 1_000_000 for file in files), "they share that script"
    for file in files:
        left = [name for name in ("checkpoints", "frozen", "store") if (file.parent / name).exists()]
        assert not left, "a study keeps numbers, not weights"
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    metric = results[0]["primary_metric"]
    mean, half = mean_and_interval([r["summary"]["final_average"][metric] for r in results])
    assert f"| FineTune | 2 | {mean:.4f} ± {half:.4f} |" in printed
    assert cli.main(["study", str(path), "--output_dir", str(out), "--jobs", "0"]) == 2
    assert cli.main(["report", str(out)]) == 2
    assert f"'recbole-cl study STUDY --output_dir={out} --only_table'" in capsys.readouterr().err
    # Learning curves of what is done: a panel for each stage, the mean over the seeds of the validation metric.
    asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    by_stage = {"metric": metric, "published": {"FineTune": [0.5, 0.25]}}
    report = {"plots": ["curves"], "by_stage": by_stage}
    path.write_text(yaml.safe_dump({**asked, "report": report}), encoding="utf-8")
    monkeypatch.setattr(plots, "_png", lambda *_: None)
    assert not (out / "plots.html").exists()
    assert cli.main(["study", str(path), "--output_dir", str(out), "--only_table"]) == 0
    own = [sum(r["matrix"][metric][index][index] for r in results) / 2 for index in range(len(results[0]["stages"]))]
    told = " | ".join(f"{value:.4f}" for value in (*own, sum(own) / len(own)))
    printed = capsys.readouterr().out
    assert f"| FineTune | {told} |" in printed and "| *FineTune, published* | 0.5000 | 0.2500 | - |" in printed
    path.write_text(yaml.safe_dump({**asked, "report": {"by_stage": {"metric": f"{metric}0"}}}), encoding="utf-8")
    assert cli.main(["study", str(path), "--output_dir", str(out), "--only_table"]) == 0
    assert f"by_stage: no run has '{metric}0'; did you mean '{metric}'?" in capsys.readouterr().out
    path.write_text(yaml.safe_dump({**asked, "report": {"by_stage": "ndcg"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="by_stage is 'ndcg'; give"):
        read_plan(path, "laptop")
    path.write_text(yaml.safe_dump({**asked, "report": report}), encoding="utf-8")
    figure = plots.figures_of(read_plan(path, "laptop"), out)["curves"][1]
    assert len(figure["layout"]["annotations"]) == len(results[0]["stages"]) and (out / "plots.html").is_file()
    own = [[p["valid"][metric] for p in r["curves"] if p["stage"] == 0] for r in results]
    line = next(t for t in figure["data"] if t["name"] == "FineTune" and t["xaxis"] == "x")
    assert line["y"] == pytest.approx([sum(values) / 2 for values in zip(*own, strict=True)])


def test_methods_share_the_first_stage_of_a_seed(log: PlantedDrift, tmp_path: Path) -> None:
    """It is trained once, with the numbers that each would have had; who takes part in it trains its own."""
    methods = ["FineTune", {"EWC weak": {"strategy": "EWC", "ewc_lambda": 0.5}}, "SI"]
    plan = read_plan(study(tmp_path, log, strategies=methods, seeds=[1], share_base=True), "laptop")
    plain, weak, si = plan.cells
    assert plain.base == weak.base == plain.folder and si.base is None
    assert walk(plan, tmp_path / "shared") == []
    apart = read_plan(study(tmp_path, log, strategies=methods, seeds=[1]), "laptop")
    assert walk(apart, tmp_path / "apart") == []
    results = {}
    for name in ("shared", "apart"):
        read = [json.loads((tmp_path / name / cell.folder / "result.json").read_text()) for cell in plan.cells]
        results[name] = [result["matrix"] for result in read]
        seconds = [result["cost"][0]["train_seconds"] for result in read]
        assert (seconds[0] == seconds[1]) == (name == "shared") and seconds[2] not in seconds[:2]
    assert results["shared"] == results["apart"]
    assert not (tmp_path / "shared" / plain.folder / "base").exists(), "a study keeps numbers, not weights"


def test_a_study_knows_what_was_imported(
    tmp_path: Path, log: PlantedDrift, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs are processes of their own, in which a strategy of the current folder answers to its name, too."""
    (tmp_path / "own_rules.py").write_text(
        "from recbole_cl.registry import strategies\n"
        "from recbole_cl.strategy.base import Strategy\n\n\n"
        "@strategies.register()\n"
        "class OwnRule(Strategy):\n"
        '    """One of somebody."""\n'
    )
    path = study(tmp_path, log, strategies=["OwnRule"], seeds=[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recbole_cl.cli.IMPORTED", imported := [])
    monkeypatch.setattr(sys.modules["recbole_cl.study.walk"], "IMPORTED", imported)
    for name in ("_members", "_names"):
        strategies.names()
        monkeypatch.setattr(strategies, name, dict(getattr(strategies, name)))
    assert cli.main(["study", str(path), "--output_dir", str(tmp_path / "out"), "--import", "own_rules"]) == 0
    assert imported == ["own_rules"] and "| OwnRule | 1 |" in capsys.readouterr().out
