"""Forms that a request may have: lists, arrays, columns of a frame, one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from recbole_cl.errors import ConfigError


def is_list(value: Any) -> bool:
    """Tells whether a value holds several: text is one token."""
    return isinstance(value, list | tuple | set | np.ndarray | pd.Series | pd.Index) and not np.isscalar(value)


def listed(values: Any) -> list[Any]:
    """Returns the values of a list, an array, a column (the first of a frame) or a single token, as a list."""
    if isinstance(values, str | bytes) or np.isscalar(values):
        return [values]
    if isinstance(values, pd.DataFrame):
        values = values.iloc[:, 0]
    return list(values)


def who_and_what(users: Any, histories: Any) -> tuple[list[Any] | None, list[list[Any]] | None]:
    """Returns the users of requests and the histories that are given for them; ``None`` for what is not.

    Args:
        users: Users, or histories in their place, or ``None``.
        histories: Histories, by user or one for each, or ``None``.

    Raises:
        ConfigError: If neither is given, or not one for each.
    """
    if users is None and histories is None:
        raise ConfigError("recommend: give users or histories")
    who: list[Any] | None = None if users is None else listed(users)
    given: list[list[Any]] | None = None
    if isinstance(histories, Mapping):
        asked: list[Any] = list(histories) if who is None else who
        missing = [user for user in asked if user not in histories]
        if missing:
            raise ConfigError(f"recommend: there is no history for the user {missing[0]!r}; give one for each")
        who, given = asked, [listed(histories[user]) for user in asked]
    elif histories is not None:
        given = [listed(history) for history in histories]
    if given is None and who and all(is_list(one) for one in who):
        given, who = [listed(history) for history in who], None
    if who is not None and given is not None and len(who) != len(given):
        raise ConfigError(f"recommend: {len(who)} users but {len(given)} histories; give one for each")
    return who, given
