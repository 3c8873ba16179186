"""Tokens and ids: what a log calls its users and items, and the rows that a model has for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from recbole_cl.stream.without import PLACE


def token(value: Any) -> str:
    """Returns a user or item as the log writes it: numbers without a fraction as integers, nothing as ``""``."""
    if value is None:
        return ""
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return ""
        return str(int(value)) if value == int(value) else repr(float(value))
    return str(value)


class Vocabulary:
    """The tokens of users or of items.

    Args:
        tokens: Token of each id, padding first, shape ``[n]``.
        rows: Ids that the model has rows for.
        trained: Flags of what the model has trained on; ids beyond their end are not.

    Attributes:
        tokens: Token of each id; id 0 is nobody.
    """

    def __init__(self, tokens: np.ndarray, rows: int, trained: np.ndarray) -> None:
        self.tokens = tokens.astype(object)
        names = enumerate(map(str, tokens))
        self._ids = {name: number for number, name in names if number and not name.startswith(PLACE)}
        self.has_row = np.arange(len(tokens)) < rows
        self.trained = np.zeros(len(tokens), dtype=bool)
        self.trained[: len(trained)] = trained[: len(tokens)]
        self.trained &= self.has_row
        self.trained[0] = False

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, value: object) -> bool:
        return token(value) in self._ids

    def ids(self, values: Iterable[Any]) -> np.ndarray:
        """Returns the ids of tokens, 0 for one that is unknown, shape ``[n]``, int64."""
        return np.fromiter((self._ids.get(token(value), 0) for value in values), dtype=np.int64)

    def names(self, ids: Iterable[int] | np.ndarray) -> list[str]:
        """Returns the tokens of ids."""
        return [str(self.tokens[int(number)]) for number in ids]

    def status(self, number: int) -> str:
        """Returns ``known``, ``untrained`` (in the log, never trained on) or ``unknown``."""
        return "unknown" if number == 0 else "known" if self.trained[number] else "untrained"


class Ids:
    """Users and items of a loaded run.

    Args:
        users: The users.
        items: The items.
    """

    def __init__(self, users: Vocabulary, items: Vocabulary) -> None:
        self.users, self.items = users, items

    def __repr__(self) -> str:
        return f"Ids({len(self.users)} users, {len(self.items)} items)"
