"""The walk over the stream: train a stage, evaluate every stage, write a checkpoint, go on.

After each stage the whole row of the matrix is evaluated. Everything random is derived from (seed, stage, name), and a
checkpoint at the end of each epoch holds all that the rest of the run depends on, so a run that was killed gives,
resumed, the bits of one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recbole.data.transform import construct_transform
from recbole.utils import ModelType, early_stopping
from torch import nn
from tqdm import tqdm

from recbole_cl import checkpoint, distributed
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.evaluation.records import Records
from recbole_cl.evaluator import Evaluator, Known, clear_caches, computed_metrics
from recbole_cl.journal import Journal, open_folder, run_folder, settings
from recbole_cl.memory import peak_megabytes, reset_peak
from recbole_cl.model.state import clone_tree, count_parameters, grow_model, load_owned_state, owned_state, tree_hash
from recbole_cl.registry import strategies
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.shares import keep_alike
from recbole_cl.strategy.base import STEP_HOOKS, Composite, Pass, StageContext, overrides
from recbole_cl.strategy.trainable import refuse_new_beginnings, with_trainable
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.stage import Stage, Stream, Targets
from recbole_cl.stream.task_loader import TaskLoader
from recbole_cl.stream.vocabulary import grow_optimizer
from recbole_cl.trainer import HookedTrainer, Watched, load_optimizer_by_name, make_trainer, optimizer_by_name

LOGGER = logging.getLogger("recbole_cl")


@dataclass
class _Progress:
    """Where a stage's training stands; part of every checkpoint."""

    number: int = 0  # of the pass
    epoch: int = 0  # epochs of the pass that are complete
    stopped: bool = False
    best_score: float = -math.inf
    waited: int = 0
    best: dict[str, Any] | None = None
    best_targets: int | None = None
    targets: int = 0  # training targets seen in this stage
    seconds: float = 0.0
    step: int = 0
    epoch_start: int = 0  # step at which the running epoch began
    partial_loss: Any = None  # loss of the batches of an unfinished epoch
    terms: dict[str, list[float]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def of(cls, state: dict[str, Any]) -> _Progress:
        progress = cls(**state)
        if isinstance(progress.partial_loss, list):
            progress.partial_loss = tuple(progress.partial_loss)
        return progress


class Runner:
    """Walks one model under one strategy over one stream.

    Args:
        config: The run's configuration.

    Attributes:
        model: The model as the last stage left it, after :meth:`run`.
        strategy: The strategies, with their state.
        stream: The stream.
        journal: Results, curves, costs and warnings so far.
        folder: The run's folder.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        asked = [strategies.get(name)(params) for name, params in config.strategy_specs()]
        self.strategy = Composite(with_trainable(config, asked))
        self.stream: Stream
        self.model: nn.Module
        self.folder = run_folder(config)
        self.journal: Journal
        self.known: Known
        self._number = 0
        self._previous: dict[str, Any] | None = None
        self._carried: dict[str, Any] = {}

    # -- the run --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Runs or resumes, writes the results and returns them.

        Raises:
            RecBoleCLError: For everything a user can mend; the message names it.
        """
        group = distributed.start(self.config["device"])
        with group.announced():
            if group.size > 1 and self.config["parity"]:
                raise ConfigError(
                    f"property 'parity' is {self.config['parity']!r}, which compares with one process of RecBole; "
                    f"start it without torchrun"
                )
            with group.together():
                if group.main:
                    open_folder(self.folder, self.config["resume"])
            return self._run()

    def _run(self) -> dict[str, Any]:
        LOGGER.info("loading %s", self.config["dataset"])
        if self.config["reproducibility"]:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        construct_transform(self.config)  # it names its fields in the configuration, where models read them
        self.stream = build_stream(self.config)
        self._data = self.stream.fingerprint()
        self.journal = Journal(self.config, self.stream)
        self.evaluator = Evaluator(self.config, self.stream, self.strategy)
        self.known = Known.nothing(self.stream.table)
        state = self._load() if self.config["resume"] else None
        first = 0
        if state is not None:
            first = state["stage"] + (state["phase"] == "done")
        for index in range(first, len(self.stream)):
            resumed = state if state is not None and state["phase"] == "train" and state["stage"] == index else None
            self._stage(index, resumed)
        if first == len(self.stream) and state is not None:
            LOGGER.info("nothing is left to do: the run in %s is complete", self.folder)
        result: dict[str, Any] = {}
        with distributed.current().together():
            result = self.journal.write(self.folder) if self.main else self.journal.result(self.folder)
        return result

    @property
    def main(self) -> bool:
        """True in the process that writes files and progress bars."""
        return distributed.current().main

    @property
    def records(self) -> Records:
        """Every result of an evaluation."""
        return self.journal.records

    def _stage(self, index: int, resumed: dict[str, Any] | None) -> None:
        stage = self.stream.stages[index]
        reset_peak(self.config["device"])
        started = time.perf_counter()
        ctx, randomness, fresh = self._enter(index, resumed)
        if resumed is None:
            stage_start = {
                "model": clone_tree(owned_state(ctx.model)),
                "strategy": clone_tree(self.strategy.state_dict()),
            }
        else:
            stage_start = resumed["stage_start"]
            load_owned_state(ctx.model, stage_start["model"])
            self.strategy.load_state_dict(clone_tree(stage_start["strategy"]))
        passes = self.strategy.plan_stage(ctx)
        refuse_new_beginnings(self.strategy.members, passes)
        progress = _Progress(best_score=self._worst(stage))
        if resumed is not None:
            progress = _Progress.of(resumed["progress"])
            ctx.load_state_dict(resumed["generators"])
        LOGGER.info(
            "stage %d/%d (%s): %d training targets, %d known users, %d known items",
            index + 1, len(self.stream), stage.name, len(stage.train), stage.n_users - 1, stage.n_items - 1,
        )  # fmt: skip
        begun = time.perf_counter()
        offset = progress.seconds
        for number in range(progress.number, len(passes)):
            if number != progress.number:
                progress = _Progress(
                    number, best_score=self._worst(stage), targets=progress.targets, seconds=progress.seconds
                )
                resumed = None
            clock = lambda: offset + time.perf_counter() - begun  # noqa: E731
            place = sum(not plan.aside for plan in passes[:number])
            ctx = self._pass(ctx, passes[number], progress, randomness, fresh, stage_start, resumed, clock, place)
        self.model = ctx.model
        if not passes:
            self._carried = {}
        ctx.known = self.known
        with randomness.owned():
            self.strategy.end_stage(ctx)
        keep_alike(ctx, self.strategy, trained=False)
        trained = time.perf_counter()
        seconds = offset + trained - begun
        self._evaluate_all(ctx)
        scratch_seconds = self._scratch(index) if self.config["scratch"] else 0.0
        self._previous = {"stage": index, "model": clone_tree(owned_state(ctx.model))}
        trainable, parameters, size = count_parameters(ctx.model)
        self.journal.costs.append(
            {
                "stage": index,
                "seconds": seconds + time.perf_counter() - trained,
                "train_seconds": seconds,
                "eval_seconds": time.perf_counter() - trained - scratch_seconds,
                "scratch_seconds": scratch_seconds,
                "peak_memory_mb": peak_megabytes(self.config["device"]),
                "trainable_parameters": trainable,
                "parameters": parameters,
                "model_bytes": size,
                **(ctx.model.stage_costs() if hasattr(ctx.model, "stage_costs") else {}),
                **self.strategy.stage_costs(ctx),
            }
        )
        self._save(ctx, "done", None, None, stage_start)
        LOGGER.info(
            "stage %d/%d done in %.1f s; %s",
            index + 1, len(self.stream), time.perf_counter() - started, self.journal.row(stage),
        )  # fmt: skip

    # -- entering a stage -----------------------------------------------------------------------------------------

    def build_model(self, view: Any, randomness: ModelRandomness) -> nn.Module:
        """Returns a new model over a view, initialised from the given random state."""
        with randomness.owned():
            model = self.config.model_class(self.config, view)
        return model.to(self.config["device"])

    def _prepare(self, ctx: StageContext, randomness: ModelRandomness) -> None:
        """Lets the strategies add their structure; what they initialise is drawn from the run's own state."""
        with randomness.owned():
            self.strategy.prepare_model(ctx)
        ctx.model.to(self.config["device"])

    def _context(self, index: int, model: nn.Module, view: Any) -> StageContext:
        stage = self.stream.stages[index]
        batcher = Batcher(self.config, self.stream, view, stage.n_users, stage.n_items)
        ctx = StageContext(self.config, self.stream, index, model, view, batcher, torch.device(self.config["device"]))
        ctx.previous_factory = self._previous_model
        ctx.model_factory = self._frozen_model
        return ctx

    def _enter(
        self, index: int, resumed: dict[str, Any] | None
    ) -> tuple[StageContext, ModelRandomness, dict[str, Any]]:
        """Builds the stage's model and brings everything into it that was learnt before."""
        stage = self.stream.stages[index]
        view = self.stream.view(index, self.config["graph"])
        randomness = ModelRandomness(derive(self.config["seed"], index))
        old: Any = getattr(self, "model", None)
        in_place = old is not None and index > 0 and hasattr(old, "grow_in_place")
        model: Any = old if in_place and old is not None else self.build_model(view, randomness)
        ctx = self._context(index, model, view)
        self._prepare(ctx, randomness)
        if index == 0 or resumed is not None:
            self._check_tasks(model)
            self.strategy.check(self.config, model)
        fresh = clone_tree(owned_state(model)) if not in_place else {}
        if resumed is None and old is not None and index > 0:
            before = self.stream.stages[index - 1]
            users, items = (before.n_users, stage.n_users), (before.n_items, stage.n_items)
            lost: list[str] = []
            with randomness.owned():  # rows of new users and items may be drawn
                if in_place:
                    growth = model.grow_in_place(view, users, items)
                else:
                    growth, lost = grow_model(old, model, users, items, self.config["new_rows"])
            if lost:
                self.journal.warn(f"stage {index + 1}: {', '.join(lost)} of the one before have no place in the model")
            if not growth.identity:
                self.strategy.grow(growth)
                self._carried = grow_optimizer(self._carried, growth)
        if resumed is None:
            self._reference(index, view)
        self.model = model
        return ctx, randomness, fresh

    def _previous_model(self) -> nn.Module | None:
        if self._previous is None:
            return None
        model, _, _ = self._frozen_model(int(self._previous["stage"]), self._previous["model"])
        return model

    def _frozen_model(self, index: int, state: Mapping[str, Any]) -> tuple[nn.Module, Any, Batcher]:
        """Returns a model with a stage's numbers of rows and the given weights, frozen; its view and its batcher."""
        view = self.stream.view(index, self.config["graph"])
        randomness = ModelRandomness(derive(self.config["seed"], index, "previous"))
        ctx = self._context(index, self.build_model(view, randomness), view)
        self._prepare(ctx, randomness)
        load_owned_state(ctx.model, state)
        for p in ctx.model.parameters():
            p.requires_grad_(False)
        return ctx.model.eval(), view, ctx.batcher

    def _check_tasks(self, model: Any) -> None:
        """Refuses a stage whose task the model cannot answer, or whose primary metric nobody computes."""
        for stage in self.stream.stages:
            computed, primary = computed_metrics(self.config, stage.task), self.journal.primary(stage)
            if primary not in computed:
                raise ConfigError(
                    f"stage {stage.index + 1} ({stage.name}): its primary metric {primary!r} is not computed; the task "
                    f"{stage.task.name!r} has {', '.join(computed)}"
                )
            if stage.task.kind == "classification" and not hasattr(model, "predict_task"):
                raise ConfigError(
                    f"model: {self.config['model']} has no predict_task(batch, task), which the task "
                    f"{stage.task.name!r} (classification) of stage {stage.index + 1} needs"
                )

    def _worst(self, stage: Stage) -> float:
        return -math.inf if self.journal.bigger(stage) else math.inf

    # -- one pass -------------------------------------------------------------------------------------------------

    def _pass(
        self,
        ctx: StageContext,
        plan: Pass,
        progress: _Progress,
        randomness: ModelRandomness,
        fresh: dict[str, Any],
        stage_start: dict[str, Any],
        resumed: dict[str, Any] | None,
        clock: Callable[[], float],
        place: int = 0,
    ) -> StageContext:
        config, stage_randomness = self.config, randomness
        if plan.aside:
            randomness = ModelRandomness(derive(config["seed"], ctx.index, f"aside/{plan.name}"))
        if plan.graph is not None and plan.graph != config["graph"]:
            ctx = self._with_view(ctx, plan.graph)
        targets = plan.data if isinstance(plan.data, Targets) else self.stream.trained_targets(ctx.index, plan.data)
        if resumed is None:
            self._initialise(ctx, plan, progress.number, randomness, fresh, stage_start)
            self._learn(ctx, targets)  # a checkpoint holds what was learnt
        ctx.pass_, ctx.epoch, ctx.step = plan, progress.epoch, progress.step
        self.strategy.begin_pass(ctx)
        make = TaskLoader.over if plan.mix_tasks else make_loader
        ctx.loader = loader = make(ctx, targets, f"{'aside' if plan.aside else place}/{plan.name}")
        scale = config["stage_lr_scale"]
        if isinstance(scale, (list, tuple)):
            scale = scale[min(ctx.index, len(scale) - 1)]
        elif ctx.index == 0:
            scale = 1.0
        rate = config["learning_rate"] * scale * plan.lr_scale
        own_trainer = getattr(ctx.model, "stage_trainer", None)
        if own_trainer is not None and distributed.current().size > 1:
            raise ConfigError(
                f"model: {config['model']} cannot be trained by several processes: it trains its stages by itself; "
                f"start it without torchrun"
            )
        if own_trainer is not None and self.strategy.steps:
            names = ", ".join(s.name for s in self.strategy.hooked(*STEP_HOOKS))
            raise ConfigError(
                f"strategy: {names} cannot serve the model {config['model']}, which trains its stages by itself: there "
                f"are no optimiser steps to take part in; use FineTune, FullRetrain, Joint, Scratch or Pretrain"
            )
        trainer = own_trainer(ctx, rate) if own_trainer is not None else make_trainer(ctx, self.strategy, rate)
        hooked = trainer if isinstance(trainer, HookedTrainer) else None
        continues = plan.init == "previous" or (plan.init == "stage_start" and place == 0)
        if resumed is None and hooked is not None and config["stage_optimizer"] == "carry" and continues:
            load_optimizer_by_name(hooked, ctx.model, self.strategy, self._carried)
        epochs = plan.epochs if plan.epochs is not None else int(getattr(trainer, "epochs", config["epochs"]))
        if config["train_neg_sample_args"].get("dynamic", False):
            loader.get_model(ctx.model)

        def save(phase: str) -> None:
            progress.step, progress.seconds = ctx.step, clock()
            state = self._trainer_state(trainer, ctx, loader, randomness)
            if plan.aside:
                state["stage_randomness"] = stage_randomness.state_dict()
            self._save(ctx, phase, progress, state, stage_start)

        if hooked is not None and config["checkpoint_steps"]:
            done = {"steps": 0}

            def after_batch() -> None:
                done["steps"] += 1
                if done["steps"] % config["checkpoint_steps"] == 0:
                    progress.partial_loss, progress.terms = hooked.partial_loss, ctx.terms
                    save("train")

            hooked.after_batch = after_batch
        if resumed is not None:
            load_owned_state(ctx.model, resumed["model"])
            self.strategy.load_state_dict(clone_tree(resumed["strategy"]))
            self._load_trainer_state(trainer, ctx, loader, randomness, resumed["trainer"])
            if plan.aside:
                stage_randomness.load_state_dict(resumed["trainer"]["stage_randomness"])
            ctx.terms = {k: list(v) for k, v in progress.terms.items()}
            if hooked is not None:
                hooked.resumed_loss = progress.partial_loss
        while progress.epoch < epochs and not progress.stopped:
            ctx.epoch = progress.epoch
            if progress.partial_loss is None:
                ctx.terms, progress.epoch_start = {}, ctx.step
            told = f"stage {ctx.index + 1}/{len(self.stream)} {plan.name} epoch {progress.epoch}"
            watched = Watched(loader, None if config["show_progress"] and self.main else True, told)
            with randomness.owned():
                if hooked is not None and progress.partial_loss is None:
                    hooked.begin_epoch(progress.epoch)
                loss = (
                    hooked._train_epoch(watched, progress.epoch)
                    if hooked is not None
                    else trainer.train_epoch(watched, progress.epoch)
                )
            keep_alike(ctx, self.strategy, loader.state_dict(), randomness.state_dict(), ctx.state_dict())
            progress.partial_loss = None
            progress.epoch += 1
            progress.targets += loader.n_targets
            self._end_epoch(ctx, plan, progress, loss, clock)
            progress.terms = {}
            save("train")
        if progress.best is not None:
            load_owned_state(ctx.model, progress.best["model"])
            self.strategy.load_state_dict(clone_tree(progress.best["strategy"]))
            clear_caches(ctx.model)
        if not plan.aside:
            moments = optimizer_by_name(hooked, ctx.model, self.strategy) if hooked is not None else {}
            self._carried = clone_tree(moments)
        with randomness.owned():
            self.strategy.end_pass(ctx)
        return ctx

    def _with_view(self, ctx: StageContext, graph: str) -> StageContext:
        """Makes the model again over another graph, with the same weights."""
        view = self.stream.view(ctx.index, graph)
        randomness = ModelRandomness(derive(self.config["seed"], ctx.index, f"graph/{graph}"))
        model = self.build_model(view, randomness)
        new = self._context(ctx.index, model, view)
        self._prepare(new, randomness)
        load_owned_state(model, owned_state(ctx.model))
        new._generators = ctx._generators
        return new

    def _initialise(
        self,
        ctx: StageContext,
        plan: Pass,
        number: int,
        randomness: ModelRandomness,
        fresh: dict[str, Any],
        stage_start: dict[str, Any],
    ) -> None:
        if plan.init == "stage_start":
            load_owned_state(ctx.model, stage_start["model"])
        elif plan.init == "fresh":
            self.known = Known.nothing(self.stream.table)
            if number == 0 and fresh:  # a model that grows in place has no fresh state at hand
                load_owned_state(ctx.model, fresh)
            else:
                model = self.build_model(ctx.view, randomness)
                self._prepare(self._context(ctx.index, model, ctx.view), randomness)
                load_owned_state(ctx.model, owned_state(model))
        elif plan.init != "previous":
            raise ConfigError(f"Pass.init: {plan.init!r} is none of previous, stage_start, fresh")
        clear_caches(ctx.model)

    def _learn(self, ctx: StageContext, targets: Targets) -> None:
        if self.config["parity"]:  # RecBole scores what it never trained on by its random row
            self.known = Known.everything(self.stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
            return
        sequential = self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        labels = None
        columns = self.stream.dataset.inter_feat
        if ctx.stage.task.kind == "value" and self.config["LABEL_FIELD"] in columns:
            labels = columns[self.config["LABEL_FIELD"]].numpy()[targets.position]
        self.known.learn(self.stream.table, targets, sequential, labels)
        if self.config["valid_split"] == "random":
            # Randomly drawn validation targets lie inside the training period: what occurs there has been seen (ADER).
            self.known.learn(self.stream.table, ctx.stage.valid, sequential, None)

    def _end_epoch(
        self, ctx: StageContext, plan: Pass, progress: _Progress, loss: Any, clock: Callable[[], float]
    ) -> None:
        """Validates, keeps the best snapshot, decides on stopping, writes the curve."""
        config, metric = self.config, self.journal.primary(ctx.stage)
        valid: dict[str, float] | None = None
        improved = False
        wanted = plan.early_stopping and config["eval_step"] > 0 and progress.epoch % config["eval_step"] == 0
        if wanted and len(ctx.stage.valid):
            valid = self.evaluator.evaluate(ctx, self.known, ctx.stage, "valid").metrics
            score = valid.get(metric)
            if score is not None and plan.mix_tasks:
                score = self._mean_score(ctx, score)
            if score is not None:
                progress.best_score, progress.waited, progress.stopped, improved = early_stopping(
                    score, progress.best_score, progress.waited, config["stopping_step"], self.journal.bigger(ctx.stage)
                )
                if improved:
                    progress.best = {
                        "model": clone_tree(owned_state(ctx.model)),
                        "strategy": clone_tree(self.strategy.state_dict()),
                    }
                    progress.best_targets = progress.targets
        # RecBole sums over the batches of an epoch; the curve tells the mean, as it does for the strategies' terms.
        batches = max(ctx.step - progress.epoch_start, 1)
        train_loss = None if loss is None else float(sum(loss) if isinstance(loss, tuple) else loss) / batches
        point = {
            "stage": ctx.index,
            "pass": plan.name,
            "epoch": progress.epoch - 1,
            "targets": progress.targets,
            "seconds": clock(),
            "train_loss": train_loss,
            "terms": {name: total / max(count, 1) for name, (total, count) in sorted(ctx.terms.items())},
            "valid": valid or None,
            "best": improved,
        }
        self.journal.curves.append(point)
        told = "" if not valid else f", {metric} {valid.get(metric, float('nan')):.4f}{' *' if improved else ''}"
        LOGGER.info(
            "  %s epoch %d: loss %s%s",
            plan.name,
            progress.epoch - 1,
            "-" if train_loss is None else f"{train_loss:.4f}",
            told,
        )

    def _mean_score(self, ctx: StageContext, own: float) -> float:
        """Returns the mean of the tasks' primary metrics on their validation targets, for a pass that trains them all.

        Args:
            ctx: The stage.
            own: That of the stage's own task.
        """
        scores = [own]
        for stage in self.stream.stages[: ctx.index]:
            if len(stage.valid) and self.journal.bigger(stage) == self.journal.bigger(ctx.stage):
                metrics = self.evaluator.evaluate(ctx, self.known, stage, "valid").metrics
                scores.append(metrics.get(self.journal.primary(stage), own))
        return sum(scores) / len(scores)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate_all(self, ctx: StageContext) -> None:
        """Fills row t of the matrix; asserts by a hash that evaluation changed nothing."""
        online = [s for s in self.strategy.members if overrides(s, "adjust_scores")]
        kept = clone_tree(self.strategy.state_dict()) if online else None
        before = tree_hash(owned_state(ctx.model), self.strategy.state_dict())
        quiet = None if self.config["show_progress"] and self.main else True  # None: no bar where stderr is no terminal
        told = f"stage {ctx.index + 1}/{len(self.stream)} evaluate"
        for stage in tqdm(self.stream.stages, desc=told, disable=quiet, leave=False):
            if not stage.evaluable(ctx.index):
                continue
            outcome = self.evaluator.evaluate(ctx, self.known, stage)
            if kept is not None:
                self.strategy.load_state_dict(clone_tree(kept))
            mode = self.evaluator.mode("test") if stage.task.kind != "classification" else "labeled"
            self.journal.record(outcome, ctx.index, stage, mode)
            if stage.index == ctx.index:
                self.journal.record_exposure(outcome, stage)
        if tree_hash(owned_state(ctx.model), self.strategy.state_dict()) != before:
            raise RuntimeError(f"stage {ctx.index + 1}: evaluation changed the model or the strategy; it must be pure")

    def _reference(self, index: int, view: Any) -> None:
        """Scores an untrained model on the next stage: b[s] of forward transfer."""
        if self.config["fwt_reference"] != "untrained" or index + 1 >= len(self.stream):
            return
        if self.config["MODEL_TYPE"] == ModelType.TRADITIONAL:
            return  # a memory-based model has no untrained state
        following = self.stream.stages[index + 1]
        if not following.evaluable(index):
            return
        randomness = ModelRandomness(derive(self.config["seed"], index, "reference"))
        model = self.build_model(view, randomness)
        ctx = self._context(index, model, view)
        self._prepare(ctx, randomness)
        plain = Evaluator(self.config, self.stream, Composite([]))
        known = Known.everything(self.stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
        self.journal.record_reference(plain.evaluate(ctx, known, following), following)

    def _scratch(self, index: int) -> float:
        """Trains a model on the stage alone and keeps its scores on the stage."""
        begun = time.perf_counter()
        inner = Runner.__new__(Runner)
        inner.__dict__.update(self.__dict__)
        inner.strategy = Composite([])
        inner.known = Known.nothing(self.stream.table)
        inner.journal = Journal(self.config, self.stream)  # its curves are nobody's
        inner._carried, inner._save = {}, lambda *a, **k: None  # type: ignore[method-assign]
        randomness = ModelRandomness(derive(self.config["seed"], index, "scratch"))
        view = self.stream.view(index, "stage")
        ctx = inner._context(index, inner.build_model(view, randomness), view)
        start = {"model": clone_tree(owned_state(ctx.model)), "strategy": {}}
        progress = _Progress(best_score=self._worst(ctx.stage))
        plan = Pass("scratch", init="previous", data="stage", graph=self.config["graph"])
        ctx = inner._pass(ctx, plan, progress, randomness, {}, start, None, lambda: 0.0)
        stage = self.stream.stages[index]
        if stage.evaluable(index):
            outcome = Evaluator(self.config, self.stream, Composite([])).evaluate(ctx, inner.known, stage)
            self.journal.record_scratch(outcome, stage)
        return time.perf_counter() - begun

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _trainer_state(
        self, trainer: Any, ctx: StageContext, loader: Any, randomness: ModelRandomness
    ) -> dict[str, Any]:
        own = (
            {"optimizer": optimizer_by_name(trainer, ctx.model, self.strategy)}
            if isinstance(trainer, HookedTrainer)
            else trainer.state_dict()
        )
        return {"own": own, "loader": loader.state_dict(), "randomness": randomness.state_dict()}

    def _load_trainer_state(
        self, trainer: Any, ctx: StageContext, loader: Any, randomness: ModelRandomness, state: dict[str, Any]
    ) -> None:
        if isinstance(trainer, HookedTrainer):
            load_optimizer_by_name(trainer, ctx.model, self.strategy, state["own"]["optimizer"])
        else:
            trainer.load_state_dict(state["own"])
        loader.load_state_dict(state["loader"])
        randomness.load_state_dict(state["randomness"])

    def _save(
        self,
        ctx: StageContext,
        phase: str,
        progress: _Progress | None,
        trainer_state: dict[str, Any] | None,
        stage_start: dict[str, Any],
    ) -> None:
        if self.config["saved"] is False:  # unset counts as wanted: a run without checkpoints is asked for
            return
        self._number += 1
        state = {
            "config": settings(self.config),
            "data": self._data,
            "stage": ctx.index,
            "phase": phase,
            "model": owned_state(ctx.model),
            "strategy": self.strategy.state_dict(),
            "side_stores": self._side_stores(ctx.model),
            "generators": ctx.state_dict(),
            "previous": self._previous,
            "carried": self._carried,
            "known": self.known.state_dict(),
            "journal": self.journal.state_dict(),
        }
        if progress is not None:
            state |= {"progress": progress.state_dict(), "trainer": trainer_state, "stage_start": stage_start}
        with distributed.current().together():
            if self.main:
                checkpoint.save(self.folder / "checkpoints", self._number, state, int(self.config["checkpoint_keep"]))

    def _side_stores(self, model: Any) -> dict[str, str]:
        """Returns the durable stores of strategies and model, name to path."""
        own = dict(model.side_stores()) if hasattr(model, "side_stores") else {}
        stores = self.strategy.side_stores()
        twice = sorted(own.keys() & stores.keys())
        if twice:
            raise ConfigError(f"side_stores: a strategy and the model both name a store {twice[0]!r}; rename one")
        return {**stores, **own}

    def _load(self) -> dict[str, Any] | None:
        state, self._number, warnings = checkpoint.newest(self.folder / "checkpoints")
        seen = distributed.current().texts(str(self._number))
        if len(set(seen)) > 1:
            raise CheckpointError(
                f"resume: the processes see different newest checkpoints in {self.folder} ({', '.join(seen)}); give an "
                f"output_dir on a file system that all of them share"
            )
        for warning in warnings:
            self.journal.warn(warning)
        if state is None:
            LOGGER.warning("resume: there is no checkpoint in %s; the run starts from the beginning", self.folder)
            return None
        self._compare(state)
        for name, path in state["side_stores"].items():
            if not Path(path).exists():
                self.journal.warn(
                    f"resume: the store {name!r} at {path}, which the checkpoint names, is not there any more"
                )
        self.journal.load_state_dict(state["journal"])
        self._previous, self._carried = state["previous"], state["carried"]
        self.known.load_state_dict(state["known"])
        index = state["stage"]
        if state["phase"] == "done":
            view = self.stream.view(index, self.config["graph"])
            randomness = ModelRandomness(derive(self.config["seed"], index))
            model = self.build_model(view, randomness)
            self._prepare(self._context(index, model, view), randomness)
            load_owned_state(model, state["model"])
            self.strategy.load_state_dict(state["strategy"])
            self.model = model
        LOGGER.info("resuming at stage %d from checkpoint %d", index + 1, self._number)
        return state

    def _compare(self, state: dict[str, Any]) -> None:
        free = self.config.RESUME_MAY_CHANGE
        now, then = settings(self.config), state["config"]
        changed = [
            k for k in sorted(set(now) | set(then)) if k not in free and k != "device" and now.get(k) != then.get(k)
        ]
        if changed:
            told = "; ".join(f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise CheckpointError(
                f"resume: the configuration has changed ({told}{more}); give the old values, or start anew in another "
                f"output_dir"
            )
        if state["data"] != self._data:
            raise CheckpointError(
                "resume: the log of interactions has changed since the checkpoint; restore it, or start anew in "
                "another output_dir"
            )


__all__ = ["Runner"]
