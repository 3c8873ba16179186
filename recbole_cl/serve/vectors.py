"""The vectors of items and users that a model ranks by, where it has any.

A model may give its own by ``vectors(batch)`` (:class:`recbole_cl.model.contract.ContinualModel`). RecBole's models say
nothing of the kind, but they keep to a few forms, and each form is checked by its shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import offers


def item_vectors(ctx: Any, name: str) -> torch.Tensor:
    """Returns a vector for each item that the model has a row for, shape ``[n_items, d]``.

    Args:
        ctx: The stage that the model ended with.
        name: Name of the model, for the message.

    Raises:
        ConfigError: If it has none of a known form.
    """
    model, n = ctx.model, ctx.batcher.n_items
    if offers(model, "item_vectors"):
        return model.item_vectors()  # type: ignore[no-any-return]
    for found in (_propagated(model, 1), _table(model, "item_embedding"), _field(ctx, ctx.batcher.iid)):
        if found is not None and len(found) >= n:
            return found[:n]
    raise ConfigError(f"vectors: {name} has no vector for each item; give its class a method item_vectors()")


def user_vectors(ctx: Any, name: str, batch: Interaction | None) -> torch.Tensor:
    """Returns a vector for each user.

    Args:
        ctx: The stage that the model ended with.
        name: Name of the model, for the message.
        batch: Rows of users with their histories, for a sequential model: one vector a row; else ``None``: one for each
            user that the model has a row for, shape ``[n_users, d]``.

    Raises:
        ConfigError: If it has none of a known form.
    """
    model, n = ctx.model, ctx.batcher.n_users
    if batch is not None:
        if offers(model, "user_representation"):
            return model.user_representation(batch)  # type: ignore[no-any-return]
        if hasattr(model, "ITEM_SEQ"):
            try:
                found = model.forward(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN])
            except (TypeError, NotImplementedError):
                found = None
            if torch.is_tensor(found) and found.dim() == 2 and len(found) == len(batch):
                return found
    else:
        for found in (_propagated(model, 0), _table(model, "user_embedding"), _field(ctx, ctx.batcher.uid)):
            if found is not None and len(found) >= n:
                return found[:n]
    raise ConfigError(f"vectors: {name} has no vector for each user; give its class a method user_representation()")


def _propagated(model: Any, side: int) -> torch.Tensor | None:
    """Returns what a graph model's ``forward()`` gives for users (0) or items (1): RecBole's own convention."""
    if not hasattr(model, "restore_user_e"):
        return None
    try:
        found = model.forward()
    except (TypeError, NotImplementedError):  # it asks for more
        return None
    if (
        isinstance(found, tuple)
        and len(found) >= 2
        and all(torch.is_tensor(part) and part.dim() == 2 for part in found[:2])
    ):
        return found[side]  # type: ignore[no-any-return]
    return None


def _table(model: Any, name: str) -> torch.Tensor | None:
    for holder in (model, getattr(model, "backbone", None)):
        table = getattr(holder, name, None)
        weight = getattr(table, "weight", None)
        if isinstance(table, nn.Module) and torch.is_tensor(weight):
            return weight
    return None


def _field(ctx: Any, field: str) -> torch.Tensor | None:
    """Returns the rows of a field in the one table of a context-aware model (``FMEmbedding``)."""
    model = ctx.model
    names: Any = getattr(model, "token_field_names", None)
    table: Any = getattr(model, "token_embedding_table", None)
    if not names or field not in names or not hasattr(table, "offsets"):
        return None
    sizes, start = model.token_field_dims, np.asarray(table.offsets)
    number = names.index(field)
    first = int(start[number])
    return table.embedding.weight[first : first + int(sizes[number])]  # type: ignore[no-any-return]
