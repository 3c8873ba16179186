"""What the model of the stage before can answer, of the rows of this stage.

A part for strategies, not a strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_cl.model.contract import contract
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.outputs import arguments
from recbole_cl.stream.batch import Windows

OUTPUTS_KEPT = 2**25
"""Numbers that are kept of a teacher's outputs (128 MiB of float32); windows beyond are run each time."""
INPUTS_AT_ONCE = 2**12
"""Inputs that are run together for it."""


class TeacherRows:
    """The rows that a frozen model of the stage before knows, and as it reads them.

    Args:
        ctx: The stage, not the first.
        teacher: The model.
    """

    def __init__(self, ctx: StageContext, teacher: Any) -> None:
        before = ctx.stream.stages[ctx.index - 1]
        self.batcher, self.teacher, self.n_items = ctx.batcher, teacher, before.n_items
        self.encoder = contract(teacher).causal_part()
        reads_users = not ctx.batcher.sequential or "user" in (arguments(self.encoder, "forward") or ())
        self.n_users = before.n_users if reads_users else None
        self.ctx, self.loader = ctx, ctx.loader
        self._outputs: _Outputs | None = None  # made when asked for

    def histories(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the order that closes histories up to what is known, and the flags of the known, ``[B, L]``."""
        known = (sequence > 0) & (sequence < self.n_items)
        return torch.argsort(~known, dim=1, stable=True), known

    def positions(self, batch: Interaction, supervised: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the teacher's outputs ``[N, d]`` at the supervised positions with something known, and the flags."""
        sequence = batch[self.encoder.ITEM_SEQ]
        order, known = self.histories(sequence)
        last = known.cumsum(dim=1) - 1  # where the newest known item lies in the closed-up history
        wanted = supervised & (last >= 0)
        if self.n_users is not None:
            wanted &= (batch[self.batcher.uid] < self.n_users).unsqueeze(1)
        rows, _ = at = wanted.nonzero(as_tuple=True)
        found = self._answers((sequence * known).gather(1, order), rows, last[at])
        with torch.no_grad():
            added = contract(self.teacher).added_at(batch, wanted)
        return found if added is None else found + added, wanted

    def _answers(self, closed: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns the outputs ``[N, d]`` at some places of closed-up histories."""
        if self._outputs is None:
            self._outputs = _Outputs(self)
        starts = torch.tensor([self._outputs.starts.get(key, -1) for key in _keys(closed)], device=closed.device)
        new = (starts < 0).nonzero().squeeze(1)
        if not len(new):
            return self._outputs.outputs[starts[rows] + places]
        number = torch.zeros_like(starts).index_fill_(0, new, 1).cumsum(0) - 1
        with torch.no_grad():
            made = self.encoder.encode(closed[new])
        if len(new) == len(closed):
            return made[rows, places]
        held = starts[rows] >= 0
        found = made.new_empty(len(rows), made.size(-1))
        found[held] = self._outputs.outputs[(starts[rows] + places)[held]].to(made.dtype)
        found[~held] = made[number[rows[~held]], places[~held]]
        return found

    def rows(self, batch: Interaction, items: bool = False) -> tuple[Interaction, Interaction]:
        """Returns the known rows, and the same as the old model reads them; ``items``: the row's item is known too."""
        users = batch[self.batcher.uid]
        columns = {name: c for name, c in batch.interaction.items() if len(c) == len(users)}
        keep = torch.ones(len(users), dtype=torch.bool, device=users.device)
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
        index = keep.nonzero().squeeze(1)
        kept = {name: c.index_select(0, index) for name, c in columns.items()}
        changed = {n: c.index_select(0, index) for n, c in read.items() if c is not columns.get(n)}
        return Interaction(kept), Interaction({**kept, **changed})


class _Outputs:
    """A teacher's outputs for the windows of the running pass: frozen, so once a pass and not once an epoch.

    They are made in the order of the windows, whatever batch asks first, so that a resumed run has the same bits. A
    window is recognised by what the teacher reads of it.

    Attributes:
        outputs: Of all windows' inputs, one after the other, shape ``[M, d]``.
        starts: First row of each window, by its key.
    """

    def __init__(self, known: TeacherRows) -> None:
        self.starts: dict[bytes, int] = {}
        units, shift = getattr(known.loader, "units", None), getattr(known.loader, "shift", False)
        parts: list[torch.Tensor] = []
        if isinstance(units, Windows) and len(units) and not shift:  # shifted windows come once
            parts.extend(self._made(known, units))
        self.outputs = torch.cat(parts) if parts else torch.empty(0)

    def _made(self, known: TeacherRows, units: Windows) -> Iterator[torch.Tensor]:
        made, step = 0, max(1, INPUTS_AT_ONCE // int((units.last - units.lo).max()))
        for start in range(0, len(units), step):
            index = np.arange(start, min(start + step, len(units)))
            sequence = known.batcher.window_rows(units, index, collate=False)[known.encoder.ITEM_SEQ].to(
                known.ctx.device
            )
            order, flags = known.histories(sequence)
            closed = (sequence * flags).gather(1, order)
            with torch.no_grad():
                part = known.encoder.encode(closed)[closed > 0]
            for key, length in zip(_keys(closed), flags.sum(dim=1).tolist(), strict=True):
                self.starts[key] = made
                made += length
            yield part
            if made * part.size(-1) > OUTPUTS_KEPT:
                return


def _keys(closed: torch.Tensor) -> list[bytes]:
    """Returns a key of each closed-up history: the bytes of its ids."""
    ids = closed.cpu().numpy()
    return [row[:length].tobytes() for row, length in zip(ids, (ids > 0).sum(axis=1), strict=True)]
