"""Users forgotten in a saved state: the rows of tables, moments and memories that were theirs.

What is a user's in a tensor is known by its axes (:func:`recbole_cl.stream.vocabulary.infer_axes`), as for growing;
what is a user's in a memory by its column of user ids. Rows of tables become 0, rows of memories are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from recbole_cl.errors import CheckpointError
from recbole_cl.model.state import base_names, others
from recbole_cl.stream.build import Stream
from recbole_cl.stream.vocabulary import Axis, infer_axes
from recbole_cl.stream.without import Removal, is_array

USER_COLUMNS = ("user", "users")


def user_axes(model: Any, wider: Any, n_users: tuple[int, int], n_items: int) -> dict[str, list[Axis]]:
    """Returns the axes of the tensors of a model in which users have rows.

    Args:
        model: The model.
        wider: The same with more users and as many items.
        n_users: Users of the two.
        n_items: Items of both.
    """
    sizes = n_users, (n_items, n_items)
    found = infer_axes(model, wider, *sizes)
    theirs = base_names(model)
    old, new = others(model), others(wider)
    for name, value in old.items():
        if torch.is_tensor(value) and torch.is_tensor(new.get(name)) and value.dim():
            holders = nn.Module(), nn.Module()
            for holder, tensor in zip(holders, (value, new[name]), strict=True):
                holder.register_buffer(name, tensor)
            found[name] = infer_axes(*holders, *sizes)[name]
    return {
        name: axes
        for name, axes in found.items()
        if name not in theirs and any(kind == "user" for axis in axes for kind, _ in axis)
    }


@dataclass(frozen=True)
class Forgetting:
    """Takes users out of saved states.

    Args:
        removal: Who is gone, and where positions and ranges went.
        axes: Of :func:`user_axes`.
        sizes: Numbers of users and items that a kept tensor may have: those of the stages.
        stream: The stream that is left.
    """

    removal: Removal
    axes: Mapping[str, Sequence[Axis]]
    sizes: Sequence[tuple[int, int]]
    stream: Stream

    def tensor(self, name: str, value: Any) -> Any:
        """Returns a tensor with the users' rows at 0.

        Args:
            name: The parameter whose axes apply; one without rows of users comes back as it is.
            value: The tensor, of the model as it is or of an earlier stage's.

        Raises:
            CheckpointError: If its shape is that of no stage, so that nobody can tell whose its rows are.
        """
        axes = self.axes.get(name)
        if axes is None or not is_array(value) or value.ndim != len(axes):
            return value
        for n_users, n_items in self.sizes:
            count = {"user": n_users, "item": n_items}
            lengths = [sum(count.get(kind, size) for kind, size in axis) for axis in axes]
            if lengths == list(value.shape):
                break
        else:
            raise CheckpointError(
                f"forget: the rows of {name!r}, {list(value.shape)}, are those of no stage, so whose they are cannot "
                f"be told; run again over a log without these users"
            )
        out = value.clone() if torch.is_tensor(value) else value.copy()
        for dim, axis in enumerate(axes):
            start = 0
            for kind, size in axis:
                if kind == "user":
                    inside = self.removal.users[self.removal.users < n_users] + start
                    index: list[Any] = [slice(None)] * value.ndim
                    index[dim] = torch.from_numpy(inside) if torch.is_tensor(value) else inside
                    out[tuple(index)] = 0
                start += count.get(kind, size)
        return out

    def nest(self, value: Any) -> Any:
        """Returns a nested state without the users.

        Named tensors lose the users' rows. A memory is a mapping with a column ``user`` or ``users`` of ids: it loses
        the rows with their ids. Flags and tables by user id under these names are set to 0 there.
        """
        if isinstance(value, list):
            return [self.nest(inner) for inner in value]
        if not isinstance(value, Mapping):
            return value
        for name in USER_COLUMNS:
            column = value.get(name)
            if column is not None and is_array(column) and column.ndim == 1 and _kind(column) == "i":
                return self.removal.rows(value, name)
        out = {}
        for key, inner in value.items():
            if key in USER_COLUMNS and is_array(inner):
                out[key] = self.by_user(inner)
            else:
                out[key] = self.tensor(key, inner) if is_array(inner) else self.nest(inner)
        return out

    def by_user(self, value: Any) -> Any:
        """Returns flags or a table by user id with 0 at the users."""
        out = value.clone() if torch.is_tensor(value) else value.copy()
        inside = self.removal.users[self.removal.users < len(value)]
        out[torch.from_numpy(inside) if torch.is_tensor(value) else inside] = 0
        return out


def _kind(column: Any) -> str:
    return str(np.asarray(column[:0]).dtype.kind)
