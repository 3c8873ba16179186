"""The walk over the stream: train a stage, evaluate every stage, write a checkpoint, go on.

After each stage the whole row of the matrix is evaluated. Everything random is derived from (seed, stage, name), and a
checkpoint at the end of each epoch holds all that the rest of the run depends on, so a run that was killed gives,
resumed, the bits of one that was not.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from recbole.data.transform import construct_transform
from torch import nn
from tqdm import tqdm

from recbole_cl import checkpoint, distributed, registry
from recbole_cl.config.folder import run_folder
from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.evaluator import Evaluator
from recbole_cl.evaluation.known import Known
from recbole_cl.evaluation.metrics import check_tasks
from recbole_cl.lock import hold
from recbole_cl.model.contract import contract, offers
from recbole_cl.model.state import grow_model, load_owned_state, owned_state
from recbole_cl.results.journal import Journal, open_folder, settings, versions
from recbole_cl.results.records import Records
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.parts.part_tuning import refuse_new_beginnings, with_trainable
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.stream.vocabulary import grow_optimizer
from recbole_cl.training.all_rows import refuse_serving, train_on_all_rows
from recbole_cl.training.base_run import keep_base, take_base
from recbole_cl.training.costs import note_costs
from recbole_cl.training.data_parallel import keep_alike
from recbole_cl.training.inputs import files_read
from recbole_cl.training.output import Output
from recbole_cl.training.passes import Save, make_pass
from recbole_cl.training.peak_memory import reset_peak
from recbole_cl.training.progress import Progress, StageStart
from recbole_cl.training.references import score_scratch_model, score_untrained_model
from recbole_cl.training.resume import go_on, loading, side_stores
from recbole_cl.training.run_state import RunState
from recbole_cl.training.stage_models import StageModels, build_model, prepare_stage
from recbole_cl.tree import clone_tree, tree_hash

LOGGER = logging.getLogger("recbole_cl")


class Runner:
    """Walks one model under one strategy over one stream.

    Args:
        config: The run's configuration.

    Attributes:
        model: The model as the last stage left it, after :meth:`run`.
        strategy: The strategies, with their state.
        state: The run as far as it has come, once it has begun.
        folder: The run's folder.
        only_trains: It scores and saves nothing: somebody else does with the model what is to be done.
    """

    model: Any = None
    state: RunState
    only_trains = False

    def __init__(self, config: Any) -> None:
        self.config = config
        self.strategy = self.strategies()
        self.folder = run_folder(config)
        self.number = 0  # of the newest checkpoint
        self.data = ""  # fingerprint of the stream
        self.files: dict[str, str | None] = {}  # what else is read, and its hashes
        self.store: str | None = None  # name of what is kept of the log
        self.output = Output(self.folder)

    def strategies(self) -> Composite:
        """Returns the strategies that were asked for, as new."""
        specs = self.config.strategy_specs()
        return Composite(with_trainable(self.config, [registry.strategies.get(name)(given) for name, given in specs]))

    # -- what the run has found out -------------------------------------------------------------------------------

    @property
    def stream(self) -> Stream:
        """The stream."""
        return self.state.stream

    @property
    def journal(self) -> Journal:
        """Results, curves, costs and warnings so far."""
        return self.state.journal

    @property
    def records(self) -> Records:
        """Every result of an evaluation."""
        return self.journal.records

    @property
    def evaluator(self) -> Evaluator:
        """Scores the model."""
        return self.state.evaluator

    @property
    def known(self) -> Known:
        """What the model has trained on."""
        return self.state.known

    def build_model(self, view: Any, randomness: ModelRandomness) -> nn.Module:
        """Returns a new model over a view, initialised from the given random state."""
        return build_model(self.config, view, randomness)

    # -- the run --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Runs or resumes, writes the results and returns them.

        Raises:
            RecBoleCLError: For everything a user can mend; the message names it.
        """
        group = distributed.start(self.config["device"])
        with group.announced(), contextlib.ExitStack() as held:
            if group.size > 1 and self.config["parity"]:
                raise ConfigError(
                    f"property 'parity' is {self.config['parity']!r}, which compares with one process of RecBole; "
                    f"start it without torchrun"
                )
            with group.together():
                if group.main:  # it holds the folder for all of them
                    held.enter_context(hold(self.folder, "run", nested=True))
                    open_folder(self.folder)
            return self._run()

    def _run(self) -> dict[str, Any]:
        refuse_serving(self.config)
        LOGGER.info("loading %s", self.config["dataset"])
        if self.config["reproducibility"]:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        construct_transform(self.config)  # it names its fields in the configuration, where models read them
        stream = build_stream(self.config)
        self.begin(stream)
        self.data, self.files = stream.fingerprint(), files_read(self.config)
        found = go_on(self) if self.config["resume"] else None
        if found is None:
            self.walk()
        more = bool(self.config["serve"]) and train_on_all_rows(self)
        result: dict[str, Any] = {}
        with distributed.current().together():
            finish = self.output.finish if self.state.main else lambda journal, _: journal.result(self.folder)
            result = finish(self.journal, found == len(stream) and not more)
        return result

    def walk(self, saved: dict[str, Any] | None = None) -> int:
        """Walks over the stages that are left after a checkpoint, all without one; returns the first of them."""
        self.store = self.output.keep(self.state, self.store)
        if saved is None and self.config["base_run"] is not None:
            saved = take_base(self)
        first = 0 if saved is None else int(saved["stage"] + (saved["phase"] == "done"))
        for index in range(first, len(self.stream)):
            inside = saved is not None and saved["phase"] == "train" and saved["stage"] == index
            self._stage(index, saved if inside else None)
        return first

    def begin(self, stream: Stream) -> RunState:
        """Takes a stream of which nothing has been trained; returns the run over it."""
        models = StageModels(self.config, stream, self.strategy, self.build_model)
        self.state = RunState.begin(self.config, self.strategy, stream, models)
        return self.state

    def standing(self, stage: int) -> StageContext:
        """Returns the context of the stage at which the run stands, with its model and what that has trained on."""
        ctx = self.state.models.context(stage, self.model, self.stream.view(stage, self.config["graph"]))
        ctx.known = self.known
        return ctx

    def train_stages(self, first: int) -> StageContext:
        """Trains the stages from one on; returns the last one's context. For whoever drives a run from outside."""
        for index in range(first, len(self.stream)):
            self._stage(index, None)
        return self.standing(len(self.stream) - 1)

    # -- a stage --------------------------------------------------------------------------------------------------

    def _stage(self, index: int, resumed: dict[str, Any] | None) -> None:
        """Trains a stage, or the rest of it, evaluates and saves."""
        stage = self.stream.stages[index]
        reset_peak(self.config["device"])
        started = time.perf_counter()
        ctx, randomness, fresh = self._enter(index, resumed)
        start = StageStart(fresh, self._begin_stage(ctx, resumed), randomness)
        passes = self.strategy.plan_stage(ctx)
        passes = contract(ctx.model).plan_stage(ctx, passes)
        refuse_new_beginnings(ctx, self.strategy.members, passes)
        worst = self.journal.worst(stage)
        progress = Progress(best_score=worst)
        if resumed is not None:
            with loading("checkpoint"):
                progress = Progress.of(resumed["progress"])
                ctx.load_state_dict(resumed["generators"])
        LOGGER.info(
            "stage %d/%d (%s): %d training targets, %d known users, %d known items",
            index + 1, len(self.stream), stage.name, len(stage.train), stage.n_users - 1, stage.n_items - 1,
        )  # fmt: skip
        begun, offset = time.perf_counter(), progress.seconds
        clock = lambda: offset + time.perf_counter() - begun  # noqa: E731

        def save(ctx: StageContext, progress: Progress, trainer: dict[str, Any]) -> None:
            inside = {"progress": progress.state_dict(), "trainer": trainer, "stage_start": start.state}
            self._save(ctx, "train", inside)

        for number in range(progress.number, len(passes)):
            if number != progress.number:
                progress, resumed = progress.next_pass(number, worst), None
            place = sum(not plan.auxiliary for plan in passes[:number])
            ctx = self._pass(ctx, passes[number], progress, start, place, clock, save, resumed)
        self.model = ctx.model
        if not passes:
            self.state.moments = {}
        ctx.known = self.known
        at_end = randomness.state_dict()
        with randomness.owned():
            self.strategy.end_stage(ctx)
        keep_alike(ctx, self.strategy, trained=False)
        trained = time.perf_counter()
        seconds = offset + trained - begun
        self._evaluate_all(ctx)
        scratch = self.config["scratch"] and not self.only_trains
        scratch_seconds = score_scratch_model(self.state, index) if scratch else 0.0
        self.state.models.previous = {"stage": index, "model": clone_tree(owned_state(ctx.model))}
        note_costs(self.state, ctx, seconds, time.perf_counter() - trained, scratch_seconds)
        self._save(ctx, "done")
        if index == 0 and self.config["keep_base"]:
            keep_base(self, ctx, at_end)
        LOGGER.info(
            "stage %d/%d done in %.1f s; %s",
            index + 1, len(self.stream), time.perf_counter() - started, self.journal.row(stage),
        )  # fmt: skip

    def _begin_stage(self, ctx: StageContext, resumed: dict[str, Any] | None) -> dict[str, Any]:
        """Prepares a stage; returns the state of model and strategies as it began."""
        if resumed is not None:
            with loading("checkpoint"):
                start: dict[str, Any] = resumed["stage_start"]
                load_owned_state(ctx.model, start["model"])
                self.strategy.load_state_dict(clone_tree(start["strategy"]))
        prepare_stage(ctx)
        if resumed is None:
            self.strategy.begin_stage(ctx)
            start = clone_tree({"model": owned_state(ctx.model), "strategy": self.strategy.state_dict()})
        return start

    def _pass(
        self,
        ctx: StageContext,
        plan: Pass,
        progress: Progress,
        start: StageStart,
        place: int,
        clock: Callable[[], float],
        save: Save,
        resumed: dict[str, Any] | None,
    ) -> StageContext:
        """Trains a pass of a stage; returns the stage with the trained model."""
        return make_pass(self.state, ctx, plan, progress, start, place, clock, save).train(resumed)

    # -- entering a stage -----------------------------------------------------------------------------------------

    def _enter(
        self, index: int, resumed: dict[str, Any] | None
    ) -> tuple[StageContext, ModelRandomness, dict[str, Any]]:
        """Builds the stage's model and brings everything into it that was learnt before."""
        stage, models = self.stream.stages[index], self.state.models
        view = self.stream.view(index, self.config["graph"])
        randomness = ModelRandomness(derive(self.config["seed"], index))
        old: Any = self.model
        in_place = old is not None and index > 0 and offers(old, "grow_in_place")
        model: Any = old if in_place else models.build(view, randomness)
        before, growth = self.stream.stages[max(index - 1, 0)], None
        users, items = (before.n_users, stage.n_users), (before.n_items, stage.n_items)
        if in_place:  # strategies see a model of the stage's size
            with randomness.owned():  # rows of new users and items may be drawn
                growth = model.grow_in_place(view, users, items)
        ctx = models.context(index, model, view)
        models.prepare(ctx, randomness)
        if index == 0 or resumed is not None:
            check_tasks(self.config, self.stream, model)
            self.strategy.check(self.config, model)
        fresh = clone_tree(owned_state(model)) if not in_place else {}
        if resumed is None and old is not None and index > 0:
            lost: list[str] = []
            if growth is None:
                with randomness.owned():
                    growth, lost = grow_model(old, model, users, items, self.config["new_rows"])
            if lost:
                self.journal.warn(f"stage {index + 1}: {', '.join(lost)} of the one before have no place in the model")
            if not growth.identity:
                self.strategy.grow(growth)
                self.state.moments = grow_optimizer(self.state.moments, growth)
        wanted = resumed is None and not self.only_trains and index + 1 < len(self.stream)
        if wanted and self._wanted(index, index + 1):
            score_untrained_model(self.state, index, view)
        self.model = model
        return ctx, randomness, fresh

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate_all(self, ctx: StageContext) -> None:
        """Fills the wanted cells of row t of the matrix; asserts by a hash that evaluation changed nothing."""
        before = tree_hash(owned_state(ctx.model), self.strategy.state_dict())
        quiet = None if self.config["show_progress"] and self.state.main else True  # None: no bar without a terminal
        words = f"stage {ctx.index + 1}/{len(self.stream)} evaluate"
        for stage in tqdm(self.stream.stages, desc=words, disable=quiet, leave=False):
            if self.only_trains or not stage.evaluable(ctx.index) or not self._wanted(ctx.index, stage.index):
                continue
            outcome = self.evaluator.evaluate(ctx, self.known, stage)
            mode = self.evaluator.mode("test") if stage.task.kind != "classification" else "labeled"
            self.journal.record(outcome, ctx.index, stage, mode)
            if stage.index == ctx.index:
                self.journal.record_exposure(outcome, stage)
        if tree_hash(owned_state(ctx.model), self.strategy.state_dict()) != before:
            raise RuntimeError(f"stage {ctx.index + 1}: evaluation changed the model or the strategy; it must be pure")

    def _wanted(self, trained: int, tested: int) -> bool:
        """Tells whether a cell of the matrix is asked for (``matrix_cells``)."""
        cells = self.config["matrix_cells"]
        if cells == "diagonal":
            return trained == tested
        return cells == "all" or trained == len(self.stream) - 1

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def saved_state(self, ctx: StageContext, phase: str, inside: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns what a checkpoint holds.

        Args:
            ctx: The stage.
            phase: ``train`` or ``done``.
            inside: In a stage: where its training stands (``progress``, ``trainer``, ``stage_start``).
        """
        return {
            "config": settings(self.config),
            "versions": versions(),
            "data": self.data,
            "files": self.files,
            "store": self.store,
            "stage": ctx.index,
            "phase": phase,
            "model": owned_state(ctx.model),
            "strategy": self.strategy.state_dict(),
            "side_stores": side_stores(ctx.model, self.strategy),
            "generators": ctx.state_dict(),
            "previous": self.state.models.previous,
            "carried": self.state.moments,
            "known": self.known.state_dict(),
            "journal": self.journal.state_dict(),
            **(inside or {}),
        }

    def _save(self, ctx: StageContext, phase: str, inside: Mapping[str, Any] | None = None) -> None:
        """Writes a checkpoint."""
        if self.only_trains:
            return
        if self.state.main:
            self.output.make_room()
        if self.config["saved"] is False:  # unset counts as wanted
            return
        self.number += 1
        state = self.saved_state(ctx, phase, inside)
        with distributed.current().together():
            if self.state.main:
                checkpoint.save(self.folder / "checkpoints", self.number, state, int(self.config["checkpoint_keep"]))

    def adopt(self, saved: dict[str, Any]) -> None:
        """Takes over where a checkpoint stands: what was found out and learnt; after a whole stage, its model, too."""
        self.take_up(saved)
        index = saved["stage"]
        if saved["phase"] == "done":
            view = self.stream.view(index, self.config["graph"])
            ctx = self.state.models.fresh(index, view, ModelRandomness(derive(self.config["seed"], index)))
            load_owned_state(ctx.model, saved["model"])
            self.strategy.load_state_dict(saved["strategy"])
            self.model = ctx.model

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint knows beside models and strategies."""
        self.journal.load_state_dict(saved["journal"])
        self.state.models.previous, self.state.moments = saved["previous"], saved["carried"]
        self.known.load_state_dict(saved["known"])
