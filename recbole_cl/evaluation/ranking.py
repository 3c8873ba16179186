"""Lists of items: which way a model's answers are had, what may stand in a list, and the best k.

Nothing here knows a stage or what a row's right answer is: rows come as a batch, limits as tensors. The evaluator goes
through these functions, and so does whoever serves a model::

    way = choose_way(model, candidates=False, histories=False)
    for part, scores in scores_of(way, model, batcher, batch):
        items, values = top_items(limit(scores, bound_of(allowed), excluded), k)
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

from recbole_cl.errors import TrainingError
from recbole_cl.evaluation.scores import best, full_scores, pair_scores
from recbole_cl.model.contract import contract, offers
from recbole_cl.model.prefixes import prefix_outputs

SCORES_AT_ONCE = 1 << 24
SCORES_IN_CACHE = 1 << 18
PREFIXES_AT_ONCE = 1 << 10
"""Rows whose histories are looked at together for sequences in common."""
INPUTS_AT_ONCE = 1 << 14
"""Sequence positions a forward pass holds: activations that stay in the cache are faster and a tenth of the memory."""

Pairs = tuple[torch.Tensor, torch.Tensor]
"""Rows (from 0) and items, shape ``[E]`` each."""


class Way(enum.Enum):
    """How the answers of rows are had."""

    PREFIXES = "one pass over a sequence answers for all its prefixes"
    QUERIES = "the outputs of many rows at once, their scores a few rows at a time"
    GIVEN = "scores of each row's candidates"
    FULL = "scores of all items"
    OWN = "lists that the model makes itself, knowing what may stand in them"


def choose_way(model: Any, candidates: bool, adjusted: bool = False, histories: bool = True) -> Way:
    """Returns the shortest way to a model's answers.

    Args:
        model: The model.
        candidates: Each row has candidates of its own; else all items are ranked.
        adjusted: Somebody changes the scores of all items before they are ranked.
        histories: The rows are histories in the log's sequences, so that many of them may share one.
    """
    if candidates:
        given = offers(model, "scores") or not offers(model, "full_sort_predict")
        return Way.GIVEN if given else Way.FULL
    if adjusted:
        return Way.FULL
    if offers(model, "recommend"):
        return Way.OWN
    if histories and contract(model).shares_prefixes():
        return Way.PREFIXES
    return Way.QUERIES if contract(model).scores_by_queries() else Way.FULL


def rows_at_once(config: Any, n_scores: int, way: Way = Way.FULL) -> int:
    """Returns how many rows make a batch.

    Args:
        config: ``eval_batch_size`` is the most.
        n_scores: Scores of a row that are held at the same time.
        way: The way to them.
    """
    most = int(config["eval_batch_size"])
    if way is Way.PREFIXES:
        return max(1, min(most, PREFIXES_AT_ONCE))
    size = max(1, min(most, SCORES_AT_ONCE // max(1 if way is Way.QUERIES else n_scores, 1)))
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        size = max(1, min(size, INPUTS_AT_ONCE // int(config["MAX_ITEM_LIST_LENGTH"])))
    return size


# -- scores -------------------------------------------------------------------------------------------------------


def scores_of(
    way: Way, model: Any, batcher: Any, batch: Interaction, candidates: torch.Tensor | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields rows and their scores of all items, -inf where there is none, shape ``[part, n_items]``.

    Args:
        way: Any but :attr:`Way.PREFIXES`, for which there is :func:`scores_of_prefixes`, and :attr:`Way.OWN`, for
            which there is :func:`own_lists`.
        model: The model, in eval mode.
        batcher: Knows the model's items and adds their features (:class:`recbole_cl.stream.batch.Batcher`).
        batch: ``B`` rows on the model's device.
        candidates: Item ids of each row, 0 for none, shape ``[B, C]``; needed by :attr:`Way.GIVEN`.
    """
    if way is Way.QUERIES:
        yield from _in_parts(model.item_queries(batch), model.score_queries, batcher.n_items)
    elif way is Way.GIVEN:
        assert candidates is not None
        own = offers(model, "scores")
        given = model.scores(batch, candidates) if own else pair_scores(model, batch, candidates, batcher)
        scores = torch.full((len(candidates), batcher.n_items), -torch.inf, device=candidates.device)
        yield slice(0, len(candidates)), scores.scatter_(1, candidates, given.to(scores.dtype))
    else:
        yield slice(0, len(batch)), full_scores(model, batch, batcher)


