"""Answers to several tasks from one representation: adapters f_k, and the base of models that have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.model.loss import BPRLoss
from torch import nn
from torch.nn import functional as F

from recbole_cl.config.models import get_model_class
from recbole_cl.errors import ConfigError
from recbole_cl.model.all_positions import last_items
from recbole_cl.stream.batch import TARGETS, TASK
from recbole_cl.stream.stage import Task

LABEL = "_label"
ADAPTERS = ("none", "linear", "mlp")


class NextItemAdapter(nn.Module):
    """f_k of a next-item task: h + g(h), with g linear or an MLP that starts as zero.

    The task therefore starts from the answers of the model as it is.

    Args:
        width: Width of the representation.
        kind: ``linear`` or ``mlp``.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width) if kind == "mlp" else None
        self.last = nn.Linear(width, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the adapted representation, shape ``[B, d]``."""
        inner = hidden if self.inner is None else F.relu(self.inner(hidden))
        return hidden + self.last(inner)


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

    Raises:
        ConfigError: If a kind of adapter is unknown.
    """

    def __init__(self, tasks: Sequence[Task], width: int, classifier: str = "linear", next_item: str = "none") -> None:
        if classifier not in ADAPTERS[1:] or next_item not in ADAPTERS:
            raise ConfigError(
                f"task adapter: {classifier!r} for classes must be one of {', '.join(ADAPTERS[1:])}, {next_item!r} for "
                f"next items one of {', '.join(ADAPTERS)}"
            )
        heads: list[nn.Module] = []
        for index, task in enumerate(tasks):
            if task.kind == "classification":
                heads.append(classification_adapter(width, int(task.n_labels or 1), classifier))
            elif index and next_item != "none":
                heads.append(NextItemAdapter(width, next_item))
            else:
                heads.append(nn.Identity())
        super().__init__(heads)


class TaskModel(SequentialRecommender):
    """A sequential backbone that answers the tasks of a stream, each through its own adapter.

    A subclass names the property that names its backbone, and writes :meth:`represent`. What is written here trains
    the task that a batch is of and answers the task that is asked for.

    Args:
        config: The run's configuration.
        dataset: The stage's view; ``dataset.stream`` and ``dataset.stage_index`` tell the tasks.

    Attributes:
        backbone_property: The property that names the backbone; its defaults become the run's.
        tasks: The tasks, by stage.
        stage: The stage that is being trained.
        backbone: The sequential model inside; it owns the item embeddings and the rule that scores items.
        heads: The adapters, by stage.
    """

    backbone_property: str
    backbone: Any
    stage: int

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.config = config
        self.tasks: list[Task] = [stage.task for stage in dataset.stream.stages]
        self.stage = dataset.stage_index
        self.pair_loss: nn.Module = BPRLoss() if config["task_pair_loss"] == "BPR" else BinaryCrossEntropy()
        self.backbone = self.make_backbone(config, dataset)
        self.width: int = self.backbone.item_embedding.embedding_dim
        self.heads = self.make_heads()

    def make_backbone(self, config: Any, dataset: Any) -> Any:
        """Returns a new backbone over a view, with the run's loss.

        Raises:
            ConfigError: If the model has no table of items of that name.
        """
        backbone = get_model_class(config[self.backbone_property])(config, dataset)
        if not isinstance(getattr(backbone, "item_embedding", None), nn.Embedding):
            raise ConfigError(
                f"{self.backbone_property}: {config[self.backbone_property]} has no item_embedding to build on; use "
                f"SASRec, GRU4Rec, NARM, STAMP or another model that has"
            )
        if config["loss_type"] == "BPR":  # RecBole's word for a target and a negative
            backbone.loss_fct = self.pair_loss
        return backbone

    def make_heads(self) -> TaskHeads:
        """Returns the adapters; a subclass reads its own properties here."""
        return TaskHeads(self.tasks, self.width)

    # -- what a subclass writes -----------------------------------------------------------------------------------

    def represent(self, batch: Interaction, task: int) -> torch.Tensor:
        """Returns the representation of each row's history for a task, shape ``[B, d]``.

        Args:
            batch: Rows with RecBole's sequence fields.
            task: Stage index of the task.
        """
        sequence, lengths = batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]
        if not hasattr(self.backbone, "outputs"):
            return self.backbone.forward(sequence, lengths)  # type: ignore[no-any-return]
        # A model of all positions leaves out what is not read, in training, too.
        return self.backbone.outputs(sequence, last_items(lengths, sequence.size(1)))  # type: ignore[no-any-return]

    # -- losses ---------------------------------------------------------------------------------------------------

    @property
    def trains_all_positions(self) -> bool:
        """Tells the loader to make windows: in the first stage, where the backbone is trained as it is."""
        return self.stage == 0 and bool(getattr(self.backbone, "trains_all_positions", False))

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        """Returns the loss of the rows: each by its own task, weighted by the rows of the task."""
        if TARGETS in batch:
            return self.backbone.calculate_loss(batch)  # type: ignore[no-any-return]
        parts = [(len(rows), self.task_loss(rows, task)) for task, _, rows in by_task(batch)]
        total = sum(n for n, _ in parts)
        return sum((loss * (n / total) for n, loss in parts[1:]), parts[0][1] * (parts[0][0] / total))

    def windows_loss(self, batch: Interaction, at: Callable[[Interaction, int, torch.Tensor], Any]) -> torch.Tensor:
        """Returns the mean loss of the supervised positions of windows: each by its own task.

        Args:
            batch: Windows with the target after each input.
            at: Gives the representations ``[n, d]`` of windows of a task at flagged positions ``[B, L]``.
        """
        losses, counts = [], []
        for task, _, rows in by_task(batch):
            supervised = rows[TARGETS] > 0
            hidden = self.heads[task](at(rows, task, supervised))
            chosen = {self.POS_ITEM_ID: rows[TARGETS][supervised]}
            if self.config["loss_type"] != "CE":
                chosen[self.NEG_ITEM_ID] = rows[self.config["NEG_PREFIX"] + TARGETS][supervised]
            losses.append(self.next_item_loss(hidden, Interaction(chosen)))
            counts.append(len(hidden))
        return torch.stack([loss * (n / sum(counts)) for loss, n in zip(losses, counts, strict=True)]).sum()

    def task_loss(self, batch: Interaction, task: int) -> torch.Tensor:
        """Returns the mean loss of rows of one task: cross-entropy of classes, or the backbone's next-item loss."""
        if self.tasks[task].kind == "classification":
            return F.cross_entropy(self.logits(batch, task, task), batch[LABEL])
        return self.next_item_loss(self.heads[task](self.represent(batch, task)), batch)

    def next_item_loss(self, hidden: torch.Tensor, batch: Interaction) -> torch.Tensor:
        """Returns the mean next-item loss of given representations, by the inner product with the items.

        Args:
            hidden: Shape ``[B, d]``.
            batch: Its targets, and negatives where ``loss_type`` asks for them.
        """
        table, positive = self.backbone.item_embedding.weight, batch[self.POS_ITEM_ID]
        if self.config["loss_type"] == "CE":
            return F.cross_entropy(hidden @ table.T, positive)
        negative = batch[self.NEG_ITEM_ID]
        scores = (hidden * table[positive]).sum(-1), (hidden * table[negative]).sum(-1)
        return self.pair_loss(*scores)  # type: ignore[no-any-return]

    # -- answers --------------------------------------------------------------------------------------------------

    def logits(self, batch: Interaction, task: int, head: int) -> torch.Tensor:
        """Returns class logits of rows, shape ``[B, n_labels]``: represented for ``task``, answered by ``head``."""
        return self.heads[head](self.represent(batch, task))  # type: ignore[no-any-return]

    def item_scores(self, batch: Interaction, task: int) -> torch.Tensor:
        """Returns scores of all items for rows of one task, shape ``[B, n_items]``."""
        hidden = self.represent(batch, task)
        if self.tasks[task].kind == "next_item":
            hidden = self.heads[task](hidden)
        return hidden @ self.backbone.item_embedding.weight.T

    def full_sort_predict(self, batch: Interaction) -> torch.Tensor:
        """Returns scores of all items, each row for the task in its ``_task``."""
        return scatter(batch, [(rows, self.item_scores(part, task)) for task, rows, part in by_task(batch)])

    def predict(self, batch: Interaction) -> torch.Tensor:
        """Returns the score of each row's item."""
        return self.full_sort_predict(batch).gather(1, batch[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    def predict_task(self, batch: Interaction, task: Task) -> torch.Tensor:
        """Returns class logits for a task, shape ``[B, n_labels]``.

        The adapter is that of ``task``; what stands before it is that of each row's ``_task``, which is the same stage
        under ``task_id: given``.
        """
        head = next(index for index, own in enumerate(self.tasks) if own == task)
        return scatter(batch, [(rows, self.logits(part, own, head)) for own, rows, part in by_task(batch)])

    def user_representation(self, batch: Interaction) -> torch.Tensor:
        """Returns the representation of each history for the task in its ``_task``, shape ``[B, d]``."""
        return scatter(batch, [(rows, self.represent(part, task)) for task, rows, part in by_task(batch)])


class BinaryCrossEntropy(nn.Module):
    """SASRec's loss of a target and a negative: -log s(positive) - log(1 - s(negative)), mean over rows."""

    def forward(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Returns the mean over scores of equal shape."""
        return (F.softplus(-positive) + F.softplus(negative)).mean()


def by_task(batch: Interaction) -> list[tuple[int, torch.Tensor, Interaction]]:
    """Returns (stage index of a task, its rows, those rows) for every task of a batch, in order."""
    tasks = batch[TASK]
    found = torch.unique(tasks).tolist()
    if len(found) == 1:  # the usual case takes no copy
        return [(int(found[0]), torch.arange(len(tasks), device=tasks.device), batch)]
    parts = []
    for task in found:
        rows = torch.nonzero(tasks == task).flatten()
        columns = {name: column[rows] for name, column in batch.interaction.items()}
        parts.append((int(task), rows, Interaction(columns)))
    return parts


def scatter(batch: Interaction, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Returns the parts' rows in the order of the batch."""
    if len(parts) == 1:
        return parts[0][1]
    out = parts[0][1].new_empty((len(batch), *parts[0][1].shape[1:]))
    for rows, values in parts:
        out[rows] = values
    return out
