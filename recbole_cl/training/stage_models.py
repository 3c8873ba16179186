"""Models over the views of a stream: new ones, the one of the stage before, one over another graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.config.model_values import told_with_properties
from recbole_cl.config.models import configured_classes
from recbole_cl.model.contract import contract, offers
from recbole_cl.model.state import load_owned_state, owned_state
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import Stream

Build = Callable[[Any, ModelRandomness], nn.Module]
"""Makes a model over a view, initialised from a random state."""


def build_model(config: Any, view: Any, randomness: ModelRandomness) -> nn.Module:
    """Returns a new model over a view, initialised from the given random state."""
    with randomness.owned(), told_with_properties(config, list(configured_classes(config))):
        model: nn.Module = config.model_class(config, view)
    return model.to(config["device"])


def prepare_stage(ctx: StageContext) -> None:
    """Lets a model do its work before a stage; what it draws is the same wherever that is done again."""
    if offers(ctx.model, "prepare_stage"):
        with ModelRandomness(derive(ctx.config["seed"], ctx.index, "prepare_stage")).owned():
            ctx.model.prepare_stage(ctx)


class StageModels:
    """Builds the models of a run and the contexts in which strategies see them.

    Args:
        config: The run's configuration.
        stream: The stream.
        strategy: The strategies, which add their structure to every model.
        build: Makes a model; default :func:`build_model`.

    Attributes:
        previous: Stage and weights of the model as the last stage left it, ``None`` before the first has ended.
    """

    def __init__(self, config: Any, stream: Stream, strategy: Composite, build: Build | None = None) -> None:
        self.config, self.stream, self.strategy = config, stream, strategy
        self._build = build
        self.previous: dict[str, Any] | None = None

    def build(self, view: Any, randomness: ModelRandomness) -> nn.Module:
        """Returns a new model over a view, without the strategies' structure."""
        return self._build(view, randomness) if self._build else build_model(self.config, view, randomness)

    def context(self, index: int, model: nn.Module, view: Any) -> StageContext:
        """Returns a stage's context around a model."""
        stage = self.stream.stages[index]
        batcher = Batcher(self.config, self.stream, view, stage.n_users, stage.n_items)
        if offers(model, "collate"):
            batcher.collate = contract(model).collate
        ctx = StageContext(self.config, self.stream, index, model, view, batcher, torch.device(self.config["device"]))
        ctx.previous_factory = self._previous_model
        ctx.model_factory = self.frozen
        ctx.strategy = self.strategy
        return ctx

    def prepare(self, ctx: StageContext, randomness: ModelRandomness) -> None:
        """Lets the strategies add their structure; what they initialise is drawn from the run's own state."""
        with randomness.owned():
            self.strategy.prepare_model(ctx)
        ctx.model.to(self.config["device"])

    def fresh(self, index: int, view: Any, randomness: ModelRandomness) -> StageContext:
        """Returns a stage's context with a new model, the strategies' structure in it."""
        ctx = self.context(index, self.build(view, randomness), view)
        self.prepare(ctx, randomness)
        return ctx

    def frozen(self, index: int, state: Mapping[str, Any]) -> tuple[nn.Module, Any, Batcher]:
        """Returns a model with a stage's numbers of rows and the given weights, frozen; its view and its batcher."""
        view = self.stream.view(index, self.config["graph"])
        ctx = self.fresh(index, view, ModelRandomness(derive(self.config["seed"], index, "previous")))
        load_owned_state(ctx.model, state)
        for p in ctx.model.parameters():
            p.requires_grad_(False)
        return ctx.model.eval(), view, ctx.batcher

    def _previous_model(self) -> nn.Module | None:
        if self.previous is None:
            return None
        model, _, _ = self.frozen(int(self.previous["stage"]), self.previous["model"])
        return model

    def over_graph(self, ctx: StageContext, graph: str) -> StageContext:
        """Makes the model of a stage again over another graph, with the same weights."""
        view = self.stream.view(ctx.index, graph)
        new = self.fresh(ctx.index, view, ModelRandomness(derive(self.config["seed"], ctx.index, f"graph/{graph}")))
        load_owned_state(new.model, owned_state(ctx.model))
        new._generators = ctx._generators
        return new
