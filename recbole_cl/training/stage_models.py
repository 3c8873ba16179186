"""Models over the views of a stream: new ones, the one of the stage before, one over another graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recbole_cl.model.state import load_owned_state, owned_state
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import Stream


class StageModels:
    """Builds the models of a run and the contexts in which strategies see them.

    Args:
        config: The run's configuration.
        strategy: The strategies, which add their structure to every model.

    Attributes:
        stream: The stream.
    """

    stream: Stream

    def __init__(self, config: Any, strategy: Composite) -> None:
        self.config, self.strategy = config, strategy
        self._previous: dict[str, Any] | None = None  # stage and weights of the model as the last stage left it

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
