"""Scores a model on the targets of a stage.

Evaluation is pure: it draws from a random state of its own and leaves model, strategy and caches as they were. What a
model cannot know counts as a miss and is counted apart as *cold*: items and users that it never trained on are never
scored by a random row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metric_information, metrics_dict
from recbole.utils import EvaluatorType, ModelType
from torch import nn

from recbole_cl import distributed
from recbole_cl.errors import ConfigError, TrainingError, nearest
from recbole_cl.model.capabilities import capabilities
from recbole_cl.model.prefixes import prefix_outputs
from recbole_cl.model.state import tree_hash
from recbole_cl.rng import ModelRandomness, derive, numpy_generator
from recbole_cl.strategy.base import Composite, StageContext, overrides
from recbole_cl.stream.sampler import NegativeSampler
from recbole_cl.stream.stage import CLASSIFICATION_METRICS, Stage, Stream, Targets, Task
from recbole_cl.stream.table import InteractionTable

SCORES_AT_ONCE = 1 << 24
SCORES_IN_CACHE = 1 << 18
PAIRS_AT_ONCE = 1 << 15
PREFIXES_AT_ONCE = 1 << 10
"""Rows whose histories are looked at together for sequences in common."""
INPUTS_AT_ONCE = 1 << 14
"""Sequence positions a forward pass holds: activations that stay in the cache are faster and a tenth of the memory."""
BLOCK = 32
CACHES = ("restore_user_e", "restore_item_e", "restore_entity_e", "restore_user_emb", "restore_item_emb")


def clear_caches(model: nn.Module) -> None:
    """Empties the propagated embeddings that RecBole's graph models keep: any change of weights makes them stale."""
    for module in model.modules():
        for name in CACHES:
            if getattr(module, name, None) is not None:
                setattr(module, name, None)


@dataclass
class Known:
    """What a model has trained on: flags by user and item id, and the mean training label.

    Args:
        users: Shape ``[n_users]`` of the whole stream.
        items: Shape ``[n_items]`` of the whole stream.
        label_sum: Sum of the training labels.
        label_count: Number of training labels.
        labels: Class labels trained on, by stage index, for classification tasks.
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
            change = np.zeros(len(table) + 1, dtype=np.int64)
            np.add.at(change, targets.lo, 1)
            np.add.at(change, targets.hi, -1)
            covered = np.cumsum(change[:-1]) > 0
            self.items[table.item[table.seq[covered]]] = True
        if labels is not None:
            self.label_sum += float(labels.sum())
            self.label_count += len(labels)

    def state_dict(self) -> dict[str, Any]:
        """Returns the flags and sums."""
        return {"users": self.users, "items": self.items, "label_sum": self.label_sum, "label_count": self.label_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the flags and sums back."""
        self.users, self.items = np.array(state["users"], dtype=bool), np.array(state["items"], dtype=bool)
        self.label_sum, self.label_count = float(state["label_sum"]), int(state["label_count"])


@dataclass
class Outcome:
    """Result of one evaluation.

    Args:
        metrics: Metric to value, over all targets.
        strata: Stratum to (metrics, number of rows).
        n: Rows evaluated.
        n_cold: Targets that the model never trained on (item or user).
        users: User of each row, shape ``[n]``.
        recommended: Item ids of the lists, 0 for an empty slot, shape ``[n, K]``; ``None`` for value tasks.
        utility: The primary metric of each row, shape ``[n]``, where it is a mean over rows.
    """

    metrics: dict[str, float]
    strata: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)
    n: int = 0
    n_cold: int = 0
    users: np.ndarray | None = None
    recommended: np.ndarray | None = None
    utility: np.ndarray | None = None


@dataclass
class _Rows:
    """Ranking rows of one (stage, split): one a user for general models, one a target for sequential ones."""

    targets: Targets  # one target a row: user and history
    row: np.ndarray  # row of each positive
    item: np.ndarray  # item of each positive
    mask_row: np.ndarray  # rows and items that are not recommended again
    mask_item: np.ndarray
    candidates: np.ndarray | None  # [n, C] sampled candidates, positives first, 0 where there is none

    @functools.cached_property
    def positives(self) -> _Grouped:
        """The positives of ranges of rows."""
        return _Grouped(self.row, self.item, len(self.targets))

    @functools.cached_property
    def masked(self) -> _Grouped:
        """What is not recommended again to ranges of rows."""
        return _Grouped(self.mask_row, self.mask_item, len(self.targets))

    def hits(self, top: np.ndarray) -> np.ndarray:
        """Returns which recommended items, shape ``[n, K]``, are positives of their row."""
        if len(self.row) == len(self.targets) and (np.diff(self.row) == 1).all():  # one a row
            return (top == self.item[:, None]) & (top > 0)
        asked = (np.arange(len(top))[:, None] << 32) + top
        found = np.minimum(np.searchsorted(self._keys, asked), len(self._keys) - 1)
        return (self._keys[found] == asked) & (top > 0)

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.unique(np.r_[-1, (self.row << 32) + self.item])


