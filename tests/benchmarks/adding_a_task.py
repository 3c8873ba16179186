"""What it costs to add a task to a stream: PCL's prompts against FineAll, which fine-tunes a copy of the whole model.

Both walk through the same tasks in this process, from the very same pretrained backbone, whose training is not counted.
CPU seconds of this process count the training of a task until it stops early, validation included. The metric is that
of the test targets, after training has stopped; its difference is told with a 95 % t interval over the seeds.

The last line compares the representations of one batch for all K tasks: by PCL together, where the items are looked up
once and what stands before the prompted ones is computed once; by PCL one task after the other; and by K separate
models, as FineAll keeps them.

    OMP_NUM_THREADS=1 python tests/benchmarks/adding_a_task.py --datasets ml-100k --seeds 2020 2021 --set epochs=30
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import time
from typing import Any, NamedTuple

import figures
import numpy as np
import torch
import yaml
from side_by_side import alternate

from recbole_cl.config import CLConfig
from recbole_cl.stream.batch import Batcher
from recbole_cl.study.table import mean_and_interval
from recbole_cl.training.runner import Runner

SIDES: dict[str, dict[str, Any]] = {
    "PCL": {"model": "PCL", "strategy": "FineTune"},
    "FineAll": {"model": "MultiTask", "strategy": "FineAll"},
}
AIM = 5.0
"""What a task shall cost FineAll, over what it costs PCL."""
COLUMNS = "PCL | FineAll | difference | PCL, s | FineAll, s | FineAll / PCL"


class Added(NamedTuple):
    """An added task: its name and metric, the metric's value on the test targets, CPU seconds of its training."""

    task: str
    metric: str
    value: float
    seconds: float


class Timed(Runner):
    """Keeps the CPU seconds of each stage's training.

    Attributes:
        backbone: Weights of a backbone that is pretrained already.
        cpu: CPU seconds by stage.
    """

    backbone: dict[str, torch.Tensor] | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cpu: dict[int, float] = {}

    def _pass(self, ctx: Any, plan: Any, *args: Any, **more: Any) -> Any:
        if ctx.index == 0 and self.backbone is not None:
            ctx.model.backbone.load_state_dict(self.backbone)
            plan = dataclasses.replace(plan, epochs=0)
        begun = time.process_time()
        out = super()._pass(ctx, plan, *args, **more)
        self.cpu[ctx.index] = time.process_time() - begun
        if ctx.index == 0:
            self.backbone = {name: value.clone() for name, value in ctx.model.backbone.state_dict().items()}
        return out

    def added(self) -> list[Added]:
        """Returns what became of each added task."""
        result = self.journal.result(self.folder)
        found = []
        for stage in self.stream.stages[1:]:
            metric = result["stages"][stage.index]["primary_metric"]
            matrix = result["matrix"].get("primary", result["matrix"].get(metric))
            found.append(Added(stage.name, metric, matrix[-1][stage.index], self.cpu[stage.index]))
        return found


def walk(side: str, dataset: str, settings: dict[str, Any], backbone: dict[str, torch.Tensor] | None = None) -> Timed:
    """Returns a finished walk of one side, from a pretrained backbone where one is given."""
    own = SIDES[side]
    with tempfile.TemporaryDirectory() as folder:
        given = {"scheduler": "TaskStream", "strategy": own["strategy"], "output_dir": folder, **settings}
        config = CLConfig(model=own["model"], dataset=dataset, config_dict=given)
        config["saved"] = False
        runner = Timed(config)
        runner.backbone = backbone
        runner.run()
    return runner


