"""Local training of weights that clients copy: FedAvg, FedProx, Ditto and FedRAP, for a batch of clients at once.

Weights are named tensors with a client in each row, ``[C, ...]``. Losses are summed over clients, and no client's loss
reads another one's row, so a gradient's row is that of its client alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Weights = dict[str, torch.Tensor]
"""Names to tensors, a client a row."""
Losses = Callable[[Weights], torch.Tensor]
"""The mean loss of each client's targets with its row of the weights, shape ``[C]``."""

METHODS = ("FedAvgFinetune", "FedProx", "Ditto", "FedRAP")
SCHEDULES = ("constant", "tanh")


def copies(weights: Mapping[str, torch.Tensor], n: int) -> Weights:
    """Returns weights for so many clients, all the same."""
    return {name: value.detach().expand(n, *value.shape).clone() for name, value in weights.items()}


def gradients(losses: Losses, *parts: Weights) -> tuple[list[Weights], torch.Tensor]:
    """Returns the gradients of each client's loss on several groups of weights, and the losses."""
    held = [{name: value.detach().requires_grad_(True) for name, value in part.items()} for part in parts]
    found = losses(*held)
    flat = [value for part in held for value in part.values()]
    slopes = iter(torch.autograd.grad(found.sum(), flat, allow_unused=True, materialize_grads=True))
    return [{name: next(slopes) for name in part} for part in held], found.detach()


def descend(
    losses: Losses,
    start: Weights,
    steps: int,
    rate: float,
    anchor: Weights | None = None,
    pull: float = 0.0,
) -> tuple[Weights, torch.Tensor]:
    """Returns weights after gradient steps on ``F(w) + pull/2 |w - anchor|^2``, and the losses F before them.

    With ``pull`` it is FedProx's local objective (Li et al. 2020, eq. 2), the anchor being the round's global weights;
    and that of Ditto's own weights (Li et al. 2021, eq. 1), which start where the client left them.

    Args:
        losses: F.
        start: Where they begin.
        steps: Steps.
        rate: Step size, for the mean loss of a client's targets.
        anchor: What they are pulled to; not needed without ``pull``.
        pull: mu of FedProx, lambda of Ditto.
    """
    weights, first = start, torch.zeros(0)
    for number in range(steps):
        (slopes,), found = gradients(losses, weights)
        first = found if number == 0 else first
        if pull:
            assert anchor is not None
            slopes = {name: slope + pull * (weights[name] - anchor[name]) for name, slope in slopes.items()}
        weights = {name: value - rate * slopes[name] for name, value in weights.items()}
    return weights, first


def descend_apart(
    losses: Losses,
    common: Weights,
    own: Weights,
    steps: int,
    rate: float,
    apart: float,
    sparse: float,
    sizes: torch.Tensor | float,
) -> tuple[Weights, Weights, torch.Tensor]:
    """Returns FedRAP's common and own weights after gradient steps, and the losses before them (Li et al. 2024).

    A client uses ``common + own`` and minimises ``F - apart MSE(own, common) + sparse mean|common|``.

    Args:
        losses: F, of the weights that a client uses.
        common: What is averaged, C.
        own: What stays with the client: D for each name of C, and further ones.
        steps: Steps.
        rate: Step size.
        apart: lambda, how strongly both are driven apart.
        sparse: mu, weight of the l1 norm of C.
        sizes: Numbers in C of each client, ``[C]`` or one for all: rows of zeros that pad C and D do not count.
    """

    def objective(common: Weights, own: Weights) -> torch.Tensor:
        found = losses(together(common, own))
        squares = sum((own[name] - value).square().flatten(1).sum(1) for name, value in common.items())
        lengths = sum(value.abs().flatten(1).sum(1) for value in common.values())
        return found + (sparse * lengths - apart * squares) / sizes

    with torch.no_grad():
        first = losses(together(common, own))
    for _ in range(steps):
        (of_common, of_own), _ = gradients(objective, common, own)  # type: ignore[arg-type]
        common = {name: value - rate * of_common[name] for name, value in common.items()}
        own = {name: value - rate * of_own[name] for name, value in own.items()}
    return common, own, first


def together(common: Weights, own: Weights) -> Weights:
    """Returns what a client of FedRAP uses: the sum where both have a name, else its own."""
    return {**own, **{name: own[name] + value for name, value in common.items()}}


def strength(value: float, schedule: str, number: int) -> float:
    """Returns FedRAP's lambda or mu in a round.

    The paper lets both grow as ``tanh(t / 10)``; the authors' code computes that and goes on with the constant. Both
    readings are offered.

    Args:
        value: The property.
        schedule: One of :data:`SCHEDULES`.
        number: Rounds before this one, t.
    """
    return value * float(torch.tanh(torch.tensor(number / 10.0))) if schedule == "tanh" else value


def flat(weights: Weights) -> torch.Tensor:
    """Returns the weights of each client as one row, shape ``[C, P]``."""
    return torch.cat([value.flatten(1) for value in weights.values()], dim=1)


def unflat(row: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns one row as tensors of the names and shapes of others."""
    parts = row.split([value.numel() for value in like.values()])
    return {name: part.view_as(like[name]) for name, part in zip(like, parts, strict=True)}


class OwnWeights:
    """What clients keep of their own weights, for those who have any; all others have what everybody begins with.

    Args:
        shapes: Names and shapes of one client's.
    """

    def __init__(self, shapes: Mapping[str, torch.Tensor]) -> None:
        self.users = torch.zeros(0, dtype=torch.int64)
        self.rows: Weights = {name: value.new_zeros(0, *value.shape) for name, value in shapes.items()}
        self._place: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.users)

    def get(self, users: torch.Tensor, others: Mapping[str, torch.Tensor]) -> Weights:
        """Returns the weights of users; who has none gets ``others``."""
        places = torch.tensor([self._place.get(user, -1) for user in users.tolist()], dtype=torch.int64)
        have, found = places >= 0, copies(others, len(places))
        for name, rows in self.rows.items():
            found[name][have] = rows[places[have]].to(found[name])
        return found

    def put(self, users: torch.Tensor, weights: Weights) -> None:
        """Keeps the weights of users, each of whom stands there once."""
        new = [number for number, user in enumerate(users.tolist()) if user not in self._place]
        for number in new:
            self._place[int(users[number])] = len(self._place)
        self.users = torch.cat([self.users, users[new]])
        places = torch.tensor([self._place[user] for user in users.tolist()], dtype=torch.int64)
        for name, value in weights.items():
            rows = self.rows[name]
            if new:
                rows = torch.cat([rows, value.detach()[new].to(rows)])
            rows[places] = value.detach().to(rows)
            self.rows[name] = rows

    def widen(self, now: Mapping[str, torch.Tensor]) -> None:
        """Gives each client the rows of items that came since, as everybody has them now."""
        for name, rows in self.rows.items():
            value = now[name].detach()
            if rows.shape[1:] != value.shape:
                more = value[rows.size(1) :].expand(len(rows), *value[rows.size(1) :].shape)
                self.rows[name] = torch.cat([rows, more.to(rows)], dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows."""
        return {"users": self.users, "rows": dict(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the rows back."""
        self.users = state["users"].clone()
        self.rows = {name: value.clone() for name, value in state["rows"].items()}
        self._place = {user: place for place, user in enumerate(self.users.tolist())}
