"""What federated models share: a SASRec that the base stage trains, items that it never saw, a ledger of releases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender

from recbole_cl.config.folder import run_folder
from recbole_cl.config.models import get_model_class
from recbole_cl.errors import CheckpointError, ConfigError, nearest
from recbole_cl.federated.client import Behind
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.server import TRUST
from recbole_cl.model.content_rows import projected_rows, read_vectors
from recbole_cl.model.contract import ContinualModel
from recbole_cl.model.fused import layer_outputs, layer_outputs_behind, projections
from recbole_cl.model.protofed_plan import budget_of
from recbole_cl.model.sasrec import SASRec
from recbole_cl.prompt.prefix import prompted_outputs, without
from recbole_cl.stream.stage import Targets
from recbole_cl.stream.vocabulary import Growth

if TYPE_CHECKING:
    from recbole_cl.strategy.context import Pass, StageContext

DISTRIBUTED = "distributed"
NO_DISTRIBUTED = (
    "protofed_trust: 'distributed' is not offered: under secure aggregation each client would add a share of discrete "
    "noise to a rounded vector, a sum of discrete Gaussians is not one, and dp-accounting has the discrete Gaussian of "
    "one integer only: its figure would not bound this release. Use 'local', which trusts nobody, or 'central'"
)
CHOICES = {
    "protofed_new_items": ("cold", "mean", "vectors"),
    "protofed_trust": (*TRUST, DISTRIBUTED),
    "protofed_noise": ("seed", "system"),
}
BACKBONE = "backbone"
"""The pass that trains the backbone on base data, outside the guarantee."""


class FederatedModel(ContinualModel, SequentialRecommender):
    """Base of models whose later stages are rounds of clients (the protocol's properties begin with ``protofed_``).

    Args:
        config: The run's configuration.
        dataset: The stage's view.

    Attributes:
        choices: Properties of its own, to the words that each may be.
        prompt_per: A client's targets share what it answers with in an ``update``, or each ``target`` has its own.
        backbone: The model that the base stage trains.
        phase: ``backbone`` while it is trained and answers alone.
        seen: Items with a trained row, flags of shape ``[n_items]``.
        vectors: Content of the items, NaN for none, shape ``[n_items, width]``, if it makes the rows of new ones.
        published: Names of the releases that the run has made.
        notes: What the stage's rounds have to tell.
        unseen: Share of each stage's targets whose item the base stage never saw, by split.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    prompt_per = "update"
    backbone_property: ClassVar[str | None] = "protofed_backbone"
    trains_all_positions = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.config = config
        for key, words in {**CHOICES, **self.choices}.items():
            if config[key] not in words:
                raise ConfigError(f"{key}: {config[key]!r} is none of {', '.join(words)}{nearest(config[key], words)}")
        if config["protofed_trust"] == DISTRIBUTED:
            raise ConfigError(NO_DISTRIBUTED)
        self.backbone = self._make_backbone(config, dataset)
        self.phase = BACKBONE
        self.seen = torch.zeros(self.n_items, dtype=torch.bool)
        self.vectors = _vectors(config, dataset, self.n_items)
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
        """Returns what the base stage has seen and what the server has published."""
        return {"phase": self.phase, "seen": self.seen, "published": list(self.published), "notes": self.notes}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
        self.phase, self.seen = state["phase"], state["seen"].clone()
        self.published, self.notes = list(state["published"]), dict(state["notes"])

    def grow_owned_state(self, state: Mapping[str, Any], growth: Growth) -> Mapping[str, Any]:
        """Returns the state with flags for new items; new users have nothing until they are trained."""
        new = growth.n_items[1] - growth.n_items[0]
        return {**state, "seen": torch.cat([state["seen"], torch.zeros(new, dtype=torch.bool)])}

    # -- the ledger ----------------------------------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """Returns the ledger of the run's releases."""
        return Ledger(self._ledger_path(), budget_of(self.config), float(self.config["protofed_delta"]))

    def _ledger_path(self) -> Path:
        given = self.config["protofed_ledger"]
        return Path(given).expanduser() if given else run_folder(self.config) / "ledger.jsonl"

    def side_stores(self) -> dict[str, str]:
        """Returns the ledger's path, once there is one: it lies outside the checkpoints and is never rolled back."""
        path = self._ledger_path()
        return {"privacy ledger": str(path)} if self.published or path.exists() else {}

    def check_ledger(self) -> None:
        """Looks whether the ledger still holds what this run has published.

        Raises:
            CheckpointError: If it misses a release.
        """
        lost = set(self.published) - (self.ledger().rounds() if self.published else set())
        if lost:
            raise CheckpointError(
                f"protofed_ledger: {self._ledger_path()} does not hold the releases {', '.join(sorted(lost)[:3])} that "
                f"this run has published; a budget that forgets them would be exceeded. Restore the file"
            )

    # -- a stage ----------------------------------------------------------------------------------------------------

    def only_pass(self, ctx: StageContext, passes: list[Pass]) -> Pass:
        """Returns the strategy's one pass.

        Raises:
            ConfigError: If it wants more than one, or new weights.
        """
        if len(passes) > 1 or (passes[0].init == "fresh" and self.phase != BACKBONE):
            raise ConfigError(
                f"strategy: {ctx.config.strategy_name} cannot serve {type(self).__name__}, whose backbone is trained "
                f"once, on the base stage; use FineTune or Pretrain"
            )
        return passes[0]

    # -- items that the base stage never saw ------------------------------------------------------------------------

    @property
    def scores_untrained_items(self) -> bool:  # type: ignore[override]
        """Tells whether an item that the backbone never saw has a row all the same."""
        return bool(self.config["protofed_new_items"] != "cold")

    @property
    def rowed(self) -> torch.Tensor:
        """Flags of the items that have a row of their own, trained or made of their content, shape ``[n_items]``."""
        return self.seen if self.vectors is None else self.seen | torch.from_numpy(np.isfinite(self.vectors[:, 0]))

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

    def count_unseen(self, ctx: StageContext) -> None:
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

    def queries_of(self, sequence: torch.Tensor) -> torch.Tensor:
        """Returns q of histories: the mean embedding of their items, shape ``[B, d]``."""
        lengths = (sequence > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.backbone.item_embedding(sequence).sum(dim=1) / lengths

    def behind_prompts(self, sequence: torch.Tensor) -> Behind:
        """Returns what gives the frozen backbone's outputs behind prompts; histories are looked up once."""
        layers, embedded = self.backbone.trm_encoder.layer, self.backbone._embed(sequence)
        kept = projections(layers[0], embedded)

        def first(prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return layer_outputs_behind(layers[0], prompts, embedded, kept, mask)

        def behind(prompts: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return prompted_outputs(layers, embedded, prompts, layer_outputs, wanted, first)

        return behind

    def readable(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns histories without the items that have no row, and where each item ended; see :func:`without`."""
        dropped = ~self.seen.to(sequence.device)[sequence] if not self.scores_untrained_items else sequence < 0
        return without(sequence, dropped)


def _vectors(config: Any, dataset: Any, n_items: int) -> np.ndarray | None:
    """Returns the items' content, where it makes the rows of new items."""
    if config["protofed_new_items"] != "vectors":
        return None
    if not config["protofed_item_vectors"]:
        raise ConfigError("protofed_item_vectors: protofed_new_items is 'vectors'; give the file that they are in")
    tokens = dataset.stream.dataset.field2id_token[dataset.iid_field][:n_items]
    return read_vectors(config["protofed_item_vectors"], [str(token) for token in tokens], "protofed_item_vectors")


def trained_items(ctx: StageContext) -> torch.Tensor:
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
