"""CPU time until SASRec reaches RecBole's best validation NDCG@10 on ml-100k: all positions against RecBole's prefixes.

Both sides train on every user's interactions but the last two, and every epoch of both is judged by RecBole's own
``evaluate`` over RecBole's own validation loader (each user's last but one interaction, all items ranked). For ours the
weights go into a RecBole model with the rows of the items moved to RecBole's ids. Only training counts: CPU seconds of
this process, one thread; on a GPU wall-clock seconds, synchronised. RecBole's side runs without autograd's anomaly
mode, which one of its models turns on for the whole process (about three times slower).

Each epoch is a line of ``results.jsonl``, with a checkpoint beside it: a run that was stopped goes on where it was.

    OMP_NUM_THREADS=1 python tests/benchmarks/time_to_quality.py OUTPUT --seeds 5
    python tests/benchmarks/time_to_quality.py OUTPUT --table          # the table from what is there
    python tests/benchmarks/time_to_quality.py OUTPUT --table --keep   # and into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
from cases import context, recbole_side
from recbole.data import data_preparation
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from side_by_side import clock

from recbole_cl import compat
from recbole_cl.config import CLConfig
from recbole_cl.strategy.composite import Composite
from recbole_cl.stream.loader import make_loader
from recbole_cl.study.parity import _write_sorted
from recbole_cl.training.stage_trainer import make_trainer

SIDES = ["ours", "RecBole"]
LENGTH = 20
METRIC = "ndcg@10"
OURS: dict[str, Any] = {
    "n_stages": 1,
    "stage_split": "leave_one_out",
    "vocabulary": "global",
    "MAX_ITEM_LIST_LENGTH": LENGTH,
    "window_shift": True,
    "show_progress": False,
}
THEIRS: dict[str, Any] = {
    "train_neg_sample_args": None,
    "MAX_ITEM_LIST_LENGTH": LENGTH,
    "train_batch_size": 512,
    "eval_batch_size": 1 << 20,  # not part of the time
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "repeatable": True,
    "normalize_all": False,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "metric_decimal_place": 12,
}


class Side:
    """One side of one seed: an epoch, its judgement, and a state to go on from."""

    def __init__(self, name: str, seed: int, device: str, folder: Path, windows: int, rate: float) -> None:
        self.name, self.seed, self.device = name, seed, device
        gpu = {"use_gpu": device != "cpu", "gpu_id": "0" if device != "cpu" else ""}
        # RecBole keeps the file's order among equal times: give it the log as a stream sorts it, for the same targets.
        config = CLConfig(
            "SASRec",
            "ml-100k",
            config_dict={
                **OURS, **gpu, "seed": seed + 1, "train_batch_size": windows * LENGTH, "learning_rate": rate,
            },
        )  # fmt: skip
        data = folder / "data"
        if not (data / "ml-100k").exists():
            _write_sorted(config, data / "ml-100k")
        recbole, dataset = recbole_side("SASRec", str(data), "ml-100k", {**THEIRS, **gpu, "seed": seed + 1})
        self.train, self.valid, _ = data_preparation(recbole, dataset)
        compat.anomaly_mode_off()
        init_seed(seed + 1, True)
        with tempfile.TemporaryDirectory() as unused, compat.without_side_effects():
            recbole["checkpoint_dir"] = unused
            self.judge = Trainer(recbole, RecBoleSASRec(recbole, self.train.dataset).to(recbole["device"]))
        self.judge.eval_collector.data_collect(self.train)
        self.rows: torch.Tensor | None = None
        if name == "RecBole":
            self.trainer, self.loader, self.n_targets = self.judge, self.train, len(self.train.dataset)
            return
        init_seed(seed + 1, True)
        _, ctx = context(config)
        ctx.loader = self.loader = make_loader(ctx, ctx.stage.train, "0/train")
        self.trainer, self.n_targets = make_trainer(ctx, Composite([]), config["learning_rate"]), self.loader.n_targets
        ours, theirs = (d.field2id_token[d.iid_field] for d in (ctx.stream.dataset, dataset))
        place = {token: i for i, token in enumerate(ours)}
        self.rows = torch.tensor([place[token] for token in theirs])
        self._same_targets(ctx, dataset)

    def _same_targets(self, ctx: Any, dataset: Any) -> None:
        """Refuses to compare different targets or histories."""
        names = [d.field2id_token for d in (ctx.stream.dataset, dataset)]
        rows = ctx.batcher.rows(ctx.stage.valid)
        valid = self.valid.dataset.inter_feat
        sides = [
            {
                names[k]["user_id"][u]: (names[k]["item_id"][i], tuple(names[k]["item_id"][h]))
                for u, i, h in zip(*(r[f].numpy() for f in ("user_id", "item_id", "item_id_list")), strict=True)
            }
            for k, r in enumerate((rows, valid))
        ]
        assert sides[0] == sides[1], "the two sides validate on different targets"

    def epoch(self, number: int) -> float:
        """Trains an epoch and returns its seconds."""
        now = clock(self.device)
        begun = now()
        self.trainer._train_epoch(self.loader, number)
        return now() - begun

    def quality(self) -> float:
        """Returns RecBole's validation NDCG@10 of the present weights; random states stay as they were."""
        state = torch.get_rng_state()
        if self.rows is not None:
            weights = {k: v.detach().cpu() for k, v in self.trainer.model.state_dict().items()}
            weights["item_embedding.weight"] = weights["item_embedding.weight"][self.rows]
            self.judge.model.load_state_dict(weights)
        found = self.judge.evaluate(self.valid, load_best_model=False)[METRIC]
        torch.set_rng_state(state)
        return float(found)

    def save(self, path: Path) -> None:
        """Writes what the next epoch depends on."""
        state = {
            "model": self.trainer.model.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "order": self.loader.generator.get_state(),
            "torch": torch.get_rng_state(),
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Goes on from a saved epoch."""
        state = torch.load(path, weights_only=True)
        self.trainer.model.load_state_dict(state["model"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.loader.generator.set_state(state["order"])
        torch.set_rng_state(state["torch"])


def read(folder: Path) -> list[dict[str, Any]]:
    """Returns the epochs that are there."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(name: str, seed: int, epochs: int, device: str, folder: Path, windows: int, rate: float) -> None:
    """Runs the epochs of a side and seed that are not there yet."""
    done = [r for r in read(folder) if (r["side"], r["seed"]) == (name, seed)]
    if len(done) >= epochs:
        return
    side, path = Side(name, seed, device, folder, windows, rate), folder / f"{name}-{seed}.pt"
    total = 0.0
    if done:
        side.load(path)
        total = done[-1]["seconds"]
    for number in range(len(done), epochs):
        took = side.epoch(number)
        total += took
        line = {"side": name, "seed": seed, "epoch": number + 1, "epoch_seconds": took, "seconds": total}
        line |= {"ndcg@10": side.quality(), "targets": side.n_targets, "device": device}
        side.save(path)
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    path.unlink()


HEAD = [
    "| seed | RecBole: epochs, s an epoch | best NDCG@10 | after s | ours: epochs, s an epoch | reaches it after s "
    "| share of the time | best | last |",
    "|---|---|---|---|---|---|---|---|---|",
]


def table(results: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of the seeds of which both sides have epochs, and what they say together."""
    lines = []
    shares, bests = [], []
    for seed in sorted({r["seed"] for r in results}):
        ours, theirs = (
            sorted((r for r in results if (r["side"], r["seed"]) == (name, seed)), key=lambda r: r["epoch"])
            for name in SIDES
        )
        if not ours or not theirs:
            continue
        goal = max(theirs, key=lambda r: r[METRIC])
        reached = next((r for r in ours if r[METRIC] >= goal[METRIC]), None)
        best = max(r[METRIC] for r in ours)
        pace = [statistics.median(r["epoch_seconds"] for r in side) for side in (theirs, ours)]
        if reached is not None:
            shares.append(reached["seconds"] / goal["seconds"])
            bests.append(best / goal[METRIC])
        told = "never" if reached is None else f"{reached['seconds']:.0f}"
        share = "" if reached is None else f"1/{goal['seconds'] / reached['seconds']:.1f}"
        lines.append(
            f"| {seed + 1} | {len(theirs)}, {pace[0]:.1f} | {goal[METRIC]:.4f} | {goal['seconds']:.0f} | {len(ours)}, "
            f"{pace[1]:.2f} | {told} | {share} | {best:.4f} | {ours[-1][METRIC]:.4f} |"
        )
    if shares:
        lines += [
            "",
            f"Median over {len(shares)} seeds: RecBole's best is reached in 1/{1 / statistics.median(shares):.1f} of "
            f"its time (slowest seed 1/{1 / max(shares):.1f}); our best is {statistics.median(bests):.2f} times it.",
        ]
    return lines


def main() -> None:
    """Runs what is missing, seed by seed, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of results.jsonl and the checkpoints")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30, help="of our side")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of our side; RecBole's is its 1e-3")
    parser.add_argument("--windows", type=int, default=32, help="windows a batch of our side, about")
    parser.add_argument("--recbole-epochs", type=int, default=12)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="two processes may share a folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--keep", action="store_true", help="write the table into the documentation")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for seed in range(args.seeds):
            for name in args.sides:
                epochs = args.epochs if name == "ours" else args.recbole_epochs
                run(name, seed, epochs, args.device, args.output, args.windows, args.rate)
    lines = table(read(args.output))
    print(*HEAD, *lines, sep="\n")
    if args.keep:
        figures.record("time_to_quality", HEAD, lines, args.device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    main()
