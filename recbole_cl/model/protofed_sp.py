"""ProtoFed-SP: prompts of each user on a frozen backbone, anchored to prototypes that are refreshed privately."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from recbole.data.interaction import Interaction

from recbole_cl.errors import ConfigError
from recbole_cl.federated.client import ALIGNMENTS, LOSSES, PROMPT_PER, Behind, Prompts, Settings, composed, observe
from recbole_cl.federated.prompts import SharedParts
from recbole_cl.federated.table import ClientTable
from recbole_cl.model.all_positions import last_items
from recbole_cl.model.contract import StageTrainer
from recbole_cl.model.federated_base import BACKBONE, FederatedModel, trained_items
from recbole_cl.model.protofed_plan import make_plan
from recbole_cl.model.protofed_report import numbers_of
from recbole_cl.model.protofed_rounds import Rounds, SharedTraining
from recbole_cl.model.protofed_session import Session
from recbole_cl.registry import Registry, aggregators, engines, models
from recbole_cl.rng import derive, seeded
from recbole_cl.stream.stage import Stage, Targets

if TYPE_CHECKING:
    from recbole_cl.strategy.context import Pass, StageContext

PAPER_LITERAL = {
    "protofed_aggregator": "AsPrinted",
    "protofed_epsilon": None,
    "protofed_prototypes": 128,
    "protofed_width": 64,
    "protofed_short_rate": 5.0e-3,
    "protofed_long_rate": 1.0e-3,
    "protofed_participation": 0.05,
}
"""What the paper prints, where the defaults differ."""
SHARED, ROUNDS = "shared", "rounds"
"""The second pass of the first stage, which trains on base data outside the guarantee, and that of all later stages."""


@models.register()
class ProtoFedSP(FederatedModel):
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
    """

    presets: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "protofed_preset": {"paper_literal": PAPER_LITERAL}
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "protofed_preset": ("honest", "paper_literal"),
        "protofed_loss": LOSSES,
        "protofed_prompt_per": PROMPT_PER,
        "protofed_align_form": ALIGNMENTS,
        "protofed_short_lifetime": ("slice", "kept"),
    }
    components: ClassVar[Mapping[str, Registry]] = {
        "protofed_aggregator": aggregators,
        "protofed_engine": engines,
    }

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        width = self.backbone.item_embedding.embedding_dim
        self.aggregator = config.component("protofed_aggregator")(config.component_parameters("protofed_aggregator"))
        self.engine = config.component("protofed_engine")(config.component_parameters("protofed_engine"))
        self.plan = make_plan(config, dataset.stream, self.aggregator)
        self.settings = _settings(config)
        self.prompt_per = self.settings.prompt_per
        tokens, sizes = int(config["protofed_tokens"]), self.plan.sizes
        with seeded(derive(config["seed"], 0, "protofed/shared")):
            self.shared = SharedParts(
                width, tokens, int(config["protofed_hidden"]), sizes.prototypes, sizes.width, int(config["seed"])
            )
        self.clients = ClientTable(tokens, width)
        self._session: Session | None = None

    # -- state ------------------------------------------------------------------------------------------------------

    def owned_state(self) -> dict[str, Any]:
        """Returns what the clients keep and what the server has published."""
        return {"clients": self.clients.state_dict(), **super().owned_state()}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
        super().load_owned_state(state)
        self.clients.load_state_dict(state["clients"])

    # -- a stage ----------------------------------------------------------------------------------------------------

    def prepare_stage(self, ctx: StageContext) -> None:
        """Gives items that the backbone never saw their rows, and counts how many targets ask for one.

        Raises:
            CheckpointError: If the ledger misses a release that this run has published.
        """
        self.check_ledger()
        self.notes = {}
        if self.phase != BACKBONE:
            self.fill_unseen()
            if self.config["protofed_short_lifetime"] == "slice":
                self.clients.end_slice()
            self.count_unseen(ctx)

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        """Returns the backbone's pass and that of the shared parts, or the pass of the rounds.

        Raises:
            ConfigError: If a strategy wants more than one pass, or new weights.
        """
        if not passes:
            return passes
        plan = self.only_pass(ctx, passes)
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
            self.phase, self.seen = "prompts", trained_items(ctx)
        self.fill_unseen()
        self.count_unseen(ctx)
        return (SharedTraining if name == SHARED else Rounds)(self, ctx)

    def learned(self, ctx: StageContext, targets: Targets) -> Targets:
        """Returns the targets whose item has a row of its own; their histories teach the backbone nothing any more."""
        if self.phase == BACKBONE:
            return targets
        warm = targets[self.rowed.numpy()[targets.label]]
        return replace(warm, lo=warm.hi)

    # -- answers ----------------------------------------------------------------------------------------------------

    def outputs(self, sequence: torch.Tensor) -> Behind:
        """Returns what gives the frozen backbone's outputs behind prompts; histories are looked up once."""
        return self.behind_prompts(sequence)

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
        return numbers_of(self)


def _settings(config: Any) -> Settings:
    """Returns how the clients learn."""
    defaults = vars(Settings())
    settings = Settings(**{name: type(value)(config[f"protofed_{name}"]) for name, value in defaults.items()})
    for name in ("steps", "most", "temperature", "align_temperature", "window"):
        if not getattr(settings, name) > 0 or math.isnan(getattr(settings, name)):
            raise ConfigError(f"protofed_{name}: {config[f'protofed_{name}']!r} must be above 0")
    return settings
