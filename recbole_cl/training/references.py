"""Models beside the one that walks the stream: an untrained one and one of a stage alone, for its summaries."""

from __future__ import annotations

import time
from typing import Any

from recbole.utils import ModelType

from recbole_cl.evaluation.evaluator import Evaluator
from recbole_cl.evaluation.known import Known
from recbole_cl.model.contract import contract
from recbole_cl.model.state import owned_state
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import Pass
from recbole_cl.training.passes import make_pass
from recbole_cl.training.progress import Progress, StageStart
from recbole_cl.training.run_state import RunState
from recbole_cl.training.stage_models import prepare_stage
from recbole_cl.tree import clone_tree


def score_untrained_model(run: RunState, index: int, view: Any) -> None:
    """Scores an untrained model on the next stage: b[s] of forward transfer, which needs R[s-1, s].

    Args:
        run: The run; its journal takes the scores.
        index: The stage that begins, not the last one.
        view: RecBole's dataset at the stage.
    """
    config, following = run.config, run.stream.stages[index + 1]
    if config["fwt_reference"] != "untrained" or not following.evaluable(index):
        return
    if config["MODEL_TYPE"] == ModelType.TRADITIONAL:
        return  # a memory-based model has no untrained state
    ctx = run.models.fresh(index, view, ModelRandomness(derive(config["seed"], index, "reference")))
    prepare_stage(ctx)
    plain = Evaluator(config, run.stream, Composite([]))
    known = Known.everything(run.stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
    run.journal.record_reference(plain.evaluate(ctx, known, following), following)


def score_scratch_model(run: RunState, index: int) -> float:
    """Trains a model on a stage alone and keeps its scores on the stage.

    Args:
        run: The run; its journal takes the scores.
        index: The stage.

    Returns:
        The seconds that it took.
    """
    begun, config = time.perf_counter(), run.config
    alone = RunState.begin(config, Composite([]), run.stream)  # its curves are nobody's
    randomness = ModelRandomness(derive(config["seed"], index, "scratch"))
    ctx = alone.models.fresh(index, run.stream.view(index, "stage"), randomness)
    prepare_stage(ctx)
    start = StageStart({}, clone_tree({"model": owned_state(ctx.model), "strategy": {}}), randomness)
    worst = run.journal.worst(ctx.stage)
    progress = Progress(best_score=worst)
    plan = Pass("scratch", init="previous", data="stage", graph=config["graph"], untrained=True)
    for number, each in enumerate(contract(ctx.model).plan_stage(ctx, [plan])):
        progress = progress if number == 0 else progress.next_pass(number, worst)
        ctx = make_pass(alone, ctx, each, progress, start).train()
    if ctx.stage.evaluable(index):
        run.journal.record_scratch(alone.evaluator.evaluate(ctx, alone.known, ctx.stage), ctx.stage)
    return time.perf_counter() - begun
