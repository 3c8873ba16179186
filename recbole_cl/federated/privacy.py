"""Differential privacy of what a server releases: clip, noise, quantise, in this order; and what it costs.

The unit of privacy is the user: of two neighbouring sets of users one has a user more (add or remove one). A user sends
at most one upload a round, a *block* ``[z, w]`` in one row of a matrix ``[K, d + 1]`` that is zero elsewhere: the
clipped vector, ``|z| <= R``, and the weight ``w`` by which a user is counted. So the sum over users moves by at most
``sqrt(R^2 + w^2)`` in L2, and Gaussian noise on *all* its entries, those of empty rows too, hides any user.

Epsilon is never computed here: :func:`epsilon` asks dp-accounting for the privacy loss distribution (PLD) of all
releases together, whose estimate is never below the true one. What the accountant assumes and floating-point noise does
not give (its low bits depend on the sum) is told in the reports that this module's figures are printed in.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from recbole_cl.errors import ConfigError

EXTRA = (
    "the privacy accountant dp-accounting is not installed; pip install 'recbole-cl[federated]', or set "
    "protofed_epsilon: ~, which adds no noise and protects nobody"
)
GRID = 1e-4
"""Width of the cells in which dp-accounting holds privacy losses; it rounds them up."""


@dataclass(frozen=True)
class Release:
    """One release of a sum over users.

    Args:
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity; 0 for none.
        sampling: Chance by which each user takes part, by the server's coins and by nothing in the data.
    """

    noise_multiplier: float
    sampling: float = 1.0

    @property
    def private(self) -> bool:
        """Whether there is noise at all."""
        return self.noise_multiplier > 0


# -- the mechanism --------------------------------------------------------------------------------------------------


def clip(vectors: np.ndarray, radius: float) -> np.ndarray:
    """Returns vectors of norm ``radius`` at most, float64; one with an entry that is not finite becomes zero.

    Args:
        vectors: Shape ``[n, d]``, of any floating-point type.
        radius: R.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    vectors = np.where(np.isfinite(vectors).all(axis=-1, keepdims=True), vectors, 0.0)
    # The largest entry is taken out first: the squares of 1e200 are no numbers any more.
    largest = np.abs(vectors).max(axis=-1, keepdims=True, initial=0.0)
    unit = np.divide(vectors, largest, out=np.zeros_like(vectors), where=largest > 0)
    norm = np.linalg.norm(unit, axis=-1, keepdims=True)
    # Rounding up in the last place must not leave a norm above the radius, on which the sensitivity rests.
    scale = radius * (1.0 - 4 * np.finfo(np.float64).eps)
    with np.errstate(over="ignore"):  # what overflows is outside
        outside = largest * norm > scale
    inside = np.divide(unit, norm, out=np.zeros_like(unit), where=norm > 0) * scale
    return np.where(outside, inside, vectors)


def sensitivity(radius: float, weight: float) -> float:
    """Returns how far one user moves the sum of blocks, in L2: ``sqrt(R^2 + w^2)``."""
    return math.hypot(radius, weight)


def blocks(vectors: np.ndarray, rows: np.ndarray, n_rows: int, radius: float, weight: float) -> np.ndarray:
    """Returns the sum of the users' blocks, shape ``[K, d + 1]``, float64.

    Args:
        vectors: One vector a user, shape ``[n, d]``; they are clipped here.
        rows: The row of each user, shape ``[n]``.
        n_rows: K.
        radius: R.
        weight: w.
    """
    clipped = clip(vectors, radius)
    total = np.zeros((n_rows, clipped.shape[1] + 1))
    np.add.at(total[:, :-1], rows, clipped)
    np.add.at(total[:, -1], rows, weight)
    return total


def add_noise(total: np.ndarray, scale: float, generator: np.random.Generator) -> np.ndarray:
    """Returns a sum with Gaussian noise on each of its entries.

    Args:
        total: Any shape.
        scale: Standard deviation of the noise: noise multiplier times sensitivity.
        generator: Who draws.
    """
    return total if scale == 0 else total + generator.normal(0.0, scale, size=total.shape)


def quantise(values: np.ndarray, bits: int = 8) -> np.ndarray:
    """Returns values rounded to ``2**bits`` levels between the least and the largest of each column.

    It comes after the noise, so it takes nothing from privacy; 0 bits leave the values as they are.

    Args:
        values: Shape ``[n, d]``.
        bits: Bits of a value.
    """
    if bits == 0:
        return values
    low, high = values.min(axis=0), values.max(axis=0)
    step = (high - low) / (2**bits - 1)
    safe = np.where(step > 0, step, 1.0)
    return low + np.round((values - low) / safe) * step  # type: ignore[no-any-return]


