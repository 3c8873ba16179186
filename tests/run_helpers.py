"""Small runs for the tests of the runner."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recbole.data.transform import construct_transform

from recbole_cl.config import CLConfig
from recbole_cl.evaluation.outcome import Outcome
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.loader import make_loader
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

SMALL: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_size": 16,
    "inner_size": 32,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_hidden_size": [16, 8],
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 64,
    "learning_rate": 0.01,
    "epochs": 2,
    "show_progress": False,
}
"""Settings under which a run over the toy log takes about a second."""

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    """Returns a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare_context(
    toy: PlantedDrift, model: str, index: int, scale: float = 1.0, previous: bool = True, **settings: Any
) -> StageContext:
    """Returns the context of a stage without a runner: a fresh model, and one of the stage before as its previous one.

    Args:
        toy: The log.
        model: Name of the model.
        index: Stage index.
        scale: What the weights are multiplied by, to lead away from uniform answers.
        previous: Give it a previous model.
        settings: Properties.
    """
    config = CLConfig(model=model, dataset=toy.name, config_dict={**toy.settings(), **settings})
    stream = build_stream(config)
    construct_transform(config)  # RecBole's transforms tell the model the names of their fields

    def build(at: int) -> Any:
        torch.manual_seed(at)
        made = config.model_class(config, stream.view(at))
        for p in made.parameters():
            p.data *= scale
        return made

    stage, view = stream.stages[index], stream.view(index)
    batcher = Batcher(config, stream, view, stage.n_users, stage.n_items)
    ctx = StageContext(config, stream, index, build(index), view, batcher, torch.device("cpu"))
    ctx.loader = make_loader(ctx, stage.train, "test")
    if index and previous:
        ctx.previous_factory = lambda: build(index - 1).requires_grad_(False).eval()
    return ctx


def toy(folder: Path) -> PlantedDrift:
    """The planted-drift log."""
    return write_planted_drift(folder)


def run(log: PlantedDrift, folder: Path, model: Any = "SASRec", **properties: Any) -> tuple[Runner, dict[str, Any]]:
    """A finished run over the toy log."""
    runner = Runner(configure(log, folder, model, **properties))
    return runner, runner.run()


def configure(log: PlantedDrift, folder: Path, model: Any = "SASRec", **properties: Any) -> CLConfig:
    """The configuration of such a run."""
    settings = {**log.settings(), **SMALL, "output_dir": str(folder), **properties}
    config = CLConfig(model=model, dataset=log.name, config_dict=settings)
    config["saved"] = True
    return config


def assert_same_ranking(one: Outcome, other: Outcome, scores: torch.Tensor) -> None:
    """Asserts that two ways to the same scores recommend the same and measure the same.

    Two ways (other shapes of a pass, other parts of a batch) agree up to rounding, and not alike on every processor. So
    two items whose scores are nearer than that may change places, and a target's metrics with them; nothing else may.

    Args:
        one: What one way gave.
        other: What the other one gave.
        scores: Scores of all items by either way, shape ``[n, n_items]``.
    """
    assert one.recommended is not None and other.recommended is not None
    assert ((one.recommended > 0) == (other.recommended > 0)).all()
    a, b = (scores.gather(1, torch.from_numpy(outcome.recommended)) for outcome in (one, other))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    moved = float((one.recommended != other.recommended).any(axis=1).mean())
    assert one.metrics == pytest.approx(other.metrics, abs=moved + 1e-12)


def but_for_a_near_tie(value: float, n: int) -> Any:
    """Returns what equals a mean over ``n`` targets up to the metric of one of them.

    For a model that is asked again after its table of items has grown: a product of another shape need not round
    alike on every processor, so two items of almost the same score may change places. A drift moves more targets.
    """
    return pytest.approx(value, abs=1.001 / n)


def command(*arguments: str, cwd: Path, seconds: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``run_recbole_cl.py`` in a process of its own, in a folder of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run_recbole_cl.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def arguments(log: PlantedDrift, folder: Path, **properties: Any) -> list[str]:
    """The same run for the command line."""
    settings = {**log.settings(), **SMALL, "output_dir": str(folder), **properties}
    return [f"--dataset={log.name}", *(f"--{k}={_yaml(v)}" for k, v in settings.items())]


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10_000).replace("...", "").strip()
