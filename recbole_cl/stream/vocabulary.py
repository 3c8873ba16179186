"""Growth: users and items get rows as they appear, by named axes.

Ids are append-only, so growing is inserting rows at the end of the *user* and *item* segments of a dimension. A
dimension may concatenate segments (a factorisation machine's one table for all fields) and end with special rows
(BERT4Rec's mask, row ``n_items``); the segments say where. One :class:`Growth` serves parameters, buffers, optimiser
moments and the tensors of strategies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from recbole_cl.errors import ConfigError

Axis = tuple[tuple[str, int], ...]
"""Segments of one dimension, such as ``(("user", 0), ("item", 0), ("none", 1))``.

A segment is (kind, size): users and items bring their count (the size is not read), ``none`` is ``size`` fixed rows.
"""


def user_axis(extra: int = 0) -> Axis:
    """Returns the axis of a table of users, with ``extra`` special rows at its end."""
    return (("user", 0),) + ((("none", extra),) if extra else ())


def item_axis(extra: int = 0) -> Axis:
    """Returns the axis of a table of items, with ``extra`` special rows at its end."""
    return (("item", 0),) + ((("none", extra),) if extra else ())


def fixed_axis(size: int) -> Axis:
    """Returns the axis of a dimension that never grows."""
    return (("none", size),)


@dataclass(frozen=True)
class Growth:
    """The step from one stage's vocabulary to the next.

    Args:
        n_users: (before, after), padding included.
        n_items: (before, after), padding included.
        axes: Axes of every named tensor, one :data:`Axis` a dimension.
    """

    n_users: tuple[int, int]
    n_items: tuple[int, int]
    axes: Mapping[str, Sequence[Axis]] = field(default_factory=dict)

    @property
    def identity(self) -> bool:
        """True where nothing new appeared."""
        return self.n_users[0] == self.n_users[1] and self.n_items[0] == self.n_items[1]

    def _sizes(self, kind: str, size: int) -> tuple[int, int]:
        if kind == "user":
            return self.n_users
        if kind == "item":
            return self.n_items
        return size, size

    def rows(self, axis: Axis) -> tuple[np.ndarray, int]:
        """Returns the new index of each old row of a dimension, and the dimension's new size."""
        where, start = [], 0
        for kind, size in axis:
            before, after = self._sizes(kind, size)
            where.append(np.arange(start, start + before))
            start += after
        return np.concatenate(where) if where else np.empty(0, dtype=np.int64), start

    def expand(self, name: str, tensor: torch.Tensor, fill: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Returns ``tensor`` with rows for what is new.

        Args:
            name: Name of the parameter whose axes apply.
            tensor: Old values.
            fill: Values of the new rows: a number, or a tensor of the new shape whose old rows are overwritten.

        Raises:
            ConfigError: If the axes do not describe the tensor's shape.
        """
        axes = self.axes.get(name)
        if axes is None or self.identity:
            return tensor.clone()
        maps = [self.rows(axis) for axis in axes]
        if tuple(len(rows) for rows, _ in maps) != tuple(tensor.shape):
            raise ConfigError(
                f"growth_axes: the axes of {name!r} describe {[len(r) for r, _ in maps]}, it is {list(tensor.shape)}"
            )
        shape = tuple(size for _, size in maps)
        if shape == tuple(tensor.shape):  # nothing grows here, or it has no dimension at all (a counter)
            return tensor.clone()
        if isinstance(fill, torch.Tensor) and tuple(fill.shape) != shape:
            raise ConfigError(
                f"growth_axes: the axes of {name!r} make it {list(shape)}, the model of the next stage has "
                f"{list(fill.shape)}"
            )
        grown = fill.clone().to(tensor) if isinstance(fill, torch.Tensor) else tensor.new_full(shape, fill)
        index = [torch.from_numpy(rows).to(tensor.device) for rows, _ in maps]
        if all(len(rows) == size for rows, size in maps[1:]):  # rows only: a plain slice assignment
            grown[index[0]] = tensor
        else:
            grown[torch.meshgrid(*index, indexing="ij")] = tensor
        return grown

    def means(self, name: str, tensor: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Returns ``fresh`` with each new row of a segment set to the mean of the segment's known rows.

        Padding (the first row of a segment) and special rows are left out of the mean.
        """
        out = fresh.clone()
        for dim, axis in enumerate(self.axes.get(name, ())):
            old_start = new_start = 0
            for kind, size in axis:
                before, after = self._sizes(kind, size)
                if after > before > 1:
                    mean = tensor.narrow(dim, old_start + 1, before - 1).mean(dim=dim, keepdim=True)
                    if mean.shape[:dim] + mean.shape[dim + 1 :] == out.shape[:dim] + out.shape[dim + 1 :]:
                        out.narrow(dim, new_start + before, after - before).copy_(mean)
                old_start, new_start = old_start + before, new_start + after
        return out


def infer_axes(
    old: nn.Module, new: nn.Module, n_users: tuple[int, int], n_items: tuple[int, int]
) -> dict[str, list[Axis]]:
    """Returns the axes of every tensor of a model from its instances at two stages.

    A model may declare them (``growth_axes``: name to one of ``"user"``, ``"item"``, ``None`` or an :data:`Axis` per
    dimension). RecBole's models do not, but a dimension that grew by exactly what users or items grew says what it is.
    Tables of factorisation machines carry the offsets of their fields, and each field is judged by itself.

    Raises:
        ConfigError: If a shape changed in a way that no axis explains.
    """
    declared = dict(getattr(new, "growth_axes", None) or {})
    before, after = dict(old.state_dict()), dict(new.state_dict())
    successors = dict(new.named_modules())
    modules = {name: (module, successors.get(name)) for name, module in old.named_modules()}
    axes: dict[str, list[Axis]] = {}
    for name, tensor in after.items():
        if name not in before:
            continue
        if before[name].dim() != tensor.dim() or len(declared.get(name, before[name].shape)) != tensor.dim():
            raise ConfigError(
                f"growth_axes: {name!r} has {before[name].dim()} dimensions before and {tensor.dim()} after, and "
                f"{len(declared.get(name, before[name].shape))} axes; declare one axis a dimension on the model"
            )
        if name in declared:
            axes[name] = [_declared(kind, size) for kind, size in zip(declared[name], before[name].shape, strict=True)]
            continue
        axes[name] = [
            _infer(name, a, b, n_users, n_items, list(_fields(modules, name, a, b)) if dim == 0 else [], dim)
            for dim, (a, b) in enumerate(zip(before[name].shape, tensor.shape, strict=True))
        ]
    return axes


def _declared(kind: Any, size: int) -> Axis:
    if kind is None:
        return fixed_axis(size)
    return ((kind, 0),) if isinstance(kind, str) else tuple(kind)


Fields = list[tuple[int, int]]
MOST_EXTRA = (2, 1024)
"""Special rows (mask, end) that a table may end with; inputs that may follow those of the items (DiffRec's clock)."""


def _fields(modules: Mapping[str, tuple[nn.Module, Any]], name: str, a: int, b: int) -> Iterator[tuple[bool, Fields]]:
    """Yields what the sizes (before, after) of the fields of a table could be, from the offsets that modules keep.

    The flag tells whether the offsets are the table's own: RecBole's ``FMEmbedding`` has ``offsets`` and the table, a
    field-aware machine keeps ``token_offsets`` further up, beside tables that they do not concern.
    """
    owner, level = name, 0
    while owner:
        owner, level = owner.rpartition(".")[0], level + 1
        old, new = modules.get(owner, (None, None))
        for key, offsets in vars(old).items() if old is not None and new is not None else ():
            later = vars(new).get(key)
            if not key.endswith("offsets") or not isinstance(offsets, np.ndarray | list | tuple) or later is None:
                continue
            x, y = np.diff(np.r_[offsets, a]), np.diff(np.r_[later, b])
            if len(x) == len(y) > 1 and (x > 0).all() and (y >= x).all():
                yield key == "offsets" and level <= 2, list(zip(x.tolist(), y.tolist(), strict=True))


def _infer(
    name: str,
    a: int,
    b: int,
    n_users: tuple[int, int],
    n_items: tuple[int, int],
    candidates: Sequence[tuple[bool, Fields]] = (),
    dim: int = 0,
) -> Axis:
    if a == b:  # ids are never taken away, so no field inside has grown either
        return fixed_axis(a)

    def joined(fields: Fields) -> Axis:
        return tuple(segment for x, y in fields for segment in _infer(name, x, y, n_users, n_items))

    for own, fields in candidates:
        if own:
            return joined(fields)
    fits: list[Axis] = []
    if (a, b) == (n_users[0] + n_items[0], n_users[1] + n_items[1]):
        fits.append((("user", 0), ("item", 0)))
    for extra in range(MOST_EXTRA[min(dim, 1)] + 1):
        if (a, b) == (n_items[0] + extra, n_items[1] + extra):
            fits.append(item_axis(extra))
        if (a, b) == (n_users[0] + extra, n_users[1] + extra):
            fits.append(user_axis(extra))
    if len(fits) > 1:  # as many users as items, before and after: the name decides
        fits = [axis for axis in fits if axis[0][0] in name.lower()] or fits
    if fits:
        return fits[0]
    for _, fields in candidates:
        with contextlib.suppress(ConfigError):
            return joined(fields)
    raise ConfigError(
        f"growth_axes: {name!r} went from {a} to {b} rows, which neither users {n_users} nor items {n_items} explain; "
        f"declare growth_axes on the model, or set vocabulary: global"
    )


def carry(old: Mapping[str, torch.Tensor], new: nn.Module, growth: Growth, new_rows: str = "random") -> list[str]:
    """Loads the old weights into a model of the next stage; new rows keep their initialisation or start as a mean.

    Args:
        old: State of the model before.
        new: Model with the new shapes, freshly initialised.
        growth: The step.
        new_rows: ``random`` (the fresh initialisation) or ``mean`` (of the known rows, padding left out).

    Returns:
        Names of old tensors that the new model does not have.
    """
    fresh = new.state_dict()
    loaded = {}
    for name, tensor in fresh.items():
        if name not in old:
            continue
        before = old[name].to(tensor.device)
        mean = new_rows == "mean" and tensor.is_floating_point()
        loaded[name] = growth.expand(name, before, growth.means(name, before, tensor) if mean else tensor)
    new.load_state_dict(loaded, strict=False)
    return [name for name in old if name not in fresh]


def grow_optimizer(old: Mapping[str, Mapping[str, Any]], growth: Growth) -> dict[str, dict[str, Any]]:
    """Returns optimiser moments by parameter name, grown with zero rows.

    Args:
        old: For each parameter name its optimiser state (``exp_avg``, ``step``, ...).
        growth: The step.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, state in old.items():
        out[name] = {
            key: growth.expand(name, value) if torch.is_tensor(value) and value.dim() else value
            for key, value in state.items()
        }
    return out
