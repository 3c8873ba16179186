"""Another package adds a model, a scheduler and a strategy by entry points and properties, and nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conformance_helpers import SMALL, write_log

from recbole_cl.registry import strategies

MODULE = '''
import numpy as np
from recbole.model.general_recommender.bpr import BPR
from recbole_cl.strategy.base import Strategy
from recbole_cl.stream.schedulers.base import Scheduler, Slices


class ElsewhereBPR(BPR):
    """RecBole's BPR with a property of its own."""

    def calculate_loss(self, interaction):
        return self.config_factor * super().calculate_loss(interaction)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.config_factor = config["elsewhere_factor"]
        print("factor", self.config_factor)


class ElsewhereHalves(Scheduler):
    def assign(self, log):
        stage = np.empty(len(log), dtype=np.int64)
        stage[log.order] = np.arange(len(log)) * self.n_stages // len(log)
        return Slices(stage, [self.config["elsewhere_names"] + str(k) for k in range(self.n_stages)])


class ElsewhereShrink(Strategy):
    prefix = "elsewhere"

    def after_step(self, ctx):
        for p in ctx.parameters().values():
            p.data.mul_(self.params["shrink"])
'''

PROPERTIES = {
    "ElsewhereBPR": "embedding_size: 8         # (int) Width.\nelsewhere_factor: 2.0     # (float) Factor.\n",
    "ElsewhereHalves": "n_stages: 3\nelsewhere_names: half-          # (str) Start of the stages' names.\n",
    "ElsewhereShrink": "elsewhere_shrink: 0.99           # (float) Factor on all parameters after a step.\n",
}

ENTRY_POINTS = """
[recbole_cl.models]
ElsewhereBPR = elsewhere:ElsewhereBPR
[recbole_cl.schedulers]
ElsewhereHalves = elsewhere:ElsewhereHalves
[recbole_cl.strategies]
ElsewhereShrink = elsewhere:ElsewhereShrink
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed distribution: a module, its properties, and its metadata."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "elsewhere.py").write_text(MODULE)
    for name, content in PROPERTIES.items():
        (folder / f"{name}.yaml").write_text(content)
    info = folder / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def command(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs recbole-cl in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    words = [sys.executable, "-m", "recbole_cl.cli", *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def test_list_shows_it(site: Path) -> None:
    """``recbole-cl list strategies`` names the strategy of the other package, which this process does not know."""
    told = command(site, "list", "strategies")
    assert told.returncode == 0, told.stderr
    assert {"ElsewhereShrink", "FineTune"} <= set(told.stdout.split())
    assert "ElsewhereShrink" not in strategies


def test_it_runs(site: Path, tmp_path: Path) -> None:
    """The three run together, their properties have defaults and types, and the command line overrides them."""
    log = write_log(tmp_path)
    settings = {k: v for k, v in SMALL.items() if k != "n_stages"} | {"data_path": str(log.folder), "epochs": 1}
    run = [
        "run", "--model=elsewherebpr", "--dataset=log", "--scheduler=ElsewhereHalves", "--strategy=elsewhereshrink",
        "--elsewhere_shrink=0.5", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    given = [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    told = command(site, *run, *given)
    assert told.returncode == 0, told.stderr
    assert "factor 2.0" in told.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [stage["name"] for stage in result["stages"]] == ["half-0", "half-1", "half-2"]
    assert result["config"]["strategy"] == [["ElsewhereShrink", {"shrink": 0.5}]]
    assert all(value is not None for row in result["matrix"]["ndcg@5"] for value in row)
