"""Prints the tables of docs/benchmarks_strategies.md: ratios of CPU seconds on one thread, both sides in one process.

OMP_NUM_THREADS=1 python tests/benchmarks/strategies.py [mf] [fisher] [catalogue] [bounds] [penalty] [epochs] [replay]

Rows beside Avalanche need ``pip install recbole-cl[peers]``; without it they are left out.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from side_by_side import Ratio, alternate, ratio
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from recbole_cl.config import CLConfig
from recbole_cl.registry import strategies
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.parts.exemplars import ReservoirMemory
from recbole_cl.strategy.parts.importance import squared_gradients
from recbole_cl.strategy.parts.rows import OwnRows
from recbole_cl.stream.build import build_stream
from recbole_cl.training.runner import Runner
from recbole_cl.training.trainer import HookedTrainer

try:
    from avalanche.training.plugins import EWCPlugin
except ImportError:
    EWCPlugin = None

Side = Callable[[], Any]
PAIRS = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}


def context(model: str, dataset: str = "ml-100k", **settings: Any) -> Any:
    """A stage's context with a fresh model; seed of the configuration."""
    config = CLConfig(model, dataset, config_dict={"n_stages": 1, "show_progress": False, **settings})
    runner = Runner(config)
    runner.begin(build_stream(config))
    view = runner.stream.view(0)
    return runner.state.models.context(0, runner.build_model(view, ModelRandomness(config["seed"])), view)


def take(ctx: Any, count: int) -> list[Interaction]:
    """Rows of ``count`` samples with their negatives."""
    return list(OwnRows(ctx, "benchmark").batches(count))


# -- Fisher -------------------------------------------------------------------------------------------------------


class Gap(nn.Module):
    """BPR as Avalanche wants it: a tensor of (user, item, negative) to scores, with a criterion of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        user = self.model.user_embedding(x[:, 0])
        gap: torch.Tensor = (user * (self.model.item_embedding(x[:, 1]) - self.model.item_embedding(x[:, 2]))).sum(-1)
        return gap


def fisher_of_mf(count: int, batch_size: int) -> tuple[Side, Side, Side]:
    """The Fisher of BPR on ml-100k: ours, Avalanche's ``compute_importances`` at a batch size, and bare gradients.

    Bare gradients are those of the batches' losses: nothing per sample, nothing squared, no loader.
    """
    ctx = context("BPR")
    batches = take(ctx, count)
    columns = [torch.cat([b[name] for b in batches]) for name in ("user_id", "item_id", "neg_item_id")]
    data = TensorDataset(torch.stack(columns, 1), torch.zeros(count), torch.zeros(count))
    wrapped = Gap(ctx.model)
    optimizer = torch.optim.SGD(ctx.model.parameters(), lr=0.1)

    def theirs() -> Any:
        def criterion(out: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return -torch.log(1e-10 + torch.sigmoid(out)).mean()

        return EWCPlugin(1.0).compute_importances(wrapped, criterion, optimizer, data, "cpu", batch_size)

    def ours() -> Any:
        return squared_gradients(ctx.model, batches)

    def plain() -> None:
        for start in range(0, count, batch_size):
            rows = data.tensors[0][start : start + batch_size]
            torch.autograd.grad(-torch.log(1e-10 + torch.sigmoid(wrapped(rows))).mean(), list(wrapped.parameters()))

    if batch_size == 1:  # the same numbers, or there is nothing to compare
        found = theirs()
        for name, value in ours().items():
            assert torch.allclose(found[f"model.{name}"].data, value, rtol=1e-4, atol=1e-10)
    return ours, theirs, plain


def fisher_of(model: str, count: int, dataset: str = "ml-100k", **settings: Any) -> Fishers:
    """The Fisher of a model: ours, ``vmap(grad)``, a loop of one backward pass a sample, and the bare gradient."""
    ctx = context(model, dataset, **settings)
    batches = take(ctx, count)
    parameters = [p for p in ctx.model.parameters() if p.requires_grad]

    def loop() -> None:
        ctx.model.eval()
        sums = [torch.zeros_like(p) for p in parameters]
        for batch in batches:
            for n in range(len(batch)):
                found = torch.autograd.grad(ctx.model.calculate_loss(batch[[n]]), parameters, allow_unused=True)
                for total, g in zip(sums, found, strict=True):
                    if g is not None:
                        total += g.square()
        ctx.model.train()

    def plain() -> None:
        ctx.model.eval()
        with sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                for start in range(0, len(batch), 32):
                    part = Interaction({name: column[start : start + 32] for name, column in batch.interaction.items()})
                    torch.autograd.grad(ctx.model.per_sample_loss(part).sum(), parameters, allow_unused=True)
        ctx.model.train()

    return Fishers(
        lambda: squared_gradients(ctx.model, batches),
        lambda chunk=None: squared_gradients(ctx.model, batches, chunk=chunk, fast=False),
        loop,
        plain,
    )


class Fishers(NamedTuple):
    """The sides of :func:`fisher_of`; ``vmap`` takes the number of samples that it holds at once."""

    ours: Side
    vmap: Side
    loop: Side
    plain: Side


def best_chunk(vectorised: Side, chunks: tuple[int, ...]) -> int:
    """The number of samples at once with which a rival takes the fewest CPU seconds, in one trial of each."""
    seconds = {}
    for chunk in chunks:
        begun = time.process_time()
        vectorised(chunk)
        seconds[chunk] = time.process_time() - begun
    return min(seconds, key=seconds.__getitem__)


def flops(work: Side) -> float:
    """Operations of the matrix products of a side, in 10^9 (a multiplication and an addition are two)."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops()) / 1e9


