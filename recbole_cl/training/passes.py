"""One pass of a stage: its epochs, their validation, the best snapshot."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from recbole.utils import ModelType, early_stopping

from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.known import Known
from recbole_cl.evaluation.scores import clear_caches
from recbole_cl.model.contract import contract, offers
from recbole_cl.model.state import load_owned_state, owned_state
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.stage import Targets
from recbole_cl.stream.task_loader import TaskLoader
from recbole_cl.training.data_parallel import keep_alike
from recbole_cl.training.progress import Progress, StageStart
from recbole_cl.training.resume import loading
from recbole_cl.training.run_state import RunState
from recbole_cl.training.stage_models import prepare_stage
from recbole_cl.training.stage_trainer import PassTrainer, pace, pass_trainer
from recbole_cl.training.trainer import Watched
from recbole_cl.tree import clone_tree

LOGGER = logging.getLogger("recbole_cl")

LEAST_SCORE = 1e-4
"""What a task's metric counts at least in the mean over tasks: one that is still zero must not hide the others."""

Save = Callable[[StageContext, Progress, dict[str, Any]], None]
"""Writes a checkpoint inside a pass: the stage, where the pass stands, what its trainer and its draws need."""


class StagePass:
    """A pass of a stage: its progress, its trainer, its batches, and when it is saved.

    Args:
        run: The run.
        ctx: The stage, with the model as the pass before left it.
        plan: The pass.
        progress: Where it stands.
        start: What the stage began from.
        place: Number of the pass among the stage's, auxiliary ones not counted.
        clock: Seconds spent on the stage.
        save: Writes a checkpoint; by default none is written.

    Attributes:
        ctx: The stage; its model is another one where the pass has a graph of its own.
        trainer: Who trains the epochs.
        loader: The batches.
        randomness: What the training draws from.
    """

    trainer: PassTrainer
    loader: Any

    def __init__(
        self,
        run: RunState,
        ctx: StageContext,
        plan: Pass,
        progress: Progress,
        start: StageStart,
        place: int = 0,
        clock: Callable[[], float] = lambda: 0.0,
        save: Save | None = None,
    ) -> None:
        self.run, self.plan, self.progress, self.start, self.place = run, plan, progress, start, place
        self.clock, self._save = clock, save
        own_graph = plan.graph is not None and plan.graph != run.config["graph"]
        self.ctx = run.models.over_graph(ctx, str(plan.graph)) if own_graph else ctx
        self.randomness = self._own_randomness()

    # -- what an auxiliary pass does otherwise ------------------------------------------------------------------------

    def _own_randomness(self) -> ModelRandomness:
        return self.start.randomness

    @property
    def _draws_as(self) -> str:
        """Name from which the generators of the pass's batches are derived."""
        return f"{self.place}/{self.plan.name}"

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs beside weights and progress."""
        return {
            "own": self.trainer.state_dict(),
            "loader": self.loader.state_dict(),
            "randomness": self.randomness.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["own"])
        self.loader.load_state_dict(state["loader"])
        self.randomness.load_state_dict(state["randomness"])

    def _finish(self) -> None:
        if self.run.config["stage_optimizer"] != "carry":
            self.run.moments = {}
        elif (moments := self.trainer.moments()) is not None:
            # A pass over some of the parameters leaves the others' as they are, where it does not begin anew.
            self.run.moments = {**(self.run.moments if self._continues else {}), **clone_tree(moments)}
        with self.randomness.owned():
            self.run.strategy.end_pass(self.ctx)

    # -- a pass -------------------------------------------------------------------------------------------------------

    def train(self, resumed: dict[str, Any] | None = None) -> StageContext:
        """Trains the pass, or the rest of it.

        Args:
            resumed: The checkpoint that it goes on from.

        Returns:
            The stage with the trained model.

        Raises:
            ConfigError: If the model trains its stages by itself and something asks for more than that.
        """
        run, ctx, plan, progress = self.run, self.ctx, self.plan, self.progress
        targets = plan.data if isinstance(plan.data, Targets) else run.stream.trained_targets(ctx.index, plan.data)
        if resumed is None:
            self._initialise()
            self._learn(targets)  # a checkpoint holds what was learnt
        else:
            with loading("checkpoint"):
                load_owned_state(ctx.model, resumed["model"])
                run.strategy.load_state_dict(clone_tree(resumed["strategy"]))
        ctx.pass_, ctx.epoch, ctx.step = plan, progress.epoch, progress.step
        contract(ctx.model).begin_pass(ctx)
        run.strategy.begin_pass(ctx)
        make = TaskLoader.over if plan.mix_tasks else make_loader
        self.loader = ctx.loader = make(ctx, targets, self._draws_as)
        self.trainer = pass_trainer(ctx, run.strategy, self._rate())
        if run.config["train_neg_sample_args"].get("dynamic", False):
            self.loader.get_model(ctx.model)
        self._save_between_steps()
        given = run.epochs.get((ctx.index, plan.name), plan.epochs)
        given = given if given is not None else self._stage_epochs()
        epochs = int(getattr(self.trainer, "epochs", run.config["epochs"])) if given is None else given
        pace(self.trainer, run.config, epochs, self.loader)
        if resumed is None:
            self._begin()
        else:
            with loading("checkpoint"):
                self._load_state(resumed["trainer"])
                ctx.terms = {name: list(values) for name, values in progress.terms.items()}
                self.trainer.resume_epoch(progress.partial_loss)
        while progress.epoch < epochs and not progress.stopped:
            self._epoch(targets)
        if progress.best is not None:
            load_owned_state(ctx.model, progress.best["model"])
            run.strategy.load_state_dict(clone_tree(progress.best["strategy"]))
            if "known" in progress.best:
                run.known.load_state_dict(progress.best["known"])
            clear_caches(ctx.model)
        self._finish()
        return ctx

    @property
    def _continues(self) -> bool:
        """True where the pass goes on from the weights that the one before left."""
        return self.plan.init == "previous" or (self.plan.init == "stage_start" and self.place == 0)

    def _begin(self) -> None:
        """Does what is done once, before the first step."""
        run = self.run
        if run.config["stage_optimizer"] == "carry" and self._continues:
            self.trainer.load_moments(run.moments)
        run.strategy.first_step(self.ctx)

    def _initialise(self) -> None:
        """Puts the weights in that the pass starts from."""
        ctx, run, init = self.ctx, self.run, self.plan.init
        if init == "stage_start":
            load_owned_state(ctx.model, self.start.state["model"])
        elif init == "fresh":
            run.known = Known.nothing(run.stream.table)
            if self.progress.number == 0 and self.start.fresh:  # a model that lives on has no fresh state at hand
                load_owned_state(ctx.model, self.start.fresh)
            else:
                load_owned_state(ctx.model, owned_state(run.models.fresh(ctx.index, ctx.view, self.randomness).model))
            prepare_stage(ctx)
        elif init != "previous":
            raise ConfigError(f"Pass.init: {init!r} is none of previous, stage_start, fresh")
        clear_caches(ctx.model)

    def _learn(self, targets: Targets) -> None:
        """Notes what the model trains on."""
        ctx, run = self.ctx, self.run
        if run.config["parity"]:  # RecBole scores what it never trained on by its random row
            run.known = Known.everything(run.stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
            return
        sequential = run.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        targets = contract(ctx.model).learned(ctx, targets)
        labels = None
        columns = run.stream.dataset.inter_feat
        if ctx.stage.task.kind == "value" and run.config["LABEL_FIELD"] in columns:
            labels = columns[run.config["LABEL_FIELD"]].numpy()[targets.position]
        run.known.learn(run.stream.table, targets, sequential, labels)
        if run.config["valid_split"] == "random":
            # Randomly drawn validation targets lie inside the training period: what occurs there has been seen (ADER).
            run.known.learn(run.stream.table, ctx.stage.valid, sequential, None)

    def _rate(self) -> float:
        """Returns the learning rate of the pass."""
        config, index = self.run.config, self.ctx.index
        scale = config["stage_lr_scale"]
        if isinstance(scale, (list, tuple)):
            scale = scale[min(index, len(scale) - 1)]
        elif index == 0:
            scale = 1.0
        return float(config["learning_rate"] * scale * self.plan.lr_scale)

    def _stage_epochs(self) -> int | None:
        """Returns how many epochs a pass has been given, all of which are trained; ``None`` where it may stop early.

        They are for a model that knows the stages before: passes with new weights, or a number of their own, have none.
        """
        given, plan = self.run.config["stage_epochs"], self.plan
        if isinstance(given, (list, tuple)):
            given = given[min(self.ctx.index, len(given) - 1)]
        elif self.ctx.index == 0:
            return None
        anew = plan.init == "fresh" or plan.untrained
        return None if given is None or anew or plan.epochs is not None else int(given)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint."""
        if self._save is not None:
            self.progress.step, self.progress.seconds = self.ctx.step, self.clock()
            self._save(self.ctx, self.progress, self._state())

    def _save_between_steps(self) -> None:
        """Lets the trainer save every ``checkpoint_steps`` steps."""
        every = self.run.config["checkpoint_steps"]
        if not every:
            return

        def save() -> None:
            self.progress.partial_loss, self.progress.terms = self.trainer.partial_loss, self.ctx.terms
            self.save()

        self.trainer.save_between_steps(every, save)

    # -- an epoch -----------------------------------------------------------------------------------------------------

    def _epoch(self, targets: Targets) -> None:
        """Trains an epoch, or the rest of one, validates and saves."""
        run, ctx, progress, loader = self.run, self.ctx, self.progress, self.loader
        ctx.epoch = progress.epoch
        if progress.partial_loss is None:
            ctx.terms, progress.epoch_start = {}, ctx.step
        words = f"stage {ctx.index + 1}/{len(run.stream)} {self.plan.name} epoch {progress.epoch}"
        watched = Watched(loader, None if run.config["show_progress"] and run.main else True, words)
        with self.randomness.owned():
            loss = self.trainer.train_epoch(watched, progress.epoch)
        keep_alike(ctx, run.strategy, loader.state_dict(), self.randomness.state_dict(), ctx.state_dict())
        progress.partial_loss = None
        progress.epoch += 1
        progress.targets += loader.n_targets if self.trainer.n_targets is None else self.trainer.n_targets
        if offers(ctx.model, "learned"):
            self._learn(targets)
        self._end_epoch(loss)
        progress.terms = {}
        self.save()

    def _end_epoch(self, loss: Any) -> None:
        """Validates, keeps the best snapshot, decides on stopping, writes the curve."""
        run, ctx, progress = self.run, self.ctx, self.progress
        metric = run.journal.primary(ctx.stage)
        valid, improved = self._validate(metric)
        # RecBole sums over the batches of an epoch; the curve tells the mean, as it does for the strategies' terms.
        steps = max(ctx.step - progress.epoch_start, 1)
        train_loss = None if loss is None else float(sum(loss) if isinstance(loss, tuple) else loss) / steps
        run.journal.add_point(
            {
                "stage": ctx.index,
                "pass": self.plan.name,
                "epoch": progress.epoch - 1,
                "targets": progress.targets,
                "seconds": self.clock(),
                "train_loss": train_loss,
                "terms": {name: total / max(count, 1) for name, (total, count) in sorted(ctx.terms.items())},
                "valid": valid or None,
                "best": improved,
            }
        )
        validated = "" if not valid else f", {metric} {valid.get(metric, float('nan')):.4f}{' *' if improved else ''}"
        LOGGER.info(
            "  %s epoch %d: loss %s%s",
            self.plan.name,
            progress.epoch - 1,
            "-" if train_loss is None else f"{train_loss:.4f}",
            validated,
        )

    def _validate(self, metric: str) -> tuple[dict[str, float] | None, bool]:
        """Returns the metrics on validation targets, if this epoch is validated, and whether it is the best so far."""
        run, ctx, progress = self.run, self.ctx, self.progress
        every = 0 if self._stage_epochs() else run.config["eval_step"]
        wanted = self.plan.early_stopping and every > 0 and progress.epoch % every == 0
        if not wanted or not len(ctx.stage.valid):
            return None, False
        valid = run.evaluator.evaluate(ctx, run.known, ctx.stage, "valid").metrics
        score = valid.get(metric)
        if score is None:
            return valid, False
        if self.plan.mix_tasks:
            score = self.mean_score(score)
        progress.best_score, progress.waited, progress.stopped, improved = early_stopping(
            score, progress.best_score, progress.waited, run.config["stopping_step"], run.journal.bigger(ctx.stage)
        )
        if improved:
            progress.best = {
                "model": clone_tree(owned_state(ctx.model)),
                "strategy": clone_tree(run.strategy.state_dict()),
            }
            if offers(ctx.model, "learned"):  # epochs after it may learn more
                progress.best["known"] = clone_tree(run.known.state_dict())
            progress.best_targets = progress.targets
        return valid, improved

    def mean_score(self, own: float) -> float:
        """Returns the geometric mean of the tasks' primary metrics on validation targets, for a pass over all of them.

        Metrics of tasks are of different sizes: an accuracy of .3 with noise of .05 would decide over a hit rate of
        .04 in a plain mean. In this one a tenth more counts the same in each.

        Args:
            own: That of the stage's own task.
        """
        run, ctx = self.run, self.ctx
        scores = [own]
        for stage in run.stream.stages[: ctx.index]:
            if len(stage.valid) and run.journal.bigger(stage) == run.journal.bigger(ctx.stage):
                metrics = run.evaluator.evaluate(ctx, run.known, stage, "valid").metrics
                scores.append(metrics.get(run.journal.primary(stage), own))
        return math.exp(sum(math.log(max(score, LEAST_SCORE)) for score in scores) / len(scores))


