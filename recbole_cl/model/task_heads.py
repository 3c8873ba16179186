"""Answers to several tasks from one representation: the adapters f_k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.stream.stage import Task

ADAPTERS = ("none", "linear", "mlp")


class NextItemAdapter(nn.Module):
    """f_k of a next-item task: h + g(h), with g linear or an MLP that starts as zero, and a bias of each item.

    An item's score is its inner product with that, plus its bias, which starts as zero, too. The task therefore starts
    from the answers of the model as it is. The bias says which items a task asks for whoever the user is.

    Args:
        width: Width of the representation.
        kind: ``none``, ``linear`` or ``mlp``.
        n_items: Known items, padding included, if they have biases; else 0.

    Attributes:
        item_bias: The biases, shape ``[n_items]``, or ``None``.
    """

    def __init__(self, width: int, kind: str, n_items: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width) if kind == "mlp" else None
        self.last = nn.Linear(width, width) if kind != "none" else None
        if self.last is not None:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)
        self.item_bias = nn.Parameter(torch.zeros(n_items)) if n_items else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the adapted representation, shape ``[B, d]``."""
        if self.last is None:
            return hidden
        inner = hidden if self.inner is None else F.relu(self.inner(hidden))
        return hidden + self.last(inner)  # type: ignore[no-any-return]


def classification_adapter(width: int, n_labels: int, kind: str) -> nn.Module:
    """Returns f_k of a classification: ``[B, d]`` to logits ``[B, n_labels]``."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_labels))
    return nn.Linear(width, n_labels)


class TaskHeads(nn.ModuleList):
    """The adapters of all tasks, by stage; an identity where a task has none.

    Args:
        tasks: The tasks, in the order of the stages.
        width: Width of the representation.
        classifier: Adapter of classifications, ``linear`` or ``mlp``.
        next_item: Adapter of next-item tasks after the first, ``none``, ``linear`` or ``mlp``.
        n_items: Known items, padding included, if these tasks have biases of items; else 0.

    Raises:
        ConfigError: If a kind of adapter is unknown.
    """

    def __init__(
        self, tasks: Sequence[Task], width: int, classifier: str = "linear", next_item: str = "none", n_items: int = 0
    ) -> None:
        if classifier not in ADAPTERS[1:] or next_item not in ADAPTERS:
            raise ConfigError(
                f"task adapter: {classifier!r} for classes must be one of {', '.join(ADAPTERS[1:])}, {next_item!r} for "
                f"next items one of {', '.join(ADAPTERS)}"
            )
        heads: list[nn.Module] = []
        for index, task in enumerate(tasks):
            if task.kind == "classification":
                heads.append(classification_adapter(width, int(task.n_labels or 1), classifier))
            elif index and (next_item != "none" or n_items):
                heads.append(NextItemAdapter(width, next_item, n_items))
            else:
                heads.append(nn.Identity())
        super().__init__(heads)

    def item_bias(self, task: int) -> nn.Parameter | None:
        """Returns a task's biases of items, shape ``[n_items]``, or ``None``."""
        return getattr(self[task], "item_bias", None)

    def item_biases(self) -> torch.Tensor | None:
        """Returns the biases of all tasks, shape ``[K, n_items]``, or ``None`` where no task has any."""
        found = [self.item_bias(task) for task in range(len(self))]
        own = next((bias for bias in found if bias is not None), None)
        return None if own is None else torch.stack([torch.zeros_like(own) if bias is None else bias for bias in found])

    def grow(self, n_items: int) -> list[str]:
        """Makes room for new items, whose biases are 0 under every task.

        Returns:
            Names of the parameters that have grown.
        """
        biases = {task: bias for task in range(len(self)) if (bias := self.item_bias(task)) is not None}
        for task, bias in biases.items():
            self[task].item_bias = nn.Parameter(F.pad(bias.detach(), (0, n_items - len(bias))))
        return [f"{task}.item_bias" for task in biases]
