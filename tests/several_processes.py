"""What ``tests/test_distributed.py`` runs in each process: ``torchrun --nproc_per_node=2 several_processes.py JOBS``.

A job is a run over the toy log. Beside its results the first process writes what tests compare: the gradients of the
first steps and the last weights (``seen.safetensors``), or the error of each process (``errors.json``).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.general_recommender.bpr import BPR
from run_helpers import configure
from safetensors.torch import save_file

from recbole_cl import checkpoint, cli, distributed
from recbole_cl.errors import ConfigError, RecBoleCLError
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.data_parallel import keep_alike
from recbole_cl.training.runner import Runner

STEPS = 12


class Seen(Strategy):
    """Notes the gradients of a stage's first steps, after they were added over the processes."""

    priority = 99

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, torch.Tensor] = {}

    def mask_gradients(self, ctx: StageContext) -> None:
        for name, p in ctx.parameters().items():
            if ctx.step < STEPS and p.grad is not None:
                self.gradients[f"{ctx.index}/{ctx.step}/{name}"] = p.grad.clone()


class Last(BPR):
    """A model that goes wrong in the last process, from a batch on."""

    batches = 0

    def wrong(self) -> bool:
        self.batches += self.training
        group = distributed.current()
        return self.batches > 4 and group.rank == group.size - 1

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        return super().calculate_loss(interaction) * self.factor(self.wrong())

    def factor(self, wrong: bool) -> float:
        return float("nan") if wrong else 1.0


class Drifting(Last):
    """It changes its weights by itself."""

    def factor(self, wrong: bool) -> float:
        if wrong:
            self.user_embedding.weight.data[1] += 1e-6
        return 1.0


class Failing(Last):
    """It raises an error, which the others are not waiting for."""

    def factor(self, wrong: bool) -> float:
        if wrong:
            raise ValueError("no such user")
        return 1.0


class Blind(Last):
    """Its scores are NaN there."""

    def factor(self, wrong: bool) -> float:
        return 1.0

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        return super().full_sort_predict(interaction) * (float("nan") if self.wrong() else 1.0)


class Sampling(BPR):
    """It draws random numbers to score."""

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        scores = super().full_sort_predict(interaction)
        return scores + 0.1 * torch.randn_like(scores)


class OwnTrainer(BPR):
    """It trains its stages by itself."""

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> Any:
        return self  # refused before it is asked for anything


MODELS = {model.__name__: model for model in (Last, Drifting, Failing, Blind, Sampling, OwnTrainer)}


def run_job(log: PlantedDrift, job: dict[str, Any], folder: Path) -> Runner:
    """Runs one job in this process, alone or together with others."""
    runner = Runner(configure(log, folder, MODELS.get(job["model"], job["model"]), **job["properties"]))
    seen = Seen()
    if not job.get("caught"):
        runner.strategy.members.append(seen)
    if job.get("dies"):
        die_at_checkpoint(job["dies"])
    runner.run()
    if distributed.current().main:
        weights = {f"weight/{name}": p.detach().clone() for name, p in runner.model.named_parameters()}
        save_file({**seen.gradients, **weights}, str(folder / "seen.safetensors"))
    return runner


def die_at_checkpoint(number: int) -> None:
    """Lets the first process die, without a word, right after it has written a checkpoint."""
    save = checkpoint.save

    def dying(folder: Path, written: int, *rest: Any) -> Any:
        save(folder, written, *rest)
        if written == number:
            os._exit(9)

    checkpoint.save = dying  # type: ignore[assignment]


def exchanges() -> dict[str, Any]:
    """Returns what the exchanges between processes give, for this process."""
    group = distributed.current()
    rng = np.random.default_rng(group.rank)
    rows = rng.random((3 * group.rank, 2))  # none in the first process
    told: dict[str, Any] = {
        "rows": group.gather(rows).tolist(),
        "ids": group.gather(np.full(group.rank, 2**60 + group.rank)).tolist(),
        "texts": group.texts("é" * group.rank),
        "sum": group.sum(torch.tensor([1.0 + group.rank])).tolist(),
        "any": group.any(torch.tensor([group.rank == 1, False])).tolist(),
    }
    try:
        with group.together():
            if group.rank == 1:
                raise ConfigError("field: wrong; remedy")
    except RecBoleCLError as error:
        told["together"] = f"{type(error).__name__}: {error}"
    return told | alike(group)


def alike(group: distributed.Group) -> dict[str, Any]:
    """Returns what is left of states that differ: statistics are taken from the first process, weights may not."""
    model = torch.nn.BatchNorm1d(2)
    model.running_mean += group.rank  # type: ignore[operator]
    ctx: Any = type("ctx", (), {"model": model, "index": 0, "epoch": 0, "pass_": type("pass", (), {"name": "train"})})
    ctx.device = torch.device("cuda")  # where sums may differ; nothing is computed there
    strategy: Any = type("strategy", (), {"state_dict": dict, "load_state_dict": lambda state: None})
    keep_alike(ctx, strategy)
    told: dict[str, Any] = {"statistics": model.running_mean.tolist()}  # type: ignore[union-attr, operator]
    model.weight.data += group.rank
    for device, name in (("cuda", "weights"), ("cpu", "statistics_on_cpu")):
        ctx.device = torch.device(device)
        try:
            keep_alike(ctx, strategy)
        except RecBoleCLError as error:
            told[name] = str(error)
        model.weight.data.fill_(0.5)
        model.running_var += group.rank  # type: ignore[operator]
    return told


def main(path: Path) -> None:
    asked = json.loads(path.read_text())
    log = PlantedDrift(Path(asked["log"][0]), asked["log"][1], [{}] * asked["log"][2], {}, {})
    for job in asked["jobs"]:
        folder = Path(job["folder"])
        if "arguments" in job:
            assert cli.main(job["arguments"]) == 0
            continue
        if "exchanges" in job:
            (folder / f"exchanges-{distributed.current().rank}.json").write_text(json.dumps(exchanges()))
            continue
        try:
            run_job(log, job, folder)
        except RecBoleCLError as error:
            if not job.get("caught"):
                raise
            told = distributed.current().texts(f"{type(error).__name__}: {error}")
            if distributed.current().main:
                (folder / "errors.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
