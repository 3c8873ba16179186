"""Vectors of items' own texts, the second field that the knowledge joins a backbone by."""

from __future__ import annotations

import torch

from recbole_cl.llm.vectors import Projection, clause_vectors
from recbole_cl.model.liber_knowledge import Learner

Items = dict[str, torch.Tensor]
"""``vector`` of each item ``[n_items, size]``, 0 for one without a text; the projection's ``mean`` and ``matrix``."""


def no_items(size: int) -> Items:
    """Returns what is known before the first stage."""
    return {"vector": torch.zeros(0, size), "mean": torch.zeros(0), "matrix": torch.zeros(0, 0)}


def item_vectors(learner: Learner, known: Items, n_first: int, size: int) -> Items:
    """Returns the vectors of all of the stream's items; those that are there already stay what they are.

    Args:
        learner: Who knows the items' texts, and encodes them.
        known: What is known already.
        n_first: Items of the stage: the projection is fitted on these where there is none yet, and then kept.
        size: Numbers of a vector.
    """
    have, texts = len(known["vector"]), learner.history.item_texts()
    wanted = [number for number in range(have, len(texts)) if texts[number]]
    vectors = torch.cat([known["vector"], torch.zeros(len(texts) - have, size)])
    if not wanted:
        return {**known, "vector": vectors}
    raw, _ = clause_vectors([texts[number] for number in wanted], learner.encode)
    if len(known["mean"]):
        projection = Projection(known["mean"], known["matrix"])
    else:
        first = torch.tensor(wanted) < n_first
        projection = Projection.fit(raw[first] if first.any() else raw, size)
    vectors[wanted] = projection(raw)
    return {"vector": vectors, "mean": projection.mean.contiguous(), "matrix": projection.matrix.contiguous()}