def told(dataset: str, pairs: list[tuple[list[Added], list[Added]]]) -> tuple[list[str], str]:
    """Returns a row for each added task, and what the aim asks in a sentence.

    Args:
        dataset: Name of the log.
        pairs: What became of the tasks under PCL and FineAll, a pair a seed.
    """
    rows, better, equal, met = [], 0, 0, 0
    spent = np.zeros(2)
    tasks = pairs[0][0]
    for number, task in enumerate(tasks):
        values = np.array([[side[number].value for side in pair] for pair in pairs])
        seconds = np.array([[side[number].seconds for side in pair] for pair in pairs])
        gap, around = mean_and_interval(values[:, 0] - values[:, 1])
        ratio = seconds[:, 1].sum() / seconds[:, 0].sum()
        spent += seconds.sum(axis=0)
        met += ratio >= AIM
        better += ratio >= AIM and gap >= 0
        equal += ratio >= AIM and not gap + around < 0
        numbers = " | ".join(f"{value:.4f}" for value in values.mean(axis=0))
        costs = " | ".join(f"{value:.1f}" for value in seconds.mean(axis=0))
        difference = f"{gap:+.4f} ± {around:.4f}"
        rows.append(f"| {task.task} ({task.metric}) | {numbers} | {difference} | {costs} | {ratio:.1f} |")
    return rows, (
        f"{dataset}: together the added tasks cost FineAll {spent[1] / spent[0]:.1f} times PCL's time; at least "
        f"{AIM:.0f} times in {met} of {len(tasks)} tasks, with a metric that is no worse in the mean in {better} of "
        f"these, and not below FineAll's by more than the interval in {equal}"
    )


def sharing(runner: Timed, separate: Timed, pairs: int) -> str:
    """Returns a line on the representations for all tasks: together, one by one, and by separate models."""
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

    models = [copy.deepcopy(separate.model).eval() for _ in tasks]  # what FineAll keeps: a whole model a task

    def separately() -> None:
        with torch.no_grad():
            torch.stack([own.represent(rows, task) for task, own in enumerate(models)])

    looked, whole = alternate(shared, apart, pairs), alternate(shared, separately, pairs)
    return (
        f"all {len(tasks)} tasks of {len(rows)} histories together: {looked.ours:.4f} s; one task after the other: "
        f"{looked.theirs:.4f} s, {looked.ratio:.2f} times; {len(tasks)} separate models: "
        f"{whole.theirs:.4f} s, {whole.ratio:.2f} times"
    )


def properties(pairs: list[str]) -> dict[str, Any]:
    """Returns properties given as ``key=value``, values in YAML."""
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["ml-100k"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020])
    parser.add_argument("--pairs", type=int, default=9, help="timings of all tasks' representations; 0 for none")
    parser.add_argument("--set", nargs="*", default=[], help="properties of both sides, key=value")
    parser.add_argument("--pcl", nargs="*", default=[], help="properties of PCL alone")
    parser.add_argument("--fine", nargs="*", default=[], help="properties of FineAll alone")
    parser.add_argument("--keep", help="name under which docs/pcl.md shows what is printed")
    given = parser.parse_args()
    both = {"pcl_encoder": "random", "show_progress": False, "matrix_cells": "last_row", **properties(given.set)}
    first = None
    for dataset in given.datasets:
        pairs = []
        for seed in given.seeds:
            settings = {**both, "seed": seed}
            pcl = walk("PCL", dataset, {**settings, **properties(given.pcl)})
            fine = walk("FineAll", dataset, {**settings, **properties(given.fine)}, pcl.backbone)
            pairs.append((pcl.added(), fine.added()))
            first = first or (pcl, fine)
        rows, sentence = told(dataset, pairs)
        head = [f"| {dataset} | {COLUMNS} |", "|---|---|---|---|---|---|---|"]
        print("\n".join([*head, *rows, "", sentence]), flush=True)
        if given.keep:
            figures.record(f"{given.keep}.{dataset}", head, rows)
            figures.record(f"{given.keep}.{dataset}.sentences", [], [f"- {sentence}."])
    if first is None or not given.pairs:
        return
    line = sharing(*first, given.pairs)
    print(line)
    if given.keep:
        figures.record(f"{given.keep}.sharing", [], [f"- {given.datasets[0]}: {line}."])


if __name__ == "__main__":
    main()
