"""An audit: an attack that guesses whether one user took part, and what it proves about epsilon.

A mechanism that is (epsilon, delta)-private bounds every test of two neighbouring inputs: the chance of a right guess
is at most ``exp(epsilon)`` times that of a false one, plus delta. So guesses on many trials prove a *lower* bound on
epsilon, by exact (Clopper-Pearson) intervals on both chances. It never shows that a mechanism is private; it shows that
one is not, or that its epsilon is no larger than claimed as far as this attack sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import beta

Trials = Callable[[bool, int, np.random.Generator], np.ndarray]
"""``trials(with_user, n, generator)``: what the mechanism releases ``n`` times, shape ``[n, m]``."""


def proven_epsilon(trials: Trials, delta: float, n: int, seed: int, chance: float = 1e-4) -> float:
    """Returns an epsilon that the mechanism has at least, up to a chance of being wrong; 0 if nothing is proven.

    Half of the trials choose the guess and its threshold: the projection on the difference of the means over the
    spread, or how far it is from nothing at all. The other half, which had no part in the choice, prove the bound.

    Args:
        trials: The mechanism on two neighbouring inputs.
        delta: The delta of the guarantee.
        n: Trials of each input.
        seed: Of the trials.
        chance: Chance by which the bound may be wrong.
    """
    generator = np.random.default_rng(seed)
    without, with_user = (_flat(trials(kind, n // 2, generator)) for kind in (False, True))
    base, way = without.mean(0), with_user.mean(0) - without.mean(0)
    # A number without noise decides alone; where all have the same, this is the difference itself.
    spread = (without.var(0) + with_user.var(0)) / 2
    way = way / (spread + 1e-9 * max(float(spread.max()), 1e-300))
    norm = float(np.linalg.norm(way))
    way = way / norm if norm > 0 else np.ones_like(way) / len(way) ** 0.5

    def scores(found: np.ndarray) -> np.ndarray:
        signed: np.ndarray = (found - base) @ way
        return np.stack([signed, np.abs(signed), -np.abs(signed)])

    zero, one = scores(without), scores(with_user)
    best = (0.0, 0, 0.0, True)
    for kind in range(len(zero)):
        for flip in (False, True):  # guess "took part" where the score is large, or "did not" where it is small
            hits, false = (-zero[kind], -one[kind]) if flip else (one[kind], zero[kind])
            # A threshold outside the smaller sample proves the most that so many trials can.
            cuts = np.unique(np.r_[np.quantile(false, 1 - np.geomspace(2 / len(false), 0.5, 60)), false.max()])
            rates = [((hits > cut).mean(), (false > cut).mean(), cut) for cut in cuts]
            for right, wrong, cut in rates:
                value = _bound(round(right * len(hits)), round(wrong * len(false)), len(hits), delta, chance)
                best = max(best, (value, kind, float(cut), flip))
    _, kind, cut, flip = best
    left = n - n // 2
    zero, one = (scores(_flat(trials(which, left, generator)))[kind] for which in (False, True))
    hits, false = (-zero, -one) if flip else (one, zero)
    return _bound(int((hits > cut).sum()), int((false > cut).sum()), left, delta, chance)


def _flat(found: np.ndarray) -> np.ndarray:
    return found.reshape(len(found), -1)


def _bound(right: int, wrong: int, n: int, delta: float, chance: float) -> float:
    """Returns the epsilon that so many right and wrong guesses of ``n`` prove."""
    least = float(beta.ppf(chance / 2, right, n - right + 1)) if right else 0.0
    most = float(beta.ppf(1 - chance / 2, wrong + 1, n - wrong)) if wrong < n else 1.0
    return math.log((least - delta) / most) if least > delta and least - delta > most else 0.0