def large_catalogue(folder: Path, items: int = 20_000, length: int = 50) -> dict[str, Any]:
    """Writes a log in which every item of a large catalogue comes once, in a random order; returns its settings."""
    order = np.random.default_rng(0).permutation(items)
    lines = [f"u{n // length}\ti{item}\t{n}" for n, item in enumerate(order)]
    (folder / "catalogue").mkdir()
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / "catalogue" / "catalogue.inter").write_text("\n".join([header, *lines]) + "\n")
    return {
        "data_path": str(folder), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "scheduler": "TimeSlices",
    }  # fmt: skip


# -- penalty ------------------------------------------------------------------------------------------------------


def penalty_step(model: str = "SASRec", stages: int = 8) -> tuple[Side, Side]:
    """What a step of EWC adds with several stages behind it: our closed form against Avalanche's loop and backward."""
    ctx = context(model)
    mine = strategies.get("EWC")({"lambda": 2.0, "samples": None})
    theirs = EWCPlugin(1.0)
    generator = torch.Generator().manual_seed(0)
    for stage in range(stages):
        for name, p in ctx.parameters().items():
            fisher, anchor = torch.rand(p.shape, generator=generator), torch.randn(p.shape, generator=generator)
            mine._add_anchor(name, fisher, anchor)
            theirs.importances[stage][name], theirs.saved_params[stage][name] = fisher, anchor
    strategy = SimpleNamespace(model=ctx.model, device="cpu", clock=SimpleNamespace(train_exp_counter=stages))
    ctx.terms["EWC/penalty"] = [0.0, 1.0]  # it is logged once an epoch

    def ours() -> None:
        for p in ctx.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        for _ in range(20):
            mine.add_gradients(ctx)

    def loop() -> None:
        for p in ctx.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        for _ in range(20):
            strategy.loss = torch.zeros(())
            theirs.before_backward(strategy)
            strategy.loss.backward()

    ours()
    kept = {name: p.grad.clone() for name, p in ctx.parameters().items()}
    loop()
    for name, p in ctx.parameters().items():
        assert torch.allclose(kept[name], p.grad, rtol=1e-3, atol=1e-3), name
    return ours, loop


# -- epochs -------------------------------------------------------------------------------------------------------


