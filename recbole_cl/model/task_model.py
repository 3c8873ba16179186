"""The base of models that answer several tasks: a backbone, and an adapter for each task."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.model.loss import BPRLoss
from torch import nn
from torch.nn import functional as F

from recbole_cl.config.models import get_model_class
from recbole_cl.errors import ConfigError, RecBoleCLError, nearest
from recbole_cl.model.all_positions import last_items
from recbole_cl.model.contract import ContinualModel
from recbole_cl.model.task_heads import ADAPTERS, TaskHeads
from recbole_cl.rng import derive, seeded
from recbole_cl.stream.batch import LABELS, TARGETS, TASK
from recbole_cl.stream.stage import Task
from recbole_cl.tree import answering

LABEL = "_label"
LOSSES, PAIR_LOSSES = ("BPR", "CE"), ("BCE", "BPR")
FORWARD = ["item_seq", "item_seq_len"]
"""What the ``forward`` of a backbone takes, as the models of RecBole call it that read a history and nothing else."""
PROBE, TOLERANCE = 3, 1e-4
"""Histories that a new backbone answers, and how far its scores may be from inner products, to the largest of them."""


class TaskModel(ContinualModel, SequentialRecommender):
    """A sequential backbone that answers the tasks of a stream, each through its own adapter.

    A subclass names the property that names its backbone, and writes :meth:`represent`. What is written here trains
    the task that a batch is of and answers the task that is asked for.

    Args:
        config: The run's configuration.
        dataset: The stage's view; ``dataset.stream`` and ``dataset.stage_index`` tell the tasks.

    Attributes:
        backbone_property: The property that names the backbone; its defaults become the run's.
        serving_backbones: Backbones that serve, for messages.
        tasks: The tasks, by stage.
        stage: The stage that is being trained.
        backbone: The sequential model inside; it owns the item embeddings and the rule that scores items.
        heads: The adapters, by stage.
    """

    backbone_property: ClassVar[str | None] = None
    serving_backbones = "SASRec, GRU4Rec, NARM or STAMP"
    backbone: Any
    stage: int

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.config = config
        self.tasks: list[Task] = [stage.task for stage in dataset.stream.stages]
        self.stage = dataset.stage_index
        chosen(config, "loss_type", LOSSES)
        pairs = chosen(config, "task_pair_loss", PAIR_LOSSES)
        self.pair_loss: nn.Module = BPRLoss() if pairs == "BPR" else BinaryCrossEntropy()
        self.backbone = self.make_backbone(config, dataset)
        self.width: int = self.backbone.item_embedding.embedding_dim
        self.heads = self.make_heads()

    def make_backbone(self, config: Any, dataset: Any) -> Any:
        """Returns a new backbone over a view, with the run's loss.

        Raises:
            ConfigError: If the model does not read histories alone, cannot be made in this run, or scores items
                otherwise than by the inner product of its output with ``item_embedding``.
        """
        kind: Any = get_model_class(config[self.backbone_property])
        reads = list(inspect.signature(kind.forward).parameters.values())[1:]
        further = any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in reads[2:])
        if [p.name for p in reads[:2]] != FORWARD or further:
            takes = ", ".join(p.name for p in reads)
            raise self._refusal(config, f"its forward takes ({takes}), not ({', '.join(FORWARD)})")
        try:
            backbone = kind(config, dataset)
        except RecBoleCLError:
            raise
        except (Exception, SystemExit) as error:  # a model of RecBole ends the process where it has no such loss
            raise self._refusal(config, self._why_not_made(config, dataset, error)) from error
        if not isinstance(getattr(backbone, "item_embedding", None), nn.Embedding):
            raise self._refusal(config, "it has no item_embedding to build on")
        with self.own_randomness("probe"):
            why_not = why_no_inner_product(backbone, config["device"])
        if why_not:
            raise self._refusal(config, why_not)
        if config["loss_type"] == "BPR":  # RecBole's word for a target and a negative
            backbone.loss_fct = self.pair_loss
        return backbone

    def _refusal(self, config: Any, why: str) -> ConfigError:
        return ConfigError(
            f"{self.backbone_property}: {config[self.backbone_property]} cannot be the backbone of "
            f"{type(self).__name__}: {why}; use {self.serving_backbones}"
        )

    @staticmethod
    def _why_not_made(config: Any, dataset: Any, error: BaseException) -> str:
        features, known = config["selected_features"], dataset.stream.dataset.field2type
        lacking = [field for field in features if field not in known] if isinstance(features, list) else []
        if lacking:
            return f"it reads the columns of selected_features, and the log has no {', '.join(map(repr, lacking))}"
        given = f"loss_type: {config['loss_type']} and the columns of this log"
        return f"it cannot be made with {given} ({type(error).__name__}: {error})"

    def own_randomness(self, name: str) -> Any:
        """A context whose draws leave the run's random state alone: the first task is the same whatever else."""
        return seeded(derive(self.config["seed"], self.stage, f"{type(self).__name__}/{name}"))

    def make_heads(self) -> TaskHeads:
        """Returns the adapters; a subclass names its own properties here, by :meth:`heads_of`."""
        return TaskHeads(self.tasks, self.width)

    def heads_of(self, classifier: str, next_item: str, item_bias: str) -> TaskHeads:
        """Returns the adapters that three properties name.

        Args:
            classifier: Property of the adapter of classifications.
            next_item: Property of the adapter of next-item tasks after the first.
            item_bias: Property that gives these tasks a bias of each item.

        Raises:
            ConfigError: If a value is none of the choices; the message names the property.
        """
        kinds = chosen(self.config, classifier, ADAPTERS[1:]), chosen(self.config, next_item, ADAPTERS)
        return TaskHeads(self.tasks, self.width, *kinds, self.n_items if self.config[item_bias] else 0)

    def fit_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Completes the state of a model over a shorter stream: heads, prompts and rows of the tasks that came since.

        A tensor with fewer rows than this model's is one with a row for each task; what it has stands first.
        """
        tensors, before = dict(state["tensors"]), self.stage + 1
        for name, fresh in self.state_dict().items():
            saved = tensors.get(name)
            if saved is None:
                tensors[name] = fresh.clone()
            elif len(fresh.shape) and len(saved) == before < len(fresh) == len(self.tasks):
                tensors[name] = torch.cat([saved, fresh[before:].to(saved)])
        return {**state, "tensors": tensors}

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
            batch: Windows with the target after each input, and its class where classes are asked for.
            at: Gives the representations ``[n, d]`` of windows of a task at flagged positions ``[B, L]``.
        """
        losses, counts = [], []
        for task, _, rows in by_task(batch):
            supervised = rows[TARGETS] > 0
            answers = self.heads[task](at(rows, task, supervised))
            counts.append(len(answers))
            if self.tasks[task].kind == "classification":
                losses.append(F.cross_entropy(answers, rows[LABELS][supervised]))
                continue
            chosen = {self.POS_ITEM_ID: rows[TARGETS][supervised]}
            if self.config["loss_type"] != "CE":
                chosen[self.NEG_ITEM_ID] = rows[self.config["NEG_PREFIX"] + TARGETS][supervised]
            losses.append(self.next_item_loss(answers, Interaction(chosen), task))
        return torch.stack([loss * (n / sum(counts)) for loss, n in zip(losses, counts, strict=True)]).sum()

    def task_loss(self, batch: Interaction, task: int) -> torch.Tensor:
        """Returns the mean loss of rows of one task: cross-entropy of classes, or the backbone's next-item loss."""
        if self.tasks[task].kind == "classification":
            return F.cross_entropy(self.logits(batch, task, task), batch[LABEL])
        return self.next_item_loss(self.heads[task](self.represent(batch, task)), batch, task)

    def next_item_loss(self, hidden: torch.Tensor, batch: Interaction, task: int) -> torch.Tensor:
        """Returns the mean next-item loss of adapted representations, by their scores of the items.

        Args:
            hidden: Shape ``[B, d]``.
            batch: Its targets, and negatives where ``loss_type`` asks for them.
            task: Stage index of the task.
        """
        table, positive = self.backbone.item_embedding.weight, batch[self.POS_ITEM_ID]
        bias = self.heads.item_bias(task)
        if self.config["loss_type"] == "CE":
            scores = hidden @ table.T if bias is None else torch.addmm(bias, hidden, table.T)
            return F.cross_entropy(scores, positive)
        pair = [
            (hidden * table[items]).sum(-1) + (0 if bias is None else bias[items])
            for items in (positive, batch[self.NEG_ITEM_ID])
        ]
        return self.pair_loss(*pair)  # type: ignore[no-any-return]

    # -- answers --------------------------------------------------------------------------------------------------

    def logits(self, batch: Interaction, task: int, head: int) -> torch.Tensor:
        """Returns class logits of rows, shape ``[B, n_labels]``: represented for ``task``, answered by ``head``."""
        return self.heads[head](self.represent(batch, task))  # type: ignore[no-any-return]

    def item_scores(self, batch: Interaction, task: int) -> torch.Tensor:
        """Returns scores of all items for rows of one task, shape ``[B, n_items]``."""
        return self.score_queries(self._queries(batch, task))

    def _queries(self, batch: Interaction, task: int) -> torch.Tensor:
        hidden = self.represent(batch, task)
        query = self.heads[task](hidden) if self.tasks[task].kind == "next_item" else hidden
        if self.heads.item_biases() is None:
            return query
        flags = query.new_zeros(len(query), len(self.tasks))
        flags[:, task] = 1
        return torch.cat([query, flags], dim=1)

    def item_queries(self, batch: Interaction) -> torch.Tensor:
        """Returns what scores items by :meth:`score_queries`, each row for the task in its ``_task``.

        Returns:
            Shape ``[B, d]``, or ``[B, d + K]`` where tasks have biases of items: K flags say which task asks.
        """
        return scatter(batch, [(rows, self._queries(part, task)) for task, rows, part in by_task(batch)])

    def score_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns scores of all items, shape ``[B, n_items]``, for queries as :meth:`item_queries` gives them."""
        table, biases = self.backbone.item_embedding.weight, self.heads.item_biases()
        if biases is None:
            return queries @ table.T
        # Flags are 0 and 1, so other tasks' biases leave every bit of the sums as it is.
        return torch.addmm(queries[:, : self.width] @ table.T, queries[:, self.width :], biases)

    def scores_by_queries(self) -> bool:
        """Tells whether ``full_sort_predict`` is those two steps: a subclass may have given it another meaning."""
        return all(
            getattr(type(self), name) is getattr(TaskModel, name) and name not in vars(self)
            for name in ("full_sort_predict", "item_scores")
        )

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


def chosen(config: Any, key: str, choices: Sequence[str]) -> str:
    """Returns the value of a property that has to be one of several words.

    Raises:
        ConfigError: If it is none of them.
    """
    value = config[key]
    if value not in choices:
        raise ConfigError(f"{key}: {value!r} is none of {', '.join(choices)}{nearest(value, choices)}")
    return str(value)


@contextlib.contextmanager
def probing(backbone: Any, device: Any) -> Iterator[None]:
    """A context in which a new backbone can be asked as in a run, in eval mode, and is afterwards as it was.

    Some models of RecBole bring what they read to the run's device, so the weights have to be there. Parameters that
    are all zero are not: behind a zero weight or bias a probe would not see what a model adds to its scores.
    """
    home = backbone.item_embedding.weight.device
    zeros = [p for p in backbone.parameters() if not p.any()]
    try:
        with torch.no_grad(), answering(backbone):
            backbone.to(device)
            for p in zeros:
                p.fill_(0.1)
            yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
        backbone.to(home)


def why_no_inner_product(backbone: Any, device: Any) -> str | None:
    """Returns why a model's scores are not ``forward(item_seq, item_seq_len) @ item_embedding.weight.T``, or ``None``.

    Args:
        backbone: A new sequential model.
        device: Where the run has it.
    """
    table, length = backbone.item_embedding, backbone.max_seq_length
    lengths = torch.tensor([max(length // n, 1) for n in range(1, PROBE + 1)], device=device)
    places = torch.arange(PROBE * length, device=device).view(PROBE, length)
    inside = torch.arange(length, device=device) < lengths.unsqueeze(1)
    sequence = (places % (table.num_embeddings - 1) + 1) * inside
    columns = {backbone.ITEM_SEQ: sequence, backbone.ITEM_SEQ_LEN: lengths, backbone.USER_ID: torch.ones_like(lengths)}
    try:
        with probing(backbone, device):
            hidden = backbone.forward(sequence, lengths)
            if not torch.is_tensor(hidden) or tuple(hidden.shape) != (PROBE, table.embedding_dim):
                found = tuple(hidden.shape) if torch.is_tensor(hidden) else f"a {type(hidden).__name__}"
                wanted = (PROBE, table.embedding_dim)
                return (
                    f"its forward gives {found} for {PROBE} histories, not a vector as wide as an item's each, {wanted}"
                )
            products = (hidden @ table.weight.T)[:, 1:]  # row 0 is padding
            scores = backbone.full_sort_predict(Interaction(columns)).view(PROBE, -1)[:, 1:]
            if scores.shape != products.shape:
                return (
                    f"its full_sort_predict scores {scores.size(1)} items, not the {products.size(1)} of item_embedding"
                )
            gap, largest = float((scores - products).abs().max()), float(products.abs().max())
    except Exception as error:
        return f"it cannot answer a history ({type(error).__name__}: {error})"
    if gap <= TOLERANCE * largest:
        return None
    return (
        f"it does not score items by the inner product of its output with item_embedding (its scores are up to "
        f"{gap:.2g} from it, where the largest product is {largest:.2g})"
    )


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
