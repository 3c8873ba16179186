"""Randomness that the run owns.

Every part draws from a generator of its own, derived from (seed, stage, name); nothing draws from the global
generators of numpy, torch and Python. RecBole's models can draw from nowhere else (initialisation, dropout), so
:class:`ModelRandomness` puts a state of its own in their place while model code runs and takes it back after.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def derive(seed: int, stage: int, name: str = "model") -> int:
    """Returns the seed of one part: ``derive(seed, 0) == seed``, others are hashed to 31 bits.

    Args:
        seed: The run's seed.
        stage: Stage index, from 0.
        name: The part that will own the generator.
    """
    if stage == 0 and name == "model":
        return seed
    digest = hashlib.sha256(f"{seed}/{stage}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def numpy_generator(seed: int, stage: int, name: str) -> np.random.Generator:
    """Returns a numpy generator owned by one part."""
    return np.random.default_rng(derive(seed, stage, name))


def torch_generator(seed: int, stage: int, name: str) -> torch.Generator:
    """Returns a CPU torch generator owned by one part."""
    generator = torch.Generator()
    generator.manual_seed(derive(seed, stage, name))
    return generator


def _capture() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": list(random.getstate()),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs the body on global generators that start from ``seed``; afterwards they are as before."""
    outer = _capture()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        _restore(outer)


class ModelRandomness:
    """The random state that model code sees, kept apart from the caller's.

    Args:
        seed: Seed of numpy, torch and Python inside :meth:`owned`.
    """

    def __init__(self, seed: int) -> None:
        outer = _capture()
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a stack trace for each absent accelerator
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        self._state = _capture()
        _restore(outer)
        self._depth = 0

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Runs the body on this state; the global generators are as before afterwards. Re-entrant."""
        if self._depth:
            yield
            return
        outer = _capture()
        _restore(self._state)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._state = _capture()
            _restore(outer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, also from inside :meth:`owned` (a checkpoint in the middle of an epoch)."""
        return _capture() if self._depth else dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a state back; one that cannot be restored is an error now, and not when it is needed."""
        if self._depth:
            _restore(state)
            return
        outer = _capture()
        try:
            _restore(state)
        finally:
            _restore(outer)
        self._state = dict(state)
