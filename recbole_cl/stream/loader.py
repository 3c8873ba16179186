"""Training loaders: what RecBole's trainers iterate over, with a state that can be put back.

A loader owns the generator of its order and the generator of its negatives. Its ``state_dict`` in the middle of an
epoch holds the order's state at the start of that epoch and how many batches are done, so a resumed run sees the very
same remaining batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from recbole_cl.config.models import configured_traits
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.rng import numpy_generator, torch_generator
from recbole_cl.stream.batch import POSITION, STAGE, TARGETS, TASK, TIMESTAMP, Batcher, Windows
from recbole_cl.stream.knowledge_loader import KnowledgeStageLoader
from recbole_cl.stream.negatives import Negatives, make_sampler
from recbole_cl.stream.sampler import REMEDY
from recbole_cl.stream.stage import Targets
from recbole_cl.stream.transforms import let_end, transform_of

Units = Targets | Windows | tuple[np.ndarray, np.ndarray]
"""What a loader shuffles: targets, windows, or user ids with the positions of their last interactions."""


class StageLoader:
    """Batches of one pass.

    Args:
        batcher: Builds the rows.
        units: What is shuffled: targets (a row each), windows (a row each), or user ids with their last positions.
        negatives: Adds negatives.
        batch_size: Targets a batch, negatives counted as RecBole counts them.
        generator: Owns the order.
        shuffle: Draw a new order each epoch.
        shift: Cut windows anew each epoch, at random places; ``units`` stay as they are.
        join_last: A last batch of a single row joins the one before: a model with BatchNorm cannot take it alone.
    """

    def __init__(
        self,
        batcher: Batcher,
        units: Units,
        negatives: Negatives,
        batch_size: int,
        generator: torch.Generator,
        shuffle: bool = True,
        shift: bool = False,
        join_last: bool = False,
    ) -> None:
        self.batcher, self.units, self.negatives = batcher, units, negatives
        self.batch_size = max(batch_size // negatives.times, 1)
        self.generator, self.shuffle, self.shift = generator, shuffle, shift
        self.transform = transform_of(batcher.config)
        self.size = len(units[0]) if isinstance(units, tuple) else len(units)
        single = negatives.times == 1 and self.size > self.batch_size > 1 and self.size % self.batch_size == 1
        self.join_last = join_last and single
        self._epoch_start: torch.Tensor | None = None
        self._cursor: int | None = None
        self._skip = 0

    @property
    def dataset(self) -> Any:
        """RecBole's name for the dataset behind the loader."""
        return self.batcher.view

    _dataset = dataset

    @property
    def n_targets(self) -> int:
        """Training targets of an epoch."""
        return int(self.units.n_targets.sum()) if isinstance(self.units, Windows) else self.size

    def __len__(self) -> int:
        return max(1, -(-self.n_targets // self.batch_size) - self.join_last)

    def get_model(self, model: Any) -> None:
        """Tells the model that dynamic negative sampling asks."""
        self.negatives.model = model

    def _plan(self) -> tuple[Units, list[np.ndarray]]:
        """Returns the epoch's units and which of them each batch holds."""
        units = self.units
        if self.shift and isinstance(units, Windows):
            units = units.shifted(self.generator)
        size = len(units) if isinstance(units, Windows) else self.size
        order = torch.randperm(size, generator=self.generator).numpy() if self.shuffle else np.arange(size)
        if isinstance(units, Windows):
            # Windows hold unequal numbers of targets: a batch closes when it has batch_size of them.
            reached = np.cumsum(units.n_targets[order])
            cuts = np.flatnonzero(np.diff((reached - 1) // self.batch_size)) + 1
        else:
            cuts = np.arange(self.batch_size, size - self.join_last, self.batch_size)
        return units, np.split(order, cuts)

    def __iter__(self) -> Iterator[Interaction]:
        self._epoch_start = self.generator.get_state().clone()
        units, plan = self._plan()
        first, self._skip = self._skip, 0
        try:
            for number in range(first, len(plan)):
                self._cursor = number
                yield self._make(units, plan[number])
        finally:  # also where a model's own trainer leaves an epoch early: the next one draws a new order
            self._cursor = None

    def make(self, index: np.ndarray) -> Interaction:
        """Returns the batch of the given units."""
        return self._make(self.units, index)

    def _make(self, units: Units, index: np.ndarray) -> Interaction:
        if isinstance(units, Windows):
            return self.complete_windows(self.batcher.window_rows(units, index, collate=False))
        if isinstance(units, tuple):
            users, positions = units[0][index], units[1][index]
            table = self.batcher.table
            return Interaction(
                {
                    self.batcher.uid: torch.from_numpy(users),
                    POSITION: torch.from_numpy(positions),
                    STAGE: torch.from_numpy(table.stage[positions]),
                    TIMESTAMP: torch.from_numpy(table.timestamp[positions]),
                    TASK: torch.from_numpy(table.stage[positions]),
                }
            )
        return self.complete(self.batcher.rows(units[index], collate=False))

    def complete(self, rows: Interaction) -> Interaction:
        """Adds the model's own columns, RecBole's transform and negatives; replayed rows go through here too."""
        rows = self.batcher.collated(rows)
        if self.batcher.negative_lists:
            rows = self._negative_lists(rows)
        return self.negatives(self.transform(self.batcher.view, rows))

    def complete_windows(self, rows: Interaction) -> Interaction:
        """Adds the model's own columns, and for some losses a negative a target (field ``neg__targets``)."""
        rows = self.batcher.collated(rows)
        if self.negatives.sampler is not None:
            targets = rows[TARGETS]
            flat = targets[targets > 0].numpy()
            negative = torch.zeros_like(targets)
            negative[targets > 0] = torch.from_numpy(self.negatives.sampler.sample_repeatable(1, flat))
            rows.interaction[self.batcher.config["NEG_PREFIX"] + TARGETS] = negative
        return rows

    def _negative_lists(self, rows: Interaction) -> Interaction:
        field = self.batcher.iid + self.batcher.suffix
        items = rows[field]
        sampler = self.negatives.sampler
        if sampler is None:
            raise ConfigError(
                f"train_neg_sample_args: {self.batcher.config['model']} needs negatives; set {{distribution: uniform, "
                f"sample_num: 1}}"
            )
        drawn = torch.from_numpy(sampler.sample_repeatable(1, items.flatten().numpy())).view_as(items)
        rows.interaction[self.batcher.config["NEG_PREFIX"] + field] = torch.where(items > 0, drawn, 0)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Returns order, place in the epoch and negatives' state."""
        middle = self._cursor is not None
        state: dict[str, Any] = {
            "generator": self._epoch_start if middle else self.generator.get_state(),
            "done": self._cursor + 1 if self._cursor is not None else self._skip,
        }
        if self.negatives.sampler is not None:
            state["negatives"] = self.negatives.sampler.generator.bit_generator.state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts order, place and negatives back; the next iteration goes on from there."""
        self.generator.set_state(state["generator"])
        self._skip, self._cursor = int(state["done"]), None
        if self.negatives.sampler is not None:
            self.negatives.sampler.generator.bit_generator.state = state["negatives"]


def _in_windows(ctx: Any, targets: Targets) -> bool:
    """Tells whether a pass trains on windows: of next items, or of classes of what comes next."""
    config = ctx.config
    if config["train_positions"] != "all" or not getattr(ctx.model, "trains_all_positions", False):
        return False
    if not ctx.batcher.sequential:
        raise ConfigError(
            f"train_positions: 'all', and model {config['model']!r} trains on windows (trains_all_positions), but it "
            f"is no sequential model: its targets need no history, and a window would leave out the first interaction "
            f"of every user; set train_positions: last, or derive the model from SequentialRecommender"
        )
    kind, seq = ctx.stage.task.kind, ctx.batcher.table.seq
    if kind != "classification" or config["task_class_positions"] != "all":
        return bool(kind == "next_item")
    # The class of a user belongs to no interaction that comes after the history: a row each.
    at_next = (targets.hi < len(seq)) & (seq[np.minimum(targets.hi, len(seq) - 1)] == targets.position)
    return bool(at_next.all())


def make_loader(
    ctx: Any, targets: Targets, name: str, batch_size: int | None = None
) -> StageLoader | KnowledgeStageLoader:
    """Returns the loader of one pass.

    Args:
        ctx: The stage (:class:`recbole_cl.strategy.context.StageContext`).
        targets: Training targets of the pass.
        name: Name of the pass; its generators are derived from it.
        batch_size: Targets of a batch, where they are not ``train_batch_size``.
    """
    config, batcher, seed = ctx.config, ctx.batcher, ctx.config["seed"]
    if config["parity"]:
        if batcher.collate is not None:
            raise ConfigError(
                f"property 'parity' is 'recbole', but model {config['model']!r} adds columns of its own to its batches "
                f"(collate), which RecBole's loader does not know; leave 'parity' out"
            )
        return ctx.view.parity_loader  # type: ignore[no-any-return]
    units: Units = targets
    next_item = ctx.stage.task.kind == "next_item"
    if _in_windows(ctx, targets):
        supervised = np.zeros(len(batcher.table.seq) + 1, dtype=bool)
        supervised[targets.hi] = True
        labels = None
        if not next_item:
            labels = np.zeros(len(supervised), dtype=np.int64)
            labels[targets.hi] = targets.label
        size = config["window"] or batcher.max_length
        if size > batcher.max_length:
            raise ConfigError(
                f"window: {size} inputs are more than MAX_ITEM_LIST_LENGTH: {batcher.max_length}, the model's most; "
                f"make window at most that, or MAX_ITEM_LIST_LENGTH larger"
            )
        units = Windows(targets, supervised, size, config["window_stride"] or size, labels=labels)
    elif configured_traits(config).user_batches:
        order = np.lexsort((targets.position, targets.user))
        last = np.r_[targets.user[order][1:] != targets.user[order][:-1], True]
        units = (targets.user[order][last], targets.position[order][last])
    sampler = None
    if next_item or ctx.stage.task.kind == "value":
        generator = numpy_generator(seed, ctx.index, f"negatives/{name}")
        sampler = make_sampler(config, ctx.stream, ctx.index, batcher.n_items, generator)
    repeatable = batcher.sequential or config.repeatable_items
    if sampler is not None and not repeatable:
        full = sampler.exhausted(targets.user)
        if len(full):
            names = ctx.stream.dataset.field2id_token[batcher.uid][full[:3]]
            raise DataError(
                f"train_neg_sample_args: at stage {ctx.index + 1}, {len(full)} users ({', '.join(map(str, names))}, "
                f"...) have interacted with every item that can be drawn as a negative; {REMEDY}"
            )
    negatives = Negatives(batcher, config, sampler, repeatable)
    model = ctx.model
    normed = isinstance(model, nn.Module) and any(isinstance(part, _BatchNorm) for part in model.modules())
    if hasattr(model, "_neg_sample"):
        let_end(model, batcher.n_items, needed=True)
    order_generator = torch_generator(seed, ctx.index, f"order/{name}")
    loader = StageLoader(
        batcher,
        units,
        negatives,
        batch_size or config["train_batch_size"],
        order_generator,
        shuffle=bool(config["shuffle"]),
        shift=bool(config["window_shift"]),
        join_last=normed and not isinstance(units, Windows),
    )
    if normed and not isinstance(units, Windows) and min(loader.size, loader.batch_size) * negatives.times == 1:
        raise DataError(
            f"train_batch_size: at stage {ctx.index + 1}, {loader.size} training targets come in batches of one row, "
            f"and the model {config['model']} normalises over a batch's rows (BatchNorm); set it to at least 2, or "
            f"lower n_stages so that every stage has more than one target"
        )
    if getattr(batcher.view, "kg_feat", None) is not None and config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        return KnowledgeStageLoader(loader, seed, ctx.index)
    return loader
