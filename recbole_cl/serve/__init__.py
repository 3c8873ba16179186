"""A saved run that is asked: load it, recommend, score, compare items."""

from __future__ import annotations

from pathlib import Path

from recbole_cl.serve.answers import Position, Recommendation, Recommendations, Scores, Vectors
from recbole_cl.serve.ids import Ids, Vocabulary
from recbole_cl.serve.recommender import Recommender
from recbole_cl.training.load import SavedRun

__all__ = [
    "Ids",
    "Position",
    "Recommendation",
    "Recommendations",
    "Recommender",
    "Scores",
    "Vectors",
    "Vocabulary",
    "load",
]


def load(
    run: str | Path, version: int | None = None, model_class: type | None = None, search: str = "exact"
) -> Recommender:
    """Loads a run: the champion of its versions, or another one. Its log is not needed, nor the folder's old place.

    Args:
        run: The run's folder.
        version: Number of the version (``recbole-cl versions RUN`` lists them).
        model_class: The model's class, where it is neither RecBole's nor registered here.
        search: How the best items of a model that scores by products of vectors are found: ``exact`` (faiss, all of
            them), ``approximate`` (faiss, the likely ones: faster among many items, some may be missed) or ``dense``
            (the model's own scores of all items, which every other model takes).

    Raises:
        CheckpointError: If something in the folder is missing, truncated, changed or foreign; the message names it.
    """
    return Recommender(SavedRun.open(run, version, model_class), search)
