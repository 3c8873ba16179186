"""Where the rows of new users and items begin, beside chance and the mean: at their neighbours', or at their words'.

With B the interactions of new items with users and M those of users with known items (each pair once), rows of both
divided by their sums::

    two_hop   new items  B M V      the mean, over its users, of the mean of what they have had   (users alike)
    one_hop   new items  B U        the mean of its users' rows, at the length of known items' rows
    text      new items  w P        ridge regression from the words of the features to the known rows

One hop needs two tables of one width; where there are none (sequential models) two hops are gone. A row without a
neighbour, or without words, stays as it was initialised. Known rows are never touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.utils import FeatureType
from scipy import sparse

from recbole_cl.model.content_rows import projected_rows
from recbole_cl.stream.build import Stream
from recbole_cl.stream.vocabulary import Axis, Growth

WAYS = ("one_hop", "two_hop", "text")
WIDTH = 128
"""Dimensions that words are thrown to."""


def hops(own: np.ndarray, other: np.ndarray, before: int, after: int, known: int) -> tuple[Any, Any]:
    """Returns the weights of one hop, ``[after - before, known]``, and of two, ``[after - before, before]``.

    Args:
        own: Ids of the side that grows, one an interaction, shape ``[E]``.
        other: Ids of the other side.
        before: Ids of the own side before it grew.
        after: Ids after.
        known: Ids of the other side before it grew.
    """
    size = max(int(other.max(initial=0)) + 1, known)
    matrix = sparse.csr_matrix((np.ones(len(own)), (own, other)), shape=(after, size))
    matrix.data[:] = 1.0  # pairs once
    new, old = matrix[before:], matrix[:before].T.tocsr()
    two = _means(new[:, np.flatnonzero(np.diff(old.indptr))]) @ _means(old[np.flatnonzero(np.diff(old.indptr))])
    return _means(new[:, :known]), two


def _means(matrix: Any) -> Any:
    """Returns a matrix with rows that sum to 1, or to 0 where they are empty."""
    total = np.asarray(matrix.sum(axis=1)).ravel()
    return sparse.diags(np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)) @ matrix


def word_vectors(feature: Any, fields: dict[str, Any], seed: int) -> np.ndarray | None:
    """Returns the words of each row of a table of features thrown to vectors, ``[n, WIDTH]``; NaN for none at all.

    Args:
        feature: The table, or ``None``.
        fields: Its fields of words, to their kinds.
        seed: Of the directions of words.
    """
    if feature is None or not fields:
        return None
    total, count = np.zeros((len(feature), WIDTH)), np.zeros(len(feature))
    for number, name in enumerate(sorted(fields)):
        ids = feature[name].numpy().reshape(len(feature), -1)
        table = np.random.default_rng([seed, number]).standard_normal((int(ids.max()) + 1, WIDTH))
        table[0] = 0
        total += table[ids].sum(axis=1)
        count += (ids > 0).sum(axis=1)
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], np.nan)


def start_new_rows(model: Any, growth: Growth, stream: Stream, stage: int, way: str, seed: int) -> None:
    """Gives the new rows of a grown model their beginning.

    Args:
        model: The model, known rows in place, new ones initialised.
        growth: How it grew.
        stream: The stream; what is trained on up to the stage are the neighbours.
        stage: The stage that begins.
        way: One of :data:`WAYS`.
        seed: Of the directions of words.
    """
    at = stream.graph_positions(stage)
    users, items = stream.table.user[at], stream.table.item[at]
    inside = (users < growth.n_users[1]) & (items < growth.n_items[1])
    users, items = users[inside], items[inside]
    sides = {"user": (users, items, growth.n_users, growth.n_items[0]),
             "item": (items, users, growth.n_items, growth.n_users[0])}  # fmt: skip
    grown = {kind for kind, (_, _, (before, after), _) in sides.items() if after > before > 1}
    if not grown:
        return
    weights = {kind: hops(own, other, *sizes, known) for kind, (own, other, sizes, known) in sides.items()}
    dataset: Any = stream.dataset
    words = {}
    for kind in grown if way == "text" else ():
        feature = getattr(dataset, f"{kind}_feat")
        kinds = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
        named = {} if feature is None else {n: dataset.field2type[n] for n in feature.interaction}
        ids = getattr(dataset, f"{kind[0]}id_field")
        words[kind] = word_vectors(feature, {n: k for n, k in named.items() if k in kinds and n != ids}, seed)
    with torch.no_grad():
        tensors = dict(model.named_parameters())
        for name, tensor in tensors.items():
            for dim, axis in enumerate(growth.axes.get(name, ())):
                start = 0
                for kind, size in axis:
                    length = sides[kind][2][1] if kind in sides else size
                    if kind in grown and tensor.is_floating_point():
                        rows = tensor.narrow(dim, start, length).movedim(dim, 0)
                        flat = rows.reshape(length, -1).double().cpu().numpy()
                        partner = _partner(tensors, growth, name, kind) if way == "one_hop" and dim == 0 else None
                        found = _beginnings(flat, weights[kind], sides[kind][2][0], way, partner, words.get(kind))
                        there = np.flatnonzero(np.isfinite(found).all(axis=1)) + sides[kind][2][0]
                        new = torch.from_numpy(found[there - sides[kind][2][0]]).to(rows)
                        rows[torch.from_numpy(there)] = new.reshape(len(there), *rows.shape[1:])
                    start += length


def _partner(tensors: dict[str, Any], growth: Growth, name: str, kind: str) -> np.ndarray | None:
    """Returns the known rows of the one table of the other side that is as wide as a table, or ``None``."""
    other = "item" if kind == "user" else "user"
    wanted: Axis = ((other, 0),)
    known = growth.n_items[0] if other == "item" else growth.n_users[0]
    found = [
        tensor
        for one, tensor in tensors.items()
        if tensor.dim() == tensors[name].dim() == 2
        and tensor.size(1) == tensors[name].size(1)
        and tuple(growth.axes.get(one, [()])[0]) == wanted
    ]
    return found[0][:known].double().cpu().numpy() if len(found) == 1 else None


def _beginnings(
    flat: np.ndarray, weights: tuple[Any, Any], before: int, way: str, partner: np.ndarray | None, words: Any
) -> np.ndarray:
    """Returns the new rows, NaN where there is nothing to begin at."""
    known, n_new = flat[:before], len(flat) - before
    if way == "text":
        if words is None:
            return np.full((n_new, flat.shape[1]), np.nan)
        trained = np.vstack([np.full((1, flat.shape[1]), np.nan), known[1:], np.full((n_new, flat.shape[1]), np.nan)])
        both = np.isfinite(words[: len(flat)]).all(axis=1) & np.isfinite(trained).all(axis=1)
        if not both.any():
            return np.full((n_new, flat.shape[1]), np.nan)
        return projected_rows(words[: len(flat)], trained)[before:]
    matrix, source = (weights[0], partner) if partner is not None else (weights[1], known)
    found = np.asarray(matrix @ source)
    found[np.asarray(matrix.sum(axis=1)).ravel() == 0] = np.nan
    if partner is not None and before > 1:
        length = np.linalg.norm(known[1:], axis=1).mean()
        found = found * (length / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))
    return found
