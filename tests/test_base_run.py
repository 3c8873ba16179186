"""Runs whose first stage is that of another run: the same bits as if they had trained it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import configure, run, toy

from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.registry import strategies
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.runner import Runner

SETTINGS: dict[str, Any] = {"epochs": 2, "n_stages": 3}
MODELS = {"LwF": "SASRec", "ADER": "SASRec", "Contrastive": "LightGCN", "PISA": "LightGCN"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def bases(log: PlantedDrift, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain run of each model, with its first stage kept."""
    found = {}
    for model in ("BPR", "SASRec", "LightGCN"):
        found[model] = tmp_path_factory.mktemp(model) / "run"
        run(log, found[model], model, keep_base=True, **SETTINGS)
    return found


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in strategies.names()
        if strategies.get(name).base_is_finetune and "continual_lora" not in strategies.get(name).needs
    ],
)
def test_a_base_taken_over_gives_the_bits_of_one_trained(
    name: str, log: PlantedDrift, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = MODELS.get(name, "BPR")
    whole, expected = run(log, tmp_path / "whole", model, strategy=name, **SETTINGS)
    taken, found = run(log, tmp_path / "taken", model, strategy=name, base_run=str(bases[model]), **SETTINGS)
    assert found["matrix"] == expected["matrix"] and found["reference"] == expected["reference"]
    for (key, a), (_, b) in zip(whole.model.state_dict().items(), taken.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    shared = json.loads((bases[model] / "result.json").read_text())["cost"][0]["train_seconds"]
    assert found["cost"][0]["train_seconds"] == shared, "its seconds are those of the run that trained it"


def test_a_run_from_a_base_is_resumed_like_any_other(log: PlantedDrift, bases: dict[str, Path], tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stops(Runner):
        def _save(self, ctx: Any, phase: str, inside: Any = None) -> None:
            super()._save(ctx, phase, inside)
            if ctx.index == 1 and phase == "train":
                raise Stopped

    given = {**SETTINGS, "strategy": "EWC", "base_run": str(bases["BPR"])}
    _, expected = run(log, tmp_path / "whole", "BPR", **given)
    with pytest.raises(Stopped):
        Stops(configure(log, tmp_path / "parts", "BPR", **given)).run()
    _, found = run(log, tmp_path / "parts", "BPR", resume=True, **given)
    assert found["matrix"] == expected["matrix"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"strategy": "SI"}, ConfigError, "the strategy SI takes part in the first stage"),
        ({"learning_rate": 0.5}, CheckpointError, "made with other settings .learning_rate was"),
        (
            {"base_run": "nowhere"},
            CheckpointError,
            "which keeps no first stage; run it with keep_base: True",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_refused(
    changed: dict[str, Any], error: type, message: str, log: PlantedDrift, bases: dict[str, Path], tmp_path: Path
) -> None:
    given = {"base_run": str(bases["BPR"]), **SETTINGS, **changed}
    with pytest.raises(error, match=message):
        run(log, tmp_path / "run", "BPR", **given)
