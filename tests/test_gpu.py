"""Runs on a CUDA device: they end near what a CPU gives, go on where they were stopped, and are loaded without it.

On a GPU no bits are promised (docs/reproducibility.md). Without dropout the same order of batches and the same start
give the same training up to rounding, so metrics agree within what rounding turns over in a few rankings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import configure, run, toy

import recbole_cl
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.runner import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = {"use_gpu": True, "gpu_id": "0"}
QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0, "epochs": 3}
NEAR = 0.05


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("toy"))


def quiet(model: str) -> dict[str, Any]:
    """The settings that leave dropout out, of those that a model has."""
    drops = {"SASRec": ("hidden_dropout_prob", "attn_dropout_prob"), "DeepFM": ("dropout_prob",)}.get(model, ())
    return {name: value for name, value in QUIET.items() if name == "epochs" or name in drops}


def ndcg(result: dict[str, Any]) -> np.ndarray:
    return np.array(result["matrix"]["ndcg@10"], dtype=float)


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "SASRec", "DeepFM"])
@pytest.mark.parametrize("strategy", ["FineTune", "EWC", "ERRandom"])
def test_a_gpu_gives_what_a_cpu_gives(model: str, strategy: str, log: PlantedDrift, tmp_path: Path) -> None:
    given = {**quiet(model), "strategy": strategy}
    _, on_cpu = run(log, tmp_path / "cpu", model, **given)
    runner, on_gpu = run(log, tmp_path / "gpu", model, **given, **GPU)
    assert next(runner.model.parameters()).is_cuda
    assert np.nanmax(np.abs(ndcg(on_gpu) - ndcg(on_cpu))) < NEAR
    assert on_gpu["cost"][0]["peak_memory_mb"] > 0


def test_a_run_stopped_on_a_gpu_goes_on(log: PlantedDrift, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stops(Runner):
        def _save(self, ctx: Any, phase: str, inside: Any = None) -> None:
            super()._save(ctx, phase, inside)
            if ctx.index == 1 and phase == "train":
                raise Stopped

    given = {**quiet("SASRec"), "strategy": "EWC", **GPU}
    _, whole = run(log, tmp_path / "whole", "SASRec", **given)
    with pytest.raises(Stopped):
        Stops(configure(log, tmp_path / "parts", "SASRec", **given)).run()
    _, resumed = run(log, tmp_path / "parts", "SASRec", resume=True, **given)
    assert np.nanmax(np.abs(ndcg(resumed) - ndcg(whole))) < NEAR


def test_a_run_of_a_gpu_is_asked_without_it(log: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = run(log, tmp_path / "run", "SASRec", **quiet("SASRec"), **GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    served = recbole_cl.load(tmp_path / "run")
    user = runner.stream.dataset.field2id_token[runner.stream.dataset.uid_field][1]
    assert len(served.recommend([user], k=3))
