"""The contract of an aggregator, and what all of them share: assignment, separation, pruning.

An aggregator turns the sums of the users' blocks into new prototypes. It never sees a block of one user, and everything
that it does to a sum comes after the noise, so it costs no privacy. A round takes ``steps`` releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np


class Aggregator:
    """Base of the aggregators.

    Args:
        parameters: Its own parameters, without prefix.

    Attributes:
        prefix: What its properties begin with.
        steps: Releases of a round.
        private: It releases sums of clipped vectors only, so noise protects them.
        why_not_private: The reason where it does not.
    """

    prefix: ClassVar[str] = ""
    private: ClassVar[bool] = True
    why_not_private: ClassVar[str] = ""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.params = dict(parameters)

    @property
    def steps(self) -> int:
        """Releases of a round."""
        return 1

    def vectors(self, uploads: np.ndarray, rows: np.ndarray, prototypes: np.ndarray, radius: float) -> np.ndarray:
        """Returns what each user adds to the row of its prototype, shape ``[n, d']``; it is clipped to ``radius``.

        Args:
            uploads: The users' vectors, shape ``[n, d']``.
            rows: Their prototypes, shape ``[n]``.
            prototypes: As the step before left them, shape ``[K, d']``.
            radius: R.
        """
        return uploads

    def step(
        self, prototypes: np.ndarray, sums: np.ndarray, counts: np.ndarray, noise: float, radius: float
    ) -> np.ndarray:
        """Returns the prototypes after a release.

        Args:
            prototypes: Before, shape ``[K, d']``.
            sums: Noisy sums of :meth:`vectors`, shape ``[K, d']``.
            counts: Noisy numbers of users, shape ``[K]``.
            noise: Standard deviation of the noise on a count.
            radius: R.
        """
        raise NotImplementedError

    def round(
        self, uploads: np.ndarray, prototypes: np.ndarray, radius: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns prototypes, numbers of users and new beginnings of a whole round, of an aggregator without noise.

        Args:
            uploads: The users' vectors, shape ``[n, d']``.
            prototypes: Before, shape ``[K, d']``.
            radius: R.
            generator: Draws.
        """
        raise NotImplementedError

    def sends(self, drift: np.ndarray) -> np.ndarray:
        """Returns flags of the clients that upload; all, where who takes part must not depend on data.

        Args:
            drift: Of each client, shape ``[n]``.
        """
        return np.ones(len(drift), dtype=bool)

    def described(self, n_releases: int, sampling: float, delta: float, radius: float) -> dict[str, str]:
        """Returns rows of its own for the report's table of privacy.

        Args:
            n_releases: Releases of the run.
            sampling: Chance by which a client takes part.
            delta: The delta.
            radius: R.
        """
        return {}

    def finish(
        self, prototypes: np.ndarray, counts: np.ndarray, noise: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        """Returns the prototypes kept apart, those that nobody uses begun anew, and how many those are.

        Args:
            prototypes: Shape ``[K, d']``.
            counts: Noisy numbers of users of the round's last step, shape ``[K]``.
            noise: Standard deviation of the noise on a count.
            generator: Draws where a prototype begins anew.
        """
        return prototypes, 0


def nearest(vectors: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Returns the nearest prototype of each vector, the first of equally near ones, shape ``[n]``."""
    gaps = (vectors**2).sum(1)[:, None] - 2 * vectors @ prototypes.T + (prototypes**2).sum(1)
    return gaps.argmin(axis=1)  # type: ignore[no-any-return]


def separate(prototypes: np.ndarray, margin: float, rounds: int = 20) -> np.ndarray:
    """Returns prototypes moved apart until any two are ``margin`` apart, as far as some rounds of moving get.

    Args:
        prototypes: Shape ``[K, d']``.
        margin: Least distance rho.
        rounds: Each moves every close pair apart by half of what is missing, as the paper's Algorithm 2 does.
    """
    moved = prototypes.copy()
    for _ in range(rounds):
        still = True
        for i in range(len(moved)):
            for j in range(i + 1, len(moved)):
                gap = moved[i] - moved[j]
                length = float(np.linalg.norm(gap))
                if length >= margin * (1 - 1e-9):
                    continue
                still = False
                if length > 0:
                    way = gap / length
                else:  # two in one place have no way apart; any that depends on nothing but their numbers will do
                    way = np.zeros_like(gap)
                    way[(i + j) % len(gap)] = 1.0
                moved[i] += (margin - length) / 2 * way
                moved[j] -= (margin - length) / 2 * way
        if still:
            break
    return moved


def revive(
    prototypes: np.ndarray, counts: np.ndarray, least: float, spread: float, generator: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Returns the prototypes with those that too few use begun anew beside the ones that most use.

    Args:
        prototypes: Shape ``[K, d']``.
        counts: Noisy numbers of users, shape ``[K]``.
        least: A prototype with fewer is begun anew.
        spread: How far from the other it begins, in a direction that is drawn.
        generator: Draws it. The uploads are not asked: k-means++ seeding on them, as printed, would release them.

    Returns:
        The prototypes, and how many have begun anew.
    """
    out, left = prototypes.copy(), counts.astype(np.float64).copy()
    few = np.flatnonzero(counts < least)
    if len(few) == len(counts):
        return out, 0
    left[few] = -np.inf
    for k in few:
        busiest = int(left.argmax())
        direction = generator.normal(size=prototypes.shape[1])
        out[k] = out[busiest] + spread * direction / max(float(np.linalg.norm(direction)), 1e-12)
        left[busiest] /= 2  # its users are now shared
    return out, len(few)
