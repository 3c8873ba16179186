"""Training loaders: what RecBole's trainers iterate over, with a state that can be put back.

A loader owns the generator of its order and the generator of its negatives. Its ``state_dict`` in the middle of an
epoch holds the order's state at the start of that epoch and how many batches are done, so a resumed run sees the very
same remaining batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.utils import InputType, KGDataLoaderState, ModelType

from recbole_cl.config.models import configured_traits
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.rng import numpy_generator, torch_generator
from recbole_cl.stream.batch import POSITION, STAGE, TARGETS, TASK, TIMESTAMP, Batcher, Windows
from recbole_cl.stream.sampler import REMEDY, NegativeSampler
from recbole_cl.stream.stage import Targets
from recbole_cl.tree import answering

Units = Targets | Windows | tuple[np.ndarray, np.ndarray]
"""What a loader shuffles: targets, windows, or user ids with the positions of their last interactions."""


class Negatives:
    """Adds RecBole's negatives to rows: ``neg_item_id`` for pairwise, rows of label 0 for pointwise models.

    Args:
        batcher: Knows columns and features.
        config: ``train_neg_sample_args`` and ``MODEL_INPUT_TYPE`` are read.
        sampler: Draws the items; ``None`` where the configuration asks for none.
        repeatable: Exclude only a row's own target, not everything its user had (sequential models in RecBole).
    """

    def __init__(self, batcher: Batcher, config: Any, sampler: NegativeSampler | None, repeatable: bool) -> None:
        args = config["train_neg_sample_args"]
        wanted = sampler is not None and args["distribution"] != "none" and args["sample_num"] != "none"
        self.sampler = sampler if wanted else None
        self.batcher, self.config, self.repeatable = batcher, config, repeatable
        self.num: int = args["sample_num"] if wanted else 0
        self.dynamic = bool(args.get("dynamic", False)) and wanted
        self.candidates: int = args.get("candidate_num", 0)
        self.pairwise = config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE
        self.times = 1 if not wanted else (self.num if self.pairwise else 1 + self.num)
        self.model: Any = None

    def __call__(self, rows: Interaction) -> Interaction:
        """Returns the rows with negatives, laid out as RecBole's loaders do."""
        if self.sampler is None:
            return rows
        users = rows[self.batcher.uid].numpy()
        positives = rows[self.batcher.iid].numpy()
        num = self.num * (self.candidates if self.dynamic else 1)
        if self.repeatable:
            drawn = self.sampler.sample_repeatable(num, positives)
        else:
            drawn = self.sampler.sample(users, num, positives)
        ids = torch.from_numpy(drawn)
        if self.dynamic:
            ids = self._hardest(rows, ids)
        return self._pairwise(rows, ids) if self.pairwise else self._pointwise(rows, ids)

    def _hardest(self, rows: Interaction, ids: torch.Tensor) -> torch.Tensor:
        """Keeps the best scored of ``candidate_num`` candidates (RecBole's dynamic negative sampling)."""
        model = self.model
        repeated = rows.repeat(self.num * self.candidates)
        repeated.update(Interaction({self.batcher.iid: ids}))
        with torch.no_grad(), answering(model):
            scores = model.predict(repeated.to(model.device)).cpu().view(self.candidates, -1)
        return ids.view(self.candidates, -1).gather(0, scores.argmax(dim=0, keepdim=True)).flatten()

    def _pairwise(self, rows: Interaction, ids: torch.Tensor) -> Interaction:
        prefix, iid = self.config["NEG_PREFIX"], self.batcher.iid
        out = rows.repeat(self.times) if self.times > 1 else rows
        negative = self.batcher.join(Interaction({iid: ids}))
        for name, column in negative.interaction.items():
            out.interaction[prefix + name] = column
        return out

    def _pointwise(self, rows: Interaction, ids: torch.Tensor) -> Interaction:
        n = len(rows)
        out = rows.repeat(self.times)
        out.interaction[self.batcher.iid][n:] = ids
        out = self.batcher.join(out)
        labels = torch.zeros(n * self.times)
        labels[:n] = 1.0
        out.interaction[self.config["LABEL_FIELD"]] = labels
        return out


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
    ) -> None:
        self.batcher, self.units, self.negatives = batcher, units, negatives
        self.batch_size = max(batch_size // negatives.times, 1)
        self.generator, self.shuffle, self.shift = generator, shuffle, shift
        self.transform = construct_transform(batcher.config)
        self.size = len(units[0]) if isinstance(units, tuple) else len(units)
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
        return max(1, -(-self.n_targets // self.batch_size))

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
            cuts = np.arange(self.batch_size, size, self.batch_size)
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


class KnowledgeStageLoader:
    """RecBole's ``KnowledgeBasedDataLoader`` over a :class:`StageLoader`: interactions, triples, or both.

    Args:
        general: Batches of interactions.
        seed: The run's seed; triples have generators of their own.
        stage: Stage index.
    """

    shuffle = False

    def __init__(self, general: StageLoader, seed: int, stage: int) -> None:
        self.general = general
        view = general.batcher.view
        self.view = view
        self.head, self.tail = view.head_entity_field, view.tail_entity_field
        self.prefix = general.batcher.config["NEG_PREFIX"]
        self.generator = torch_generator(seed, stage, "triples")
        heads, tails = view.kg_feat[self.head].numpy(), view.kg_feat[self.tail].numpy()
        total_items = len(view.field2id_token[view.iid_field])
        # Entities of items that come later are nodes of nobody yet, hence no negatives either.
        pool = np.r_[1 : general.batcher.n_items, total_items : view.entity_num]
        self.sampler = NegativeSampler(
            heads, tails, view.entity_num, numpy_generator(seed, stage, "triples"), pool=pool.astype(np.int64)
        )
        self.batch_size = general.batcher.config["train_batch_size"]
        self.state = KGDataLoaderState.RSKG
        self._order_start: torch.Tensor | None = None  # state of the generator before the running order of triples
        self._done = 0  # batches of triples taken from it
        self._skip = 0

    @property
    def dataset(self) -> Any:
        """RecBole's name for the dataset behind the loader."""
        return self.view

    _dataset = dataset

    @property
    def n_targets(self) -> int:
        """Training targets of an epoch."""
        return self.general.n_targets

    def set_mode(self, state: KGDataLoaderState) -> None:
        """Chooses interactions (RS), triples (KG) or both (RSKG)."""
        self.state = state

    def get_model(self, model: Any) -> None:
        """Tells the model that dynamic negative sampling asks."""
        self.general.get_model(model)

    def complete(self, rows: Interaction) -> Interaction:
        """See :meth:`StageLoader.complete`."""
        return self.general.complete(rows)

    def __len__(self) -> int:
        if self.state == KGDataLoaderState.KG:
            return max(1, -(-len(self.view.kg_feat) // self.batch_size))
        return len(self.general)

    def _triples(self) -> Iterator[Interaction]:
        # The order is drawn here, not at the first batch: an epoch that is resumed behind its last batch draws it, too.
        self._order_start = self.generator.get_state().clone()
        order = torch.randperm(len(self.view.kg_feat), generator=self.generator)
        self._done, self._skip = self._skip, 0
        return self._batches(order.split(self.batch_size)[self._done :])

    def _batches(self, indices: Sequence[torch.Tensor]) -> Iterator[Interaction]:
        for index in indices:
            self._done += 1
            rows = {name: column[index] for name, column in self.view.kg_feat.interaction.items()}
            drawn = self.sampler.sample(rows[self.head].numpy(), 1, rows[self.tail].numpy())
            rows[self.prefix + self.tail] = torch.from_numpy(drawn)
            yield Interaction(rows)

    def __iter__(self) -> Iterator[Interaction]:
        if self.state == KGDataLoaderState.KG:
            yield from self._triples()
        elif self.state == KGDataLoaderState.RS:
            yield from self.general
        else:
            triples = self._triples()
            for rows in self.general:
                batch = next(triples, None)
                if batch is None:  # more interactions than triples: once more through them
                    triples = self._triples()
                    batch = next(triples)
                rows.update(batch)
                yield rows
        self._order_start, self._done = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both parts and the place in the running order of triples."""
        running = self._order_start is not None
        return {
            "general": self.general.state_dict(),
            "triples": self._order_start if running else self.generator.get_state(),
            "triples_done": self._done if running else self._skip,
            "negatives": self.sampler.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts both parts back."""
        self.general.load_state_dict(state["general"])
        self.generator.set_state(state["triples"])
        self._order_start, self._done, self._skip = None, 0, int(state["triples_done"])
        self.sampler.generator.bit_generator.state = state["negatives"]


def make_sampler(
    config: Any, stream: Any, stage: int, n_items: int, generator: np.random.Generator
) -> NegativeSampler | None:
    """Returns a sampler of negatives that knows the training interactions up to ``stage``, or ``None`` without any.

    Args:
        config: ``train_neg_sample_args`` is read.
        stream: The stream.
        stage: The trained stage.
        n_items: Items that the model has rows for.
        generator: Owned by the caller.
    """
    args = config["train_neg_sample_args"]
    if args["distribution"] == "none":
        return None
    past = stream.trained_targets(stage, "so_far").position
    table = stream.table
    return NegativeSampler(
        table.user[past], table.item[past], n_items, generator, args["distribution"], float(args.get("alpha", 1.0))
    )


def _in_windows(ctx: Any, targets: Targets) -> bool:
    """Tells whether a pass trains on windows: of next items, or of classes of what comes next."""
    config = ctx.config
    if config["train_positions"] != "all" or not getattr(ctx.model, "trains_all_positions", False):
        return False
    if not ctx.batcher.sequential:
        raise ConfigError(
            f"train_positions: 'all', and model {config['model']!r} trains on windows (trains_all_positions), but it is "
            f"no sequential model: its targets need no history, and a window would leave out the first interaction of "
            f"every user; set train_positions: last, or derive the model from SequentialRecommender"
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
    order_generator = torch_generator(seed, ctx.index, f"order/{name}")
    loader = StageLoader(
        batcher,
        units,
        negatives,
        batch_size or config["train_batch_size"],
        order_generator,
        shuffle=bool(config["shuffle"]),
        shift=bool(config["window_shift"]),
    )
    if getattr(batcher.view, "kg_feat", None) is not None and config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        return KnowledgeStageLoader(loader, seed, ctx.index)
    return loader
