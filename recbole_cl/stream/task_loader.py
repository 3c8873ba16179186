"""Batches of several tasks at once, for objectives that are optimised together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from recbole.data.interaction import Interaction

from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.stage import Targets


class TaskLoader:
    """A loader for each task, side by side: a step has a batch of the stage's own task and one of every other.

    ::

        task 0   a0 a1 a2 a3 a4 | the longest: batches of train_batch_size, and an epoch lasts until it is seen whole
        task 1   b0 b1 b2 b3 b4 | a shorter one is spread over the same steps, by smaller batches
        task 2   c0 c1 c2 c3 c0'| the batch that is yielded; those of a and b lie in ``others``

    One whose targets come in fewer batches all the same (windows hold unequal numbers of them) begins anew, in a new
    order.

    Args:
        loaders: One loader a task by stage index, that of the stage's own task last.

    Attributes:
        others: Batches of the other tasks beside the one that was yielded last, by stage index, with their negatives.
    """

    def __init__(self, loaders: dict[int, Any]) -> None:
        self.tasks = list(loaders)
        self.loaders = list(loaders.values())
        self.others: dict[int, Interaction] = {}
        self._done: int | None = None
        self._skip = 0

    @classmethod
    def over(cls, ctx: Any, targets: Targets, name: str) -> TaskLoader:
        """Returns the loader of a pass over targets of several stages.

        Args:
            ctx: The stage (:class:`recbole_cl.strategy.context.StageContext`).
            targets: Training targets, each with its stage.
            name: Name of the pass; the loaders' generators are derived from it, the task and the stage.
        """
        tasks = targets.task if targets.task is not None else np.full(len(targets), ctx.index)
        parts = {int(index): targets[tasks == index] for index in np.unique(np.r_[tasks, ctx.index])}
        steps = -(-max(len(own) for own in parts.values()) // ctx.config["train_batch_size"])
        loaders = {}
        for index, own in parts.items():
            size = -(-len(own) // max(steps, 1))
            loaders[index] = make_loader(replace(ctx, index=index), own, f"{name}/stage{ctx.index}", max(size, 1))
        return cls(loaders)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaders[-1], name)

    def __len__(self) -> int:
        return max(len(loader) for loader in self.loaders)

    @property
    def n_targets(self) -> int:
        """Training targets of an epoch, those seen again counted again."""
        return sum(round(loader.n_targets * len(self) / len(loader)) for loader in self.loaders)

    def __iter__(self) -> Iterator[Interaction]:
        running = [iter(loader) for loader in self.loaders]
        first, self._skip = self._skip, 0
        try:
            for number in range(first, len(self)):
                batches = []
                for place, loader in enumerate(self.loaders):
                    batch = next(running[place], None)
                    if batch is None:  # seen whole: once more, in a new order
                        running[place] = iter(loader)
                        batch = next(running[place])
                    batches.append(batch)
                self._done = number + 1
                self.others = dict(zip(self.tasks, batches[:-1], strict=False))
                yield batches[-1]
        finally:
            self._done = None
            for iterator in running:
                iterator.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the epoch and the state of every task's loader."""
        done = self._skip if self._done is None else self._done
        return {"done": done, "loaders": [loader.state_dict() for loader in self.loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts place and states back."""
        self._skip, self._done = int(state["done"]), None
        for loader, mine in zip(self.loaders, state["loaders"], strict=True):
            loader.load_state_dict(mine)
