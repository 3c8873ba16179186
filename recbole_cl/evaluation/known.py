"""What a model has trained on: the rest counts as a miss, and is counted apart as *cold*."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_cl.stream.stage import Targets
from recbole_cl.stream.table import InteractionTable


@dataclass
class Known:
    """What a model has trained on: flags by user and item id, and the mean training label.

    Args:
        users: Shape ``[n_users]`` of the whole stream.
        items: Shape ``[n_items]`` of the whole stream.
        label_sum: Sum of the training labels.
        label_count: Number of training labels.
    """

    users: np.ndarray
    items: np.ndarray
    label_sum: float = 0.0
    label_count: int = 0

    @classmethod
    def nothing(cls, table: InteractionTable) -> Known:
        """Returns the knowledge of a model that has not trained."""
        return cls(np.zeros(table.n_users, dtype=bool), np.zeros(table.n_items, dtype=bool))

    @classmethod
    def everything(cls, table: InteractionTable, n_users: int, n_items: int) -> Known:
        """Returns a knowledge of all rows: the untrained reference is scored by its random rows, as its name says."""
        known = cls.nothing(table)
        known.users[:n_users] = True
        known.items[:n_items] = True
        return known

    def learn(self, table: InteractionTable, targets: Targets, sequential: bool, labels: np.ndarray | None) -> None:
        """Adds the users, labels and (for sequential models) history items of trained targets."""
        self.users[targets.user] = True
        self.items[table.item[targets.position]] = True
        if sequential and len(targets):
            change = np.zeros(len(table.seq) + 1, dtype=np.int64)
            np.add.at(change, targets.lo, 1)
            np.add.at(change, targets.hi, -1)
            covered = np.cumsum(change[:-1]) > 0
            self.items[table.item[table.seq[covered]]] = True
        if labels is not None:
            self.label_sum += float(labels.sum())
            self.label_count += len(labels)

    def scorable(self, n_items: int, untrained: bool) -> np.ndarray:
        """Returns the items that the model can score, flags of shape ``[n_items]`` of the whole stream.

        Args:
            n_items: Items that the model has rows for.
            untrained: It also scores items that it never trained on (``scores_untrained_items``).
        """
        return self.items | (np.arange(len(self.items)) < n_items) if untrained else self.items

    def state_dict(self) -> dict[str, Any]:
        """Returns the flags and sums."""
        return {"users": self.users, "items": self.items, "label_sum": self.label_sum, "label_count": self.label_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the flags and sums back."""
        self.users, self.items = np.array(state["users"], dtype=bool), np.array(state["items"], dtype=bool)
        self.label_sum, self.label_count = float(state["label_sum"]), int(state["label_count"])
