"""Small runs for the tests of the runner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from recbole_cl.config import CLConfig
from recbole_cl.runner import Runner
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift

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
