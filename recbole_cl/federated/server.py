"""A round of the server: uploads to new prototypes, through the noise and the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recbole_cl.federated.aggregators.base import Aggregator, nearest
from recbole_cl.federated.ledger import Ledger, hash_of
from recbole_cl.federated.privacy import Release, add_noise, blocks, clip, quantise, sensitivity

TRUST = ("central", "local")
"""Who adds the noise: the server, who sees the clipped uploads, or each client to its own upload."""
BLOCKS_AT_ONCE = 1 << 22
"""Numbers of the noise of local blocks that are drawn together."""


@dataclass(frozen=True)
class Mechanism:
    """How a server releases sums.

    Args:
        cost: Noise multiplier and sampling of a release.
        radius: R, the clip radius.
        weight: w, what a user adds to the count's column.
        trust: One of :data:`TRUST`.
        bits: Bits of a number of the prototypes that are sent to the clients; 0 for float32.
    """

    cost: Release
    radius: float = 1.0
    weight: float = 1.0
    trust: str = "central"
    bits: int = 8

    @property
    def scale(self) -> float:
        """Standard deviation of the noise that is added, on one number, by whoever adds it."""
        return self.cost.noise_multiplier * sensitivity(self.radius, self.weight)

    def noise_of(self, n_users: int) -> float:
        """Returns the standard deviation of the noise on a number of the released sum."""
        return self.scale * (n_users**0.5 if self.trust == "local" else 1.0)


@dataclass(frozen=True)
class ServerRound:
    """What a round gave.

    Attributes:
        prototypes: Shape ``[K, d']``, as the clients get them.
        counts: Noisy numbers of users, shape ``[K]``.
        noise: Standard deviation of the noise on a number of users.
        revived: Prototypes that began anew.
    """

    prototypes: np.ndarray
    counts: np.ndarray
    noise: float
    revived: int

    def noise_ratio(self, width: int, radius: float, weight: float) -> float:
        """Returns the length of the noise on a prototype of average size, over R; from the noisy counts."""
        mean = max(float(self.counts.sum()) / len(self.counts), 1.0)
        return float(self.noise * weight * width**0.5 / (mean * radius))


def server_round(
    aggregator: Aggregator,
    uploads: np.ndarray,
    prototypes: np.ndarray,
    mechanism: Mechanism,
    ledger: Ledger,
    round_id: str,
    generator: Callable[[str], np.random.Generator],
) -> ServerRound:
    """Returns the prototypes after a round.

    Args:
        aggregator: Makes prototypes of noisy sums.
        uploads: The accepted vectors, one a user, shape ``[n, d']``; none is fine.
        prototypes: The public prototypes of the round before, shape ``[K, d']``.
        mechanism: How sums are released.
        ledger: Where each release is charged and kept.
        round_id: Name of the round.
        generator: Gives the generator of a name; the noise of a release that is made again must be the same or new.

    Raises:
        BudgetSpent: If the budget does not allow the round.
    """
    radius, weight = mechanism.radius, mechanism.weight
    if not aggregator.private:  # it sees the uploads themselves; the budget is infinite, and the ledger says so
        made: list[int] = []

        def make() -> np.ndarray:
            moved, counts, revived = aggregator.round(uploads, prototypes, radius, generator(f"noise/{round_id}"))
            made.append(revived)
            return np.c_[moved, counts]

        released = ledger.release(f"{round_id}/0", hash_of(uploads, prototypes), mechanism.cost, make)
        kept = quantise(released[:, :-1], mechanism.bits)
        return ServerRound(kept, released[:, -1], 0.0, made[0] if made else 0)
    rows = nearest(clip(uploads, radius), prototypes)
    counts, noise = np.zeros(len(prototypes)), 0.0
    for number in range(aggregator.steps):
        vectors = aggregator.vectors(clip(uploads, radius), rows, prototypes, radius)
        total = blocks(vectors, rows, len(prototypes), radius, weight)
        name = f"{round_id}/{number}"

        released = release(total, len(uploads), mechanism, ledger, name, hash_of(total, prototypes), generator)
        noise = mechanism.noise_of(len(uploads)) / weight
        counts = released[:, -1] / weight
        prototypes = aggregator.step(prototypes, released[:, :-1], counts, noise, radius)
    prototypes, revived = aggregator.finish(prototypes, counts, noise, generator(f"revive/{round_id}"))
    return ServerRound(quantise(prototypes, mechanism.bits), counts, noise, revived)


def release(
    total: np.ndarray,
    n_users: int,
    mechanism: Mechanism,
    ledger: Ledger,
    name: str,
    input_hash: str,
    generator: Callable[[str], np.random.Generator],
) -> np.ndarray:
    """Returns a sum of the users' blocks with noise, charged before it is drawn; the stored one where it was released.

    Args:
        total: The sum, shape ``[K, d' + 1]``.
        n_users: Users in it; each has added noise of its own where nobody else is trusted.
        mechanism: How sums are released.
        ledger: Where the release is charged and kept.
        name: Name of the release.
        input_hash: Hash of what it depends on.
        generator: Gives the generator of a name.
    """

    def make() -> np.ndarray:
        draws = generator(f"noise/{name}")
        if mechanism.trust == "local":
            return _local(total, n_users, mechanism, draws)
        return add_noise(total, mechanism.scale, draws)

    return ledger.release(name, input_hash, mechanism.cost, make)


def _local(total: np.ndarray, n_users: int, mechanism: Mechanism, generator: np.random.Generator) -> np.ndarray:
    """Returns the sum of blocks to which each user has added noise, on all rows of its own."""
    at_once, noisy = max(1, BLOCKS_AT_ONCE // total.size), total.copy()
    for start in range(0, n_users, at_once):
        drawn = generator.normal(0.0, mechanism.scale, size=(min(at_once, n_users - start), *total.shape))
        noisy += drawn.sum(axis=0)
    return noisy


def bytes_of_round(prototypes: int, width: int, parts: int, trust: str, bits: int) -> tuple[int, int]:
    """Returns the bytes that a client sends and gets in a round.

    Args:
        prototypes: K.
        width: d'.
        parts: Steps of the aggregator; each takes an upload and sends the prototypes.
        trust: Who adds the noise: a local block is sent whole, in 8 bits a number and its columns' ranges.
        bits: Bits of a number of the prototypes, 0 for 32.
    """
    row = 4 + 4 * width  # the prototype's number, the clipped vector in float32
    whole = prototypes * (width + 1) + 8 * (width + 1)
    numbers = prototypes * width * (bits or 32) // 8 + (8 * width if bits else 0)
    return parts * (whole if trust == "local" else row), parts * numbers
