"""One pass of a stage: its epochs, their validation, the best snapshot."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recbole.utils import ModelType, early_stopping

from recbole_cl import distributed
from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.evaluator import Evaluator
from recbole_cl.evaluation.known import Known
from recbole_cl.evaluation.scores import clear_caches
from recbole_cl.model.state import load_owned_state, owned_state
from recbole_cl.results.journal import Journal
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.base import STEP_HOOKS
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.stream.build import Stream
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.stage import Stage, Targets
from recbole_cl.stream.task_loader import TaskLoader
from recbole_cl.training.data_parallel import keep_alike
from recbole_cl.training.resume import load_trainer_state, trainer_state
from recbole_cl.training.stage_models import StageModels
from recbole_cl.training.stage_trainer import make_trainer
from recbole_cl.training.trainer import HookedTrainer, Watched, load_optimizer_by_name, optimizer_by_name
from recbole_cl.tree import clone_tree

LOGGER = logging.getLogger("recbole_cl")

LEAST_SCORE = 1e-4
"""What a task's metric counts at least in the mean over tasks: one that is still zero must not hide the others."""


@dataclass
class Progress:
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
        """Returns everything in it."""
        return dict(self.__dict__)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        """Returns the progress with a given state."""
        progress = cls(**state)
        if isinstance(progress.partial_loss, list):
            progress.partial_loss = tuple(progress.partial_loss)
        return progress


@dataclass
class Running:
    """A pass whose training has begun.

    Attributes:
        plan: The pass.
        progress: Where it stands.
        trainer: Its trainer, RecBole's with hooks or the model's own.
        loader: Its batches.
        randomness: The random state that its training draws from.
        clock: Seconds spent on the stage.
        save: Writes a checkpoint of a phase.
    """

    plan: Pass
    progress: Progress
    trainer: Any
    loader: Any
    randomness: ModelRandomness
    clock: Callable[[], float]
    save: Callable[[str], None]

    @property
    def hooked(self) -> HookedTrainer | None:
        """RecBole's trainer with hooks; ``None`` where the model trains its stages by itself."""
        return self.trainer if isinstance(self.trainer, HookedTrainer) else None


