"""Models kept beside the one that is trained: what strategies with a model for each task share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole_cl.model.state import count_parameters, grow_model, load_owned_state, owned_state
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.stage import Stage
from recbole_cl.tree import clone_tree


class ModelPerTask(Strategy):
    """Keeps the model of every stage, and lets each answer for its own stage.

    Nothing that was learnt is ever changed, so nothing is forgotten; the price is one backbone a task, and the task of
    a request must be known. Under ``task_id: latest`` the newest model answers for all.
    """

    kind = "bound"

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.models: dict[str, dict[str, Any]] = {}

    def serving(self, ctx: StageContext, stage: Stage) -> StageContext:
        mine = self.models.get(str(stage.index))
        if mine is None or stage.index >= ctx.index:
            return ctx
        return ctx.with_model(stage.index, mine["model"], mine["known"])

    def end_stage(self, ctx: StageContext) -> None:
        self.models[str(ctx.index)] = clone_tree({"model": owned_state(ctx.model), "known": ctx.known.state_dict()})

    def stage_costs(self, ctx: StageContext) -> dict[str, Any]:
        return {"backbones": len(self.models), "bytes_per_task": count_parameters(ctx.model)[2]}

    def state_dict(self) -> dict[str, Any]:
        return {"models": dict(self.models)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "models")
        self.models = dict(state["models"])


def start_from(ctx: StageContext, state: Mapping[str, Any], index: int) -> None:
    """Puts the weights of an earlier stage into ``ctx.model``; rows that were not there then stay as they are.

    Args:
        ctx: The stage that begins.
        state: Weights of the earlier stage's model.
        index: That stage.
    """
    before, now = ctx.stream.stages[index], ctx.stage
    if (before.n_users, before.n_items) == (now.n_users, now.n_items):
        load_owned_state(ctx.model, clone_tree(state))
        return
    old = ctx.with_model(index, state).model
    grow_model(old, ctx.model, (before.n_users, now.n_users), (before.n_items, now.n_items), ctx.config["new_rows"])
