"""Runs of a model over the planted-drift stream, watched, for the contract of models; scores had by every way."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_cl.config import CLConfig
from recbole_cl.evaluation.ranking import Way, scores_of, scores_of_prefixes
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.stage import Targets
from recbole_cl.testing.contract import SMALL
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.costs import note_costs
from recbole_cl.training.run_state import RunState
from recbole_cl.training.runner import Runner
from recbole_cl.tree import answering

ROWS = 12
"""Rows that are asked for scores."""


@dataclass
class Moment:
    """What the walk showed at a moment: the answers of the model to some rows, and its state.

    Args:
        targets: The rows.
        scores: Their scores of all items, shape ``[B, n_items]``.
        n_users: Users that the model has rows for.
        n_items: Items that the model has rows for.
    """

    targets: Targets
    scores: torch.Tensor
    n_users: int
    n_items: int


@dataclass
class ModelRuns:
    """Runs of a model over the stream, made when a test first asks for them.

    Args:
        model: Name or class.
        folder: Where data and runs are put.
        settings: Properties besides the contract's own.
        moving: Users change their cluster of items from stage to stage.
    """

    model: Any
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    moving: bool = False
    ended: dict[int, Moment] = field(default_factory=dict)
    begun: dict[int, Moment] = field(default_factory=dict)
    drew: list[str] = field(default_factory=list)
    _toy: PlantedDrift | None = None
    _whole: Runner | None = None

    @property
    def toy(self) -> PlantedDrift:
        """The stream."""
        if self._toy is None:
            self._toy = write_planted_drift(self.folder, moving=self.moving)
        return self._toy

    def runner(self, name: str, **changed: Any) -> Runner:
        """Returns a runner into the folder ``name``."""
        given = {**SMALL, "metrics": ["Hit", "NDCG"], **self.toy.settings(), "checkpoint_steps": 2, **self.settings}
        given |= {"output_dir": str(self.folder / name), **changed}
        config = CLConfig(model=self.model, dataset=self.toy.name, config_dict=given)
        config["saved"] = True
        return Runner(config)

    @property
    def whole(self) -> Runner:
        """A run to the end, in which the ends and beginnings of stages and the global generators were watched."""
        if self._whole is None:
            runner = self.runner("whole")
            before = _global_states()
            with self._watched():
                runner.run()
            self.drew = [name for name, state in _global_states().items() if state != before[name]]
            self._whole = runner
        return self._whole

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes what the model answers as stages begin and end; the run does not notice."""
        with pytest.MonkeyPatch.context() as patch:
            begin, note = Runner._begin_stage, note_costs

            def begun(runner: Runner, ctx: StageContext, resumed: Any) -> Any:
                if ctx.index - 1 in self.ended:  # before the model prepares the stage
                    self.begun[ctx.index] = moment(ctx, self.ended[ctx.index - 1].targets)
                return begin(runner, ctx, resumed)

            def ended(run: RunState, ctx: StageContext, *costs: Any) -> None:
                note(run, ctx, *costs)
                self.ended[ctx.index] = moment(ctx, ctx.stage.test[np.arange(min(ROWS, len(ctx.stage.test)))])

            patch.setattr(Runner, "_begin_stage", begun)
            patch.setattr("recbole_cl.training.runner.note_costs", ended)
            yield

    @property
    def ctx(self) -> StageContext:
        """The last stage, with the trained model in it."""
        runner = self.whole
        index = len(runner.stream) - 1
        view = runner.stream.view(index, runner.config["graph"])
        ctx = runner.state.models.context(index, runner.model, view)
        ctx.known = runner.known
        return ctx

    def fresh(self, seed: int = 99) -> StageContext:
        """Returns the last stage with a new model in it, initialised from another seed."""
        runner = self.whole
        index = len(runner.stream) - 1
        view = runner.stream.view(index, runner.config["graph"])
        return runner.state.models.fresh(index, view, ModelRandomness(seed))

    def interrupted(self) -> Runner:
        """Returns a run that broke off inside the second stage, before a checkpoint, and was taken up by another."""
        save, left = Runner._save, {"saves": 2}

        def stop(runner: Runner, ctx: StageContext, phase: str, inside: Any = None) -> None:
            if ctx.index == 1 and phase == "train":
                left["saves"] -= 1
                if left["saves"] < 0:
                    raise KeyboardInterrupt
            save(runner, ctx, phase, inside)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runner, "_save", stop)
            with contextlib.suppress(KeyboardInterrupt):
                self.runner("broken").run()
                raise AssertionError("the second stage has fewer than three checkpoints; give it more epochs")
        again = self.runner("broken", resume=True)
        again.run()
        return again


def _global_states() -> dict[str, str]:
    """Returns the states of the global generators."""
    return {
        "torch": str(torch.get_rng_state().sum()) + str(hash(torch.get_rng_state().numpy().tobytes())),
        "numpy": str(hash(np.random.get_state(legacy=False)["state"]["key"].tobytes())),
        "python": str(hash(random.getstate())),
    }


def rows_of(ctx: StageContext, targets: Targets) -> Interaction:
    """Returns rows as the evaluator makes them."""
    batch = ctx.batcher.rows(targets, stage=ctx.index, evaluation=True)
    length = ctx.config["ITEM_LIST_LENGTH_FIELD"]
    if length in batch:
        batch.interaction[length] = batch[length].clamp(min=1)
    return batch.to(ctx.device)


@torch.no_grad()
def all_scores(ctx: StageContext, targets: Targets, way: Way = Way.FULL) -> torch.Tensor:
    """Returns the scores of all items, shape ``[B, n_items]``, had by a way; padding has none."""
    with answering(ctx.model), ModelRandomness(0).owned():
        if way is Way.PREFIXES:
            parts = list(scores_of_prefixes(ctx.model, ctx.batcher, targets))
        else:
            items = torch.arange(ctx.batcher.n_items, device=ctx.device).expand(len(targets), -1)
            candidates = items if way is Way.GIVEN else None
            parts = list(scores_of(way, ctx.model, ctx.batcher, rows_of(ctx, targets), candidates))
    out = torch.cat([scores.float() for _, scores in parts]).cpu()
    out[:, 0] = -torch.inf
    return out


def moment(ctx: StageContext, targets: Targets) -> Moment:
    """Returns what the model answers now."""
    scores = torch.zeros(0) if ctx.stage.task.kind != "next_item" else all_scores(ctx, targets)
    return Moment(targets, scores, ctx.batcher.n_users, ctx.batcher.n_items)


def assert_close(one: torch.Tensor, two: torch.Tensor, tolerance: float, message: str) -> None:
    """Asserts that scores are alike, relative to the spread of the finite ones."""
    finite = torch.isfinite(one) & torch.isfinite(two)
    assert bool((torch.isfinite(one) == torch.isfinite(two)).all()), f"{message}: not the same items have scores"
    spread = float(one[finite].abs().max().clamp(min=1e-12))
    gap = float((one - two)[finite].abs().max()) if bool(finite.any()) else 0.0
    assert gap <= tolerance * spread, f"{message}: scores differ by {gap:.2e}, the largest is {spread:.2e}"
