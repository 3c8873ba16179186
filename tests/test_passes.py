"""Passes beside a plan, and combinations that are refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import configure, run, toy

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.pisa import PISA
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.runner import Runner

COMPANIONS: dict[str, dict[str, Any]] = {
    "ERRandom": {"memory_size": 60, "batch_size": 16},
    "PersonalizedImitation": {"lambda": 0.5},
    "Contrastive": {"lambda": 0.1},
    "SI": {"c": 1.0},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("companion", list(COMPANIONS))
def test_an_auxiliary_pass_leaves_companions_as_they_were(
    companion: str, log: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PISA's forward model, without PISA's term, changes no bit of what stands beside it; nor where it broke off."""
    alone = {companion: COMPANIONS[companion]}
    both = {**alone, "PISA": {"alpha": 0.0}}
    settings: dict[str, Any] = {"epochs": 2, "checkpoint_steps": 3}
    expected, _ = run(log, tmp_path / "alone", "BPR", strategy=alone, **settings)
    beside, _ = run(log, tmp_path / "both", "BPR", strategy=both, **settings)
    assert_same(expected, beside)

    original, left = PISA.after_step, {"steps": 7}

    def stop(member: PISA, ctx: StageContext) -> None:
        original(member, ctx)
        if ctx.index == 1 and ctx.pass_.auxiliary:
            left["steps"] -= 1
            if left["steps"] == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(PISA, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(log, tmp_path / "broken", "BPR", strategy=both, **settings)
    resumed, _ = run(log, tmp_path / "broken", "BPR", strategy=both, resume=True, **settings)
    assert_same(expected, resumed)


class Anew(Strategy):
    """Begins every stage from new weights, and does not say so beforehand."""

    neutral = {}

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass(init="fresh")]


def test_a_model_that_builds_on_itself_refuses_a_new_beginning(
    log: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a strategy of another package has not said that it begins anew: PCL would prompt random weights."""
    strategies.names()
    for name in ("_members", "_names"):
        monkeypatch.setattr(strategies, name, dict(getattr(strategies, name)))
    strategies.register()(Anew)
    settings = {"pcl_encoder": "random", "weight_decay": 0.0, "strategy": "Anew"}
    with pytest.raises(ConfigError, match="starts stage 2 from new weights, but the model PCL builds on"):
        run(log, tmp_path, "PCL", **settings)


def assert_same(one: Runner, other: Runner) -> None:
    """Asserts that two runs ended with the same bits and the same results."""
    for (name, a), (_, b) in zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert one.journal.records == other.journal.records


@pytest.mark.parametrize(
    ("strategy", "settings", "told"),
    [
        (["Joint", "DualLoRA"], {}, "strategy: DualLoRA and Joint both plan a stage's passes"),
        (["Pretrain", "DualLoRA"], {}, "strategy: DualLoRA and Pretrain both plan a stage's passes"),
        (["FullRetrain", "Adapter"], {"matrix_cells": "last_row"}, "the strategy FullRetrain starts from new weights"),
        ("Scratch", {"trainable": "lora"}, "trainable: lora adapts a base .* the strategy Scratch starts from new"),
    ],
)
def test_what_cannot_go_together_is_refused_before_it_is_trained(
    strategy: Any, settings: dict[str, Any], told: str, log: PlantedDrift, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        runner = Runner(configure(log, tmp_path / "run", "SASRec", strategy=strategy, **settings))
        runner.run()
    assert not list(tmp_path.rglob("checkpoints/0*")), "a stage was trained before the refusal"