def scores_of_prefixes(model: Any, batcher: Any, histories: Any) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields rows and their scores of all items, for a model that shares prefixes.

    Args:
        model: The model, in eval mode.
        batcher: Knows the table and the model's items.
        histories: Ranges of the table's ``seq``: columns ``lo`` and ``hi``, as of
            :class:`recbole_cl.stream.stage.Targets`.
    """
    yield from _in_parts(prefix_outputs(model, batcher, histories), model.item_scores, batcher.n_items)


def _in_parts(
    outputs: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor], n_items: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields rows and their scores, few enough rows at a time that the scores stay in the cache."""
    size = max(1, (SCORES_IN_CACHE if outputs.device.type == "cpu" else SCORES_AT_ONCE) // n_items)
    for start in range(0, len(outputs), size):
        part = slice(start, min(start + size, len(outputs)))
        yield part, score(outputs[part])[:, :n_items]


# -- lists --------------------------------------------------------------------------------------------------------


def bound_of(allowed: torch.Tensor) -> torch.Tensor:
    """Returns what the scores of items may be at most, shape ``[n_items]``: +inf, or -inf where not allowed."""
    return torch.where(allowed, torch.inf, -torch.inf)


def limit(
    scores: torch.Tensor, bound: torch.Tensor, excluded: Pairs, candidates: torch.Tensor | None = None
) -> torch.Tensor:
    """Sets to -inf, in place, what may not stand in a list.

    Args:
        scores: Scores of all items, shape ``[B, n_items]``.
        bound: From :func:`bound_of`, shape ``[n_items]``.
        excluded: Rows and items that are left out.
        candidates: Item ids of each row, 0 for none, shape ``[B, C]``: no other is ranked.

    Returns:
        The same tensor.
    """
    torch.minimum(scores, bound.to(scores.dtype), out=scores)  # several times as fast as to fill them in
    if candidates is not None:
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.scatter_(1, candidates, True)
        scores.masked_fill_(~kept, -torch.inf)
    if len(excluded[0]):
        scores[excluded] = -torch.inf
    return scores


def top_items(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the best items of each row, best first, and their scores, shape ``[B, min(k, n_items)]`` each.

    Args:
        scores: Scores of all items, -inf for what may not be recommended, shape ``[B, n_items]``.
        k: Items wanted; an empty slot holds item 0 and -inf.
    """
    values, items = best(scores, min(k, scores.size(1)))
    return torch.where(torch.isfinite(values), items, 0), values


def own_lists(
    model: Any, batch: Interaction, k: int, allowed: torch.Tensor, excluded: Pairs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the lists that a model makes itself (``recommend``), and their scores, shape ``[B, k]`` each.

    Args:
        model: The model, in eval mode.
        batch: ``B`` rows on the model's device.
        k: Items wanted; an empty slot holds item 0 and -inf, and no item stands behind it.
        allowed: Flag of each item, shape ``[n_items]``.
        excluded: Rows and items that must not stand in a list.

    Raises:
        TrainingError: If the lists are not what was asked for.
    """
    items, values = model.recommend(batch, k, allowed, excluded)
    wrong = _wrong(items, values, (len(batch), k), allowed, excluded)
    if wrong:
        raise TrainingError(f"model: recommend() of {type(model).__name__} {wrong}")
    return items, values


def _wrong(
    items: torch.Tensor, values: torch.Tensor, shape: tuple[int, int], allowed: torch.Tensor, excluded: Pairs
) -> str:
    """Returns what is wrong with a model's own lists, in words, or nothing."""
    for what, found in (("items", items), ("scores", values)):
        if found.shape != shape:
            return f"returned {what} of shape {list(found.shape)} instead of {list(shape)}, a row for each of the batch"
    if items.dtype not in (torch.int32, torch.int64):
        return f"returned items of type {items.dtype} instead of int64"
    filled = items != 0
    outside = filled & ((items < 0) | (items >= len(allowed)))
    outside = outside | ~(allowed[items.clamp(0, len(allowed) - 1)] | ~filled)
    if outside.any():
        return f"returned item {int(items[outside][0])}, which is not among the {int(allowed.sum())} allowed items"
    if (filled[:, 1:] & ~filled[:, :-1]).any():
        return "returned an item behind an empty slot; items come first, then zeros"
    ordered = items.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    if twice.any():
        return f"returned item {int(ordered[:, 1:][twice][0])} twice in one list"
    row, item = excluded
    again = (items[row] == item.unsqueeze(1)).any(dim=1)
    if again.any():
        return f"returned item {int(item[again][0])} in a row that it is excluded from"
    if torch.isnan(values).any() or (torch.isfinite(values) != filled).any():
        return "returned scores that are not finite where an item stands and -inf where a slot is empty"
    if (values[:, 1:] > values[:, :-1]).any():
        return "returned lists whose scores rise; the best item comes first"
    return ""
