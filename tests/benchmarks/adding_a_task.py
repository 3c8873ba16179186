"""What it costs to add a task to a stream: PCL's prompts against FineAll, which fine-tunes a copy of the whole model.

Both walk through the same tasks in this process, from the same kind of pretraining, which is not counted. CPU seconds
of this process count the training of a task until it stops early, validation included. The last line compares the
representations of one batch for all K tasks with and without a shared look-up of the items.

    OMP_NUM_THREADS=1 python tests/benchmarks/adding_a_task.py --dataset=ml-100k --epochs=10
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from side_by_side import alternate

from recbole_cl.config import CLConfig
from recbole_cl.runner import Runner
from recbole_cl.stream.batch import Batcher

SIDES: dict[str, dict[str, Any]] = {
    "PCL": {"model": "PCL", "strategy": "FineTune"},
    "FineAll": {"model": "MultiTask", "strategy": "FineAll"},
}


class Timed(Runner):
    """Keeps the CPU seconds of the passes of each stage."""

    def _pass(self, ctx: Any, *args: Any, **more: Any) -> Any:
        begun = time.process_time()
        out = super()._pass(ctx, *args, **more)
        self.cpu = getattr(self, "cpu", {})
        self.cpu[ctx.index] = self.cpu.get(ctx.index, 0.0) + time.process_time() - begun
        return out


def walk(side: str, dataset: str, settings: dict[str, Any]) -> Timed:
    """Returns a finished walk of one side."""
    own = SIDES[side]
    with tempfile.TemporaryDirectory() as folder:
        given = {"scheduler": "TaskStream", "strategy": own["strategy"], "output_dir": folder, **settings}
        config = CLConfig(model=own["model"], dataset=dataset, config_dict=given)
        config["saved"] = False
        runner = Timed(config)
        runner.run()
    return runner


def adding(dataset: str, settings: dict[str, Any]) -> tuple[dict[str, Timed], list[str]]:
    """Returns both walks, and the lines of the table."""
    runners = {side: walk(side, dataset, settings) for side in SIDES}
    lines = [
        "| task | metric | PCL | FineAll | PCL s | FineAll s | FineAll / PCL |",
        "|---|---|---|---|---|---|---|",
    ]
    stages = runners["PCL"].stream.stages
    results = {side: runner.journal.result(runner.folder) for side, runner in runners.items()}
    for stage in stages:
        k = stage.index
        own = [results[side]["matrix"]["primary"][-1][k] for side in SIDES]
        seconds = [runners[side].cpu[k] for side in SIDES]
        told = [f"{value:.4f}" for value in own] + [f"{value:.1f}" for value in seconds]
        ratio = "not counted" if k == 0 else f"{seconds[1] / seconds[0]:.2f}"
        metric = results["PCL"]["stages"][k]["primary_metric"]
        lines.append(f"| {stage.name} | {metric} | {' | '.join(told)} | {ratio} |")
    return runners, lines


def sharing(runner: Timed, pairs: int) -> str:
    """Returns a line on the representations for all tasks with and without a shared look-up."""
    model, stage = runner.model.eval(), runner.stream.stages[0]
    view = runner.stream.view(len(runner.stream) - 1)
    batcher = Batcher(runner.config, runner.stream, view, stage.n_users, stage.n_items)
    rows = batcher.rows(stage.test[np.arange(min(len(stage.test), 512))], evaluation=True)
    tasks = range(len(runner.stream))

    def shared() -> None:
        with torch.no_grad():
            model.represent_all(rows)

    def apart() -> None:
        with torch.no_grad():
            torch.stack([model.represent(rows, task) for task in tasks])

    found = alternate(shared, apart, pairs)
    return f"all {len(tasks)} tasks, one look-up: {found.ours:.4f} s; {len(tasks)} look-ups: {found.theirs:.4f} s"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--encoder", default="random")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--set", nargs="*", default=[], help="further properties, key=value")
    given = parser.parse_args()
    settings: dict[str, Any] = {
        "MAX_ITEM_LIST_LENGTH": given.length,
        "epochs": given.epochs,
        "seed": given.seed,
        "pcl_encoder": given.encoder,
        "show_progress": False,
        **dict(pair.split("=", 1) for pair in given.set),
    }
    runners, lines = adding(given.dataset, settings)
    print("\n".join(lines))
    ratios = [runners["FineAll"].cpu[k] / runners["PCL"].cpu[k] for k in range(1, len(lines) - 2)]
    print(f"\nFineAll / PCL, median over the added tasks: {statistics.median(ratios):.2f}")
    print(sharing(runners["PCL"], given.pairs))


if __name__ == "__main__":
    main()
