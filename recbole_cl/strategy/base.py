"""The contract of a strategy, and what a stage gives it.

A strategy is one file with a class that derives from :class:`Strategy`, decorated with ``@strategies.register()``,
and a properties file ``properties/strategy/<Name>.yaml`` whose keys start with the class's ``prefix``. Hooks return
what they want; they never reach into the trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.rng import numpy_generator
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.stage import Stage, Stream, Targets
from recbole_cl.stream.vocabulary import Growth


@dataclass(frozen=True)
class Pass:
    """One training pass of a stage.

    Args:
        name: Name in curves and checkpoints.
        init: ``previous`` (go on), ``stage_start`` (as the stage began) or ``fresh`` (a new initialisation).
        data: ``stage`` (its training targets), ``so_far`` (those of all stages up to it), or targets of its own.
        epochs: Epochs at most; ``None`` takes the configuration's.
        lr_scale: Factor on the stage's learning rate.
        graph: What a graph model sees: ``all``, ``stage``, or ``None`` for the configuration's ``graph``.
        early_stopping: Stop by the validation metric and keep the best epoch.
        untrained: The model is a new one, whatever ``init`` says (the reference model of ``scratch``).
        mix_tasks: ``data`` holds targets of several stages' tasks: each step has a batch of every one of them
            (:class:`recbole_cl.stream.task_loader.TaskLoader`), and the geometric mean of their primary metrics stops
            training.
        aside: A pass beside the plan: it draws from generators of its own, hands on no optimiser state, and leaves the
            strategies beside the one that planned it as they were, so the passes after it have the bits that they
            have without it (PISA's forward model).
    """

    name: str = "train"
    init: str = "previous"
    data: str | Targets = "stage"
    epochs: int | None = None
    lr_scale: float = 1.0
    graph: str | None = None
    early_stopping: bool = True
    untrained: bool = False
    mix_tasks: bool = False
    aside: bool = False


@dataclass
class StageContext:
    """What a stage gives to its strategies.

    Attributes:
        config: The run's configuration.
        stream: The stream.
        index: The stage that is trained.
        model: The model, with the stage's numbers of users and items.
        view: RecBole's dataset at this stage.
        batcher: Builds rows from targets.
        device: Device of the model.
        loader: Loader of the running pass (its ``complete`` adds negatives to rows).
        pass_: The running pass.
        epoch: Epoch of the pass, from 0.
        step: Optimiser steps of the pass so far.
        data_gradients: Gradients of the data loss alone, by parameter name; filled where a strategy sets
            ``wants_data_gradients``.
        learning_rate: Learning rate of the running pass.
        terms: Values logged this epoch, by name: sum and count.
        known: What the model has trained on (:class:`recbole_cl.evaluator.Known`), as the stage ends.
        model_factory: See :meth:`with_model`.
    """

    config: Any
    stream: Stream
    index: int
    model: Any
    view: Any
    batcher: Batcher
    device: torch.device
    loader: Any = None
    pass_: Pass = field(default_factory=Pass)
    epoch: int = 0
    step: int = 0
    learning_rate: float = 0.0
    data_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    terms: dict[str, list[float]] = field(default_factory=dict)
    previous_factory: Callable[[], nn.Module | None] = lambda: None
    known: Any = None
    model_factory: Callable[[int, Mapping[str, Any]], tuple[Any, Any, Batcher]] | None = None
    _generators: dict[str, np.random.Generator] = field(default_factory=dict)
    _previous: nn.Module | None = None

    @property
    def stage(self) -> Stage:
        """The stage that is trained."""
        return self.stream.stages[self.index]

    def generator(self, name: str) -> np.random.Generator:
        """Returns the generator that ``name`` owns in this stage; its state is checkpointed."""
        if name not in self._generators:
            self._generators[name] = numpy_generator(self.config["seed"], self.index, name)
        return self._generators[name]

    @property
    def previous_model(self) -> nn.Module | None:
        """The model as the previous stage ended, frozen, in eval mode, with its own numbers of rows."""
        if self._previous is None:
            self._previous = self.previous_factory()
        return self._previous

    def with_model(self, index: int, state: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> StageContext:
        """Returns this context with another model in it, frozen and in eval mode (see :meth:`Strategy.serving`).

        Args:
            index: Stage whose numbers of users and items the model has.
            state: The model's weights, as :func:`recbole_cl.model.state.owned_state` gives them.
            known: State of what it trained on; default what this context's model did.
        """
        if self.model_factory is None:
            raise RuntimeError("with_model: this context was made without a run, which would build the model")
        model, view, batcher = self.model_factory(index, state)
        told = copy.copy(self.known)
        if known is not None:
            told.load_state_dict(known)
        return replace(self, model=model, view=view, batcher=batcher, known=told)

    def log(self, name: str, value: float | torch.Tensor) -> None:
        """Adds a value to this epoch's mean of ``name`` in the curves."""
        entry = self.terms.setdefault(name, [0.0, 0.0])
        entry[0] += float(value)
        entry[1] += 1.0

    def rows(self, targets: Targets) -> Interaction:
        """Returns rows for targets, without negatives."""
        return self.batcher.rows(targets)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the model's trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the strategies' generators."""
        return {name: g.bit_generator.state for name, g in self._generators.items()}

    def forget_generators(self, but: str) -> None:
        """Starts all generators anew whose name does not begin with ``but``; who holds one goes on with the same."""
        for name, generator in self._generators.items():
            if not name.startswith(but):
                fresh = numpy_generator(self.config["seed"], self.index, name)
                generator.bit_generator.state = fresh.bit_generator.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the generators back."""
        for name, value in state.items():
            self.generator(name).bit_generator.state = value


class Strategy:
    """Base of all strategies; every hook has a neutral default.

    Args:
        parameters: The strategy's own parameters, without prefix, defaults filled in.

    Attributes:
        prefix: Prefix of its properties (``ewc`` for ``ewc_lambda``).
        defaults: Defaults of parameters without a properties file (a strategy in another package).
        neutral: Parameters under which it equals FineTune bit for bit with its code still running, or ``None``.
        why_not_neutral: The reason where there are none.
        needs: Capabilities that the model must have (see :func:`recbole_cl.model.capabilities.capabilities`).
        excludes: Kinds that cannot be combined with another strategy of the same kind (``bound``, ``replay``).
        kind: Its own kind.
        priority: Order of combination; equal priorities are ordered by name.
        plans_passes: Its :meth:`plan_stage` gives passes at some stage; two such strategies do not compose.
        wants_data_gradients: Keep the gradients of the data loss apart (``ctx.data_gradients``).
    """

    prefix: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any] | None] = None
    why_not_neutral: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    kind: ClassVar[str] = ""
    priority: ClassVar[int] = 50
    plans_passes: ClassVar[bool] = False
    wants_data_gradients: ClassVar[bool] = False

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        self.params: dict[str, Any] = dict(parameters or {})

    @property
    def name(self) -> str:
        """Its registered name."""
        return type(self).__name__

    @property
    def begins_anew(self) -> bool:
        """True where it trains a stage after the first from new weights, which not every model can (PCL, parts)."""
        return False

    def check(self, config: Any, model: nn.Module) -> None:
        """Raises a :class:`ConfigError` where parameters or the model make no sense for it."""

    def prepare_model(self, ctx: StageContext) -> None:
        """Adds deterministic structure (adapters, masks) to ``ctx.model``; runs again before a checkpoint is loaded."""

    def plan_stage(self, ctx: StageContext) -> list[Pass] | None:
        """Returns the stage's passes, or ``None`` for one pass over the stage's own data."""
        return None

    def begin_pass(self, ctx: StageContext) -> None:
        """Runs before each pass (``ctx.pass_``), before its optimiser is made: says which parameters it trains."""

    def augment_batch(self, ctx: StageContext, batch: Interaction) -> Interaction:
        """Returns the batch, with rows added (replay)."""
        return batch

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        """Returns scalar terms by name; the trainer adds them to the data loss, logs and checks each."""
        return {}

    def add_gradients(self, ctx: StageContext) -> None:
        """Adds to ``p.grad`` in closed form, after backward and before clipping."""

    def mask_gradients(self, ctx: StageContext) -> None:
        """Removes from ``p.grad`` what must not move; runs after every ``add_gradients``."""

    def after_step(self, ctx: StageContext) -> None:
        """Runs after each optimiser step."""

    def adjust_scores(self, ctx: StageContext, batch: Interaction, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores at test time, shape ``[B, n_items]``, or ``[B]`` of the rows' own items (value tasks)."""
        return scores

    def serving(self, ctx: StageContext, stage: Stage) -> StageContext:
        """Returns the context whose model answers for ``stage``: ``ctx``, or :meth:`StageContext.with_model`.

        For strategies that keep a model, or a part of one, for each task. The kept model's own ``known`` counts.
        """
        return ctx

    def end_pass(self, ctx: StageContext) -> None:
        """Runs after each pass (``ctx.pass_``); the model holds the pass's best weights."""

    def end_stage(self, ctx: StageContext) -> None:
        """Takes importances, exemplars, anchors; the model holds the stage's best weights."""

    def stage_costs(self, ctx: StageContext) -> dict[str, Any]:
        """Returns entries of the stage's costs that the strategy knows better than the model (``backbones`` kept)."""
        return {}

    def penalty(self, ctx: StageContext) -> torch.Tensor:
        """Returns the current value of what :meth:`add_gradients` differentiates (0 where it does nothing)."""
        return torch.zeros(())

    def parameters(self) -> Iterable[nn.Parameter]:
        """Returns its own trainable parameters."""
        return ()

    def grow(self, growth: Growth) -> None:
        """Grows its tensors to the next stage's vocabulary."""

    def state_dict(self) -> dict[str, Any]:
        """Returns everything a resumed run needs: tensors, arrays, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state back.

        Raises:
            KeyError: If a key is missing; the message names it.
        """

    def side_stores(self) -> dict[str, str]:
        """Returns durable stores outside the checkpoint (name to path); they are named in it, never rolled back."""
        return {}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in sorted(self.params.items()))
        return f"{self.name}({inner})"


