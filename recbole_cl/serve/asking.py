"""Who asks, and with what: users and histories as requests, and why one cannot be answered."""

from __future__ import annotations

from typing import Any

import numpy as np
from recbole.utils import ModelType

from recbole_cl.errors import ConfigError
from recbole_cl.serve.forms import listed, who_and_what
from recbole_cl.serve.ids import Ids, token
from recbole_cl.serve.requests import Request, seen_items
from recbole_cl.stream.table import InteractionTable


class Asking:
    """Reads requests.

    Args:
        config: The run's configuration.
        ids: Its users and items.
        table: Its log.
        needs_user: The model answers only for users that it has trained on.
    """

    def __init__(self, config: Any, ids: Ids, table: InteractionTable, needs_user: bool) -> None:
        self.ids, self.table, self.needs_user = ids, table, needs_user
        self.model = str(config["model"])
        self.sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.longest = int(config["MAX_ITEM_LIST_LENGTH"] or 0)
        self.all_rows = bool(ids.items.has_row[1:].all())

    def requests(self, users: Any, histories: Any) -> tuple[list[str | None], list[Request], list[list[str]]]:
        """Returns who asks, what is asked, and the unknown tokens of each history."""
        who, given = who_and_what(users, histories)
        if given is not None and who is None and self.needs_user:
            raise ConfigError(
                f"model {self.model} knows users by their id, not by a history; give users that the log has"
            )
        size = len(who if who is not None else given or [])
        names: list[str | None] = [None] * size if who is None else [token(user) for user in who]
        ids = np.zeros(size, dtype=np.int64) if who is None else self.ids.users.ids(who)
        requests, unknown = [], []
        for number in range(size):
            history, strange = (None, []) if given is None else self.history(given[number])
            requests.append(Request(int(ids[number]), history))
            unknown.append(strange)
        return names, requests, unknown

    def history(self, items: Any) -> tuple[np.ndarray, list[str]]:
        """Returns the ids of a history's items that the model has rows for, and the tokens of the others."""
        items = listed(items)
        ids = self.ids.items.ids(items)
        fits = (ids > 0) & self.ids.items.has_row[ids]
        return ids[fits], [token(item) for item, there in zip(items, fits.tolist(), strict=True) if not there]

    def why_not(self, request: Request) -> str | None:
        """Returns why a request cannot be answered, or ``None``."""
        users = self.ids.users
        if self.needs_user and not users.trained[request.user]:
            problem = "is in no interaction" if request.user == 0 else "has no trained row"
            return f"the user {problem}; {self.model} answers only for users that it has trained on"
        if self.sequential:
            if request.history is None and request.user == 0:
                return "the user is in no interaction; give a history"
            history = seen_items(self.table, request)[-self.longest :]
            if not (len(history) if self.all_rows else self.ids.items.has_row[history].any()):
                return "the history holds no item that the model knows"
        return None