class Evaluator:
    """Evaluates a model of stage t on the targets of stage s.

    Args:
        config: The run's configuration.
        stream: The stream.
        strategy: Adjusts scores at test time.
    """

    def __init__(self, config: Any, stream: Stream, strategy: Composite) -> None:
        self.config, self.stream, self.strategy = config, stream, strategy
        self.sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.metrics = [m.lower() for m in config["metrics"]]
        self.topk: list[int] = list(config["topk"])
        self._cache: dict[tuple[int, str], _Rows] = {}
        self._group = distributed.current()
        self._in_order = any(overrides(s, "adjust_scores") for s in strategy.members)

    # -- the public face ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, ctx: StageContext, known: Known, stage: Stage, split: str = "test") -> Outcome:
        """Returns the outcome of ``ctx.model`` on one split of ``stage``.

        Args:
            ctx: The trained stage; its batcher knows the model's rows.
            known: What the model has trained on.
            stage: The evaluated stage.
            split: ``valid`` or ``test``.

        Raises:
            TrainingError: If a score is NaN.
        """
        served = self.strategy.serving(ctx, self.stream.stages[self._answers_for(ctx, stage)])
        if served is not ctx:
            ctx, known = served, served.known
        model = ctx.model
        was_training = model.training
        model.eval()
        clear_caches(model)
        randomness = ModelRandomness(derive(self.config["seed"], ctx.index, f"evaluate/{stage.index}"))
        try:
            if self._group.size == 1:
                return self._outcome(ctx, known, stage, split, randomness)
            return self._shared(ctx, known, stage, split, randomness)
        finally:
            clear_caches(model)
            model.train(was_training)

    def _outcome(
        self, ctx: StageContext, known: Known, stage: Stage, split: str, randomness: ModelRandomness
    ) -> Outcome:
        with randomness.owned():
            kind = stage.task.kind
            if kind == "classification":
                return self._classification(ctx, known, stage, split)
            if kind == "value":
                return self._value(ctx, known, stage, split)
            return self._ranking(ctx, known, stage, split)

    def _shared(
        self, ctx: StageContext, known: Known, stage: Stage, split: str, randomness: ModelRandomness
    ) -> Outcome:
        """Returns the outcome of several processes, the same in each.

        Where the order of batches matters (a strategy adjusts scores, the model draws random numbers to score) all
        score them all, and the first one's results count.
        """
        start = randomness.state_dict()
        outcome = self._outcome(ctx, known, stage, split, randomness)
        drew = tree_hash(randomness.state_dict()) != tree_hash(start)
        if not self._in_order and self._group.any(torch.tensor([drew])).any():
            self._in_order = True
            randomness.load_state_dict(start)
            outcome = self._outcome(ctx, known, stage, split, randomness)
        return outcome

    def mode(self, split: str) -> str:
        """Returns RecBole's evaluation mode of a split (``full``, ``uni100``, ``labeled``)."""
        return str(self.config["eval_args"]["mode"][split])

    # -- ranking --------------------------------------------------------------------------------------------------

    def _rows_of(self, stage: Stage, split: str) -> _Rows:
        key = (stage.index, split)
        if key not in self._cache:
            self._cache[key] = self._build_rows(stage, split)
        return self._cache[key]

    def _build_rows(self, stage: Stage, split: str) -> _Rows:
        targets = stage.split(split)
        if self.sequential:
            rows, row, item = targets, np.arange(len(targets)), targets.label
        else:
            _, first, row = np.unique(targets.user, return_index=True, return_inverse=True)
            rows = targets[first]
            pairs = np.unique(np.stack([row, targets.label]), axis=1)
            row, item = pairs[0], pairs[1]
        empty = np.empty(0, dtype=np.int64)
        mask_row, mask_item = (
            (empty, empty) if self.config.repeatable_items else self._earlier(stage, split, rows, row, item)
        )
        mode = self.mode(split)
        candidates = None
        if mode[:3] in ("uni", "pop"):
            candidates = self._sample(stage, split, mode, len(rows), row, item, mask_row, mask_item)
        return _Rows(rows, row, item, mask_row, mask_item, candidates)

    def _earlier(
        self, stage: Stage, split: str, rows: Targets, row: np.ndarray, item: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a user had before, not to be recommended again; targets themselves are never masked."""
        table = self.stream.table
        lengths = rows.hi - rows.lo if self.sequential else table.ptr[rows.user + 1] - table.ptr[rows.user]
        start = rows.lo if self.sequential else table.ptr[rows.user]
        owner = np.repeat(np.arange(len(rows)), lengths)
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        position = table.seq[np.repeat(start, lengths) + inside]
        if not self.sequential:
            held = np.zeros(len(table), dtype=bool)
            held[stage.test.position] = True
            if split == "valid":
                held[stage.valid.position] = True
            first_later = np.searchsorted(table.stage, self._last_slice(stage), side="right")
            keep = (position < first_later) & ~held[position]
            owner, position = owner[keep], position[keep]
        key = np.unique(owner * table.n_items + table.item[position])
        key = np.setdiff1d(key, row * table.n_items + item, assume_unique=False)
        return key // table.n_items, key % table.n_items

    def _last_slice(self, stage: Stage) -> int:
        """Slice in which the stage's test targets lie."""
        return int(self.stream.table.stage[stage.test.position].max()) if len(stage.test) else stage.index

    def _sample(
        self,
        stage: Stage,
        split: str,
        mode: str,
        n_rows: int,
        row: np.ndarray,
        item: np.ndarray,
        mask_row: np.ndarray,
        mask_item: np.ndarray,
    ) -> np.ndarray:
        """Draws the candidates of sampled ranking once, the same for every trained stage."""
        number = int(mode[3:])
        limit = self.stream.table.n_items if self.config["candidates"] == "all" else stage.catalogue
        by_popularity = mode.startswith("pop")  # of the task's own training targets, hence among its items anyway
        pool = None if stage.items is None or by_popularity else stage.items[stage.items < limit]
        sampler = NegativeSampler(
            np.r_[row, mask_row],
            np.r_[item, mask_item],
            limit,
            numpy_generator(self.config["seed"], stage.index, f"candidates/{split}"),
            pool=pool,
        )
        if by_popularity:
            counts = np.bincount(self.stream.table.item[stage.train.position], minlength=limit)[1:limit].astype(float)
            sampler.cumulative = np.cumsum(counts / counts.sum())
        negatives = sampler.sample(row, number).reshape(number, len(row)).T
        per_row = np.bincount(row, minlength=n_rows)
        width = int(per_row.max()) * (1 + number)
        out = np.zeros((n_rows, width), dtype=np.int64)
        order = np.argsort(row, kind="stable")
        place = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        out[row[order], place] = item[order]
        start = per_row[row[order]] + place * number
        out[row[order][:, None], start[:, None] + np.arange(number)[None, :]] = negatives[order]
        return out

    def _allowed(self, ctx: StageContext, known: Known, stage: Stage) -> np.ndarray:
        """Items that may be recommended, shape ``[n_items of the model]``."""
        n = ctx.batcher.n_items
        allowed = np.zeros(n, dtype=bool)
        scope = self.config["candidates"]
        if scope == "seen":
            allowed[1 : min(n, stage.catalogue)] = True
            allowed &= known.items[:n]
        elif scope == "trained":
            allowed = known.items[:n].copy()
        else:
            allowed[1:] = True
        if stage.items is not None:
            allowed &= np.isin(np.arange(n), stage.items)
        allowed[0] = False
        return allowed

    def _ranking(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        rows, n = self._rows_of(stage, split), ctx.batcher.n_items
        width = max(self.topk)
        needs_user = not self.sequential or hasattr(ctx.model, "n_users")
        cold_row = self._cold_rows(ctx, known, rows.targets, needs_user)
        cold_pos = cold_row[rows.row] | (rows.item >= n)
        cold_pos |= ~known.items[np.minimum(rows.item, len(known.items) - 1)]
        banned = torch.from_numpy(np.flatnonzero(~self._allowed(ctx, known, stage))).to(ctx.device)
        top = np.zeros((len(rows.targets), width), dtype=np.int64)
        auc = np.zeros(len(rows.targets))
        full = rows.candidates is None
        shared = full and self._shares_prefixes(ctx)
        for batch in self._batches(len(rows.targets), n, shared):
            for index, scores in self._scored(ctx, stage, rows, batch, full, shared):
                if torch.isnan(scores.sum()) and torch.isnan(scores).any():  # a sum takes a fraction of the time
                    raise TrainingError(
                        f"stage {ctx.index + 1}: the model's scores on stage {stage.index + 1} ({split}) contain NaN"
                    )
                scores.index_fill_(1, banned, -torch.inf)
                if not full:
                    assert rows.candidates is not None
                    kept = torch.zeros_like(scores, dtype=torch.bool)
                    inside = np.where(rows.candidates[index] < n, rows.candidates[index], 0)
                    kept.scatter_(1, torch.from_numpy(inside).to(ctx.device), True)
                    scores.masked_fill_(~kept, -torch.inf)
                row_index, item_index = rows.masked.of(index)
                fits = item_index < n
                if fits.any():
                    pairs = (torch.from_numpy(column[fits]).to(ctx.device) for column in (row_index, item_index))
                    scores[tuple(pairs)] = -torch.inf
                if cold_row[index].any():
                    scores[torch.from_numpy(cold_row[index]).to(ctx.device)] = -torch.inf
                k = min(width, n)
                values, items = best(scores, k)
                top[index, :k] = torch.where(torch.isfinite(values), items, 0).cpu().numpy()
                if "gauc" in self._metrics_of(stage):
                    auc[index] = _auc(scores.cpu(), *rows.positives.of(index), n)
        self._everyones(top, auc)
        return self._ranking_outcome(rows, top, auc, cold_pos, stage, ctx)

    def _cold_rows(self, ctx: StageContext, known: Known, targets: Targets, needs_user: bool) -> np.ndarray:
        cold = np.zeros(len(targets), dtype=bool)
        if needs_user:
            cold |= ~known.users[targets.user] | (targets.user >= ctx.batcher.n_users)
        if self.sequential and len(targets):
            # A history of unknown items only says nothing: count, over seq, of items with a row.
            table = self.stream.table
            seen = np.r_[0, np.cumsum(table.item[table.seq] < ctx.batcher.n_items)]
            start = np.maximum(targets.lo, targets.hi - ctx.batcher.max_length)
            cold |= seen[targets.hi] == seen[start]
        return cold

    def _batches(self, n_rows: int, n_items: int, shared: bool = False) -> Iterator[np.ndarray]:
        size = max(1, min(int(self.config["eval_batch_size"]), SCORES_AT_ONCE // max(n_items, 1)))
        if shared:
            size = max(1, min(int(self.config["eval_batch_size"]), PREFIXES_AT_ONCE))
        elif self.sequential:
            size = max(1, min(size, INPUTS_AT_ONCE // int(self.config["MAX_ITEM_LIST_LENGTH"])))
        for start in self._mine(n_rows, size):
            yield np.arange(start, min(start + size, n_rows))

    def _mine(self, n: int, size: int) -> range:
        """Returns where the batches of this process start: all of them, or its share of several processes' work.

        Whole batches are shared, because the last bits of a score may depend on what is scored beside it.
        """
        starts = range(0, n, size)
        return starts if self._in_order else starts[self._group.share(len(starts))]

    def _everyones(self, *arrays: np.ndarray) -> None:
        """Completes arrays that are 0 in the rows of other processes, exactly: to a number 0 is added."""
        for array in arrays:
            if self._in_order and not self._group.main:  # all have scored all rows
                array[:] = 0
            self._group.sum(torch.from_numpy(array))

    def _answers_for(self, ctx: StageContext, stage: Stage) -> int:
        return stage.index if self.config["task_id"] == "given" else ctx.index

    def _shares_prefixes(self, ctx: StageContext) -> bool:
        """Tells whether one pass over a sequence may score all its prefixes (no strategy adjusts the scores)."""
        told = getattr(ctx.model, "shares_prefixes", None)
        adjusted = any(overrides(s, "adjust_scores") for s in self.strategy.members)
        return told is not None and not adjusted and bool(told())

    def _scored(
        self, ctx: StageContext, stage: Stage, rows: _Rows, index: np.ndarray, full: bool, shared: bool
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yields rows and their scores of all items, few enough rows at a time that the scores stay in the cache."""
        if not shared:
            yield index, self._score(ctx, stage, rows, index, full)
            return
        n = ctx.batcher.n_items
        outputs = prefix_outputs(ctx.model, ctx.batcher, rows.targets[index])
        size = max(1, (SCORES_IN_CACHE if ctx.device.type == "cpu" else SCORES_AT_ONCE) // n)
        for start in range(0, len(index), size):
            part = slice(start, start + size)
            yield index[part], ctx.model.item_scores(outputs[part])[:, :n]

    def _score(self, ctx: StageContext, stage: Stage, rows: _Rows, index: np.ndarray, full: bool) -> torch.Tensor:
        batch = ctx.batcher.rows(rows.targets[index], stage=self._answers_for(ctx, stage), evaluation=True)
        if self.sequential:  # a history of unknown items only: any token will do, the row is a miss
            lengths = batch[self.config["ITEM_LIST_LENGTH_FIELD"]]
            batch.interaction[self.config["ITEM_LIST_LENGTH_FIELD"]] = lengths.clamp(min=1)
        batch = batch.to(ctx.device)
        n, model = ctx.batcher.n_items, ctx.model
        if not full and ("scores" in (offers := capabilities(model)) or "full_sort_predict" not in offers):
            assert rows.candidates is not None
            inside = np.where(rows.candidates[index] < n, rows.candidates[index], 0)
            items = torch.from_numpy(inside).to(ctx.device)
            given = model.scores(batch, items) if "scores" in offers else pair_scores(model, batch, items, ctx)
            scores = torch.full((len(index), n), -torch.inf, device=ctx.device)
            scores.scatter_(1, items, given.to(scores.dtype))
        else:
            scores = full_scores(model, batch, n, ctx)
        return self.strategy.adjust_scores(ctx, batch, scores)

    def _ranking_outcome(
        self, rows: _Rows, top: np.ndarray, auc: np.ndarray, cold_pos: np.ndarray, stage: Stage, ctx: StageContext
    ) -> Outcome:
        n_rows = len(rows.targets)
        hit = rows.hits(top)
        new_item = rows.item >= stage.first_new_item
        new_user = rows.targets.user >= stage.first_new_user

        def count(flag: np.ndarray) -> np.ndarray:
            return np.bincount(rows.row[flag], minlength=n_rows)

        everything = count(np.ones(len(rows.row), dtype=bool))
        known_only = count(~cold_pos)
        total = known_only if self.config["cold_targets"] == "drop" else everything
        is_new = top >= stage.first_new_item
        every = np.ones(n_rows, dtype=bool)
        strata = {
            "all": (hit, total, every),
            "known": (hit, known_only, every),
            "warm_user": (hit, total, ~new_user),
            "new_user": (hit, total, new_user),
            "warm_item": (hit & ~is_new, count(~new_item), every),
            "new_item": (hit & is_new, count(new_item), every),
        }
        out: dict[str, tuple[dict[str, float], int]] = {}
        done: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = []  # strata that differ in their rows alone
        for name, (hits, length, chosen) in strata.items():
            counted = length > 0
            found = next((f for h, n, f in done if h is hits and np.array_equal(n, length)), None)
            if found is None:
                found = self._by_row(hits[counted], length[counted], stage)
                done.append((hits, length, found))
            part, chosen = chosen[counted], chosen & counted
            by_row = {metric: values[part] for metric, values in found.items()}
            out[name] = (self._topk(by_row, length[chosen], top[chosen], auc[chosen], stage), int(chosen.sum()))
        metrics, n = out.pop("all")
        used = total > 0
        primary = stage.task.primary_metric(str(self.config["valid_metric"]))
        per_row = done[0][2].get(primary) if used.any() else None
        if per_row is None:
            per_row = self._per_row(hit[used], total[used], primary)
        return Outcome(metrics, out, n, int(cold_pos.sum()), rows.targets.user[used], top[used], per_row)

    def _metrics_of(self, stage: Stage) -> list[str]:
        return self.metrics if stage.task.metrics is None else [m.lower() for m in stage.task.metrics]

    def _per_row(self, hit: np.ndarray, length: np.ndarray, metric: str) -> np.ndarray | None:
        name, _, k = metric.partition("@")
        if name not in metrics_dict or metric_information[name] != ["rec.topk"] or not len(hit):
            return None
        return np.asarray(_metric_rows(self.config, name, hit, length)[:, int(k) - 1])

    def _by_row(self, hit: np.ndarray, length: np.ndarray, stage: Stage) -> dict[str, np.ndarray]:
        """Returns the metrics that are means over rows, by name, each of shape ``[n]``."""
        out: dict[str, np.ndarray] = {}
        for name in self._metrics_of(stage) if len(hit) else ():
            if metric_information[name] == ["rec.topk"]:
                rows = _metric_rows(self.config, name, hit, length)
                out.update({f"{name}@{k}": np.ascontiguousarray(rows[:, k - 1]) for k in self.topk})
        return out

    def _topk(
        self, by_row: dict[str, np.ndarray], length: np.ndarray, top: np.ndarray, auc: np.ndarray, stage: Stage
    ) -> dict[str, float]:
        if not len(length):
            return {}
        out: dict[str, float] = {}
        for name in self._metrics_of(stage):
            if metric_information[name] == ["rec.topk"]:
                out.update({f"{name}@{k}": float(by_row[f"{name}@{k}"].mean()) for k in self.topk})
            elif name == "gauc":
                out[name] = float((auc * length).sum() / length.sum())
            else:
                out.update(self._beyond(name, top, stage))
        return out

    def _beyond(self, name: str, top: np.ndarray, stage: Stage) -> dict[str, float]:
        """Metrics of the recommended lists. An empty slot repeats the row's first item, so that it adds nothing new."""
        filled = np.where(top > 0, top, top[:, :1])
        filled = filled[filled[:, 0] > 0]
        if not len(filled):
            return {}
        data = DataStruct()
        data.set("rec.items", torch.from_numpy(filled))
        data.set("data.num_items", stage.catalogue)
        items, counts = np.unique(self.stream.table.item[stage.train.position], return_counts=True)
        table = {int(i): 0 for i in np.unique(filled)}
        table.update({int(i): int(c) for i, c in zip(items, counts, strict=True)})
        data.set("data.count_items", table)
        return {k: float(v) for k, v in metrics_dict[name](self.config).calculate_metric(data).items()}

    # -- labelled values ------------------------------------------------------------------------------------------

    def _value(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        targets, mode = stage.split(split), self.mode(split)
        batch = ctx.batcher.rows(targets, stage=self._answers_for(ctx, stage), evaluation=True)
        label_field = self.config["LABEL_FIELD"]
        item = targets.label.copy()
        user = targets.user
        if mode[:3] in ("uni", "pop"):
            number = int(mode[3:])
            sampler = NegativeSampler(
                user, item, stage.catalogue, numpy_generator(self.config["seed"], stage.index, f"candidates/{split}")
            )
            negatives = sampler.sample(user, number)
            batch = batch.repeat(1 + number)
            item, user = np.r_[item, negatives], np.tile(user, 1 + number)
            ids = torch.from_numpy(np.where(item < ctx.batcher.n_items, item, 0))
            batch.interaction[ctx.batcher.iid] = ids
            batch = ctx.batcher.join(batch)
            label = np.r_[np.ones(len(targets)), np.zeros(len(negatives))]
        elif label_field in batch:
            label = batch[label_field].numpy().astype(np.float64)
        else:
            raise ConfigError(
                f"LABEL_FIELD: {label_field!r} is no column of the interactions and no threshold makes it; set "
                f"threshold: {{rating: 4}} or evaluate with eval_args mode uni100"
            )
        needs_user = not self.sequential or hasattr(ctx.model, "n_users")
        cold = ~known.items[item] | (item >= ctx.batcher.n_items)
        if needs_user:
            cold |= ~known.users[user] | (user >= ctx.batcher.n_users)
        prior = known.label_sum / known.label_count if known.label_count else 0.5
        score = np.full(len(item), prior)
        warm = np.flatnonzero(~cold)
        size = max(1, int(self.config["eval_batch_size"]))
        predictions = np.zeros(len(warm))
        for start in self._mine(len(warm), size):
            rows = torch.from_numpy(warm[start : start + size])
            part = Interaction({name: column[rows] for name, column in batch.interaction.items()})
            if self.sequential:
                field_ = self.config["ITEM_LIST_LENGTH_FIELD"]
                part.interaction[field_] = part[field_].clamp(min=1)
            part = part.to(ctx.device)
            predicted = self.strategy.adjust_scores(ctx, part, ctx.model.predict(part).flatten())
            predictions[start : start + size] = predicted.double().cpu().numpy()
        self._everyones(predictions)
        score[warm] = predictions
        if np.isnan(score).any():
            raise TrainingError(
                f"stage {ctx.index + 1}: the model's predictions on stage {stage.index + 1} ({split}) contain NaN"
            )
        used = ~cold if self.config["cold_targets"] == "drop" else np.ones(len(item), dtype=bool)
        new_user, new_item = user >= stage.first_new_user, item >= stage.first_new_item
        flags = {
            "known": ~cold,
            "warm_user": ~new_user & used,
            "new_user": new_user & used,
            "warm_item": ~new_item & used,
            "new_item": new_item & used,
        }
        names = self._metrics_of(stage)
        strata = {name: (self._losses(score[f], label[f], names), int(f.sum())) for name, f in flags.items()}
        metrics = self._losses(score[used], label[used], names)
        return Outcome(metrics, strata, int(used.sum()), int(cold.sum()), user[used])

    def _losses(self, score: np.ndarray, label: np.ndarray, names: list[str]) -> dict[str, float]:
        out: dict[str, float] = {}
        for name in names:
            if not len(score) or (name == "auc" and (label.min() == label.max())):
                continue
            out[name] = float(metrics_dict[name](self.config).metric_info(score, label))
        return out

    # -- classes --------------------------------------------------------------------------------------------------

    def _classification(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        targets = stage.split(split)
        predicted = np.zeros(len(targets), dtype=np.int64)
        cold = self._cold_rows(ctx, known, targets, not self.sequential)
        n_labels = stage.task.n_labels or 1
        for index in self._batches(len(targets), n_labels):
            batch = ctx.batcher.rows(targets[index], stage=self._answers_for(ctx, stage), evaluation=True)
            logits = ctx.model.predict_task(batch.to(ctx.device), stage.task)
            predicted[index] = logits.argmax(dim=-1).cpu().numpy()
        self._everyones(predicted)
        predicted[cold] = -1
        used = ~cold if self.config["cold_targets"] == "drop" else np.ones(len(targets), dtype=bool)
        new = targets.user >= stage.first_new_user
        wanted = [m.lower() for m in stage.task.metrics or CLASSIFICATION_METRICS]

        def measure(flag: np.ndarray) -> dict[str, float]:
            if not flag.any():
                return {}
            truth, guess = targets.label[flag], predicted[flag]
            scores = []
            for label in np.unique(truth):
                hits = ((truth == label) & (guess == label)).sum()
                scores.append(2 * hits / max((truth == label).sum() + (guess == label).sum(), 1))
            found = {"accuracy": float((truth == guess).mean()), "macro_f1": float(np.mean(scores))}
            return {name: found[name] for name in wanted}

        flags = {"known": ~cold, "warm_user": ~new & used, "new_user": new & used}
        strata = {name: (measure(f), int(f.sum())) for name, f in flags.items()}
        right = (predicted == targets.label)[used].astype(float)
        return Outcome(measure(used), strata, int(used.sum()), int(cold.sum()), targets.user[used], None, right)


class _Grouped:
    """Pairs (row, item) that can be taken by ranges of rows."""

    def __init__(self, row: np.ndarray, item: np.ndarray, n_rows: int) -> None:
        order = np.argsort(row, kind="stable")
        self.row, self.item = row[order], item[order]
        self.ptr = np.searchsorted(self.row, np.arange(n_rows + 1))

    def of(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows (from 0) and items of a contiguous range of rows."""
        part = slice(self.ptr[index[0]], self.ptr[index[-1] + 1])
        return self.row[part] - index[0], self.item[part]


def best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ``k`` largest scores of each row and their columns, falling, shape ``[B, k]`` each.

    In a wide row on a CPU the maxima of blocks say which blocks can hold one of them.
    """
    width, blocks = scores.size(1), scores.size(1) // BLOCK
    if scores.device.type != "cpu" or blocks < 16 * k:
        found = torch.topk(scores, k, dim=1)
        return found.values, found.indices
    peaks = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(dim=2)
    chosen = torch.topk(peaks, k, dim=1).indices.sort(dim=1).values
    columns = (chosen.unsqueeze(2) * BLOCK + torch.arange(BLOCK)).flatten(1)
    rest = torch.arange(blocks * BLOCK, width).expand(len(scores), -1)
    columns = torch.cat([columns, rest], dim=1)
    found = torch.topk(scores.gather(1, columns), k, dim=1)
    return found.values, columns.gather(1, found.indices)


def _metric_rows(config: Any, name: str, hit: np.ndarray, length: np.ndarray) -> np.ndarray:
    metric = metrics_dict[name](config)
    if _takes_lengths(metrics_dict[name]):
        return np.asarray(metric.metric_info(hit, length))
    return np.asarray(metric.metric_info(hit))


@functools.cache
def _takes_lengths(metric: Any) -> bool:
    return len(inspect.signature(metric.metric_info).parameters) > 2  # self, hits, numbers of positives


def _auc(scores: torch.Tensor, row: np.ndarray, item: np.ndarray, n_items: int) -> np.ndarray:
    """Area under the ROC curve of each row over its finite candidates; an unscored positive ranks last."""
    positive = torch.zeros_like(scores, dtype=torch.bool)
    fits = item < n_items
    positive[row[fits], item[fits]] = True
    out = np.zeros(len(scores))
    for i in range(len(scores)):
        finite = torch.isfinite(scores[i])
        negatives = scores[i][finite & ~positive[i]].sort().values
        chosen = scores[i][finite & positive[i]]
        total = int((row == i).sum())
        if not len(negatives) or not total:
            continue
        below = torch.searchsorted(negatives, chosen, side="left")
        upto = torch.searchsorted(negatives, chosen, side="right")
        out[i] = float((below + upto).double().sum() / 2 / (len(negatives) * total))
    return out


def full_scores(model: Any, batch: Interaction, n_items: int, ctx: StageContext) -> torch.Tensor:
    """Returns scores of all items, shape ``[B, n_items]``; models without ``full_sort_predict`` score pair by pair."""
    if "full_sort_predict" in capabilities(model):
        return model.full_sort_predict(batch).view(len(batch), -1)[:, :n_items]
    return pair_scores(model, batch, torch.arange(n_items).expand(len(batch), -1), ctx)


def pair_scores(model: Any, batch: Interaction, items: torch.Tensor, ctx: StageContext) -> torch.Tensor:
    """Returns ``model.predict`` of given pairs, -inf where the item is padding.

    Args:
        model: The model.
        batch: One row a user or target, ``B`` of them.
        items: Item ids, shape ``[B, C]``.
        ctx: Its batcher adds the items' features.

    Returns:
        Scores, shape ``[B, C]``.
    """
    rows, columns = torch.nonzero(items.cpu() > 0, as_tuple=True)
    ids = items.cpu()[rows, columns]
    batch = batch.to("cpu")
    out = torch.full(items.shape, -torch.inf, device=ctx.device)
    size = max(int(ctx.config["eval_batch_size"]), PAIRS_AT_ONCE)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        pairs = Interaction({name: column[rows[part]] for name, column in batch.interaction.items()})
        pairs.interaction[ctx.batcher.iid] = ids[part]
        scores = model.predict(ctx.batcher.join(pairs).to(ctx.device)).flatten()
        out[rows[part].to(ctx.device), columns[part].to(ctx.device)] = scores.to(out.dtype)
    return out


def computed_metrics(config: Any, task: Task | None = None) -> list[str]:
    """Returns the names of the metrics that a run computes, ``name@k`` where they have a cut-off.

    Args:
        config: The run's configuration.
        task: The task of a stage, whose own metrics count where it has some.

    Raises:
        ConfigError: If a task names a metric that does not exist.
    """
    asked = [m.lower() for m in (config["metrics"] if task is None or task.metrics is None else task.metrics)]
    if task is not None and task.kind == "classification":
        asked = list(CLASSIFICATION_METRICS) if task.metrics is None else asked
    classes = task is not None and task.kind == "classification"
    for metric in asked:
        known = CLASSIFICATION_METRICS if classes else metrics_dict
        if metric not in known:
            raise ConfigError(f"task {task.name if task else ''!r}: unknown metric {metric!r}{nearest(metric, known)}")
    if classes:
        return asked
    names: list[str] = []
    for metric in asked:
        plain = metric_information[metric] == ["rec.meanrank"] or config["eval_type"] == EvaluatorType.VALUE
        names += [metric] if plain else [f"{metric}@{k}" for k in config["topk"]]
    return names
