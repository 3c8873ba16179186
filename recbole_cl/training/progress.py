"""Where the training of a stage stands, and what it began from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from recbole_cl.rng import ModelRandomness


@dataclass
class Progress:
    """Where a stage's training stands; part of every checkpoint."""

    number: int = 0  # of the pass
    epoch: int = 0  # epochs of the pass that are complete
    stopped: bool = False
    best_score: float = -math.inf
    waited: int = 0
    best: dict[str, Any] | None = None
    best_targets: int | None = None
    targets: int = 0  # training targets seen in this stage
    seconds: float = 0.0
    step: int = 0
    epoch_start: int = 0  # step at which the running epoch began
    partial_loss: Any = None  # loss of the batches of an unfinished epoch
    terms: dict[str, list[float]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything in it."""
        return dict(self.__dict__)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        """Returns the progress with a given state."""
        progress = cls(**state)
        if isinstance(progress.partial_loss, list):
            progress.partial_loss = tuple(progress.partial_loss)
        return progress

    def next_pass(self, number: int, worst: float) -> Progress:
        """Returns the progress of the pass after this one."""
        return Progress(number, best_score=worst, targets=self.targets, seconds=self.seconds)


@dataclass
class StageStart:
    """What a stage's passes begin from.

    Attributes:
        fresh: Initial weights of the stage's model, empty where it lives on from the stage before.
        state: Model and strategies as the stage began.
        randomness: The random state that the stage's training draws from.
    """

    fresh: dict[str, Any]
    state: dict[str, Any]
    randomness: ModelRandomness
