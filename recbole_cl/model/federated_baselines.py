"""FedAvg-Finetune, FedProx, Ditto and FedRAP in the protocol of ProtoFed-SP, on all weights or on few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from recbole.data.interaction import Interaction

from recbole_cl.errors import ConfigError
from recbole_cl.federated.client import LOSSES, Behind, Examples
from recbole_cl.federated.local import (
    METHODS,
    SCHEDULES,
    OwnWeights,
    Weights,
    copies,
    descend,
    descend_apart,
    flat,
    strength,
    together,
)
from recbole_cl.model.all_positions import last_items
from recbole_cl.model.contract import StageTrainer
from recbole_cl.model.federated_base import BACKBONE, FederatedModel, trained_items
from recbole_cl.model.federated_parts import PARTS, TABLE
from recbole_cl.model.federated_rounds import FederatedRounds
from recbole_cl.model.protofed_plan import make_mechanism
from recbole_cl.model.protofed_report import privacy_rows, traffic
from recbole_cl.registry import models
from recbole_cl.stream.stage import Targets

if TYPE_CHECKING:
    from recbole_cl.strategy.context import Pass, StageContext

START, ROUNDS = "start", "rounds"
"""The second pass of the first stage, rounds on base data without noise, and the pass of all later stages."""


@models.register()
class Federated(FederatedModel):
    """A federated baseline: clients train copies of global weights, a server averages what changed.

    The first stage trains the backbone, as in ProtoFed-SP, and lets the part that clients train begin on base data. In
    every later stage clients train on their own targets and send what changed. Without noise a client counts by its
    targets; with noise all count alike, clipped to ``protofed_radius``.

    Args:
        config: The run's configuration.
        dataset: The stage's view.

    Attributes:
        part: What clients train; its weights are the global ones.
        own: What clients keep to themselves.
        rounds: Rounds so far.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "federated_method": METHODS,
        "federated_part": tuple(PARTS),
        "fedrap_schedule": SCHEDULES,
        "protofed_loss": LOSSES,
    }

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.method, kind = config["federated_method"], config["federated_part"]
        whole = kind == "whole"
        if whole and self.method == "FedRAP":
            raise ConfigError(
                "federated_part: 'whole' is no part of FedRAP, which adds two tables; use 'prompt' or 'adapter', or "
                "the model FedRAP for tables of items"
            )
        if whole and config["protofed_new_items"] != "cold":
            raise ConfigError(
                f"protofed_new_items: {config['protofed_new_items']!r} with federated_part 'whole', whose clients "
                f"train the rows of new items; leave it at 'cold'"
            )
        self.mechanism, self.n_releases = make_mechanism(config, dataset.stream, 1)
        self.part = PARTS[kind](self)
        self.own = OwnWeights(self.part.weights())
        self.rounds = 0

    @property
    def at_once(self) -> int:
        """Clients in a batch."""
        return self.part.at_once

    @property
    def trains_rows(self) -> bool:
        """Tells whether clients train rows of items, so that new items are learnt."""
        return self.part.private

    # -- state ------------------------------------------------------------------------------------------------------

    def owned_state(self) -> dict[str, Any]:
        """Returns what the clients keep and what the server has published."""
        return {"own": self.own.state_dict(), "rounds": self.rounds, **super().owned_state()}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
        super().load_owned_state(state)
        self.own.load_state_dict(state["own"])
        self.rounds = int(state["rounds"])

    @property
    def rowed(self) -> torch.Tensor:
        """Flags of the items that have a row of their own, shape ``[n_items]``."""
        if not self.trains_rows or self.phase == BACKBONE:
            return super().rowed
        return torch.arange(self.n_items) > 0

    # -- a stage ----------------------------------------------------------------------------------------------------

    def prepare_stage(self, ctx: StageContext) -> None:
        """Gives items that the base stage never saw their rows, and clients those of items that came since.

        Raises:
            CheckpointError: If the ledger misses a release that this run has published.
        """
        self.check_ledger()
        self.notes = {}
        if self.phase != BACKBONE:
            self.own.widen(self.part.weights())
            if not self.trains_rows:
                self.fill_unseen()
            self.count_unseen(ctx)

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        """Returns the backbone's pass and the first rounds, or the pass of the rounds."""
        if not passes:
            return passes
        plan = self.only_pass(ctx, passes)
        if self.phase != BACKBONE:
            return [replace(plan, name=ROUNDS, epochs=int(self.config["protofed_rounds"]), early_stopping=False)]
        first = [replace(plan, name=BACKBONE)]
        base = int(self.config["federated_base_rounds"])
        return [*first, replace(plan, name=START, init="previous", epochs=base, early_stopping=False)]

    def begin_pass(self, ctx: StageContext) -> None:
        """Lets RecBole's trainer train the backbone; clients train copies."""
        self.backbone.requires_grad_(ctx.pass_.name == BACKBONE)
        for parameter in self.part.parameters():
            parameter.requires_grad_(False)

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> StageTrainer | None:
        """Returns the trainer of the rounds; the backbone has RecBole's."""
        if ctx.pass_.name == BACKBONE:
            self.phase = BACKBONE
            return None
        if self.phase == BACKBONE:
            self.phase, self.seen = "rounds", trained_items(ctx)
        if not self.trains_rows:
            self.fill_unseen()
        self.count_unseen(ctx)
        return FederatedRounds(self, ctx, private=ctx.pass_.name == ROUNDS)

    def learned(self, ctx: StageContext, targets: Targets) -> Targets:
        """Returns the targets that are trained on: all, where clients train rows of items."""
        if self.phase == BACKBONE or self.trains_rows:
            return targets
        warm = targets[self.rowed.numpy()[targets.label]]
        return replace(warm, lo=warm.hi)

    # -- clients ----------------------------------------------------------------------------------------------------

    def global_weights(self) -> dict[str, torch.Tensor]:
        """Returns what the server averages, by name."""
        return self.part.weights()

    def load_global(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes the server's new weights."""
        self.part.load(weights)

    def train_clients(self, users: torch.Tensor, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets clients take their local steps; what stays with them is kept.

        Returns:
            What changed of their copies of the global weights, ``[C, P]``, and their losses before, ``[C]``.
        """
        config, losses = self.config, self.part.losses(examples)
        start = copies(self.part.weights(), len(users))
        steps, rate, pull = self._pace(), float(config["federated_rate"]), float(config["federated_proximal"])
        if self.method == "FedRAP":
            nothing = {name: torch.zeros_like(value[0]) for name, value in start.items()}
            schedule, size = config["fedrap_schedule"], float(flat(start).size(1))
            apart = strength(float(config["fedrap_apart"]), schedule, self.rounds)
            sparse = strength(float(config["fedrap_sparse"]), schedule, self.rounds)
            own = self.own.get(users, nothing)
            common, own, first = descend_apart(losses, start, own, steps, rate, apart, sparse, size)
            self.own.put(users, own)
            return flat(common) - flat(start), first
        after, first = descend(losses, start, steps, rate, start, pull if self.method == "FedProx" else 0.0)
        if self.method == "Ditto":
            own = self.own.get(users, self.part.weights())
            self.own.put(users, descend(losses, own, steps, rate, start, pull)[0])
        return flat(after) - flat(start), first

    def end_rounds(self, users: torch.Tensor, examples: Examples) -> None:
        """Lets the clients of a stage go on from its last global weights; what they learn stays with them."""
        if self.method == "FedAvgFinetune":
            losses, start = self.part.losses(examples), copies(self.part.weights(), len(users))
            self.own.put(users, descend(losses, start, self._pace(), float(self.config["federated_rate"]))[0])

    def _pace(self) -> int:
        return int(self.config["protofed_steps"])

    # -- answers ----------------------------------------------------------------------------------------------------

    def readable(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns histories without the items that have no row."""
        if not self.trains_rows:
            return super().readable(sequence)
        places = torch.arange(sequence.size(1), device=sequence.device)
        return sequence, places.expand_as(sequence)

    def weights_of(self, users: torch.Tensor) -> Weights:
        """Returns what users answer with: their own weights, or the global ones."""
        given = self.part.weights()
        if self.method == "FedProx":
            return copies(given, len(users))
        if self.method == "FedRAP":
            nothing = {name: torch.zeros_like(value) for name, value in given.items()}
            return together(copies(given, len(users)), self.own.get(users, nothing))
        return self.own.get(users, given)

    def represent(self, batch: Interaction) -> torch.Tensor:
        """Returns the representation of each history with its user's weights, shape ``[B, d]``."""
        return self._answers(batch)[0]

    def _answers(self, batch: Interaction, items: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the representations, and the scores of given items, by default of all, with each user's table."""
        sequence, lengths = batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]
        if self.phase != BACKBONE:
            sequence, _ = self.readable(sequence)
            lengths = (sequence > 0).sum(dim=1).clamp(min=1)
        sequence = sequence[:, : int(lengths.max())]
        wanted = last_items(lengths, sequence.size(1))
        if self.phase == BACKBONE:
            hidden = self.backbone.outputs(sequence, wanted)
            return hidden, self._scores(hidden, self.backbone.item_embedding.weight, items)
        users, owner = batch[self.USER_ID].unique(return_inverse=True)
        hidden = sequence.new_zeros(len(sequence), self.backbone.item_embedding.embedding_dim, dtype=torch.float32)
        scores = hidden.new_zeros(len(sequence), self.n_items if items is None else items.size(1))
        for chunk in torch.arange(len(users)).split(self.part.at_once):
            rows = torch.isin(owner, chunk)
            weights = self.weights_of(users[chunk].cpu())
            found = self.part.outputs(weights, owner[rows] - chunk[0], sequence[rows], wanted[rows])
            hidden[rows] = found
            mine = None if items is None else items[rows]
            if self.trains_rows:
                for place, user in enumerate(chunk.tolist()):
                    one = owner == user
                    given = None if items is None else items[one]
                    scores[one] = self._scores(hidden[one], weights[TABLE][place], given)
            else:
                scores[rows] = self._scores(found, self.backbone.item_embedding.weight, mine)
        return hidden, scores

    @staticmethod
    def _scores(hidden: torch.Tensor, table: torch.Tensor, items: torch.Tensor | None) -> torch.Tensor:
        return hidden @ table.T if items is None else (table[items] @ hidden.unsqueeze(-1)).squeeze(-1)

    def outputs(self, sequence: torch.Tensor) -> Behind:
        """Returns what gives the frozen backbone's outputs behind prompts."""
        return self.behind_prompts(sequence)

    def item_queries(self, batch: Interaction) -> torch.Tensor:
        """Returns what scores items by :meth:`score_queries`, shape ``[B, d]``."""
        return self.represent(batch)

    def score_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns the scores of all items, shape ``[B, n_items]``."""
        return queries @ self.backbone.item_embedding.weight.T

    def scores_by_queries(self) -> bool:
        """Tells whether all users share one table of items."""
        return not self.trains_rows

    def full_sort_predict(self, batch: Interaction) -> torch.Tensor:
        """Returns the scores of all items, shape ``[B, n_items]``."""
        return self._answers(batch)[1]

    def scores(self, batch: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Returns the scores of given items, shape ``[B, C]``."""
        return self._answers(batch, items)[1]

    def predict(self, batch: Interaction) -> torch.Tensor:
        """Returns the score of each row's item."""
        return self.scores(batch, batch[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    # -- what is told -------------------------------------------------------------------------------------------------

    def stage_costs(self) -> dict[str, Any]:
        """Returns what a client sends and gets in the stage, and how many numbers it trains."""
        keys = ("clients", "bytes_up_per_client", "bytes_down_per_client")
        own = sum(value.numel() for value in self.part.weights().values())
        twice = self.method in ("Ditto", "FedRAP")
        return {"trainable_per_client": own * (1 + twice), **{key: self.notes.get(key, 0) for key in keys}}

    def report(self) -> dict[str, Any]:
        """Returns the stage's privacy, traffic and share of targets that the base stage never saw."""
        numbers, tables = traffic(self)
        if self.phase != BACKBONE:
            epsilon, rows = privacy_rows(self, self.mechanism, self.n_releases, {"method": self._told()})
            numbers |= epsilon
            tables["Privacy"] = rows
            if self.notes.get("rounds"):
                tables["Rounds"] = self.notes["rounds"]
            if self.notes.get("refused"):
                tables["Refused uploads"] = [{"reason": why, "uploads": n} for why, n in self.notes["refused"].items()]
        return {"numbers": numbers, "tables": tables}

    def _told(self) -> str:
        schedule = f", lambda and mu {self.config['fedrap_schedule']}" if self.method == "FedRAP" else ""
        return f"{self.method} on {self.config['federated_part']}{schedule}"
