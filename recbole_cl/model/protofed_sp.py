"""ProtoFed-SP: prompts of each user on a frozen backbone, anchored to prototypes that are refreshed privately."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender

from recbole_cl.config.folder import run_folder
from recbole_cl.config.models import get_model_class
from recbole_cl.errors import CheckpointError, ConfigError, nearest
from recbole_cl.federated.client import LOSSES, Behind, Prompts, Settings, composed, observe
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.prompts import SharedParts
from recbole_cl.federated.server import TRUST
from recbole_cl.federated.table import ClientTable
from recbole_cl.model.all_positions import last_items
from recbole_cl.model.content_rows import projected_rows, read_vectors
from recbole_cl.model.contract import ContinualModel, StageTrainer
from recbole_cl.model.fused import layer_outputs, layer_outputs_behind, projections
from recbole_cl.model.protofed_plan import budget_of, make_plan
from recbole_cl.model.protofed_report import told
from recbole_cl.model.protofed_rounds import Rounds, SharedTraining
from recbole_cl.model.protofed_session import Session
from recbole_cl.model.sasrec import SASRec
from recbole_cl.prompt.prefix import prompted_outputs, without
from recbole_cl.registry import Registry, aggregators, engines, models
from recbole_cl.rng import derive, seeded
from recbole_cl.stream.stage import Stage, Targets
from recbole_cl.stream.vocabulary import Growth

if TYPE_CHECKING:
    from recbole_cl.strategy.context import Pass, StageContext

CHOICES = {
    "protofed_new_items": ("cold", "mean", "vectors"),
    "protofed_loss": LOSSES,
    "protofed_short_lifetime": ("slice", "kept"),
    "protofed_trust": TRUST,
    "protofed_noise": ("seed", "system"),
}
BACKBONE, SHARED, ROUNDS = "backbone", "shared", "rounds"
"""The passes of the first stage, which trains on base data outside the guarantee, and the one of all later stages."""


@models.register()
class ProtoFedSP(ContinualModel, SequentialRecommender):
    """Prototype-aligned federated soft prompts (Xiao and Hou 2026), with privacy that holds.

    The first stage trains the backbone with RecBole's trainer, then encoders, decoder and first prototypes. In every
    later stage only prompts are trained, each on its user's own targets (:mod:`recbole_cl.federated.client`), and the
    prototypes are refreshed from noisy sums (:mod:`recbole_cl.federated.server`).

    Args:
        config: The run's configuration.
        dataset: The stage's view.

    Attributes:
        backbone: The frozen model inside.
        shared: What all clients share; its ``prototypes`` are what the server releases.
        clients: What the clients keep.
        plan: What the budget allows.
        phase: ``backbone`` while it is trained and answers alone, then ``prompts``.
        seen: Items that the backbone was trained on, flags of shape ``[n_items]``.
        vectors: Content of the items, NaN for none, shape ``[n_items, width]``, if it makes the rows of new ones.
        notes: What the stage's rounds have to tell.
    """

    backbone_property: ClassVar[str | None] = "protofed_backbone"
    components: ClassVar[Mapping[str, Registry]] = {
        "protofed_aggregator": aggregators,
        "protofed_engine": engines,
    }
    trains_all_positions = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.config = config
        for key, words in CHOICES.items():
            if config[key] not in words:
                raise ConfigError(f"{key}: {config[key]!r} is none of {', '.join(words)}{nearest(config[key], words)}")
        self.backbone = self._make_backbone(config, dataset)
        width = self.backbone.item_embedding.embedding_dim
        self.aggregator = config.component("protofed_aggregator")(config.component_parameters("protofed_aggregator"))
        self.engine = config.component("protofed_engine")(config.component_parameters("protofed_engine"))
        self.plan = make_plan(config, dataset.stream, self.aggregator)
        self.settings = _settings(config)
        tokens, sizes = int(config["protofed_tokens"]), self.plan.sizes
        with seeded(derive(config["seed"], 0, "protofed/shared")):
            self.shared = SharedParts(
                width, tokens, int(config["protofed_hidden"]), sizes.prototypes, sizes.width, int(config["seed"])
            )
        self.clients = ClientTable(tokens, width)
        self.phase = BACKBONE
        self.seen = torch.zeros(self.n_items, dtype=torch.bool)
        self.vectors = _vectors(config, dataset, self.n_items)
        self._session: Session | None = None
        self.published: list[str] = []
        self.notes: dict[str, Any] = {}
        self.unseen: dict[str, list[float | None]] = {}

    @staticmethod
    def _make_backbone(config: Any, dataset: Any) -> SASRec:
        kind = get_model_class(config["protofed_backbone"])
        backbone = kind(config, dataset)
        if not isinstance(backbone, SASRec) or not backbone._plain():
            raise ConfigError(
                f"protofed_backbone: {config['protofed_backbone']} has no transformer before whose inputs each user's "
                f"tokens could stand; use SASRec"
            )
        return backbone

    # -- state ------------------------------------------------------------------------------------------------------

    def owned_state(self) -> dict[str, Any]:
        """Returns what the clients keep and what the server has published."""
        return {
            "clients": self.clients.state_dict(),
            "phase": self.phase,
            "seen": self.seen,
            "published": list(self.published),
            "notes": self.notes,
        }

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
        self.clients.load_state_dict(state["clients"])
        self.phase, self.seen = state["phase"], state["seen"].clone()
        self.published, self.notes = list(state["published"]), dict(state["notes"])

    def grow_owned_state(self, state: Mapping[str, Any], growth: Growth) -> Mapping[str, Any]:
        """Returns the state with flags for new items; new users have nothing until they are trained."""
        new = growth.n_items[1] - growth.n_items[0]
        return {**state, "seen": torch.cat([state["seen"], torch.zeros(new, dtype=torch.bool)])}

    def ledger(self) -> Ledger:
        """Returns the ledger of the run's releases."""
        return Ledger(self._ledger_path(), budget_of(self.config), float(self.config["protofed_delta"]))

    def _ledger_path(self) -> Path:
        given = self.config["protofed_ledger"]
        return Path(given).expanduser() if given else run_folder(self.config) / "ledger.jsonl"

    def side_stores(self) -> dict[str, str]:
        """Returns the ledger's path, once there is one: it lies outside the checkpoints and is never rolled back."""
        return {"privacy ledger": str(self._ledger_path())} if self.published else {}

    @property
    def scores_untrained_items(self) -> bool:  # type: ignore[override]
        """Tells whether an item that the backbone never saw has a row all the same."""
        return bool(self.config["protofed_new_items"] != "cold")

    @property
    def rowed(self) -> torch.Tensor:
        """Flags of the items that have a row of their own, trained or made of their content, shape ``[n_items]``."""
        return self.seen if self.vectors is None else self.seen | torch.from_numpy(np.isfinite(self.vectors[:, 0]))

    # -- a stage ----------------------------------------------------------------------------------------------------

    def prepare_stage(self, ctx: StageContext) -> None:
        """Gives items that the backbone never saw their rows, and counts how many targets ask for one.

        Raises:
            CheckpointError: If the ledger misses a release that this run has published.
        """
        lost = set(self.published) - (self.ledger().rounds() if self.published else set())
        if lost:
            raise CheckpointError(
                f"protofed_ledger: {self._ledger_path()} does not hold the releases {', '.join(sorted(lost)[:3])} that "
                f"this run has published; a budget that forgets them would be exceeded. Restore the file"
            )
        self.notes = {}
        if self.phase != BACKBONE:
            self.fill_unseen()
            if self.config["protofed_short_lifetime"] == "slice":
                self.clients.end_slice()
            self._count_unseen(ctx)

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        """Returns the backbone's pass and that of the shared parts, or the pass of the rounds.

        Raises:
            ConfigError: If a strategy wants more than one pass, or new weights.
        """
        if not passes:
            return passes
        plan = passes[0]
        if len(passes) > 1 or (plan.init == "fresh" and self.phase != BACKBONE):
            raise ConfigError(
                f"strategy: {ctx.config.strategy_name} cannot serve ProtoFedSP, whose backbone is trained once, on the "
                f"base stage; use FineTune or Pretrain"
            )
        if self.phase == BACKBONE:
            epochs = int(self.config["protofed_shared_epochs"])
            return [replace(plan, name=BACKBONE), replace(plan, name=SHARED, init="previous", epochs=epochs)]
        # A fixed number of rounds: validation targets would have a say in how much is released.
        rounds = int(self.config["protofed_rounds"])
        return [replace(plan, name=ROUNDS, epochs=rounds, early_stopping=False)]

    def begin_pass(self, ctx: StageContext) -> None:
        """Lets the backbone, the shared parts or, in rounds, nothing but the clients' prompts be trained."""
        self.backbone.requires_grad_(ctx.pass_.name == BACKBONE)
        self.shared.requires_grad_(ctx.pass_.name == SHARED)

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> StageTrainer | None:
        """Returns the trainer of the shared parts or of the rounds; the backbone has RecBole's."""
        name = ctx.pass_.name
        if name == BACKBONE:
            self.phase = BACKBONE
            return None
        if self.phase == BACKBONE:
            self.phase, self.seen = "prompts", _trained_items(ctx)
        self.fill_unseen()
        self._count_unseen(ctx)
        return (SharedTraining if name == SHARED else Rounds)(self, ctx)

    def learned(self, ctx: StageContext, targets: Targets) -> Targets:
        """Returns the targets whose item has a row of its own; their histories teach the backbone nothing any more."""
        if self.phase == BACKBONE:
            return targets
        warm = targets[self.rowed.numpy()[targets.label]]
        return replace(warm, lo=warm.hi)

    @torch.no_grad()
    def fill_unseen(self) -> None:
        """Sets the rows of items that the backbone never saw: none, the mean row of those it saw, or from content."""
        table = self.backbone.item_embedding.weight
        unseen = ~self.seen.to(table.device)
        unseen[0] = False
        table[unseen] = table[~unseen][1:].mean(dim=0) if self.scores_untrained_items else 0.0
        if self.vectors is not None:
            rows = table.cpu().numpy().astype(np.float64)
            rows[~self.seen.numpy()] = np.nan
            made = torch.from_numpy(projected_rows(self.vectors, rows)).to(table)
            chosen = unseen & self.rowed.to(table.device)
            table[chosen] = made[chosen]

    def _count_unseen(self, ctx: StageContext) -> None:
        """Notes the share of each stage's targets whose item the backbone never saw."""
        seen = np.zeros(ctx.stream.table.n_items, dtype=bool)
        seen[: len(self.seen)] = self.seen.numpy()
        self.unseen = {
            split: [
                float(1.0 - seen[stage.split(split).label].mean()) if len(stage.split(split)) else None
                for stage in ctx.stream.stages
            ]
            for split in ("train", "test")
        }

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        """Returns the backbone's loss: the only one that RecBole's trainer asks for."""
        return self.backbone.calculate_loss(batch)

    # -- answers ----------------------------------------------------------------------------------------------------

    def outputs(self, sequence: torch.Tensor) -> Behind:
        """Returns what gives the frozen backbone's outputs behind prompts; histories are looked up once."""
        layers, embedded = self.backbone.trm_encoder.layer, self.backbone._embed(sequence)
        kept = projections(layers[0], embedded)

        def first(prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return layer_outputs_behind(layers[0], prompts, embedded, kept, mask)

        def behind(prompts: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return prompted_outputs(layers, embedded, prompts, layer_outputs, wanted, first)

        return behind

    def queries_of(self, sequence: torch.Tensor) -> torch.Tensor:
        """Returns q of histories: the mean embedding of their items, shape ``[B, d]``."""
        lengths = (sequence > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.backbone.item_embedding(sequence).sum(dim=1) / lengths

    def readable(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns histories without the items that have no row, and where each item ended; see :func:`without`."""
        dropped = ~self.seen.to(sequence.device)[sequence] if not self.scores_untrained_items else sequence < 0
        return without(sequence, dropped)

    @contextlib.contextmanager
    def evaluating(self, stage: Stage, split: str) -> Iterator[None]:
        """A context of evaluation, in which users learn from what they were asked before (``protofed_online``)."""
        if self.config["protofed_online"] and self.phase != BACKBONE:
            self._session = Session(self, f"{stage.index}/{split}")
        try:
            yield
        finally:
            self._session = None

    def represent(self, batch: Interaction) -> torch.Tensor:
        """Returns the representation of each history behind its user's composed prompt, shape ``[B, d]``."""
        return self._represent(batch) if self._session is None else self._session.answer(batch, self._represent)

    def _represent(self, batch: Interaction) -> torch.Tensor:
        sequence, lengths = batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]
        if self.phase != BACKBONE:
            sequence, _ = self.readable(sequence)
            lengths = (sequence > 0).sum(dim=1).clamp(min=1)
        sequence = sequence[:, : int(lengths.max())]
        if self.phase == BACKBONE:
            return self.backbone.outputs(sequence, last_items(lengths, sequence.size(1)))
        prompts, query = self._prompts_of(batch[self.USER_ID]), self.queries_of(sequence)
        now = observe(prompts, query, self.settings.window)
        given = composed(self.shared, now, query, self.settings)
        return self.outputs(sequence)(given, last_items(lengths, sequence.size(1)))

    def _prompts_of(self, users: torch.Tensor) -> Prompts:
        found = (self.clients if self._session is None else self._session.clients).get(users)
        device = self.backbone.item_embedding.weight.device
        return Prompts(**{name: getattr(found, name).to(device) for name in Prompts.__dataclass_fields__})

    def item_queries(self, batch: Interaction) -> torch.Tensor:
        """Returns what scores items by :meth:`score_queries`, shape ``[B, d]``."""
        return self.represent(batch)

    def score_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns the scores of all items, shape ``[B, n_items]``."""
        return queries @ self.backbone.item_embedding.weight.T

    def scores_by_queries(self) -> bool:
        """Tells that an item's score is the product of its row with a representation."""
        return True

    def full_sort_predict(self, batch: Interaction) -> torch.Tensor:
        """Returns the scores of all items, shape ``[B, n_items]``."""
        return self.score_queries(self.represent(batch))

    def scores(self, batch: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Returns the scores of given items, shape ``[B, C]``."""
        return (self.backbone.item_embedding(items) @ self.represent(batch).unsqueeze(-1)).squeeze(-1)

    def predict(self, batch: Interaction) -> torch.Tensor:
        """Returns the score of each row's item."""
        return self.scores(batch, batch[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    # -- what is told -------------------------------------------------------------------------------------------------

    def stage_costs(self) -> dict[str, Any]:
        """Returns what a client sends and gets in the stage, and how many numbers of its own it trains."""
        own = 2 * self.clients.tokens * self.clients.width
        keys = ("clients", "bytes_up_per_client", "bytes_down_per_client")
        return {"trainable_per_client": own, **{key: self.notes.get(key, 0) for key in keys}}

    def report(self) -> dict[str, Any]:
        """Returns the stage's privacy, traffic and share of targets that the backbone cannot know."""
        return told(self)


def _settings(config: Any) -> Settings:
    """Returns how the clients learn."""
    defaults = vars(Settings())
    settings = Settings(**{name: type(value)(config[f"protofed_{name}"]) for name, value in defaults.items()})
    for name in ("steps", "most", "temperature", "align_temperature", "window"):
        if not getattr(settings, name) > 0 or math.isnan(getattr(settings, name)):
            raise ConfigError(f"protofed_{name}: {config[f'protofed_{name}']!r} must be above 0")
    return settings


def _vectors(config: Any, dataset: Any, n_items: int) -> np.ndarray | None:
    """Returns the items' content, where it makes the rows of new items."""
    if config["protofed_new_items"] != "vectors":
        return None
    if not config["protofed_item_vectors"]:
        raise ConfigError("protofed_item_vectors: protofed_new_items is 'vectors'; give the file that they are in")
    tokens = dataset.stream.dataset.field2id_token[dataset.iid_field][:n_items]
    return read_vectors(config["protofed_item_vectors"], [str(token) for token in tokens], "protofed_item_vectors")


def _trained_items(ctx: StageContext) -> torch.Tensor:
    """Returns flags of the items in the targets of a pass and in their histories, shape ``[n_items]``."""
    targets = ctx.pass_.data
    if not isinstance(targets, Targets):
        targets = ctx.stream.trained_targets(ctx.index, targets)
    table, seen = ctx.stream.table, np.zeros(ctx.batcher.n_items, dtype=bool)
    change = np.zeros(len(table.seq) + 1, dtype=np.int64)
    np.add.at(change, targets.lo, 1)
    np.add.at(change, targets.hi, -1)
    seen[table.item[table.seq[np.cumsum(change[:-1]) > 0]]] = True
    seen[targets.label] = True
    return torch.from_numpy(seen)
