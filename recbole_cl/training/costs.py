"""What a stage cost: seconds, memory, parameters, and what the model and the strategies tell of it."""

from __future__ import annotations

import importlib
from typing import Any

from recbole_cl.model.contract import contract
from recbole_cl.model.state import count_parameters
from recbole_cl.strategy.context import StageContext
from recbole_cl.training.peak_memory import peak_megabytes
from recbole_cl.training.run_state import RunState


def import_before_the_clock(config: Any) -> None:
    """Imports what the first pass of a process would import inside its seconds.

    The first optimiser of a process imports ``torch._dynamo`` with some 800 modules, the first schedule transformers:
    seconds, which no stage of the run has cost.

    Args:
        config: ``warmup`` and ``lr_schedule`` are read.
    """
    importlib.import_module("torch._dynamo")
    if config["warmup"] or config["lr_schedule"] != "constant":
        importlib.import_module("transformers.optimization")


def note_costs(run: RunState, ctx: StageContext, train: float, after: float, scratch: float) -> None:
    """Writes the stage's entry of the costs, and what the model tells beside the matrix.

    Args:
        run: The run; its journal takes the entry.
        ctx: The trained stage.
        train: Seconds of its training, also in the processes that were killed before this one.
        after: Seconds of what came after, evaluation and the scratch model.
        scratch: Seconds of the scratch model.
    """
    trainable, parameters, size = count_parameters(ctx.model)
    run.journal.costs.append(
        {
            "stage": ctx.index,
            "seconds": train + after,
            "train_seconds": train,
            "eval_seconds": after - scratch,
            "scratch_seconds": scratch,
            "peak_memory_mb": peak_megabytes(run.config["device"]),
            "trainable_parameters": trainable,
            "parameters": parameters,
            "model_bytes": size,
            **contract(ctx.model).stage_costs(),
            **run.strategy.stage_costs(ctx),
        }
    )
    run.journal.add_report(ctx.stage, {run.config["model"]: contract(ctx.model).report()})
    run.journal.add_report(ctx.stage, run.strategy.reports(ctx))
