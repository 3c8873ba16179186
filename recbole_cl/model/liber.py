"""LIBER: a language model reads each closed partition of a lifetime once, and any backbone profits."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.sequential_recommender.dien import DIEN
from recbole.model.sequential_recommender.din import DIN
from recbole.utils import ModelType
from torch import nn

from recbole_cl.config import get_model_class
from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import ContinualModel
from recbole_cl.model.liber_fusion import InterestFusion, KnowledgeAdded, KnowledgeField
from recbole_cl.model.liber_items import item_vectors, no_items
from recbole_cl.model.liber_knowledge import Knowledge, Learner
from recbole_cl.model.liber_profile import Profiles
from recbole_cl.model.liber_report import report_of
from recbole_cl.model.liber_rows import COUNT, USER, with_partitions
from recbole_cl.model.liber_tables import READINGS, SHIFTS, VECTORS, interest_tables, item_table
from recbole_cl.model.liber_texts import folder_of, history_of
from recbole_cl.registry import encoders, llm_clients, models
from recbole_cl.rng import derive, seeded
from recbole_cl.stream.batch import TARGETS, Batcher
from recbole_cl.stream.stage import Targets

if TYPE_CHECKING:
    from recbole_cl.model.forget import Forgetting
    from recbole_cl.stream.build import Stream

PROBED = 64
_LOG = logging.getLogger("recbole_cl")


def _has_perceptron(kind: type) -> bool:
    """Tells whether a sequential model is a DIN or DIEN: its scores come from a perceptron over user and item."""
    return kind.type == ModelType.SEQUENTIAL and issubclass(kind, (DIN, DIEN))  # type: ignore[attr-defined]


def _horizon(config: Any, ctx: Any) -> int:
    """Returns the last position at which a target may ask in this stage: its own, or those it is evaluated on."""
    cells, stages = config["matrix_cells"], ctx.stream.stages
    alone = cells == "diagonal" or (cells == "last_row" and ctx.index < len(stages) - 1)
    asked = [ctx.stage] if alone else stages
    return max(
        (
            int(split.position.max())
            for stage in asked
            for split in (stage.train, stage.valid, stage.test)
            if len(split)
        ),
        default=-1,
    )


@functools.cache
def _mixed(backbone: type, way: str) -> type:
    """Returns a backbone's class that takes the knowledge in."""
    parents = {"field": (backbone, KnowledgeField), "added": (KnowledgeAdded, backbone), "hook": (backbone,)}[way]
    return backbone if way == "hook" else type(backbone.__name__, parents, {"__module__": backbone.__module__})