def overrides(strategy: Strategy, hook: str) -> bool:
    """Tells whether a strategy implements a hook."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)


PARTS = "way of training parts only"
"""Kind of the strategies that freeze all but a part of their own: two would each freeze the other's."""

STEP_HOOKS = ("augment_batch", "loss_terms", "add_gradients", "mask_gradients", "after_step")


class Composite:
    """Several strategies as one, in canonical (priority, name) order: any listing gives the same bits.

    Args:
        members: The strategies.

    Raises:
        ConfigError: If two members are of a kind that excludes itself, or the same strategy is listed twice.
    """

    def __init__(self, members: Iterable[Strategy]) -> None:
        self.members = sorted(members, key=lambda s: (s.priority, s.name))
        names = [s.name for s in self.members]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"strategy: {name} is listed twice")
        for kind in ("bound", "replay", PARTS):
            same = [s.name for s in self.members if s.kind == kind]
            if len(same) > 1:
                raise ConfigError(f"strategy: {' and '.join(same)} are both a {kind}; keep one of them")
        self._one_plan([s.name for s in self.members if s.plans_passes])
        self.planner: str | None = None

    @staticmethod
    def _one_plan(names: list[str]) -> None:
        if len(names) > 1:
            raise ConfigError(f"strategy: {' and '.join(names)} both plan a stage's passes; keep one")

    def hooked(self, *hooks: str) -> list[Strategy]:
        """Returns the members that implement one of the hooks."""
        return [s for s in self.members if any(overrides(s, hook) for hook in hooks)]

    @property
    def steps(self) -> bool:
        """True where a member takes part in optimiser steps."""
        return bool(self.hooked(*STEP_HOOKS))

    @property
    def wants_data_gradients(self) -> bool:
        """True where a member needs the data gradient apart."""
        return any(s.wants_data_gradients for s in self.members)

    def check(self, config: Any, model: nn.Module) -> None:
        """Checks every member against the model's capabilities.

        Raises:
            ConfigError: Naming the strategy, the model and what is missing.
        """
        from recbole_cl.model.capabilities import capabilities

        have = capabilities(model)
        for s in self.members:
            missing = sorted(s.needs - have)
            if missing:
                raise ConfigError(
                    f"strategy: {s.name} cannot serve the model {config['model']}: it needs {', '.join(missing)}, "
                    f"the model offers {', '.join(sorted(have)) or 'none of the optional capabilities'}"
                )
            s.check(config, model)

    def prepare_model(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.prepare_model(ctx)

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        """Returns the one plan that a member gives (``planner`` is its name), or one default pass.

        Raises:
            ConfigError: If two members give a plan, of which one did not say so (``plans_passes``).
        """
        plans = [(s.name, plan) for s in self.members if (plan := s.plan_stage(ctx)) is not None]
        self._one_plan([name for name, _ in plans])
        self.planner = plans[0][0] if plans else None
        return plans[0][1] if plans else [Pass()]

    def companions_state(self, ctx: StageContext) -> dict[str, Any]:
        """Returns what a pass aside may not change: the states of who did not plan it, and of their generators."""
        own = f"{self.planner}/"
        return {
            "strategies": {s.name: s.state_dict() for s in self.members if s.name != self.planner},
            "generators": {name: value for name, value in ctx.state_dict().items() if not name.startswith(own)},
        }

    def load_companions_state(self, ctx: StageContext, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`companions_state` returned; generators that came since are forgotten."""
        for s in self.members:
            if s.name != self.planner:
                s.load_state_dict(state["strategies"][s.name])
        ctx.forget_generators(f"{self.planner}/")
        ctx.load_state_dict(state["generators"])

    def adjust_scores(self, ctx: StageContext, batch: Interaction, scores: torch.Tensor) -> torch.Tensor:
        """Passes the scores through every member."""
        for s in self.members:
            scores = s.adjust_scores(ctx, batch, scores)
        return scores

    def serving(self, ctx: StageContext, stage: Stage) -> StageContext:
        """Returns the context that the first member with one of its own gives, or ``ctx``."""
        for s in self.members:
            served = s.serving(ctx, stage)
            if served is not ctx:
                return served
        return ctx

    def begin_pass(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.begin_pass(ctx)

    def end_pass(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.end_pass(ctx)

    def end_stage(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.end_stage(ctx)

    def stage_costs(self, ctx: StageContext) -> dict[str, Any]:
        """Returns the members' entries."""
        return {name: value for s in self.members for name, value in s.stage_costs(ctx).items()}

    def grow(self, growth: Growth) -> None:
        """Grows every member."""
        for s in self.members:
            s.grow(growth)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the members' own trainable parameters."""
        return [p for s in self.members for p in s.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """Returns every member's state by name."""
        return {s.name: s.state_dict() for s in self.members}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the members' states back.

        Raises:
            KeyError: If a member's state is missing.
        """
        for s in self.members:
            if s.name not in state:
                raise KeyError(f"the state of the strategy {s.name} is missing")
            s.load_state_dict(state[s.name])

    def side_stores(self) -> dict[str, str]:
        """Returns the members' durable stores."""
        return {name: path for s in self.members for name, path in s.side_stores().items()}


def require(state: Mapping[str, Any], *keys: str) -> None:
    """Raises a :class:`KeyError` that names the missing keys of a state."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise KeyError(f"state misses {', '.join(missing)}{nearest(missing[0], state)}")
