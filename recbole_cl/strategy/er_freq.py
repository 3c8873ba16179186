"""Experience replay that draws by degree."""

from __future__ import annotations

from typing import Any

import numpy as np
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.er_random import ERRandom
from recbole_cl.strategy.parts.alias import AliasTable

WEIGHTINGS = ("inverse", "proportional", "adaptive")


@strategies.register()
class ERFreq(ERRandom):
    """Replays rows of the same memory as ERRandom, drawn by how often their user (or item) is in it.

    Ahrabian et al. 2021, "Structure aware experience replay for incremental learning in graph-based recommender
    systems" (CIKM). A memory of M rows is a graph of users and items; with the degree ``d`` of a row's user in it, and
    ``n`` the user's share of the new stage's training targets, a row is drawn with a probability in proportion to::

        inverse         1 / d                     every user of the memory as often as every other
        proportional    d                         what is frequent, even more often
        adaptive        (1 / d) * n / (d / M)     inverse, for users who are about to be seen more than before

    The paper's text was not read. The weights are those of public code of the same group (AntonValk/GraphSANE,
    ``reservoir_util.py``), where a memory is drawn from once a block and the degree is the user's; ``degree: item``
    counts items instead. Here rows are drawn for every batch, with replacement, in time that does not depend on M
    (:class:`~recbole_cl.strategy.parts.alias.AliasTable`, made once a stage). The memory is a uniform sample
    of the past; only the draws are weighted. Under ``adaptive`` a user without new targets is never drawn; where
    nobody of the memory has any, the weights are the inverse ones. A window counts as one row of its user and of the
    item it ends with.
    """

    prefix = "er_freq"
    defaults = {"memory_size": 1000, "batch_size": 256, "weighting": "inverse", "degree": "user"}

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._table: tuple[StageContext, AliasTable] | None = None

    def check(self, config: Any, model: nn.Module) -> None:
        super().check(config, model)
        for key, choices in (("weighting", WEIGHTINGS), ("degree", ("user", "item"))):
            if self.params[key] not in choices:
                raise ConfigError(f"er_freq_{key}: {self.params[key]!r} is none of {', '.join(choices)}")

    def weights(self, ctx: StageContext) -> np.ndarray:
        """Returns the weight of each row of the memory in this stage, shape ``[M]``."""
        by_user, new = self.params["degree"] == "user", ctx.stage.train
        ids = self.memory.columns[ctx.batcher.uid if by_user else ctx.batcher.iid].cpu().numpy()
        degree = np.bincount(ids)[ids].astype(np.float64)
        if self.params["weighting"] == "proportional":
            return degree
        if self.params["weighting"] == "adaptive":
            there = new.user if by_user else ctx.batcher.table.item[new.position]
            share = np.bincount(there, minlength=int(ids.max()) + 1)[ids] / max(len(new), 1)
            if share.any():
                return share / (degree / len(ids)) / degree
        return 1 / degree

    def draw(self, ctx: StageContext) -> Interaction:
        if self._table is None or self._table[0] is not ctx:  # the memory changes only where a stage ends
            self._table = ctx, AliasTable(self.weights(ctx))
        return self.memory.rows(self._table[1].draw(self.count(ctx), ctx.generator(f"{self.name}/batches")))

    def end_stage(self, ctx: StageContext) -> None:
        super().end_stage(ctx)
        self._table = None

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._table = None
