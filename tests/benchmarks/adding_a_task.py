"""What it costs to add a task to a stream: PCL's prompts against FineAll, which fine-tunes a copy of the whole model.

Both walk through the same tasks in this process, from the very same pretrained backbone, whose training is not counted.
CPU seconds of this process count the training of a task until it stops early, validation included. Two ratios are told:

* of the whole cost until each side stops early;
* of the time to an equal or better metric: that of FineAll to its best value on the validation targets, over that of
  PCL to a value at least as good. Where PCL never has one, its own best is told instead.

The last line compares the representations of one batch for all K tasks: by PCL with one shared look-up of the items and
with K of them, and by K separate models, as FineAll keeps them.

    OMP_NUM_THREADS=1 python tests/benchmarks/adding_a_task.py --dataset=ml-100k --seeds 2020 2021
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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
AIM = 5.0
"""What a task shall cost FineAll, over what it costs PCL."""


class Timed(Runner):
    """Keeps the CPU seconds of each stage's training, and its validation curve over them.

    Attributes:
        backbone: Weights of a backbone that is pretrained already.
        cpu: CPU seconds by stage.
        curve: CPU seconds and the primary metric on the validation targets after each epoch, by stage.
    """

    backbone: dict[str, torch.Tensor] | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cpu: dict[int, float] = {}
        self.curve: dict[int, list[tuple[float, float]]] = {}
        self._begun = 0.0

    def _pass(self, ctx: Any, plan: Any, *args: Any, **more: Any) -> Any:
        if ctx.index == 0 and self.backbone is not None:
            ctx.model.backbone.load_state_dict(self.backbone)
            plan = dataclasses.replace(plan, epochs=0)
        self._begun = time.process_time()
        out = super()._pass(ctx, plan, *args, **more)
        self.cpu[ctx.index] = time.process_time() - self._begun
        if ctx.index == 0:
            self.backbone = {name: value.clone() for name, value in ctx.model.backbone.state_dict().items()}
        return out

    def _end_epoch(self, ctx: Any, *args: Any, **more: Any) -> None:
        super()._end_epoch(ctx, *args, **more)
        value = (self.journal.curves[-1]["valid"] or {}).get(self.journal.primary(ctx.stage))
        if value is not None:
            self.curve.setdefault(ctx.index, []).append((time.process_time() - self._begun, value))

    def best(self, stage: int) -> tuple[float, float]:
        """Returns the seconds to a stage's best validation value, and the value (bigger is better)."""
        return max(self.curve[stage], key=lambda point: point[1])

    def reaches(self, stage: int, value: float) -> float | None:
        """Returns the seconds to a validation value at least as good, or ``None``."""
        return next((seconds for seconds, own in self.curve[stage] if own >= value), None)


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


def adding(
    dataset: str, settings: dict[str, Any], only_pcl: dict[str, Any]
) -> tuple[dict[str, Timed], list[str], list[str]]:
    """Returns both walks, and the rows of the two tables."""
    pcl = walk("PCL", dataset, {**settings, **only_pcl})
    fine = walk("FineAll", dataset, settings, pcl.backbone)
    results = [runner.journal.result(runner.folder) for runner in (pcl, fine)]
    whole, equal = [], []
    for stage in pcl.stream.stages[1:]:
        k, seed = stage.index, settings["seed"]
        test = [result["matrix"]["primary"][-1][k] for result in results]
        told = [f"{value:.4f}" for value in test] + [f"{runner.cpu[k]:.1f}" for runner in (pcl, fine)]
        whole.append(
            f"| {stage.name} | {seed} | {results[0]['stages'][k]['primary_metric']} | {' | '.join(told)} | "
            f"{fine.cpu[k] / pcl.cpu[k]:.1f} |"
        )
        if k not in pcl.curve or k not in fine.curve:
            continue
        (needed, goal), (_, best) = fine.best(k), pcl.best(k)
        reached = pcl.reaches(k, goal)
        told = ["never", "-"] if reached is None else [f"{reached:.1f}", f"{needed / reached:.1f}"]
        equal.append(f"| {stage.name} | {seed} | {goal:.4f} | {best:.4f} | {needed:.1f} | {' | '.join(told)} |")
    return {"PCL": pcl, "FineAll": fine}, whole, equal


def summary(pairs: list[dict[str, Timed]]) -> list[str]:
    """Returns what the aim asks, in words, for pairs of walks."""
    ratios, ahead = [], []
    for pair in pairs:
        pcl, fine = pair["PCL"], pair["FineAll"]
        for k in fine.curve.keys() & pcl.curve.keys() - {0}:
            needed, goal = fine.best(k)
            reached = pcl.reaches(k, goal)
            ratios.append(fine.cpu[k] / pcl.cpu[k])
            ahead.append(None if reached is None else needed / reached)
    met = sum(ratio is not None and ratio >= AIM for ratio in ahead)
    lines = [f"FineAll / PCL until both stop: median {statistics.median(ratios):.1f} over {len(ratios)} added tasks"]
    found = [ratio for ratio in ahead if ratio is not None]
    if found:
        lines.append(
            f"FineAll / PCL to an equal or better metric: median {statistics.median(found):.1f} over the {len(found)} "
            f"that PCL reaches"
        )
    lines.append(f"a fifth of FineAll's time at an equal or better metric: {met} of {len(ratios)} added tasks")
    return lines


def sharing(runner: Timed, separate: Timed, pairs: int) -> str:
    """Returns a line on the representations for all tasks: with a shared look-up, without, and by separate models."""
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

    def kept() -> None:
        with torch.no_grad():
            torch.stack([own.represent(rows, task) for task, own in enumerate(models)])

    looked, whole = alternate(shared, apart, pairs), alternate(shared, kept, pairs)
    return (
        f"all {len(tasks)} tasks of {len(rows)} histories, one look-up: {looked.ours:.4f} s; {len(tasks)} look-ups: "
        f"{looked.theirs:.4f} s, {looked.ratio:.2f} times; {len(tasks)} separate models: "
        f"{whole.theirs:.4f} s, {whole.ratio:.2f} times"
    )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020])
    parser.add_argument("--encoder", default="random")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--set", nargs="*", default=[], help="further properties of both sides, key=value")
    parser.add_argument("--pcl", nargs="*", default=[], help="properties of PCL alone")
    given = parser.parse_args()
    settings: dict[str, Any] = {
        "MAX_ITEM_LIST_LENGTH": given.length,
        "epochs": given.epochs,
        "pcl_encoder": given.encoder,
        "show_progress": False,
        **dict(pair.split("=", 1) for pair in given.set),
    }
    only_pcl = dict(pair.split("=", 1) for pair in given.pcl)
    pairs, whole, equal = [], [], []
    for seed in given.seeds:
        runners, *rows = adding(given.dataset, {**settings, "seed": seed}, only_pcl)
        pairs.append(runners)
        whole += rows[0]
        equal += rows[1]
    print("Until each side stops early; the metric on the test targets\n")
    print("| task | seed | metric | PCL | FineAll | PCL s | FineAll s | FineAll / PCL |")
    print("\n".join(["|---|---|---|---|---|---|---|---|", *sorted(whole)]))
    print("\nTo FineAll's best value on the validation targets, or a better one\n")
    print("| task | seed | FineAll's best | PCL's best | FineAll s | PCL s | FineAll / PCL |")
    print("\n".join(["|---|---|---|---|---|---|---|", *sorted(equal), "", *summary(pairs)]))
    print(sharing(pairs[0]["PCL"], pairs[0]["FineAll"], given.pairs))


if __name__ == "__main__":
    main()