def epoch_seconds(model: str, strategy: Any, epochs: int = 3, **settings: Any) -> float:
    """Mean CPU seconds of an epoch of the second stage of ml-100k, with all that a strategy does in its first one."""
    found: list[float] = []
    original = HookedTrainer._train_epoch

    def timed(self: Any, *args: Any, **more: Any) -> Any:
        begun = time.process_time()
        out = original(self, *args, **more)
        if self.ctx.index == 1:
            found.append(time.process_time() - begun)
        return out

    HookedTrainer._train_epoch = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = {
                "n_stages": 2, "epochs": epochs, "eval_step": 0, "metrics": ["Hit"], "valid_metric": "Hit@10",
                "topk": [10], "strategy": strategy, "output_dir": folder, "show_progress": False, **settings,
            }  # fmt: skip
            config = CLConfig(model, "ml-100k", config_dict=given)
            config["saved"] = False
            Runner(config).run()
    finally:
        HookedTrainer._train_epoch = original  # type: ignore[method-assign]
    return statistics.fmean(found)


# -- replay -------------------------------------------------------------------------------------------------------


def replay_microseconds(size: int, count: int = 64, times: int = 300) -> float:
    """Microseconds of one draw of ``count`` rows from a memory of ``size``."""
    memory = ReservoirMemory(size)
    memory.keys = np.zeros(size)
    memory.columns = {name: torch.zeros(size, dtype=torch.int64) for name in ("user_id", "item_id", "_position")}
    generator = np.random.default_rng(0)
    memory.sample(count, generator)
    begun = time.process_time()
    for _ in range(times):
        memory.sample(count, generator)
    return 1e6 * (time.process_time() - begun) / times


# -- report -------------------------------------------------------------------------------------------------------


def row(what: str, rival: str, found: Ratio, aim: str) -> str:
    """One line of a table of two sides."""
    return f"| {what} | {rival} | {found.ours:.3f} | {found.theirs:.3f} | {found.ratio:.1f}x | {aim} | {found.pairs} |"


def fisher_table(
    cases: list[tuple[str, str, int, str, dict[str, Any]]], pairs: int = 3, chunks: tuple[int, ...] = (16, 32, 64)
) -> None:
    """Lines of (what, model, samples, aim, settings): ours against vmap at its best chunk, and against a loop."""
    for told, model, count, aim, settings in cases:
        sides = fisher_of(model, count, **settings)
        if model != "GRU4Rec":  # PyTorch does not vectorise recurrent layers
            chunk = best_chunk(sides.vmap, chunks)
            found = alternate(sides.ours, functools.partial(sides.vmap, chunk), pairs)
            print(row(f"Fisher of {told}", f"vmap(grad), {chunk} at once", found, aim), flush=True)
        print(row(f"Fisher of {told}", "one backward a sample", alternate(sides.ours, sides.loop, 1), aim), flush=True)


def bounds_table(cases: list[tuple[str, int, dict[str, Any]]], pairs: int = 3) -> None:
    """Lines of (what, samples, settings) of SASRec: what nobody can save, the bare gradient of the same samples."""
    print("\n| what | GFLOP: gradient of the sum | ours | vmap | CPU s: gradient of the sum | ours | vmap |")
    print("|---|---|---|---|---|---|---|")
    for told, count, settings in cases:
        sides = fisher_of("SASRec", count, **settings)
        vectorised = functools.partial(sides.vmap, best_chunk(sides.vmap, (16, 32)))
        first, second = alternate(sides.plain, sides.ours, pairs), alternate(sides.plain, vectorised, pairs)
        counts = " | ".join(f"{flops(side):.1f}" for side in (sides.plain, sides.ours, vectorised))
        print(f"| {told} | {counts} | {first.ours:.3f} | {first.ratio:.1f}x | {second.ratio:.1f}x |", flush=True)