@models.register()
class LIBER(ContinualModel, AbstractRecommender):
    """LIBER (arXiv 2411.14713) around one of RecBole's models: an implementation of the idea, not a reproduction.

    Behaviours gather in partitions that close once. For each a client writes a summary, and for each but a user's first
    how it differs from the one before. Their vectors meet in an attention, and the result joins the backbone: as one
    more field of context-aware models, by a zero-started map beside the first layer of DIN's and DIEN's perceptron, or
    added to what a sequential model knows of the user. A sample sees the partitions that end strictly before it.

    Args:
        config: The run's configuration.
        dataset: RecBole's dataset at the stage.
    """

    backbone_property = "liber_backbone"
    backbone_types = frozenset({ModelType.CONTEXT, ModelType.SEQUENTIAL})
    type_of_backbone = True
    components: ClassVar[Any] = {"liber_client": llm_clients, "liber_encoder": encoders}
    changeable = frozenset(f"liber_{name}" for name in (
        "consent", "concurrency", "retries", "max_calls", "max_tokens", "calls_per_minute", "price_read",
        "price_written",
    ))  # fmt: skip

    def __new__(cls, config: Any, dataset: Any) -> LIBER:
        """Makes one that scores all items at once where its backbone does: evaluation asks the class."""
        inner = get_model_class(config["liber_backbone"])
        own = getattr(inner, "full_sort_predict", None)
        ranks = own is not None and own is not AbstractRecommender.full_sort_predict
        made: LIBER = super().__new__(_ranking(cls) if ranks else cls)  # type: ignore[arg-type]
        return made

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__()
        self.config = config
        self.device = config["device"]
        name = str(config["liber_backbone"])
        kind: Any = get_model_class(name)
        self._check(config, kind)
        self.vectors = str(config["liber_vectors"])
        if self.vectors == "none":
            self.way = "none"
        elif kind.type == ModelType.CONTEXT:
            self.way = "field"
        else:
            self.way = "hook" if _has_perceptron(kind) else "added"
        try:
            self.backbone = (kind if self.way == "none" else _mixed(kind, self.way))(config, dataset)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, ConfigError) or self.way != "field":
                raise
            raise self._refused(error) from error
        self.trains_all_positions = getattr(self.backbone, "trains_all_positions", False)
        if isinstance(getattr(self.backbone, "sigmoid", None), nn.Sigmoid):  # strategies ask what predict gives
            self.sigmoid = self.backbone.sigmoid
        self.knowledge = Knowledge()
        self._learner: Learner | None = None
        self._probing: torch.Tensor | None = None
        self._admitted = False
        size = int(config["liber_size"])
        for table in ("_summaries", "_shifts"):
            self.register_buffer(table, torch.zeros(0, size), persistent=False)
        self.register_buffer("_starts", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.with_items = bool(config["liber_item_field"]) and self.way != "none"
        self.items = no_items(size)
        if self.with_items:
            self.register_buffer("_items", torch.zeros(0, size), persistent=False)
        if self.way == "none":
            return
        # Drawn apart, so that the backbone's own draws, dropout included, are those of the plain backbone.
        with seeded(derive(int(config["seed"]), 0, "liber")):
            self._build_fusion(config, size, int(dataset.num(dataset.iid_field)))

    def _build_fusion(self, config: Any, size: int, n_items: int) -> None:
        backbone: Any = self.backbone
        hidden = int(config["liber_hidden"])
        if self.way == "field":
            out = int(backbone.embedding_size)
        elif self.way == "hook":
            out = hidden
        else:
            table = getattr(backbone, "item_embedding", None)
            out = int(table.weight.size(1)) if table is not None else int(config["embedding_size"])
        self.fusion = InterestFusion(
            size, hidden, out, zero=self.way == "added", mixes=config["liber_attention"] == "self",
            experts=int(config["liber_experts"]), items=self.with_items,
        )  # fmt: skip
        if self.way == "hook":
            first = next(m for m in backbone.dnn_mlp_layers.modules() if isinstance(m, nn.Linear))
            self.join = nn.Linear(out, first.out_features, bias=False)
            nn.init.zeros_(self.join.weight)
            first.register_forward_hook(self._add_to_first_layer)
            if self.with_items:
                self.join_item = nn.Linear(out, first.out_features, bias=False)
                nn.init.zeros_(self.join_item.weight)
        if config["liber_query"] == "target":
            self.target_query = nn.Embedding(n_items, size, padding_idx=0)
            nn.init.zeros_(self.target_query.weight)

    @staticmethod
    def _check(config: Any, kind: Any) -> None:
        for key, known in (
            ("liber_vectors", VECTORS), ("liber_query", ("learned", "target")), ("liber_shift", SHIFTS),
            ("liber_attention", ("pooled", "self")), ("liber_reading", READINGS),
        ):  # fmt: skip
            if config[key] not in known:
                raise ConfigError(f"property {key!r} is {config[key]!r}; it must be one of {', '.join(known)}")
        for key, value, instead in (("liber_query", "target", "'learned'"), ("liber_item_field", True, False)):
            if config[key] == value and kind.type != ModelType.CONTEXT and not _has_perceptron(kind):
                raise ConfigError(
                    f"property {key!r} is {value!r}, but {config['liber_backbone']} knows the user before the item; "
                    f"use {instead}"
                )

    def _refused(self, reason: object) -> ConfigError:
        return ConfigError(
            f"liber_backbone: {self.config['liber_backbone']!r} cannot take the knowledge in: {reason}; use DeepFM, "
            f"DCNV2, AutoInt, xDeepFM, FM, WideDeep, DIN, DIEN or SASRec"
        )

    # -- knowledge ------------------------------------------------------------------------------------------------

    def prepare_stage(self, ctx: Any) -> None:
        """Asks for what the stage needs: partitions that targets of it, or of stages evaluated with it, can see."""
        if self.way == "none":
            return
        self._probe(ctx)
        history = history_of(self.config, ctx.stream)
        self._learner, self._prepared = Learner(self.config, history), ctx.index
        self.knowledge = self._learner.learn(self.knowledge, ctx.index, _horizon(self.config, ctx))
        if self.with_items:
            n, size = ctx.stage.n_items, int(self.config["liber_size"])
            self.items = item_vectors(self._learner, self.items, n, size)
        self._naive = history.naive()
        self._set_tables()

    def _set_tables(self) -> None:
        known, size, seed = self.knowledge, int(self.config["liber_size"]), int(self.config["seed"])
        tables = interest_tables(known, self.vectors, str(self.config["liber_shift"]), size, seed)
        starts = known.starts(int(known.user.max()) + 2 if len(known) else 1)
        self._summaries, self._shifts = (table.to(self.device) for table in tables)
        self._starts = starts.to(self.device)
        if self.with_items:
            self._items = item_table(self.items["vector"], self.vectors, seed).to(self.device)

    def owned_state(self) -> dict[str, Any]:
        items = {"items": dict(self.items)} if self.with_items else {}
        return {"knowledge": self.knowledge.state_dict(), **items}

    def load_owned_state(self, state: Any) -> None:
        # Copied: memory read from a file is aligned otherwise, and products may then round otherwise.
        self.knowledge = Knowledge(**{name: value.to("cpu", copy=True) for name, value in state["knowledge"].items()})
        self.items = {name: value.to("cpu", copy=True) for name, value in state.get("items", self.items).items()}
        self._set_tables()

    def side_stores(self) -> dict[str, str]:
        return {} if self.way == "none" else {"knowledge": str(folder_of(self.config))}

    def without_users(self, state: Mapping[str, Any], forgetting: Forgetting) -> dict[str, Any]:
        """Returns the knowledge without users' partitions; the projection is nobody's."""
        rows = dict(state["knowledge"])
        projection = {name: rows.pop(name) for name in ("mean", "matrix")}
        return {"knowledge": {**forgetting.removal.rows(rows, "user"), **projection}}

    def forget_users(self, stream: Stream, users: list[str]) -> int:
        """Removes what was written about users, and the vectors made of it."""
        if self.way == "none":
            return 0
        profiles = Profiles(self.config, stream)
        return sum(profiles.forget(user) for user in users)

    # -- batches --------------------------------------------------------------------------------------------------

    def collate(self, batcher: Batcher, rows: Interaction, targets: Targets, evaluation: bool) -> Interaction:
        """Adds whose partitions a row sees and how many; of a window, at each of its positions."""
        if self.way == "none":
            return rows
        return with_partitions(history_of(self.config, batcher.stream), batcher, rows, targets)

    def _fused(self, batch: Interaction, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Returns what goes into the backbone: shape ``[B, out]``, or ``[n, out]`` of the wanted positions."""
        user, count = batch[USER], batch[COUNT]
        if wanted is not None:
            user, count = user[wanted], count[wanted]
        known = user < len(self._starts) - 1
        user = torch.where(known, user, 0)
        start = self._starts[user]
        end = self._starts[(user + 1).clamp(max=len(self._starts) - 1)]
        count = torch.minimum(torch.where(known, count, 0), end - start)
        if self.config["liber_reading"] == "whole":  # the newest tells of all that came before
            start, count = start + (count - 1).clamp(min=0), count.clamp(max=1)
        query = self.target_query(batch[self._item_field()]) if hasattr(self, "target_query") else None
        return self.fusion((self._summaries, self._shifts), start, count, query)

    def _item_field(self) -> str:
        return str(self.config["ITEM_ID_FIELD"])

    def _inject(self, batch: Interaction) -> None:
        if self.way == "none":
            return
        windows = TARGETS in batch
        fused = self._fused(batch, batch[TARGETS] > 0 if windows else None)
        backbone: Any = self.backbone
        if self.way == "added":
            backbone.windows = windows
        if self.with_items:
            item = batch[self._item_field()]
            table = self._items if len(self._items) else self._items.new_zeros(1, self._items.size(1))
            of_items = self.fusion.of_items(table.index_select(0, item.clamp(max=len(table) - 1)))
        if self.way == "field":
            injected = torch.stack([fused, of_items] if self.with_items else [fused], dim=1)
        elif self.way == "hook":
            injected = self.join(fused) + self.join_item(of_items) if self.with_items else self.join(fused)
        else:
            injected = fused
        if self._probing is not None:
            injected = self._probing = torch.randn_like(injected).requires_grad_()
        if self.way == "hook":
            self._injected = injected
        else:
            backbone.injected = injected

    def _add_to_first_layer(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + self._injected

    def _probe(self, ctx: Any) -> None:
        """Refuses a backbone whose answers do not depend on the knowledge: it would train without it, silently.

        Raises:
            ConfigError: If no gradient reaches the fusion, or the backbone fails on it.
        """
        targets = ctx.stage.train[: min(PROBED, len(ctx.stage.train))]
        batch = ctx.batcher.rows(targets).to(ctx.device)
        training = self.training
        self.eval()
        self._probing = torch.zeros(0)
        try:
            with torch.enable_grad():
                answer = self.predict(batch)
                (gradient,) = torch.autograd.grad(answer.sum(), self._probing, allow_unused=True)
        finally:
            self._probing = None
            self.train(training)
        if gradient is None or not (gradient.abs().sum(0).sum(-1) > 0).all():
            raise self._refused("no gradient reaches it, so it would be trained as if there were none")
        self._admitted = True

    # -- RecBole --------------------------------------------------------------------------------------------------

    def calculate_loss(self, interaction: Interaction) -> Any:
        self._inject(interaction)
        loss = self.backbone.calculate_loss(interaction)
        if self.way == "added":
            self.backbone.windows = False
        return loss

    def predict(self, interaction: Interaction) -> torch.Tensor:
        self._inject(interaction)
        try:
            found: torch.Tensor = self.backbone.predict(interaction)
        except (RuntimeError, KeyError, IndexError) as error:
            if self._admitted:
                raise
            raise self._refused(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        return found

    def causal_part(self) -> Any:
        """Returns the backbone where it answers at all positions of a window."""
        return self.backbone if self.trains_all_positions else self

    def added_at(self, batch: Interaction, at: torch.Tensor) -> torch.Tensor | None:
        return self._fused(batch, at) if self.way == "added" else None

    # -- what is told ---------------------------------------------------------------------------------------------

    def stage_costs(self) -> dict[str, Any]:
        if self._learner is None:
            return {}
        history = self._learner.history
        calls, seconds = history.calls.get(self._prepared, 0), history.seconds.get(self._prepared, 0.0)
        return {"llm_calls_made": calls, "llm_seconds": seconds}

    def report(self) -> dict[str, Any]:
        if self.way == "none" or self._learner is None:
            return {}
        return report_of(self.config, self.knowledge, self._learner, self._naive)


class _Ranking:
    """What a LIBER has whose backbone scores all items at once."""

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """Returns the scores of all items, shape ``[B, n_items]``."""
        self._inject(interaction)  # type: ignore[attr-defined]
        found: torch.Tensor = self.backbone.full_sort_predict(interaction)  # type: ignore[attr-defined]
        return found

    def item_vectors(self) -> torch.Tensor:
        """Returns the backbone's vectors of items, shape ``[n_items, d]``."""
        table = getattr(self.backbone, "item_embedding", None)  # type: ignore[attr-defined]
        if not isinstance(table, nn.Embedding):
            raise ConfigError(f"vectors: {self.config['liber_backbone']} has none of items")  # type: ignore[attr-defined]
        return table.weight


@functools.cache
def _ranking(cls: type) -> type:
    return type(cls.__name__, (_Ranking, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
