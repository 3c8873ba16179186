"""FedRAP: tables of items that are a common and an own part together (Li et al. 2024), without any backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn import functional as F

from recbole_cl.federated.client import Examples
from recbole_cl.federated.local import SCHEDULES, Losses, Weights, descend_apart, strength
from recbole_cl.model.contract import StageTrainer
from recbole_cl.model.federated_base import BACKBONE, FederatedModel, trained_items
from recbole_cl.model.federated_rounds import FederatedRounds
from recbole_cl.model.protofed_plan import make_mechanism
from recbole_cl.model.protofed_report import privacy_rows, traffic
from recbole_cl.registry import models
from recbole_cl.rng import derive, seeded
from recbole_cl.stream.stage import Targets

if TYPE_CHECKING:
    from recbole_cl.strategy.context import Pass, StageContext

START, ROUNDS = "start", "rounds"


@models.register()
class FedRAP(FederatedModel):
    """A user's score of item j is ``a . (D[j] + C[j]) + b``: C is averaged, a, b and D stay with the user.

    An item's own row begins, for every user, as the row of one table that is drawn once, and only the rows of a user's
    targets and negatives ever move; so a user keeps those rows alone, which is exact. The base stage trains in rounds
    without noise, outside the guarantee.

    Args:
        config: The run's configuration.
        dataset: The stage's view.

    Attributes:
        common: C.
        first: The rows that all D begin with.
        own: What users keep: items, their rows of D, a and b.
        rounds: Rounds so far.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fedrap_schedule": SCHEDULES,
        "protofed_new_items": ("cold",),
    }
    backbone_property: ClassVar[str | None] = None
    trains_all_positions = True
    at_once = 64

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.width = int(config["fedrap_width"])
        self.mechanism, self.n_releases = make_mechanism(config, dataset.stream, 1)
        self.common = nn.Parameter(0.1 * torch.randn(self.n_items, self.width), requires_grad=False)
        self.register_buffer("first", 0.1 * torch.randn(self.n_items, self.width))
        with seeded(derive(config["seed"], 0, "fedrap/a")):
            self.start = F.normalize(torch.randn(self.width), dim=0)
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.rounds = 0

    first: torch.Tensor

    def _make_backbone(self, config: Any, dataset: Any) -> Any:  # type: ignore[override]
        return None

    # -- state ------------------------------------------------------------------------------------------------------

    def owned_state(self) -> dict[str, Any]:
        """Returns what the users keep, one after the other, and what the server has published."""
        kept, ids = list(self.own.values()), torch.tensor(list(self.own), dtype=torch.int64)
        counts = torch.tensor([len(items) for items, *_ in kept], dtype=torch.int64)
        rows = {
            "users": ids.repeat_interleave(counts),
            "items": torch.cat([torch.zeros(0, dtype=torch.int64), *(items for items, *_ in kept)]),
            "own": torch.cat([torch.zeros(0, self.width), *(own for _, own, _, _ in kept)]),
        }
        slopes = {
            "users": ids,
            "a": torch.stack([a for _, _, a, _ in kept]) if kept else torch.zeros(0, self.width),
            "b": torch.stack([b for _, _, _, b in kept]) if kept else torch.zeros(0),
        }
        return {"rows": rows, "slopes": slopes, "rounds": self.rounds, **super().owned_state()}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
        super().load_owned_state(state)
        rows, slopes, self.rounds = state["rows"], state["slopes"], int(state["rounds"])
        self.own = {}
        for user, a, b in zip(slopes["users"].tolist(), slopes["a"], slopes["b"], strict=True):
            mine = rows["users"] == user
            self.own[user] = (rows["items"][mine], rows["own"][mine], a.clone(), b.clone())

    @property
    def rowed(self) -> torch.Tensor:
        """Flags of all items: each has a row."""
        return torch.arange(self.n_items) > 0

    # -- a stage ----------------------------------------------------------------------------------------------------

    def prepare_stage(self, ctx: StageContext) -> None:
        """Looks whether the ledger is still there.

        Raises:
            CheckpointError: If it misses a release that this run has published.
        """
        self.check_ledger()
        self.notes = {}
        if self.phase != BACKBONE:
            self.count_unseen(ctx)

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        """Returns the rounds of the base stage, or of a later one."""
        if not passes:
            return passes
        plan, base = self.only_pass(ctx, passes), self.phase == BACKBONE
        rounds = int(self.config["federated_base_rounds" if base else "protofed_rounds"])
        return [replace(plan, name=START if base else ROUNDS, epochs=rounds, early_stopping=False)]

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> StageTrainer | None:
        """Returns the trainer of the rounds."""
        if self.phase == BACKBONE:
            self.phase, self.seen = "rounds", trained_items(ctx)
        self.count_unseen(ctx)
        return FederatedRounds(self, ctx, private=ctx.pass_.name == ROUNDS)

    def readable(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns histories as they are: every item has a row, and none is read for what comes after it."""
        return sequence, torch.arange(sequence.size(1), device=sequence.device).expand_as(sequence)

    def queries_of(self, sequence: torch.Tensor) -> torch.Tensor:
        """Returns nothing: no prototype is asked for."""
        return torch.zeros(len(sequence), 1)

    def learned(self, ctx: StageContext, targets: Targets) -> Targets:
        """Returns all targets; their histories teach nothing."""
        return replace(targets, lo=targets.hi)

    # -- clients ----------------------------------------------------------------------------------------------------

    def global_weights(self) -> dict[str, torch.Tensor]:
        """Returns C."""
        return {"common": self.common.detach()}

    def load_global(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes the server's new C."""
        self.common.data.copy_(weights["common"])

    def train_clients(self, users: torch.Tensor, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets clients take their local steps on the rows of their targets and negatives."""
        config, places = self.config, Touched(examples)
        own = self._rows_of(users, places)
        common = {"rows": self.common.detach()[places.items] * places.real}
        schedule = config["fedrap_schedule"]
        apart = strength(float(config["fedrap_apart"]), schedule, self.rounds)
        sparse = strength(float(config["fedrap_sparse"]), schedule, self.rounds)
        sizes = places.real.sum((1, 2)) * self.width
        steps, rate = int(config["protofed_steps"]), float(config["federated_rate"])
        after, own, first = descend_apart(places.losses(), common, own, steps, rate, apart, sparse, sizes)
        for client, user in enumerate(users.tolist()):
            self._keep(user, places.items[client], own, client, int(places.real[client].sum()))
        changed = torch.zeros(len(users), self.n_items, self.width)
        moved = (after["rows"] - common["rows"]) * places.real
        changed.scatter_add_(1, places.items.unsqueeze(-1).expand_as(moved), moved)
        return changed.flatten(1), first

    def end_rounds(self, users: torch.Tensor, examples: Examples) -> None:
        """Does nothing: a user's own rows are trained in its rounds."""

    def _rows_of(self, users: torch.Tensor, places: Touched) -> Weights:
        """Returns what users have of some items, those that nobody touched as everybody begins with them."""
        rows, a, b = self.first[places.items] * places.real, [], []
        for client, user in enumerate(users.tolist()):
            items, mine, slope, offset = self.own.get(user, (None, None, self.start, torch.zeros(())))
            a.append(slope)
            b.append(offset)
            if items is not None and mine is not None and len(items):
                asked = places.items[client]
                at = torch.searchsorted(items, asked).clamp(max=len(items) - 1)
                have = (items[at] == asked) & (places.real[client, :, 0] > 0)
                rows[client, have] = mine[at[have]]
        return {"rows": rows, "a": torch.stack(a), "b": torch.stack(b)}

    def _keep(self, user: int, items: torch.Tensor, own: Weights, client: int, n: int) -> None:
        """Keeps what a client has learnt; its items stay sorted."""
        items, rows = items[:n], own["rows"][client, :n]
        if user in self.own:
            old, old_rows = self.own[user][:2]
            left = ~torch.isin(old, items)
            items, rows = torch.cat([old[left], items]), torch.cat([old_rows[left], rows])
        order = items.argsort()
        self.own[user] = (items[order], rows[order], own["a"][client].clone(), own["b"][client].clone())

    # -- answers ----------------------------------------------------------------------------------------------------

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        """Returns zero: nobody but clients trains it."""
        return self.common.sum() * 0.0

    def full_sort_predict(self, batch: Interaction) -> torch.Tensor:
        """Returns the scores of all items, shape ``[B, n_items]``."""
        users, owner = batch[self.USER_ID].unique(return_inverse=True)
        table, found = self.common.detach() + self.first, []
        for user in users.tolist():
            items, rows, a, b = self.own.get(
                user, (torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.width), self.start, torch.zeros(()))
            )
            scores = table @ a + b
            scores[items] += (rows - self.first[items]) @ a
            found.append(scores)
        return torch.stack(found)[owner]

    def scores(self, batch: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Returns the scores of given items, shape ``[B, C]``."""
        return self.full_sort_predict(batch).gather(1, items)

    def predict(self, batch: Interaction) -> torch.Tensor:
        """Returns the score of each row's item."""
        return self.scores(batch, batch[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    # -- what is told -------------------------------------------------------------------------------------------------

    def stage_costs(self) -> dict[str, Any]:
        """Returns what a client sends and gets in the stage, and how many numbers it trains at most."""
        keys = ("clients", "bytes_up_per_client", "bytes_down_per_client")
        own = 2 * self.common.numel() + self.width + 1
        return {"trainable_per_client": own, **{key: self.notes.get(key, 0) for key in keys}}

    def report(self) -> dict[str, Any]:
        """Returns the stage's privacy, traffic and share of targets that the base stage never saw."""
        numbers, tables = traffic(self)
        if self.phase != BACKBONE:
            described = {"method": f"FedRAP on tables of items, lambda and mu {self.config['fedrap_schedule']}"}
            epsilon, tables["Privacy"] = privacy_rows(self, self.mechanism, self.n_releases, described)
            numbers |= epsilon
            if self.notes.get("rounds"):
                tables["Rounds"] = self.notes["rounds"]
        return {"numbers": numbers, "tables": tables}


class Touched:
    """The items of each client's targets and negatives, padded to the most that one has.

    Args:
        examples: The clients.

    Attributes:
        items: Rising, shape ``[C, J]``, 0 where there is none.
        real: 1 where there is one, shape ``[C, J, 1]``.
    """

    def __init__(self, examples: Examples) -> None:
        supervised = examples.targets > 0
        owner = examples.client.unsqueeze(1).expand_as(supervised)[supervised]
        target, negative = examples.targets[supervised], examples.negatives[supervised]
        n, many = len(examples), negative.size(1)
        everything = torch.cat([target.unsqueeze(1), negative], dim=1)
        biggest = int(everything.max()) + 1 if len(everything) else 1
        keys = (owner.unsqueeze(1) * biggest + everything).flatten().unique()
        client, item = keys // biggest, keys % biggest
        counts = torch.bincount(client, minlength=n)
        inside = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[client]
        width = max(int(counts.max()) if len(keys) else 0, 1)
        self.items = torch.zeros(n, width, dtype=torch.int64)
        self.items[client, inside] = item
        self.real = torch.zeros(n, width, 1)
        self.real[client, inside] = 1.0
        at = inside[torch.searchsorted(keys, owner.unsqueeze(1) * biggest + everything)]
        self._owner, self._at, self._n, self._many = owner, at, n, many

    def losses(self) -> Losses:
        """Returns what gives each client's binary cross-entropy, the mean over its targets."""
        counts = torch.bincount(self._owner, minlength=self._n).clamp(min=1)

        def of(weights: Weights) -> torch.Tensor:
            scores = (weights["rows"] @ weights["a"].unsqueeze(-1)).squeeze(-1) + weights["b"].unsqueeze(-1)
            taken = scores[self._owner.unsqueeze(1), self._at]
            losses = F.softplus(-taken[:, 0]) + F.softplus(taken[:, 1:]).sum(1)
            return torch.zeros(self._n).index_add(0, self._owner, losses) / counts

        return of
