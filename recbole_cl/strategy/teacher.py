"""What the model of the stage before can answer, of the rows of this stage.

A part for strategies, not a strategy.
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction

from recbole_cl.strategy.base import StageContext
from recbole_cl.strategy.outputs import arguments


class TeacherRows:
    """The rows that a frozen model of the stage before knows, and as it reads them.

    Args:
        ctx: The stage, not the first.
        teacher: The model.
    """

    def __init__(self, ctx: StageContext, teacher: Any) -> None:
        before = ctx.stream.stages[ctx.index - 1]
        self.batcher, self.teacher, self.n_items = ctx.batcher, teacher, before.n_items
        reads_users = not ctx.batcher.sequential or "user" in (arguments(teacher, "forward") or ())
        self.n_users = before.n_users if reads_users else None

    def histories(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the order that closes histories up to what is known, and the flags of the known, ``[B, L]``."""
        known = (sequence > 0) & (sequence < self.n_items)
        return torch.argsort(~known, dim=1, stable=True), known

    def positions(
        self, model: Any, batch: Interaction, supervised: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns new and old outputs ``[N, d]`` at the supervised positions with something known, and the flags."""
        sequence = batch[model.ITEM_SEQ]
        order, known = self.histories(sequence)
        last = known.cumsum(dim=1) - 1  # where the newest known item lies in the closed-up history
        wanted = supervised & (last >= 0)
        if self.n_users is not None:
            wanted &= (batch[self.batcher.uid] < self.n_users).unsqueeze(1)
        with torch.no_grad():
            old = self.teacher.encode((sequence * known).gather(1, order))
        old = old.gather(1, last.clamp(min=0).unsqueeze(-1).expand(-1, -1, old.size(-1)))
        return model.encode(sequence)[wanted], old[wanted], wanted

    def rows(self, batch: Interaction, items: bool = False) -> tuple[Interaction, Interaction]:
        """Returns the known rows, and the same as the old model reads them; ``items``: the row's item is known too."""
        columns = {name: c for name, c in batch.interaction.items() if len(c) == len(batch[self.batcher.uid])}
        keep = torch.ones(len(batch[self.batcher.uid]), dtype=torch.bool, device=batch[self.batcher.uid].device)
        if self.n_users is not None:
            keep &= columns[self.batcher.uid] < self.n_users
        if items:
            keep &= columns[self.batcher.iid] < self.n_items
        read = dict(columns)
        if self.batcher.sequential:
            name = self.batcher.iid + self.batcher.suffix
            order, known = self.histories(columns[name])
            keep &= known.any(dim=1)
            read[self.batcher.length_field] = known.sum(dim=1)
            for key in (key for key in columns if key.endswith(self.batcher.suffix) and columns[key].dim() > 1):
                shape = order.shape + (1,) * (columns[key].dim() - 2)
                closed = columns[key] * known.view(shape).to(columns[key].dtype)
                read[key] = closed.gather(1, order.view(shape).expand_as(closed))
        return tuple(Interaction({k: c[keep] for k, c in part.items()}) for part in (columns, read))  # type: ignore[return-value]
