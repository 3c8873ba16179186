"""What contracts ask of states and of strategies: equal to the bit, as a checkpoint gives it back, something done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_cl import checkpoint
from recbole_cl.strategy.base import Strategy, overrides
from recbole_cl.strategy.context import StageContext


def effects(member: Strategy, ctx: StageContext) -> list[str]:
    """Returns which of a strategy's hooks do something now: change gradients, give a positive term, add rows."""
    found = []
    kept = {name: p.grad for name, p in ctx.parameters().items()}

    def moved() -> bool:
        return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in ctx.parameters().values())

    def clear() -> None:
        for p in ctx.parameters().values():
            p.grad = None

    if overrides(member, "add_gradients"):
        clear()
        member.add_gradients(ctx)
        value = float(member.penalty(ctx))
        if moved() and math.isfinite(value) and (value > 0 or not overrides(member, "penalty")):
            found.append("add_gradients")
    if overrides(member, "mask_gradients"):
        for p in ctx.parameters().values():
            p.grad = torch.ones_like(p)
        member.mask_gradients(ctx)
        if any(p.grad is None or bool((p.grad == 0).any()) for p in ctx.parameters().values()):
            found.append("mask_gradients")
    if overrides(member, "augment_batch") or overrides(member, "loss_terms"):
        batch = next(iter(ctx.loader))
        larger = member.augment_batch(ctx, batch)
        if len(larger) > len(batch):
            found.append("augment_batch")
        clear()
        terms = [term for term in member.loss_terms(ctx, larger.to(ctx.device)).values() if float(term) > 0]
        for term in terms:
            term.backward()  # type: ignore[no-untyped-call]
        if terms and moved():
            found.append("loss_terms")
    for name, p in ctx.parameters().items():
        p.grad = kept[name]
    return found


def leaves(state: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields (path, last key, value) of all leaves of a nest."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from leaves(value, f"{path}/{key}", key)
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from leaves(value, f"{path}/{number}", str(number))
    else:
        yield path, name, state


def assert_same(one: Any, two: Any) -> None:
    """Asserts that two nests have the same keys and bit for bit the same leaves."""
    first = {path: value for path, _, value in leaves(one)}
    second = {path: value for path, _, value in leaves(two)}
    assert first.keys() == second.keys()
    for path, value in first.items():
        other = second[path]
        if torch.is_tensor(value):
            assert value.dtype == other.dtype and torch.equal(value, other), f"{path} differs"
        elif isinstance(value, np.ndarray):
            assert np.array_equal(value, other), f"{path} differs"
        else:
            assert value == other, f"{path} differs: {value!r}, {other!r}"


def through_disk(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a state as a checkpoint gives it back."""
    return checkpoint.read(checkpoint.save(folder / "state", 1, state, 1))
