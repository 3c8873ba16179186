"""Online inference of ProtoFed-SP (Algorithm 3): after each answer its user's short prompt takes one step on the label.

Rows are answered in waves: the first row of each user, then their feedback, then the second ones. So no label is read
before its own row was answered. What a session learns is its own and gone when it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_cl.federated.client import Examples, client_step, observe
from recbole_cl.federated.table import ClientTable
from recbole_cl.rng import numpy_generator
from recbole_cl.stream.batch import LABEL

if TYPE_CHECKING:
    from recbole_cl.model.protofed_sp import ProtoFedSP


class Session:
    """The clients during one evaluation.

    Args:
        model: The model; its clients are copied.
        name: Stage and split, from which the generators of negatives are derived.
    """

    def __init__(self, model: ProtoFedSP, name: str) -> None:
        self.model = model
        self.clients = ClientTable(model.clients.tokens, model.clients.width)
        self.clients.load_state_dict(model.clients.state_dict())
        self.name, self.pool = name, np.flatnonzero(model.rowed.numpy())
        # One step on the one target, of the short prompt alone.
        self.settings = replace(model.settings, steps=1, long_rate=0.0, alignment=False)

    def answer(self, batch: Interaction, represent: Callable[[Interaction], torch.Tensor]) -> torch.Tensor:
        """Returns the representations of rows in the order of time, each user's later ones after feedback.

        Args:
            batch: Rows with their labels.
            represent: Represents rows with the session's clients.
        """
        users = batch[self.model.USER_ID].cpu().numpy()
        order = np.argsort(users, kind="stable")
        new = np.r_[True, users[order][1:] != users[order][:-1]]
        start = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        wave = np.empty(len(order), dtype=np.int64)
        wave[order] = np.arange(len(order)) - start
        out: torch.Tensor | None = None
        for number in range(int(wave.max(initial=0)) + 1):
            rows = torch.from_numpy(np.flatnonzero(wave == number)).to(batch[self.model.USER_ID].device)
            part = Interaction({name: column[rows] for name, column in batch.interaction.items()})
            found = represent(part)
            out = found.new_zeros(len(users), found.size(1)) if out is None else out
            out[rows] = found
            self.learn(part)
        assert out is not None
        return out

    def learn(self, rows: Interaction) -> None:
        """Lets each row's user learn its label; users and items that nobody knows teach nothing."""
        model = self.model
        users, labels = rows[model.USER_ID].cpu(), rows[LABEL].cpu()
        inside = labels.clamp(max=len(model.rowed) - 1)
        chosen = (users > 0) & (labels < len(model.rowed)) & model.rowed[inside]
        if not chosen.any():
            return
        users, labels = users[chosen], labels[chosen]
        sequence, _ = model.readable(rows[model.ITEM_SEQ].cpu()[chosen])
        lengths = (sequence > 0).sum(dim=1)
        targets = torch.zeros_like(sequence)
        held = lengths > 0
        targets[torch.arange(len(users))[held], lengths[held] - 1] = labels[held]
        with torch.no_grad():
            query = model.queries_of(sequence)
        prompts = observe(self.clients.get(users), query, self.settings.window)
        drawn = [
            self._negatives(*row) for row in zip(users.tolist(), prompts.seen.tolist(), labels.tolist(), strict=True)
        ]
        negatives = targets.new_zeros(*targets.shape, int(model.config["protofed_negatives"]))
        negatives[targets > 0] = torch.from_numpy(np.stack(drawn))[held]
        examples = Examples(torch.arange(len(users)), sequence, targets, negatives, query)
        table = model.backbone.item_embedding.weight
        with torch.enable_grad():
            prompts, _ = client_step(model.outputs, table, model.shared, prompts, examples, self.settings)
        self.clients.put(users, prompts)

    def _negatives(self, user: int, seen: int, label: int) -> np.ndarray:
        """Returns negatives of one row; they depend on nobody else's label."""
        generator = numpy_generator(self.model.config["seed"], 0, f"protofed/session/{self.name}/{user}/{seen}")
        drawn = generator.integers(len(self.pool) - 1, size=int(self.model.config["protofed_negatives"]))
        return self.pool[drawn + (drawn >= np.searchsorted(self.pool, label))]  # type: ignore[no-any-return]