class AuxiliaryPass(StagePass):
    """A pass beside the plan (``Pass.auxiliary``), after which the others draw and go on as if it had not been.

    It draws from generators of its own, hands on no optimiser state, and puts the strategies beside the one that
    planned it back to where they were.
    """

    _companions: dict[str, Any]

    def _own_randomness(self) -> ModelRandomness:
        return ModelRandomness(derive(self.run.config["seed"], self.ctx.index, f"aside/{self.plan.name}"))

    @property
    def _draws_as(self) -> str:
        return f"aside/{self.plan.name}"

    def train(self, resumed: dict[str, Any] | None = None) -> StageContext:
        strategy = self.run.strategy
        before = strategy.companions_state(self.ctx) if resumed is None else resumed["trainer"]["companions"]
        self._companions = clone_tree(before)
        return super().train(resumed)

    def _state(self) -> dict[str, Any]:
        stage_randomness = self.start.randomness.state_dict()
        return {**super()._state(), "stage_randomness": stage_randomness, "companions": self._companions}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self.start.randomness.load_state_dict(state["stage_randomness"])

    def _finish(self) -> None:
        with self.randomness.owned():
            self.run.strategy.end_pass(self.ctx)
        self.run.strategy.load_companions_state(self.ctx, self._companions)


def make_pass(run: RunState, ctx: StageContext, plan: Pass, *given: Any, **more: Any) -> StagePass:
    """Returns a :class:`StagePass`, or an :class:`AuxiliaryPass` where the plan says so."""
    return (AuxiliaryPass if plan.auxiliary else StagePass)(run, ctx, plan, *given, **more)
