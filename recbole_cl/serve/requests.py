"""Requests as the rows that a model reads: a user with what the log holds of it, or a history that is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.ranking import Pairs
from recbole_cl.serve.forms import is_list, listed
from recbole_cl.serve.ids import Vocabulary, token
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import POSITION, STAGE, TIMESTAMP, Batcher
from recbole_cl.stream.stage import Targets
from recbole_cl.stream.table import InteractionTable


@dataclass
class Request:
    """What one row of an answer is asked with.

    Args:
        user: User id, 0 for nobody.
        history: Ids of the items that are given, oldest first; ``None`` takes what the log holds of the user.
    """

    user: int
    history: np.ndarray | None = None


def seen_items(table: InteractionTable, request: Request) -> np.ndarray:
    """Returns the items that a request's user has had."""
    if request.history is not None:
        return request.history
    return table.item[table.seq[table.ptr[request.user] : table.ptr[request.user + 1]]]


def excluded_pairs(items: Sequence[np.ndarray], n_items: int, device: torch.device) -> Pairs:
    """Returns rows and items of lists of items, those without a row in the model left out.

    Args:
        items: Item ids of each row.
        n_items: Items that the model has rows for.
        device: Where the scores are.
    """
    row = np.repeat(np.arange(len(items)), [len(part) for part in items])
    item = np.concatenate([*items, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    fits = item < n_items
    return torch.from_numpy(row[fits]).to(device), torch.from_numpy(item[fits]).to(device)


def known_items(items: Vocabulary, tokens: Any, strange: list[str]) -> np.ndarray:
    """Returns the ids of items; unknown tokens are added to a list."""
    tokens = listed(tokens)
    ids = items.ids(tokens)
    strange += [token(item) for item, number in zip(tokens, ids.tolist(), strict=True) if not number]
    return ids[ids > 0]


def excluded_items(
    items: Vocabulary, excluded: Any, names: Sequence[str | None], size: int, strange: list[str]
) -> list[np.ndarray]:
    """Returns the excluded items of each request.

    Args:
        items: The items.
        excluded: Tokens for all requests, a list of them for each, or user to tokens; ``None`` for none.
        names: Who asks.
        size: Number of requests.
        strange: Takes unknown tokens.

    Raises:
        ConfigError: If there are lists, but not one for each.
    """
    nothing = np.zeros(0, dtype=np.int64)
    if excluded is None:
        return [nothing] * size
    if isinstance(excluded, Mapping):
        by_user = {token(user): known_items(items, theirs, strange) for user, theirs in excluded.items()}
        return [by_user.get(name or "", nothing) for name in names]
    rows = listed(excluded)
    if rows and all(is_list(row) for row in rows):
        if len(rows) != size:
            raise ConfigError(f"excluded: {len(rows)} lists for {size} requests; give one for each, or one for all")
        return [known_items(items, row, strange) for row in rows]
    return [known_items(items, rows, strange)] * size


class RequestBatcher(Batcher):
    """Builds the rows of requests, as :class:`Batcher` builds those of targets: the next interaction is asked for.

    Columns of the log that are neither user nor item (a rating, a country) are those of the user's newest interaction,
    or 0 where a history is given.

    Args:
        ctx: The stage that the model ended with.
        requests: What is asked.
    """

    def __init__(self, ctx: StageContext, requests: list[Request]) -> None:
        own = ctx.batcher
        super().__init__(ctx.config, ctx.stream, ctx.view, own.n_users, own.n_items)
        self.collate = own.collate
        log, most = ctx.stream.table, self.max_length if self.sequential else 1
        parts, lengths = [], []
        for request in requests:
            if request.history is None:
                start, end = log.ptr[request.user], log.ptr[request.user + 1]
                position = log.seq[max(start, end - most) : end]
                item = log.item[position]
            else:
                item = request.history[-most:]
                position = np.full(len(item), -1, dtype=np.int64)
            lengths.append(len(item))
            if not len(item):  # a row of nothing, which no history reaches into
                item, position = np.zeros(1, dtype=np.int64), np.full(1, -1, dtype=np.int64)
            parts.append((item, position))
        item = np.concatenate([item for item, _ in parts])
        position = np.concatenate([position for _, position in parts])
        rows = np.array([len(item) for item, _ in parts])
        owner = np.repeat(np.arange(len(parts)), rows)
        given = torch.from_numpy(position < 0)
        at = torch.from_numpy(np.maximum(position, 0))
        for name, column in self.columns.items():
            chosen = column[at]
            chosen[given] = 0
            self.columns[name] = chosen
        self.columns[self.iid] = torch.from_numpy(item)
        self.users = np.array([request.user for request in requests], dtype=np.int64)
        self.columns[self.uid] = torch.from_numpy(self.users[owner])
        stage = np.full(len(item), ctx.index, dtype=np.int64)
        time = np.where(position < 0, log.timestamp.max(), log.timestamp[np.maximum(position, 0)])
        self.table = InteractionTable(owner + 1, item, time, stage, len(parts) + 1, log.n_items, log.time_scale)
        self.table_columns = {POSITION: np.maximum(position, 0), STAGE: stage, TIMESTAMP: time}
        self._first = np.cumsum(rows) - rows
        self._last = self._first + rows - 1
        self._lengths = np.array(lengths, dtype=np.int64)

    def requests(self, task: int) -> Interaction:
        """Returns one row a request.

        Args:
            task: Stage whose task is asked.
        """
        targets = Targets(
            self._last, self.users, self._first, self._first + self._lengths, np.zeros(len(self.users), dtype=np.int64)
        )
        rows = self.rows(targets, stage=task, evaluation=True)
        if self.sequential:  # a history of unknown items only: any item will do, the row is not answered
            rows.interaction[self.length_field] = rows[self.length_field].clamp(min=1)
        return rows
