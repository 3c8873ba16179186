"""The best items by products of vectors: a faiss index in place of the scores of all items.

Whether a model scores by products is not guessed: as an index is made, the model's own scores of some users are
compared with the products of its vectors, and where they differ there is no index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch

from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.scores import best
from recbole_cl.serve.vectors import item_vectors, user_vectors

SEARCHES = ("exact", "approximate", "dense")
PROBED = 8
"""Requests whose scores are compared as an index is made."""
TOLERANCE = 1e-4
"""Share of the largest score by which products may differ from the model's own scores."""
FEW = 8
"""Queries up to which one product of matrices is faster than faiss, which goes through the vectors for each."""
MOST = 2048
"""Items that an index is asked for at a time; more are ranked by the model itself."""
LISTS, VISITED = 4.0, 1 / 32
"""Of an approximate index: lists for each square root of items, and the share of them that is visited."""
PRODUCTS_AT_ONCE = 2000
"""Numbers in queries from which on faiss multiplies matrices; where it waits for 128000, small batches take long."""


def check_search(search: str) -> str:
    """Returns the name of a search; raises a :class:`ConfigError` for any other word."""
    if search not in SEARCHES:
        raise ConfigError(f"search: {search!r} is none of {', '.join(SEARCHES)}")
    return search


def make_index(vectors: np.ndarray, approximate: bool = False) -> Any:
    """Returns a faiss index of inner products over vectors, shape ``[n, d]``; row ``i`` is its number ``i``.

    Args:
        vectors: The vectors, float32.
        approximate: Inverted lists, few of which are visited, in place of all vectors; below some thousand vectors all
            are compared anyway.
    """
    if faiss.cvar.distance_compute_blas_threshold > PRODUCTS_AT_ONCE:
        faiss.cvar.distance_compute_blas_threshold = PRODUCTS_AT_ONCE
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    lists = int(LISTS * len(vectors) ** 0.5)
    if not approximate or len(vectors) < 40 * lists:
        flat.add(vectors)
        return flat
    index = faiss.IndexIVFFlat(flat, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.nprobe = 1, max(1, int(VISITED * lists))
    index.train(vectors)
    index.add(vectors)
    return index  # faiss keeps the reference to its centres


class VectorSearch:
    """An index over some of the items of a model.

    Args:
        vectors: A vector for each item, shape ``[n_items, d]``.
        allowed: Flags of the items that may be found, shape ``[n_items]``.
        approximate: See :func:`make_index`.
    """

    def __init__(self, vectors: np.ndarray, allowed: np.ndarray, approximate: bool = False) -> None:
        self.ids = np.flatnonzero(allowed)
        self.index = make_index(vectors[self.ids], approximate)
        flat = isinstance(self.index, faiss.IndexFlat)
        self._table = torch.from_numpy(np.ascontiguousarray(vectors[self.ids], dtype=np.float32)) if flat else None

    def best(self, queries: np.ndarray, k: int, excluded: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the best items of each query, 0 for an empty slot, and their scores, -inf there, shape ``[B, k]``.

        Args:
            queries: Shape ``[B, d]``.
            k: Items wanted.
            excluded: Items that must not stand in each list.

        Returns:
            ``None`` where too many would have to be asked for.
        """
        more = max((len(items) for items in excluded), default=0)
        asked = min(k + more, len(self.ids))
        if asked > MOST or not asked:
            return None
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self._table is not None and len(queries) <= FEW:
            values, columns = best(torch.from_numpy(queries) @ self._table.T, asked)
            scores, rows = values.numpy(), columns.numpy()
        else:
            scores, rows = self.index.search(queries, asked)
        items = np.where(rows >= 0, self.ids[np.maximum(rows, 0)], 0)
        good = rows >= 0
        if more:
            size = int(self.ids[-1]) + 1
            owner = np.repeat(np.arange(len(excluded)), [len(part) for part in excluded])
            gone = owner * size + np.minimum(np.concatenate(list(excluded)), size - 1)
            fits = np.concatenate(list(excluded)) < size
            good &= ~np.isin(np.arange(len(items))[:, None] * size + items, gone[fits])
        order = np.argsort(~good, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(good, order, axis=1)
        items = np.where(kept, np.take_along_axis(items, order, axis=1), 0)
        return items, np.where(kept, np.take_along_axis(scores, order, axis=1), -np.inf)


@dataclass(frozen=True)
class ModelIndex:
    """What the lists of a task are found by.

    Args:
        search: The index over its items.
        users: A vector for each user, shape ``[n_users, d]``, or ``None`` where they are computed from histories.
    """

    search: VectorSearch
    users: np.ndarray | None

    def of_users(
        self, users: list[int], k: int, excluded: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the lists of users by id; see :meth:`VectorSearch.best`."""
        assert self.users is not None
        return self.search.best(self.users[users], k, excluded)


def spread(ids: np.ndarray) -> list[int]:
    """Returns some ids, from the first to the last."""
    chosen = np.linspace(0, len(ids) - 1, min(PROBED, len(ids))).astype(np.int64)
    return [int(number) for number in ids[chosen]]


def model_index(
    ctx: Any,
    name: str,
    sequential: bool,
    probes: Iterable[tuple[Any, torch.Tensor, slice, torch.Tensor]],
    flags: np.ndarray,
    approximate: bool,
) -> ModelIndex | None:
    """Returns an index of a model's items, or ``None`` where it scores by anything else than products of vectors.

    Args:
        ctx: The stage that the model ended with.
        name: Name of the model.
        sequential: It computes a user's vector from a history.
        probes: A batch, user ids, the rows of the batch that are scored, and their scores of all items.
        flags: Flags of the items that may stand in a list, shape ``[n_items]``.
        approximate: See :func:`make_index`.
    """
    if not flags.any():
        return None
    compared = 0
    try:
        vectors = item_vectors(ctx, name)
        users = None if sequential else user_vectors(ctx, name, None)
        for batch, ids, part, scores in probes:
            queries = user_vectors(ctx, name, batch)[part] if users is None else users[ids]
            if not are_products(scores[:, 1:], queries, vectors[1:]):
                return None
            compared += len(scores)
    except ConfigError:  # no vectors of a known form
        return None
    if not compared:
        return None
    found = VectorSearch(vectors.float().cpu().numpy(), flags, approximate)
    return ModelIndex(found, None if users is None else users.float().cpu().numpy())


def are_products(scores: torch.Tensor, queries: torch.Tensor, vectors: torch.Tensor) -> bool:
    """Tells whether scores are the products of vectors.

    Args:
        scores: The model's, shape ``[B, n]``.
        queries: Shape ``[B, d]``.
        vectors: Shape ``[n, d]``.
    """
    if queries.dim() != 2 or vectors.dim() != 2 or queries.size(1) != vectors.size(1):
        return False
    products = queries @ vectors.T
    if products.shape != scores.shape:
        return False
    most = float(scores.abs().max().clamp(min=1e-12))
    return bool((products - scores).abs().max() <= TOLERANCE * most)
