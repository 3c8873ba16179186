"""What a stage gives its strategies: the passes that they may plan, and the context that every hook is handed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.rng import numpy_generator
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets


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
        auxiliary: A pass beside the plan: it draws from generators of its own, hands on no optimiser state, and leaves
            the strategies beside the one that planned it as they were, so the passes after it have the bits that they
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
    auxiliary: bool = False


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
        known: What the model has trained on (:class:`recbole_cl.evaluation.evaluator.Known`), as the stage ends.
        model_factory: See :meth:`with_model`.
        strategy: The strategies as one; a model with its own loop asks it for loss terms.
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
    strategy: Any = None
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
        trained_on = copy.copy(self.known)
        if known is not None:
            trained_on.load_state_dict(known)
        return replace(self, model=model, view=view, batcher=batcher, known=trained_on)

    def log(self, name: str, value: float | torch.Tensor, weight: float = 1.0) -> None:
        """Adds a value to this epoch's mean of ``name`` in the curves; ``weight`` is a batch's share of its step."""
        entry = self.terms.setdefault(name, [0.0, 0.0])
        entry[0] += weight * float(value)
        entry[1] += weight

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
