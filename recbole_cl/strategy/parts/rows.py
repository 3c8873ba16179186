"""Rows of a stage's training targets for the strategies' own use, with negatives of their own.

A part for strategies, not a strategy. Importances, exemplars and replay need rows as the trainer's loader makes them,
but may not draw from that loader: with a strategy of strength 0, training must see the bits it sees without it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import Windows
from recbole_cl.stream.knowledge_loader import KnowledgeStageLoader
from recbole_cl.stream.loader import StageLoader, Units, make_loader

CHUNK = 256
"""Units made at a time. Fixed, since the negatives drawn depend on it and must not depend on the batch size."""


class OwnRows:
    """Makes rows as the training loader does, drawing only from generators of its owner.

    Args:
        ctx: The stage.
        name: Owner: its generators are ``<name>/negatives``, ``<name>/transform``, ``<name>/samples`` of the context,
            so their states are checkpointed.

    Attributes:
        units: The samples of the stage's training targets.
    """

    def __init__(self, ctx: StageContext, name: str) -> None:
        self.ctx, self.name = ctx, name
        loader = make_loader(ctx, ctx.stage.train, name)
        self.knowledge = loader if isinstance(loader, KnowledgeStageLoader) else None
        self.loader: StageLoader = loader.general if isinstance(loader, KnowledgeStageLoader) else loader
        self.units: Units = self.loader.units
        self.size = self.loader.size
        self.loader.negatives.model = ctx.model
        if self.loader.negatives.sampler is not None:
            self.loader.negatives.sampler.generator = ctx.generator(f"{name}/negatives")

    def complete(self, rows: Interaction) -> Interaction:
        """Returns rows (targets or windows, without negatives) with RecBole's transform and negatives applied."""
        complete = self.loader.complete_windows if isinstance(self.units, Windows) else self.loader.complete
        if self.ctx.config["transform"] is None:
            return complete(rows)
        if not len(rows):  # RecBole's transforms cannot take an empty batch
            return rows
        with self._randomness().owned():
            return complete(rows)

    def _randomness(self) -> ModelRandomness:
        """What RecBole's transforms (masking, cropping) draw from: Python's and torch's generators, seeded by ours."""
        return ModelRandomness(int(self.ctx.generator(f"{self.name}/transform").integers(2**31)))

    def batches(self, limit: int | None = None) -> Iterator[Interaction]:
        """Yields completed rows of all units, or of ``limit`` of them drawn without replacement."""
        index = np.arange(self.size)
        if limit is not None and limit < self.size:
            index = np.sort(self.ctx.generator(f"{self.name}/samples").choice(self.size, limit, replace=False))
        for start in range(0, len(index), CHUNK):
            chosen = index[start : start + CHUNK]
            if self.ctx.config["transform"] is None:
                rows = self.loader.make(chosen)
            else:
                with self._randomness().owned():
                    rows = self.loader.make(chosen)
            if self.knowledge is not None:
                rows.update(self._triples(self.knowledge, len(rows)))
            yield rows

    def _triples(self, loader: KnowledgeStageLoader, count: int) -> Interaction:
        """Returns as many random triples, with negatives, as there are rows: a sample is a row with a triple."""
        drawn = self.ctx.generator(f"{self.name}/triples").integers(len(loader.view.kg_feat), size=count)
        rows = {name: column[torch.from_numpy(drawn)] for name, column in loader.view.kg_feat.interaction.items()}
        tails = loader.sampler.sample(rows[loader.head].numpy(), 1, rows[loader.tail].numpy())
        return Interaction({**rows, loader.prefix + loader.tail: torch.from_numpy(tails)})