# -- what it costs --------------------------------------------------------------------------------------------------


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Returns the epsilon of all releases together, by dp-accounting's PLD; infinite if one of them has no noise.

    Args:
        releases: What was released.
        delta: The delta.

    Raises:
        ConfigError: If dp-accounting is not installed.
    """
    counted = Counter(releases)
    if not counted:
        return 0.0
    if not all(release.private for release in counted):
        return math.inf
    rounds = tuple(sorted((r.noise_multiplier, r.sampling, n) for r, n in counted.items()))
    return _epsilon(rounds, delta, GRID)


@functools.lru_cache(maxsize=1024)
def _epsilon(releases: tuple[tuple[float, float, int], ...], delta: float, grid: float) -> float:
    try:
        import dp_accounting
        from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    accountant = PLDAccountant(value_discretization_interval=grid)
    for multiplier, sampling, count in releases:
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(multiplier)
        if sampling < 1:
            event = dp_accounting.PoissonSampledDpEvent(sampling, event)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=64)
def noise_multiplier(budget: float, delta: float, n_releases: int, sampling: float = 1.0) -> float:
    """Returns the least noise multiplier, to three digits and rounded up, with which a number of releases fit a budget.

    Args:
        budget: Epsilon of all releases together; infinite for no noise.
        delta: The delta.
        n_releases: Number of releases.
        sampling: Chance by which each user takes part in a release.

    Raises:
        ConfigError: If dp-accounting is not installed, or the budget is no number above 0.
    """
    if math.isinf(budget) or n_releases == 0:
        return 0.0
    if not budget > 0:
        raise ConfigError(f"protofed_epsilon: {budget!r} is no number above 0; give a budget, or ~ for no noise")
    low, high = 0.0, 1.0
    spent = functools.partial(_of_alike, n_releases=n_releases, sampling=sampling, delta=delta)
    while spent(high, grid=10 * GRID) > budget:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle, grid=10 * GRID) <= budget else (middle, high)
    found = math.ceil(high * 1000) / 1000
    while spent(found, grid=GRID) > budget:  # the coarse cells rounded up more, so this is rarely needed
        found = math.ceil(found * 1001) / 1000
    return found


def _of_alike(multiplier: float, n_releases: int, sampling: float, delta: float, grid: float) -> float:
    return _epsilon(((multiplier, sampling, n_releases),), delta, grid)


# -- how many prototypes a budget allows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What a server can learn from so many users at such noise.

    Args:
        prototypes: K.
        width: d', numbers of a prototype.
        noise_ratio: Length of the noise on a prototype of average size, over R.
    """

    prototypes: int
    width: int
    noise_ratio: float


def noise_ratio(n_users: float, prototypes: int, width: int, multiplier: float, radius: float, weight: float) -> float:
    """Returns the expected length of the noise on the mean of ``n_users / K`` vectors, over R."""
    if multiplier == 0:
        return 0.0
    scale = multiplier * sensitivity(radius, weight)
    return scale * math.sqrt(width) * prototypes / (max(n_users, 1.0) * radius)


def pick_sizes(
    n_users: float,
    multiplier: float,
    radius: float,
    weight: float,
    limit: float,
    prototypes: Sequence[int],
    widths: Sequence[int],
) -> Sizes:
    """Returns the most prototypes whose noise stays below a limit: as many of them as they have numbers, or nearly.

    Args:
        n_users: Users who take part in a release.
        multiplier: Noise multiplier of a release.
        radius: R.
        weight: w.
        limit: Largest noise over R that is allowed.
        prototypes: The K to choose from.
        widths: The d' to choose from.

    Raises:
        ConfigError: If noise drowns even the smallest.
    """
    found = [Sizes(k, d, noise_ratio(n_users, k, d, multiplier, radius, weight)) for k in prototypes for d in widths]
    fitting = [sizes for sizes in found if sizes.noise_ratio <= limit]
    if not fitting:
        least = min(found, key=lambda sizes: sizes.noise_ratio)
        raise ConfigError(
            f"protofed_epsilon: with {n_users:.0f} users a release and a noise multiplier of {multiplier:.3g}, the "
            f"noise on each of {least.prototypes} prototypes of {least.width} numbers is {least.noise_ratio:.2g} times "
            f"as long as what it hides (at most {limit:g} by protofed_noise_limit): it would drown them. Give a larger "
            f"protofed_epsilon, fewer stages or rounds, more users, or protofed_static: True, which releases nothing"
        )
    return max(fitting, key=lambda s: (min(s.prototypes, s.width), s.prototypes * s.width, s.prototypes))
