"""Targets, tasks, stages and the stream.

A *target* is (user, end of history, label). For next-item prediction the label is the item of an interaction and
the history ends before it; for a user's age the history is the whole sequence and the label a class. A *stage* holds
the targets that are trained, validated and tested in it, and the task they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_cl.stream.table import InteractionTable

if TYPE_CHECKING:
    pass


CLASSIFICATION_METRICS = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Task:
    """What a stage asks of the model.

    Args:
        kind: ``next_item`` (rank items), ``value`` (score a labelled interaction) or ``classification``.
        name: Name in reports.
        n_labels: Size of the label vocabulary; ``None`` for items.
        metrics: Metrics of this task, named as in the property ``metrics`` (without a cut-off); ``None`` takes the
            run's, or :data:`CLASSIFICATION_METRICS`.
        primary: Metric of early stopping and of the matrix's column (``ndcg@10``); ``None`` takes the run's
            ``valid_metric``, or the first metric of a classification.
        description: Words about the task, for prompts.
        labels: Names of the classes.
        attributes: Columns of the items that may accompany a history.
    """

    kind: str = "next_item"
    name: str = "next_item"
    n_labels: int | None = None
    metrics: tuple[str, ...] | None = None
    primary: str | None = None
    description: str = ""
    labels: tuple[str, ...] | None = None
    attributes: tuple[str, ...] = ()

    def primary_metric(self, valid_metric: str) -> str:
        """Returns the name, in lower case, of the metric that stops training early and fills the matrix's column.

        Args:
            valid_metric: The run's ``valid_metric``.
        """
        if self.primary is None and self.kind == "classification":
            return (self.metrics or CLASSIFICATION_METRICS)[0].lower()
        return (self.primary or valid_metric).lower()


@dataclass(frozen=True)
class Targets:
    """A set of targets, as columns of equal length ``n``.

    Args:
        position: Position of the interaction that carries the label (of the last one for labels of a user).
        user: User ids.
        lo: Start of the history in ``table.seq``.
        hi: End of the history in ``table.seq``, exclusive.
        label: Item ids or class ids.
        task: Index of the stage that each belongs to; a :class:`Stage` fills it in. ``None`` means the slice of the
            position, which is the same where stages are slices of the log.
    """

    position: np.ndarray
    user: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    label: np.ndarray
    task: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, index: Any) -> Targets:
        task = None if self.task is None else self.task[index]
        return Targets(self.position[index], self.user[index], self.lo[index], self.hi[index], self.label[index], task)

    @classmethod
    def next_items(cls, table: InteractionTable, positions: np.ndarray, history: str = "all") -> Targets:
        """Returns the next-item targets at ``positions``."""
        positions = np.asarray(positions, dtype=np.int64)
        lo, hi = table.history(positions, history)
        return cls(positions, table.user[positions], lo, hi, table.item[positions])

    @classmethod
    def concat(cls, parts: Sequence[Targets]) -> Targets:
        """Returns all targets of ``parts``, in order."""
        if not parts:
            return cls(*(np.empty(0, dtype=np.int64) for _ in range(5)))
        tasks = [part.task for part in parts if part.task is not None]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("position", "user", "lo", "hi", "label")
        }
        return cls(**joined, task=np.concatenate(tasks) if len(tasks) == len(parts) else None)


@dataclass
class Stage:
    """One stage of the stream.

    Args:
        index: From 0.
        name: Name in reports.
        start: First timestamp of its interactions, in seconds.
        end: Last timestamp of its interactions, in seconds.
        train: Training targets.
        valid: Validation targets.
        test: Test targets.
        task: What is asked.
        n_users: User ids known when this stage is trained, padding included (rows of the model).
        n_items: Item ids known when this stage is trained, padding included.
        catalogue: Item ids seen by the end of the evaluated targets: the ranking scope ``candidates: seen``.
        first_new_user: Users with this id or a larger one are first seen in this stage.
        first_new_item: Items with this id or a larger one are first seen in this stage.
        tested_until: Last stage whose training leaves the test targets untouched; ``None`` means all.
        items: Items that this stage's targets are ranked among; ``None`` means all that the property ``candidates``
            allows.
    """

    index: int
    name: str
    start: float
    end: float
    train: Targets
    valid: Targets
    test: Targets
    task: Task = field(default_factory=Task)
    n_users: int = 0
    n_items: int = 0
    catalogue: int = 0
    first_new_user: int = 0
    first_new_item: int = 0
    n_new_users: int = 0
    n_new_items: int = 0
    tested_until: int | None = None
    items: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            targets = getattr(self, name)
            setattr(self, name, replace(targets, task=np.full(len(targets), self.index, dtype=np.int64)))

    def split(self, name: str) -> Targets:
        """Returns the targets called ``train``, ``valid`` or ``test``."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    def evaluable(self, trained: int) -> bool:
        """Tells whether a model trained up to stage ``trained`` has not trained on this stage's test targets."""
        return len(self.test) > 0 and (self.tested_until is None or trained <= self.tested_until)

    def describe(self) -> dict[str, Any]:
        """Returns the row of ``result.json``."""
        return {
            "name": self.name,
            "start": self.start,
            "end": self.end,
            "n_train": len(self.train),
            "n_valid": len(self.valid),
            "n_test": len(self.test),
            "n_users": self.n_users - 1,
            "n_items": self.n_items - 1,
            "n_new_users": self.n_new_users,
            "n_new_items": self.n_new_items,
            "task": self.task.name,
            "task_kind": self.task.kind,
        }
