"""Properties are chosen without the future: rows that come later change nothing, and an interruption neither."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_helpers import SMALL, arguments, configure, toy

from recbole_cl import cli
from recbole_cl.config import CLConfig, properties_dir, read_properties
from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.study import tune as tuning
from recbole_cl.study.tune import FirstStages, read_space, tune
from recbole_cl.testing.toy import PlantedDrift

optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="the extra [tune] is missing")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("planted"))


def altered(log: PlantedDrift, folder: Path) -> dict[str, Any]:
    """Settings of the log with everything in its last stage replaced: other users, other items, in other order."""
    given = log.settings()
    file = Path(given["data_path"]) / log.name / f"{log.name}.inter"
    frame = pd.read_csv(file, sep="\t", dtype=str)
    time_column = next(name for name in frame if name.startswith("timestamp"))
    late = frame[time_column].astype(float) >= given["boundaries"][1]
    assert 0 < late.sum() < len(frame)
    rng = np.random.default_rng(0)
    for name in [name for name in frame if not name.startswith("timestamp")]:
        frame.loc[late, name] = rng.permutation(frame.loc[late, name].to_numpy())
    item = next(name for name in frame if name.startswith("item_id"))
    frame.loc[late & (rng.random(len(frame)) < 0.5), item] = "neverseen"
    (folder / log.name).mkdir(parents=True)
    frame.to_csv(folder / log.name / f"{log.name}.inter", sep="\t", index=False)
    return {**given, "data_path": str(folder)}


def test_the_future_changes_nothing(log: PlantedDrift, tmp_path: Path) -> None:
    """The value of a trial has the same bits whatever stands in the stages behind those that are trained."""
    one = FirstStages(configure(log, tmp_path / "a", "BPR", strategy="EWC"), 2)
    other_log = altered(log, tmp_path / "altered")
    given = {**SMALL, **other_log, "strategy": "EWC", "output_dir": str(tmp_path / "b")}
    two = FirstStages(CLConfig("BPR", log.name, config_dict=given), 2)
    assert one.measured() == two.measured() and one.scores == two.scores
    assert [len(row) for row in one.scores] == [1, 2]
    assert len(one.records) == 0, "no test target is scored"
    last = [runner.stream.stages[2].train.label for runner in (one, two)]
    assert len(last[0]) != len(last[1]) or (last[0] != last[1]).any(), "the logs do differ later on"
    assert not (tmp_path / "a").exists(), "a trial writes nothing"


def test_value_is_the_mean_over_time(log: PlantedDrift, tmp_path: Path) -> None:
    runner = FirstStages(configure(log, tmp_path / "a", "BPR"), 2)
    value = runner.measured()
    (first,), (kept, learnt) = runner.scores
    assert value == pytest.approx((first + (kept + learnt) / 2) / 2)
    # Right after its training a stage is scored as early stopping scored its best epoch.
    best = [max(p["valid"]["ndcg@10"] for p in runner.journal.curves if p["stage"] == s) for s in (0, 1)]
    assert [first, learnt] == pytest.approx(best)
    with pytest.raises(ConfigError, match="give at most 2"):
        FirstStages(configure(log, tmp_path / "b", "BPR"), 3).measured()


# -- the space ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((properties_dir() / "tune").glob("*.yaml")), ids=lambda file: file.stem)
def test_spaces_name_properties_of_their_strategy(file: Path) -> None:
    own = read_properties(properties_dir() / "strategy" / f"{strategies.get(file.stem).__name__}.yaml")
    space = read_space(None, [file.stem])
    assert set(space) <= set(own)
    for name, entry in space.items():
        (kind, what), default = next(iter(entry.items())), own[name]
        assert kind == "choice" or what[0] <= default <= what[1], f"{name}: the default {default} is not searched"


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("ewc_lambda: {lgo: [1, 2]}", "'lgo', which is none; did you mean 'log'?"),
        ("ewc_lambda: {log: [0, 2]}", "both above 0"),
        ("ewc_lambda: {uniform: [2, 1]}", "the lowest and the highest"),
        ("ewc_lambda: {integer: [1.5, 2]}", "the lowest and the highest"),
        ("ewc_lambda: 3", "give {log:"),
        ("ewc_lambda", "give {property"),
        ("{", "it is no YAML"),
    ],
)
def test_a_wrong_space_is_told(space: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?").replace("{", r"\{")):
        read_space(space, ["EWC"])


def test_strategies_without_a_space_are_told() -> None:
    with pytest.raises(ConfigError, match="nothing is known to search for FineTune"):
        read_space(None, ["FineTune"])


# -- the search ---------------------------------------------------------------------------------------------------

SPACE: dict[str, dict[str, Any]] = {"ewc_lambda": {"log": [0.1, 1000]}, "train_positions": {"choice": ["one", [1, 2]]}}


class Measured:
    """A trial without training: what stands in for a configuration, and the value of its properties."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(tuning, "_digest", lambda *_: "digest")
        monkeypatch.setattr(tuning, "_value", self.value)

    def configure(self, changed: dict[str, Any]) -> dict[str, Any]:
        return {"seed": 7, "valid_metric": "NDCG@10"}

    def value(self, _: Any, changed: dict[str, Any], __: int) -> dict[str, Any]:
        self.asked.append(dict(changed))
        size = np.log10(changed.get("ewc_lambda", 100.0))
        if size > 2.5:
            return {"value": None, "error": "not finite"}
        return {"value": -((size - 1.0) ** 2), "error": None}


@optuna
def test_a_search_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Measured(monkeypatch), None
    found = tune(whole.configure, SPACE, tmp_path / "whole", 25, 2)
    parts = Measured(monkeypatch)
    for n in (1, 2, 9, 25):
        again = tune(parts.configure, SPACE, tmp_path / "parts", n, 2)
    assert again == found and parts.asked == whole.asked
    assert whole.asked[0] == {} and any(trial["value"] is None for trial in found["trials"])
    assert abs(np.log10(found["best"]["properties"]["ewc_lambda"]) - 1.0) < 0.3, "it finds the best strength"
    assert read_properties(tmp_path / "whole" / "best.yaml") == found["best"]["properties"]
    monkeypatch.setattr(tuning, "_digest", lambda *_: "other")
    with pytest.raises(ConfigError, match="another --output_dir"):
        tune(parts.configure, SPACE, tmp_path / "parts", 30, 2)


@optuna
def test_the_command_killed_and_gone_on_with(log: PlantedDrift, tmp_path: Path, capsys: Any) -> None:
    """SIGKILL in the middle; the same command then gives the trials of a search that was left alone."""
    out = tmp_path / "cut"
    words = ["tune", "--model=BPR", "--trials=3", "--strategy=EWC", *arguments(log, out, epochs=1)]
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "recbole_cl.cli", *words], env=given, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (out / "trials.json").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads((out / "trials.json").read_text(encoding="utf-8"))["trials"]
    assert 1 <= len(before) < 3
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "| trial | NDCG@10 on validation | ewc_lambda |" in printed and "best.yaml" in printed
    other = [word.replace(str(out), str(tmp_path / "whole")) for word in words]
    assert cli.main(other) == 0
    kept = [json.loads((folder / "trials.json").read_text(encoding="utf-8")) for folder in (out, tmp_path / "whole")]
    assert kept[0] == kept[1] and kept[0]["trials"][: len(before)] == before
    assert not (out / "checkpoints").exists() and not (out / "result.json").exists()
