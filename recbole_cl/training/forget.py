"""Users forgotten in one checkpoint: its store, its model, its strategies, its moments and memories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recbole_cl.model.contract import contract
from recbole_cl.model.forget import Forgetting, user_axes
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.stream.build import Stream
from recbole_cl.stream.extend import with_more_users
from recbole_cl.stream.without import without_users
from recbole_cl.training.load import SavedRun
from recbole_cl.training.runner import Runner
from recbole_cl.tree import clone_tree

MORE = 3
"""Users by which a second model is wider, to see where they have rows."""


def forgotten(saved: SavedRun, users: np.ndarray) -> tuple[dict[str, Any], Stream]:
    """Returns the checkpoint and the stream of a saved run without some of its users.

    The caller keeps the stream and writes its name into ``store``.

    Args:
        saved: The run.
        users: Ids of the users.
    """
    stream, removal = without_users(saved.stream, users)
    runner = saved.runner()
    sizes = {(stage.n_users, stage.n_items) for stage in saved.stream.stages}
    axes = _axes(saved, runner)
    forgetting = Forgetting(removal, axes, sorted(sizes, reverse=True), stream)
    state = clone_tree(saved.state)
    state["model"] = _model(runner.model, state["model"], forgetting)
    if state["previous"] is not None:
        state["previous"]["model"] = _model(runner.model, state["previous"]["model"], forgetting)
    state["carried"] = {
        name: {key: forgetting.tensor(name, value) for key, value in moments.items()}
        for name, moments in state["carried"].items()
        if not name.startswith("strategy:")  # whose parameters no axes describe: their moments begin anew
    }
    state["strategy"] = {
        member.name: dict(member.without_users(state["strategy"][member.name], forgetting))
        for member in runner.strategy.members
    }
    state["known"]["users"] = forgetting.by_user(state["known"]["users"])
    state["data"] = stream.fingerprint()
    return state, stream


def forget_outside(saved: SavedRun, users: list[str]) -> int:
    """Removes what the model's side stores (caches, profiles) hold of users; returns how many entries there were.

    Args:
        saved: The run, the users still in it.
        users: Their tokens.
    """
    return int(contract(saved.runner().model).forget_users(saved.stream, users))


def _axes(saved: SavedRun, runner: Runner) -> dict[str, Any]:
    """Returns the axes of the tensors in which users have rows, from a second model with more users."""
    last = len(saved.stream) - 1
    wider = Runner(saved.config)
    wider.folder = saved.folder
    wider.begin(with_more_users(saved.stream, MORE))
    view = wider.stream.view(last, saved.config["graph"])
    ctx = wider.state.models.fresh(last, view, ModelRandomness(derive(saved.config["seed"], last)))
    stage = saved.stream.stages[last]
    return user_axes(runner.model, ctx.model, (stage.n_users, stage.n_users + MORE), stage.n_items)


def _model(model: Any, state: Mapping[str, Any], forgetting: Forgetting) -> dict[str, Any]:
    """Returns an owned state without the users."""
    found = dict(state)
    for part in ("tensors", "other"):
        found[part] = {name: forgetting.tensor(name, value) for name, value in state[part].items()}
    if "owned" in state:
        found["owned"] = contract(model).without_users(state["owned"], forgetting)
    return found
