"""Experience replay from a uniform sample of the past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import contract, offers
from recbole_cl.model.forget import Forgetting
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_number
from recbole_cl.strategy.parts.exemplars import ReservoirMemory, join_rows
from recbole_cl.strategy.parts.rows import OwnRows


@strategies.register()
class ERRandom(Strategy):
    """Joins to every batch rows drawn uniformly from a memory that is a uniform sample of all training targets so far.

    Chaudhry et al. 2019, "On tiny episodic memories in continual learning" (reservoir variant). With ``m`` replayed
    targets joined to a batch of ``B`` the loss is the mean over both, so an old target weighs as much as a new one::

        L = 1 / (B + m) * (sum over the batch + sum over replayed targets)

    A stage's targets enter the memory when it ends (:class:`~recbole_cl.strategy.parts.exemplars.ReservoirMemory`). For
    models trained on all positions an exemplar is a window, the loss the mean over all supervised positions, and as
    many windows are drawn as hold ``m`` targets at the memory's mean. ``batch_size`` counts as ``train_batch_size``
    does in RecBole: where a target comes with rows of negatives (pointwise models), these count too, and m is the rest.
    Replayed rows keep their ``_position``, ``_stage`` and ``_timestamp``, and draw their negatives from a generator of
    their own among the items known *now*, as rows of the stage do.

    Known mistakes elsewhere: the newest stage's rows replace old ones, so the memory is no sample of the past;
    replay draws from the loader's generator, so that replaying nothing already changes training.
    """

    prefix = "er"
    base_is_finetune = True
    defaults = {"memory_size": 1000, "batch_size": 256}
    neutral = {"batch_size": 0}
    needs = frozenset({"gradient", "batch_rows"})
    kind = "replay"

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.memory = ReservoirMemory(int(self.params["memory_size"]))
        self._own: OwnRows | None = None

    def check(self, config: Any, model: nn.Module) -> None:
        check_number(self, "memory_size", "the default is 1000 exemplars", least=1)
        check_number(self, "batch_size", "the default is 256, 0 is FineTune", least=0)
        if contract(model).builds_on_stages:
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']}, which keeps what earlier stages "
                f"trained as it is, so that replay has nothing to keep; use FineTune"
            )
        if config["scheduler"] == "TaskStream" and offers(model, "predict_task"):
            # A model with heads reads other fields for each kind of task (labels, windows): no batch holds rows of two.
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']} under the scheduler TaskStream: rows "
                f"of old tasks have other fields than the batches that they would join; use MTL, which trains all "
                f"tasks so far side by side, CONURE, TERACON with the model SoftMask, or FineTune with the model PCL"
            )

    def own_rows(self, ctx: StageContext) -> OwnRows:
        """Returns what makes stored rows batch rows in this stage; its generators' states are the context's."""
        if self._own is None or self._own.ctx is not ctx:
            self._own = OwnRows(ctx, self.name)
        return self._own

    def augment_batch(self, ctx: StageContext, batch: Interaction) -> Interaction:
        if not len(self.memory) or ctx.batcher.uid not in batch.interaction:  # MKR's batches of triples alone
            return batch
        self.memory.check(ctx)
        return join_rows(batch, self.own_rows(ctx).complete(self.draw(ctx)), optional=self._triples(ctx))

    def draw(self, ctx: StageContext) -> Interaction:
        """Returns the rows that are replayed with the next batch, without negatives."""
        return self.memory.sample(self.count(ctx), ctx.generator(f"{self.name}/batches"))

    def count(self, ctx: StageContext) -> int:
        """Returns the number of rows, without negatives, that are replayed with a batch: m as the loader counts B."""
        wanted = int(self.params["batch_size"])
        targets = max(wanted // self.own_rows(ctx).loader.negatives.times, 1) if wanted else 0
        return self.memory.rows_of(targets)

    def _triples(self, ctx: StageContext) -> frozenset[str]:
        """Fields of a knowledge graph's triples, which a batch holds beside its rows."""
        view, prefix = ctx.view, ctx.config["NEG_PREFIX"]
        if getattr(view, "kg_feat", None) is None:
            return frozenset()
        return frozenset({*view.kg_feat.interaction, prefix + view.tail_entity_field})

    def end_stage(self, ctx: StageContext) -> None:
        self.memory.add(ctx, self.own_rows(ctx).units, ctx.generator(f"{self.name}/memory"))

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "memory")
        self.memory.load_state_dict(state["memory"])

    def without_users(self, state: Mapping[str, Any], forgetting: Forgetting) -> Mapping[str, Any]:
        return {"memory": self.memory.without_users(state["memory"], forgetting)}
