"""Scores a model on the targets of a stage.

Evaluation is pure: it draws from a random state of its own and leaves model, strategy and caches as they were. What a
model cannot know counts as a miss and is counted apart as *cold*: items and users that it never trained on are never
scored by a random row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

from recbole_cl import distributed
from recbole_cl.errors import ConfigError, TrainingError
from recbole_cl.evaluation.known import Known
from recbole_cl.evaluation.metrics import asked_metrics
from recbole_cl.evaluation.outcome import Outcome, class_outcome, ranking_outcome, value_outcome
from recbole_cl.evaluation.rows import Rows, allowed_items, build_rows, mode_of
from recbole_cl.evaluation.scores import auc_of_rows, best, clear_caches, full_scores, pair_scores
from recbole_cl.model.capabilities import capabilities
from recbole_cl.model.prefixes import prefix_outputs
from recbole_cl.rng import ModelRandomness, derive, numpy_generator
from recbole_cl.strategy.base import overrides
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.build import Stream
from recbole_cl.stream.sampler import NegativeSampler
from recbole_cl.stream.stage import Stage, Targets
from recbole_cl.tree import answering, clone_tree, tree_hash

__all__ = ["Evaluator", "Known", "Outcome"]

SCORES_AT_ONCE = 1 << 24
SCORES_IN_CACHE = 1 << 18
PREFIXES_AT_ONCE = 1 << 10
"""Rows whose histories are looked at together for sequences in common."""
INPUTS_AT_ONCE = 1 << 14
"""Sequence positions a forward pass holds: activations that stay in the cache are faster and a tenth of the memory."""


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
        self._cache: dict[tuple[int, str], Rows] = {}
        self._group = distributed.current()
        self._adjusting = [s for s in strategy.members if overrides(s, "adjust_scores")]
        self._in_order = bool(self._adjusting)

    # -- the public face ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, ctx: StageContext, known: Known, stage: Stage, split: str = "test") -> Outcome:
        """Returns the outcome of ``ctx.model`` on one split of ``stage``.

        A strategy may take notes while it adjusts scores; its state is put back afterwards, so that neither the next
        evaluation nor the training between two validations depends on what was looked at.
        A model that has a context manager ``validating()`` answers validation targets inside it.

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
        clear_caches(model)
        kept = [clone_tree(s.state_dict()) for s in self._adjusting]
        randomness = ModelRandomness(derive(self.config["seed"], ctx.index, f"evaluate/{stage.index}"))
        between = getattr(model, "validating", contextlib.nullcontext) if split == "valid" else contextlib.nullcontext
        try:
            with answering(model), between():
                if self._group.size == 1:
                    return self._outcome(ctx, known, stage, split, randomness)
                return self._shared(ctx, known, stage, split, randomness)
        finally:
            for strategy, state in zip(self._adjusting, kept, strict=True):
                strategy.load_state_dict(state)
            clear_caches(model)

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
        return mode_of(self.config, split)

    # -- ranking --------------------------------------------------------------------------------------------------

    def _rows_of(self, stage: Stage, split: str) -> Rows:
        key = (stage.index, split)
        if key not in self._cache:
            self._cache[key] = build_rows(self.config, self.stream, stage, split)
        return self._cache[key]

    def _ranking(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        rows, n = self._rows_of(stage, split), ctx.batcher.n_items
        width = max(self.config["topk"])
        needs_user = not self.sequential or hasattr(ctx.model, "n_users")
        cold_row = self._cold_rows(ctx, known, rows.targets, needs_user)
        cold_pos = cold_row[rows.row] | (rows.item >= n)
        cold_pos |= ~known.items[np.minimum(rows.item, len(known.items) - 1)]
        allowed = torch.from_numpy(allowed_items(self.config, known, stage, n)).to(ctx.device)
        bound = torch.where(allowed, torch.inf, -torch.inf)
        top = np.zeros((len(rows.targets), width), dtype=np.int64)
        auc = np.zeros(len(rows.targets))
        with_auc = "gauc" in asked_metrics(self.config, stage.task)
        full = rows.candidates is None
        shared = full and self._shares_prefixes(ctx)
        queried = full and not shared and self._told(ctx, "scores_by_queries")
        for batch in self._batches(len(rows.targets), 1 if queried else n, shared):
            for index, scores in self._scored(ctx, stage, rows, batch, full, shared, queried):
                if torch.isnan(scores.sum()) and torch.isnan(scores).any():  # a sum takes a fraction of the time
                    raise TrainingError(
                        f"stage {ctx.index + 1}: the model's scores on stage {stage.index + 1} ({split}) contain NaN"
                    )
                torch.minimum(scores, bound.to(scores.dtype), out=scores)  # several times as fast as to fill them in
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
                if with_auc:
                    auc[index] = auc_of_rows(scores.cpu(), *rows.positives.of(index), n)
        self._everyones(top, auc)
        return ranking_outcome(self.config, self.stream, stage, rows, top, auc, cold_pos)

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
        """Tells whether one pass over a sequence may score all its prefixes."""
        return self._told(ctx, "shares_prefixes")

    def _told(self, ctx: StageContext, ability: str) -> bool:
        """Tells whether a model has a short way to its scores, and no strategy adjusts them."""
        told = getattr(ctx.model, ability, None)
        return told is not None and not self._adjusting and bool(told())

    def _scored(
        self, ctx: StageContext, stage: Stage, rows: Rows, index: np.ndarray, full: bool, shared: bool, queried: bool
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yields rows and their scores of all items, few enough rows at a time that the scores stay in the cache."""
        n, model = ctx.batcher.n_items, ctx.model
        if shared:
            outputs, score = prefix_outputs(model, ctx.batcher, rows.targets[index]), model.item_scores
        elif queried:
            outputs, score = model.item_queries(self._batch(ctx, stage, rows, index)), model.score_queries
        else:
            yield index, self._score(ctx, stage, rows, index, full)
            return
        size = max(1, (SCORES_IN_CACHE if ctx.device.type == "cpu" else SCORES_AT_ONCE) // n)
        for start in range(0, len(index), size):
            part = slice(start, start + size)
            yield index[part], score(outputs[part])[:, :n]

    def _batch(self, ctx: StageContext, stage: Stage, rows: Rows, index: np.ndarray) -> Interaction:
        batch = ctx.batcher.rows(rows.targets[index], stage=self._answers_for(ctx, stage), evaluation=True)
        if self.sequential:  # a history of unknown items only: any token will do, the row is a miss
            lengths = batch[self.config["ITEM_LIST_LENGTH_FIELD"]]
            batch.interaction[self.config["ITEM_LIST_LENGTH_FIELD"]] = lengths.clamp(min=1)
        return batch.to(ctx.device)

    def _score(self, ctx: StageContext, stage: Stage, rows: Rows, index: np.ndarray, full: bool) -> torch.Tensor:
        batch = self._batch(ctx, stage, rows, index)
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
        return value_outcome(self.config, stage, score, label, user, item, cold)

    # -- classes --------------------------------------------------------------------------------------------------

    def _classification(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        targets = stage.split(split)
        predicted = np.zeros(len(targets), dtype=np.int64)
        cold = self._cold_rows(ctx, known, targets, not self.sequential)
        n_labels = stage.task.n_labels or 1
        for index in self._batches(len(targets), n_labels):
            batch = ctx.batcher.rows(targets[index], stage=self._answers_for(ctx, stage), evaluation=True)
            if self.sequential:  # a history of unknown items only: any answer will do, the row is a miss
                field_ = self.config["ITEM_LIST_LENGTH_FIELD"]
                batch.interaction[field_] = batch[field_].clamp(min=1)
            logits = ctx.model.predict_task(batch.to(ctx.device), stage.task)
            predicted[index] = logits.argmax(dim=-1).cpu().numpy()
        self._everyones(predicted)
        predicted[cold] = -1
        return class_outcome(self.config, stage, targets, predicted, cold)