class PassTrainer(StageModels):
    """Trains passes over a stream; by itself it keeps no checkpoints.

    Args:
        config: The run's configuration.
        strategy: The strategies.

    Attributes:
        journal: Results, curves, costs and warnings so far.
        evaluator: Scores the model.
        known: What the model has trained on.
    """

    journal: Journal
    evaluator: Evaluator
    known: Known

    def __init__(self, config: Any, strategy: Composite) -> None:
        super().__init__(config, strategy)
        self._carried: dict[str, Any] = {}  # the optimiser's moments as the last pass left them

    def _begin(self, stream: Stream) -> None:
        """Takes a stream of which nothing has been trained."""
        self.stream = stream
        self.journal = Journal(self.config, stream)
        self.evaluator = Evaluator(self.config, stream, self.strategy)
        self.known = Known.nothing(stream.table)

    @property
    def main(self) -> bool:
        """True in the process that writes files and progress bars."""
        return distributed.current().main

    def _save(
        self,
        ctx: StageContext,
        phase: str,
        progress: Progress | None,
        trainer_state: dict[str, Any] | None,
        stage_start: dict[str, Any],
    ) -> None:
        """Does nothing; a runner writes a checkpoint here."""

    def _worst(self, stage: Stage) -> float:
        return -math.inf if self.journal.bigger(stage) else math.inf

    def _pass(
        self,
        ctx: StageContext,
        plan: Pass,
        progress: Progress,
        randomness: ModelRandomness,
        fresh: dict[str, Any],
        stage_start: dict[str, Any],
        resumed: dict[str, Any] | None,
        clock: Callable[[], float],
        place: int = 0,
    ) -> StageContext:
        """Trains one pass of a stage, or the rest of it.

        Args:
            ctx: The stage, with the model as the pass before left it.
            plan: The pass.
            progress: Where it stands.
            randomness: The stage's random state.
            fresh: Initial weights of the stage's model, empty where it grows in place.
            stage_start: State of model and strategy at the start of the stage.
            resumed: The checkpoint that the pass goes on from.
            clock: Seconds spent on the stage.
            place: Number of the pass among those that are not ``aside``.

        Returns:
            The stage with the trained model, which is another one where the pass has a graph of its own.

        Raises:
            ConfigError: If the model trains its stages by itself and something asks for more than that.
        """
        config, stage_randomness = self.config, randomness
        if plan.aside:
            randomness = ModelRandomness(derive(config["seed"], ctx.index, f"aside/{plan.name}"))
        if plan.graph is not None and plan.graph != config["graph"]:
            ctx = self._with_view(ctx, plan.graph)
        companions: dict[str, Any] = {}
        if plan.aside:
            before = self.strategy.companions_state(ctx) if resumed is None else resumed["trainer"]["companions"]
            companions = clone_tree(before)
        targets = plan.data if isinstance(plan.data, Targets) else self.stream.trained_targets(ctx.index, plan.data)
        if resumed is None:
            self._initialise(ctx, plan, progress.number, randomness, fresh, stage_start)
            self._learn(ctx, targets)  # a checkpoint holds what was learnt
        ctx.pass_, ctx.epoch, ctx.step = plan, progress.epoch, progress.step
        self.strategy.begin_pass(ctx)
        make = TaskLoader.over if plan.mix_tasks else make_loader
        loader = make(ctx, targets, f"{'aside' if plan.aside else place}/{plan.name}")
        ctx.loader = loader
        trainer = self._trainer(ctx, plan)

        def save(phase: str) -> None:
            progress.step, progress.seconds = ctx.step, clock()
            state = trainer_state(trainer, ctx, self.strategy, loader, randomness)
            if plan.aside:
                state["stage_randomness"] = stage_randomness.state_dict()
                state["companions"] = companions
            self._save(ctx, phase, progress, state, stage_start)

        running = Running(plan, progress, trainer, loader, randomness, clock, save)
        continues = plan.init == "previous" or (plan.init == "stage_start" and place == 0)
        if resumed is None and running.hooked is not None and config["stage_optimizer"] == "carry" and continues:
            load_optimizer_by_name(running.hooked, ctx.model, self.strategy, self._carried)
        if config["train_neg_sample_args"].get("dynamic", False):
            loader.get_model(ctx.model)
        self._save_between_steps(ctx, running)
        if resumed is not None:
            self._restore(ctx, running, resumed)
            if plan.aside:
                stage_randomness.load_state_dict(resumed["trainer"]["stage_randomness"])
        epochs = plan.epochs if plan.epochs is not None else self._stage_epochs(ctx.index, plan)
        if epochs is None:
            epochs = int(getattr(trainer, "epochs", config["epochs"]))
        while progress.epoch < epochs and not progress.stopped:
            self._epoch(ctx, running)
        if progress.best is not None:
            load_owned_state(ctx.model, progress.best["model"])
            self.strategy.load_state_dict(clone_tree(progress.best["strategy"]))
            clear_caches(ctx.model)
        if not plan.aside:
            hooked = running.hooked
            moments = optimizer_by_name(hooked, ctx.model, self.strategy) if hooked is not None else {}
            self._carried = clone_tree(moments)
        with randomness.owned():
            self.strategy.end_pass(ctx)
        if plan.aside:
            self.strategy.load_companions_state(ctx, companions)
        return ctx

    def _save_between_steps(self, ctx: StageContext, running: Running) -> None:
        """Lets the trainer save every ``checkpoint_steps`` steps."""
        every, hooked = self.config["checkpoint_steps"], running.hooked
        if hooked is None or not every:
            return
        done = itertools.count(1)

        def after_batch() -> None:
            if next(done) % every == 0:
                running.progress.partial_loss, running.progress.terms = hooked.partial_loss, ctx.terms
                running.save("train")

        hooked.after_batch = after_batch

    def _restore(self, ctx: StageContext, running: Running, resumed: dict[str, Any]) -> None:
        """Puts the pass back to where a checkpoint was written."""
        load_owned_state(ctx.model, resumed["model"])
        self.strategy.load_state_dict(clone_tree(resumed["strategy"]))
        load_trainer_state(running.trainer, ctx, self.strategy, running.loader, running.randomness, resumed["trainer"])
        ctx.terms = {k: list(v) for k, v in running.progress.terms.items()}
        if running.hooked is not None:
            running.hooked.resumed_loss = running.progress.partial_loss

    def _epoch(self, ctx: StageContext, running: Running) -> None:
        """Trains an epoch, or the rest of one, validates and saves."""
        progress, hooked, loader = running.progress, running.hooked, running.loader
        ctx.epoch = progress.epoch
        if progress.partial_loss is None:
            ctx.terms, progress.epoch_start = {}, ctx.step
        told = f"stage {ctx.index + 1}/{len(self.stream)} {running.plan.name} epoch {progress.epoch}"
        watched = Watched(loader, None if self.config["show_progress"] and self.main else True, told)
        with running.randomness.owned():
            if hooked is None:
                loss = running.trainer.train_epoch(watched, progress.epoch)
            else:
                if progress.partial_loss is None:
                    hooked.begin_epoch(progress.epoch)
                loss = hooked._train_epoch(watched, progress.epoch)
        keep_alike(ctx, self.strategy, loader.state_dict(), running.randomness.state_dict(), ctx.state_dict())
        progress.partial_loss = None
        progress.epoch += 1
        progress.targets += loader.n_targets
        self._end_epoch(ctx, running.plan, progress, loss, running.clock)
        progress.terms = {}
        running.save("train")

    def _stage_epochs(self, index: int, plan: Pass) -> int | None:
        """Returns how many epochs a pass has been given, all of which are trained; ``None`` where it may stop early.

        They are for a model that knows the stages before: passes with new weights, or a number of their own, have none.
        """
        given = self.config["stage_epochs"]
        if isinstance(given, (list, tuple)):
            given = given[min(index, len(given) - 1)]
        elif index == 0:
            return None
        anew = plan.init == "fresh" or plan.untrained
        return None if given is None or anew or plan.epochs is not None else int(given)

    def _trainer(self, ctx: StageContext, plan: Pass) -> Any:
        """Returns RecBole's trainer of the model with the hooks in it, or the model's own."""
        config = self.config
        scale = config["stage_lr_scale"]
        if isinstance(scale, (list, tuple)):
            scale = scale[min(ctx.index, len(scale) - 1)]
        elif ctx.index == 0:
            scale = 1.0
        rate = config["learning_rate"] * scale * plan.lr_scale
        own_trainer = getattr(ctx.model, "stage_trainer", None)
        if own_trainer is None:
            return make_trainer(ctx, self.strategy, rate)
        if distributed.current().size > 1:
            raise ConfigError(
                f"model: {config['model']} cannot be trained by several processes: it trains its stages by itself; "
                f"start it without torchrun"
            )
        if self.strategy.steps:
            names = ", ".join(s.name for s in self.strategy.hooked(*STEP_HOOKS))
            raise ConfigError(
                f"strategy: {names} cannot serve the model {config['model']}, which trains its stages by itself: there "
                f"are no optimiser steps to take part in; use FineTune, FullRetrain, Joint, Scratch or Pretrain"
            )
        return own_trainer(ctx, rate)

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
        self, ctx: StageContext, plan: Pass, progress: Progress, loss: Any, clock: Callable[[], float]
    ) -> None:
        """Validates, keeps the best snapshot, decides on stopping, writes the curve."""
        config, metric = self.config, self.journal.primary(ctx.stage)
        valid: dict[str, float] | None = None
        improved = False
        every = 0 if self._stage_epochs(ctx.index, plan) else config["eval_step"]
        wanted = plan.early_stopping and every > 0 and progress.epoch % every == 0
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
        """Returns the geometric mean of the tasks' primary metrics on validation targets, for a pass over all of them.

        Metrics of tasks are of different sizes: an accuracy of .3 with noise of .05 would decide over a hit rate of
        .04 in a plain mean. In this one a tenth more counts the same in each.

        Args:
            ctx: The stage.
            own: That of the stage's own task.
        """
        scores = [own]
        for stage in self.stream.stages[: ctx.index]:
            if len(stage.valid) and self.journal.bigger(stage) == self.journal.bigger(ctx.stage):
                metrics = self.evaluator.evaluate(ctx, self.known, stage, "valid").metrics
                scores.append(metrics.get(self.journal.primary(stage), own))
        return math.exp(sum(math.log(max(score, LEAST_SCORE)) for score in scores) / len(scores))