def main(wanted: list[str]) -> None:
    """Runs the comparisons that were asked for, all without a name."""
    torch.set_num_threads(1)
    wanted = wanted or ["fisher", "catalogue", "penalty", "bounds", "epochs", "replay"]
    if {"mf", "fisher", "catalogue", "penalty"} & set(wanted):
        print("| what | against | ours, CPU s | rival, CPU s | rival / ours | aim | pairs |")
        print("|---|---|---|---|---|---|---|")
    if "fisher" in wanted or "mf" in wanted:
        for count, size in ((1000, 1), (20000, 64), (20000, 2048)) if EWCPlugin is not None else ():
            told = "exact, too" if size == 1 else "not exact"
            what = f"Fisher of BPR, {count:,} rows"
            ours, theirs, plain = fisher_of_mf(count, size)
            found = alternate(ours, theirs, 3)
            print(row(what, f"Avalanche, batches of {size} ({told})", found, ">= 20x"), flush=True)
            if size > 1:
                print(row(what, f"gradients of batches of {size}", alternate(ours, plain, 3), ""), flush=True)
    if "fisher" in wanted:
        fisher_table(
            [
                ("BPR, 1,000 rows", "BPR", 1000, "", {}),
                ("DeepFM, 500 targets", "DeepFM", 500, "", {}),
                ("GRU4Rec, 64 windows", "GRU4Rec", 64, "", {}),
                ("SASRec, 192 windows, softmax", "SASRec", 192, ">= 10x", {}),
                ("SASRec, 192 windows, pairs", "SASRec", 192, ">= 10x", PAIRS),
                ("SASRec, 192 single targets, softmax", "SASRec", 192, ">= 10x", {"train_positions": "last"}),
            ]
        )
    if "catalogue" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            log = {"dataset": "catalogue", **large_catalogue(Path(folder))}
            single = {**log, "train_positions": "last"}
            fisher_table(
                [
                    ("SASRec, 20,000 items, 320 windows, pairs", "SASRec", 320, ">= 10x", {**log, **PAIRS}),
                    ("SASRec, 20,000 items, 512 single targets, softmax", "SASRec", 512, ">= 10x", single),
                    ("SASRec, 20,000 items, 512 single targets, pairs", "SASRec", 512, ">= 10x", {**single, **PAIRS}),
                ],
                pairs=3,
                chunks=(4, 11),
            )
    if "penalty" in wanted and EWCPlugin is not None:
        for model in ("SASRec", "BPR"):
            found = alternate(*penalty_step(model), 5)
            print(row(f"20 penalty steps, 8 stages, {model}", "Avalanche", found, ">= 20x"), flush=True)
    if "bounds" in wanted:
        bounds_table([("192 windows, softmax", 192, {}), ("192 windows, pairs", 192, PAIRS)])
    if "epochs" in wanted:
        print("\n| epoch of ml-100k, stage 2 of 2 | FineTune, CPU s | strategy | times FineTune |\n|---|---|---|---|")
        for model, rounds, members in (("BPR", 7, MEMBERS), ("SASRec", 3, MEMBERS[:3])):
            times: dict[str, list[float]] = {}
            for _ in range(rounds):
                for told, name, settings in (("FineTune", "FineTune", {}), *members):
                    times.setdefault(told, []).append(epoch_seconds(model, name, **settings))
            base = times["FineTune"]
            for told, _, _ in members:
                found = ratio(list(zip(base, times[told], strict=True)))
                print(f"| {model} ({rounds} rounds) | {statistics.median(base):.3f} | {told} | {found.ratio:.2f}x |")
    if "replay" in wanted:
        print("\n| rows in the memory | one draw of 64, microseconds |\n|---|---|")
        for size in (1_000, 10_000, 100_000, 1_000_000):
            print(f"| {size:,} | {replay_microseconds(size):.0f} |")
    peer = f", avalanche-lib {version('avalanche-lib')}" if EWCPlugin is not None else ", without Avalanche"
    print(
        f"\nOne thread of {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch "
        f"{version('torch')}{peer}, seed 2020, {datetime.date.today().isoformat()}."
    )


Member = tuple[str, str, dict[str, Any]]
MEMBERS: tuple[Member, ...] = (
    ("SI", "SI", {}),
    ("LwF", "LwF", {}),
    ("ERRandom", "ERRandom", {}),
    ("EWC", "EWC", {"ewc_samples": 16}),  # the Fisher is no part of an epoch
)

if __name__ == "__main__":
    main(sys.argv[1:])
