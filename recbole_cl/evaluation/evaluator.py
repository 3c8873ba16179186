"""Scores a model on the targets of a stage.

Evaluation is pure: it draws from a random state of its own and leaves model, strategy and caches as they were. What a
model cannot know counts as a miss and is counted apart as *cold*: items and users that it never trained on are never
scored by a random row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

from recbole_cl import distributed
from recbole_cl.config.strata import make_strata
from recbole_cl.errors import ConfigError, TrainingError
from recbole_cl.evaluation.known import Known
from recbole_cl.evaluation.levels import checked_levels
from recbole_cl.evaluation.metrics import GAUC_NEEDS_SCORES, asked_metrics
from recbole_cl.evaluation.outcome import Outcome, class_outcome, ranking_outcome, value_outcome
from recbole_cl.evaluation.ranking import (
    Pairs,
    Way,
    bound_of,
    choose_way,
    limit,
    own_lists,
    rows_at_once,
    scores_of,
    scores_of_prefixes,
    top_items,
)
from recbole_cl.evaluation.rows import Rows, allowed_items, build_labelled, build_rows, mode_of
from recbole_cl.evaluation.scores import auc_of_rows, clear_caches
from recbole_cl.evaluation.strata import flags_of
from recbole_cl.model.contract import contract
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.base import overrides
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets
from recbole_cl.tree import answering, clone_tree, tree_hash

__all__ = ["Evaluator", "Known", "Outcome"]


FULL = 12
"""Decimal places from which on ``metric_decimal_place`` rounds nothing; our default."""


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
        self._strata = make_strata(config["strata"])

    # -- the public face ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, ctx: StageContext, known: Known, stage: Stage, split: str = "test") -> Outcome:
        """Returns the outcome of ``ctx.model`` on one split of ``stage``.

        A strategy may take notes while it adjusts scores; its state is put back afterwards, so that neither the next
        evaluation nor the training between two validations depends on what was looked at.
        The model answers inside its own context ``evaluating(stage, split)``.

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
        try:
            with answering(model), contract(model).evaluating(stage, split):
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
        how = {"classification": self._classification, "value": self._value}.get(stage.task.kind, self._ranking)
        with randomness.owned():
            outcome = how(ctx, known, stage, split)
            self._measure(ctx, known, stage, split, outcome)
        if (places := self.config["metric_decimal_place"]) < FULL:
            outcome.round(places)
        return outcome

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

    def _strata_of(self, stage: Stage, split: str, all_targets: bool = False) -> dict[str, np.ndarray]:
        """Returns the strata of the property ``strata``: flags of the rows that are ranked, or of all targets."""
        targets = stage.split(split)
        if not self._strata:
            return {}
        if stage.task.kind == "next_item" and not all_targets:
            targets = self._rows_of(stage, split).targets
        return flags_of(self._strata, self.stream, stage, targets)

    # -- ranking --------------------------------------------------------------------------------------------------

    def _rows_of(self, stage: Stage, split: str) -> Rows:
        key = (stage.index, split)
        if key not in self._cache:
            self._cache[key] = build_rows(self.config, self.stream, stage, split)
        return self._cache[key]

    def _ranking(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        rows, n = self._rows_of(stage, split), ctx.batcher.n_items
        cold_row = self._cold_rows(ctx, known, rows.targets, self._needs_user(ctx))
        cold_item = cold_row[rows.row] | self._cold_items(ctx, known, rows.item)
        top = np.zeros((len(rows.targets), max(self.config["topk"])), dtype=np.int64)
        auc = np.zeros(len(rows.targets))
        with_auc = "gauc" in asked_metrics(self.config, stage.task)
        way = choose_way(ctx.model, rows.candidates is not None, bool(self._adjusting))
        if way is Way.OWN and with_auc:
            raise ConfigError(GAUC_NEEDS_SCORES.format(self.config["model"]))
        untrained = contract(ctx.model).scores_untrained_items
        allowed = torch.from_numpy(allowed_items(self.config, known, stage, n, untrained)).to(ctx.device)
        bound = bound_of(allowed)
        for batch in self._batches(len(rows.targets), rows_at_once(self.config, n, way)):
            if way is Way.OWN:
                asked, excluded = self._batch(ctx, stage, rows.targets[batch]), self._excluded(ctx, rows, batch)
                items, _ = own_lists(ctx.model, asked, min(top.shape[1], n), allowed, excluded)
                top[batch, : items.size(1)] = items.cpu().numpy()
                continue
            for index, scores in self._scored(ctx, stage, rows, batch, way):
                if torch.isnan(scores.sum()) and torch.isnan(scores).any():  # a sum takes a fraction of the time
                    raise TrainingError(
                        f"stage {ctx.index + 1}: the model's scores on stage {stage.index + 1} ({split}) contain NaN"
                    )
                limit(scores, bound, self._excluded(ctx, rows, index), self._candidates(ctx, rows, index))
                items, _ = top_items(scores, top.shape[1])
                top[index, : items.size(1)] = items.cpu().numpy()
                if with_auc:
                    auc[index] = auc_of_rows(scores.cpu(), *rows.positives.of(index), n)
        top[cold_row], auc[cold_row] = 0, 0.0
        self._everyones(top, auc)
        levels = checked_levels(ctx.model, contract(ctx.model).item_levels(), n)
        more = self._strata_of(stage, split)
        return ranking_outcome(self.config, self.stream, stage, rows, top, auc, cold_item, more, levels)

    def _scored(
        self, ctx: StageContext, stage: Stage, rows: Rows, index: np.ndarray, way: Way
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yields rows and their scores of all items, as the strategies want them."""
        if way is Way.PREFIXES:
            for part, scores in scores_of_prefixes(ctx.model, ctx.batcher, rows.targets[index]):
                yield index[part], scores
            return
        batch = self._batch(ctx, stage, rows.targets[index])
        for part, scores in scores_of(way, ctx.model, ctx.batcher, batch, self._candidates(ctx, rows, index)):
            yield index[part], self.strategy.adjust_scores(ctx, batch, scores) if self._adjusting else scores

    def _candidates(self, ctx: StageContext, rows: Rows, index: np.ndarray) -> torch.Tensor | None:
        """Returns the sampled candidates of a range of rows, 0 for one without a row in the model."""
        if rows.candidates is None:
            return None
        chosen = rows.candidates[index]
        return torch.from_numpy(np.where(chosen < ctx.batcher.n_items, chosen, 0)).to(ctx.device)

    def _excluded(self, ctx: StageContext, rows: Rows, index: np.ndarray) -> Pairs:
        """Returns what is not recommended again to a range of rows."""
        row, item = rows.masked.of(index)
        fits = item < ctx.batcher.n_items
        return torch.from_numpy(row[fits]).to(ctx.device), torch.from_numpy(item[fits]).to(ctx.device)

    def _needs_user(self, ctx: StageContext) -> bool:
        """Tells whether a user whom the model never trained on makes a row a miss (RecBole's models count users)."""
        return not self.sequential or hasattr(ctx.model, "n_users")

    def _cold_items(self, ctx: StageContext, known: Known, item: np.ndarray) -> np.ndarray:
        """Returns which items the model cannot score: it has no row for them, or never trained the one it has."""
        n = ctx.batcher.n_items
        scorable = known.scorable(n, contract(ctx.model).scores_untrained_items)
        cold: np.ndarray = (item >= n) | ~scorable[np.minimum(item, len(scorable) - 1)]
        return cold

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

    def _batches(self, n_rows: int, size: int) -> Iterator[np.ndarray]:
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

    def _batch(self, ctx: StageContext, stage: Stage, targets: Targets, items: np.ndarray | None = None) -> Interaction:
        """Returns the rows of targets, with other items than the targets' own where some are given."""
        batch = ctx.batcher.rows(targets, stage=self._answers_for(ctx, stage), evaluation=True)
        if items is not None:
            batch.interaction[ctx.batcher.iid] = torch.from_numpy(np.where(items < ctx.batcher.n_items, items, 0))
            batch = ctx.batcher.join(batch)
        if self.sequential:  # a history of unknown items only: any token will do, the row is a miss
            lengths = batch[self.config["ITEM_LIST_LENGTH_FIELD"]]
            batch.interaction[self.config["ITEM_LIST_LENGTH_FIELD"]] = lengths.clamp(min=1)
        return batch.to(ctx.device)

    # -- labelled values ------------------------------------------------------------------------------------------

    def _value(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        targets, more = stage.split(split), self._strata_of(stage, split)
        rows = build_labelled(self.config, self.stream, stage, split)
        cold = self._cold_items(ctx, known, rows.item)
        if self._needs_user(ctx):
            cold |= ~known.users[rows.user] | (rows.user >= ctx.batcher.n_users)
        prior = known.label_sum / known.label_count if known.label_count else 0.5
        score = np.full(len(rows.item), prior)
        warm = np.flatnonzero(~cold)
        predictions = np.zeros(len(warm))
        for index in self._batches(len(warm), max(1, int(self.config["eval_batch_size"]))):
            chosen = warm[index]
            batch = self._batch(ctx, stage, targets[rows.target[chosen]], rows.item[chosen] if rows.sampled else None)
            predicted = self.strategy.adjust_scores(ctx, batch, ctx.model.predict(batch).flatten())
            predictions[index] = predicted.double().cpu().numpy()
        self._everyones(predictions)
        score[warm] = predictions
        if np.isnan(score).any():
            raise TrainingError(
                f"stage {ctx.index + 1}: the model's predictions on stage {stage.index + 1} ({split}) contain NaN"
            )
        flags = {name: flag[rows.target] for name, flag in more.items()}
        return value_outcome(self.config, stage, score, rows.label, rows.user, rows.item, cold, flags)

    # -- classes --------------------------------------------------------------------------------------------------

    def _classification(self, ctx: StageContext, known: Known, stage: Stage, split: str) -> Outcome:
        targets = stage.split(split)
        predicted = np.zeros(len(targets), dtype=np.int64)
        cold = self._cold_rows(ctx, known, targets, not self.sequential)
        for index in self._batches(len(targets), rows_at_once(self.config, stage.task.n_labels or 1)):
            logits = ctx.model.predict_task(self._batch(ctx, stage, targets[index]), stage.task)
            predicted[index] = logits.argmax(dim=-1).cpu().numpy()
        self._everyones(predicted)
        predicted[cold] = -1
        return class_outcome(self.config, stage, targets, predicted, cold, self._strata_of(stage, split))

    # -- the model's own metrics ----------------------------------------------------------------------------------

    def _measure(self, ctx: StageContext, known: Known, stage: Stage, split: str, outcome: Outcome) -> None:
        """Adds the model's own metrics of the targets that are not cold."""
        model, targets = ctx.model, stage.split(split)
        names = [name.lower() for name in contract(model).own_metrics]
        if not names:
            return
        cold = self._cold_rows(ctx, known, targets, self._needs_user(ctx))
        if stage.task.kind != "classification":
            cold |= self._cold_items(ctx, known, targets.label)
        warm = np.flatnonzero(~cold)
        values = {name: np.zeros(len(warm)) for name in names}
        for index in self._batches(len(warm), rows_at_once(self.config, ctx.batcher.n_items)):
            measured = model.measure(self._batch(ctx, stage, targets[warm[index]]))
            found = {str(name).lower(): value for name, value in measured.items()}
            for name in names:
                problem = (
                    f"stage {ctx.index + 1}: measure() of {type(model).__name__} on stage {stage.index + 1} ({split})"
                )
                if name not in found or found[name].shape != (len(index),):
                    shape = list(found[name].shape) if name in found else "nothing"
                    raise TrainingError(f"{problem}: {name} is {shape}, not a number for each of the {len(index)} rows")
                if not torch.isfinite(found[name]).all():
                    raise TrainingError(f"{problem}: {name} is not finite")
                values[name][index] = found[name].double().cpu().numpy()
        self._everyones(*values.values())
        flags = {name: flag[warm] for name, flag in self._strata_of(stage, split, all_targets=True).items()}
        outcome.add_own(stage, targets[warm], values, flags)
        if self.config["own_metric_rows"] and split == "test":
            outcome.rows = {"user": targets.user[warm], **values}
