"""What the clients keep on their devices, for all who have anything: one row a client who was ever trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recbole_cl.federated.client import FIELDS, Prompts


class ClientTable:
    """Prompts of the clients that were trained; all others have those that everybody begins with.

    Args:
        tokens: Lp.
        width: d.
    """

    def __init__(self, tokens: int, width: int) -> None:
        self.tokens, self.width = tokens, width
        self._row = torch.full((1,), -1, dtype=torch.int64)  # of each user, -1 for one without
        self.users = torch.zeros(0, dtype=torch.int64)
        self._room = Prompts.new(0, tokens, width)  # with space for clients to come

    def __len__(self) -> int:
        return len(self.users)

    @property
    def prompts(self) -> Prompts:
        """The rows, in the order in which their clients came; they are written to when :meth:`put` is called."""
        return Prompts(*(getattr(self._room, name)[: len(self.users)] for name in FIELDS))

    def rows(self, users: torch.Tensor) -> torch.Tensor:
        """Returns the row of each user, -1 for one without, shape ``[n]``."""
        inside = users < len(self._row)
        return torch.where(inside, self._row[users.clamp(max=len(self._row) - 1)], -1)

    def get(self, users: torch.Tensor) -> Prompts:
        """Returns the prompts of users, in their order."""
        rows = self.rows(users.cpu())
        found, have = Prompts.new(len(rows), self.tokens, self.width), rows >= 0
        for name in FIELDS:
            getattr(found, name)[have] = getattr(self._room, name)[rows[have]]
        return found

    def put(self, users: torch.Tensor, prompts: Prompts) -> None:
        """Keeps the prompts of users, each of whom stands there once; rows are written in place."""
        users = users.cpu()
        new = users[self.rows(users) < 0]
        if len(new):
            size = max(int(new.max()) + 1, len(self._row))
            row = torch.full((size,), -1, dtype=torch.int64)
            row[: len(self._row)] = self._row
            row[new] = torch.arange(len(self.users), len(self.users) + len(new))
            self._row, self.users = row, torch.cat([self.users, new])
            if len(self.users) > len(self._room):
                more = max(len(self.users), len(self._room) * 5 // 4) - len(self._room)
                self._room = Prompts.join([self._room, Prompts.new(more, self.tokens, self.width)])
        rows = self.rows(users)
        for name in FIELDS:
            column = getattr(self._room, name)
            column[rows] = getattr(prompts, name).detach().to(column)

    def end_slice(self) -> None:
        """Lets all short prompts begin anew."""
        self._room.short.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows."""
        return {"users": self.users, **{name: getattr(self.prompts, name) for name in FIELDS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the rows back."""
        self.users = state["users"].clone()
        self._room = Prompts(**{name: state[name].clone() for name in FIELDS})
        self._row = torch.full((int(self.users.max()) + 1 if len(self.users) else 1,), -1, dtype=torch.int64)
        self._row[self.users] = torch.arange(len(self.users))
