"""What a loaded run answers: lists of items, scores, vectors. Tokens, no ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Recommendation:
    """The list of one request.

    Args:
        user: The user's token, or ``None`` where only a history was given.
        status: ``known`` (the model has trained on the user), ``untrained`` (in the log, not trained on), ``unknown``
            (not in the log), or ``history`` (no user was given).
        items: Tokens of the items, best first.
        scores: Their scores.
        unknown_items: Tokens of the given history that the model has no row for; the others count.
        reason: Why the list is empty, or ``None``.
    """

    user: str | None
    status: str
    items: list[str]
    scores: list[float]
    unknown_items: list[str] = field(default_factory=list)
    reason: str | None = None

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


class Recommendations(Sequence[Recommendation]):
    """The lists of all requests, in their order.

    Args:
        answers: The lists.
        unknown: Tokens of ``allowed`` and ``excluded`` that are no items of the log.
    """

    def __init__(self, answers: list[Recommendation], unknown: Sequence[str] = ()) -> None:
        self._answers, self.unknown = answers, list(unknown)

    def __getitem__(self, index: Any) -> Any:
        return self._answers[index]

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Recommendation]:
        return iter(self._answers)

    @property
    def items(self) -> list[list[str]]:
        """The items of each list."""
        return [answer.items for answer in self._answers]

    @property
    def scores(self) -> list[list[float]]:
        """The scores of each list."""
        return [answer.scores for answer in self._answers]

    def to_frame(self) -> pd.DataFrame:
        """Returns one row an item: request (from 0), user, rank (from 1), item, score."""
        rows = [
            (number, answer.user, rank + 1, item, score)
            for number, answer in enumerate(self._answers)
            for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True))
        ]
        return pd.DataFrame(rows, columns=["request", "user", "rank", "item", "score"])


@dataclass(frozen=True)
class Scores:
    """Scores of pairs.

    Args:
        values: One a pair, NaN where the model cannot say, shape ``[n]``.
        reasons: Why it cannot, or ``None``, by pair.
    """

    values: np.ndarray
    reasons: list[str | None]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Vectors:
    """Vectors of users or items.

    Args:
        tokens: Their tokens, ``n`` of them.
        values: Shape ``[n, d]``, float32.
    """

    tokens: list[str]
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Position:
    """Where in its stream a model stands.

    Args:
        stage: Number of the last stage that it has trained on, from 1.
        name: Name of that stage.
        last_timestamp: Time of the newest interaction it was trained over, in seconds.
        n_users: Users that it has rows for.
        n_items: Items that it has rows for.
        version: The version of the run.
        all_rows: It has trained on every interaction (``serve: True``); else the held-out ones are left out.
    """

    stage: int
    name: str
    last_timestamp: float
    n_users: int
    n_items: int
    version: int
    all_rows: bool
