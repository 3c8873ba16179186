"""Tests of methods that ran over the same seeds, and of methods that ran over the same logs: numbers in, numbers out.

- :func:`paired` two methods, seed by seed: Student's paired t or Wilcoxon's signed ranks (both scipy's)
- :func:`adjusted` many comparisons at once: Holm (1979) or Benjamini and Hochberg (1995)
- :func:`ranks` many methods over many blocks: Friedman's test and Nemenyi's critical difference (Demšar, "Statistical
  comparisons of classifiers over multiple data sets", JMLR 7, 2006, section 3.2.2)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

TESTS = {"t": "paired t", "wilcoxon": "Wilcoxon signed-rank"}
CORRECTIONS = {"holm": "Holm", "bh": "Benjamini-Hochberg", "bonferroni": "Bonferroni", "none": "no"}


@dataclass(frozen=True)
class Paired:
    """What the differences of two methods say.

    Attributes:
        n: Pairs.
        difference: Mean difference, the first minus the second.
        half: Half-width of the 95 % t interval of the mean difference; NaN for fewer than two pairs.
        p: Two-sided p value; NaN where the test says nothing: fewer than two pairs, or differences that are all the
            same number other than 0 (their spread cannot be estimated).
        effect: Mean difference over its standard deviation (Cohen's d of pairs); NaN where that is 0.
    """

    n: int
    difference: float
    half: float
    p: float
    effect: float


def paired(first: ArrayLike, second: ArrayLike, test: str = "t") -> Paired:
    """Tests whether two methods differ, pair by pair.

    Args:
        first: Figures of one method, shape ``[n]``; pairs in which one is NaN are left out.
        second: Figures of the other under the same seeds, shape ``[n]``.
        test: One of :data:`TESTS`. With n pairs Wilcoxon's smallest p is 2 / 2**n: five pairs never reach 0.05.

    Raises:
        ValueError: If the test is unknown or the shapes differ.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if test not in TESTS or a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"test {test!r} of shapes {a.shape} and {b.shape}; use {', '.join(TESTS)} on equal lengths")
    there = np.isfinite(a) & np.isfinite(b)
    a, b = a[there], b[there]
    n, d = len(a), a - b
    if n == 0:
        return Paired(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(d.mean())
    if n == 1:
        return Paired(1, mean, math.nan, math.nan, math.nan)
    if not d.any():
        return Paired(n, 0.0, 0.0, 1.0, math.nan)
    spread = float(d.std(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    if np.ptp(d) <= 1e-12 * np.abs(d).max():
        return Paired(n, mean, half, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few pairs: said in the table
        p = stats.ttest_rel(a, b).pvalue if test == "t" else stats.wilcoxon(d).pvalue
    return Paired(n, mean, half, float(p), mean / spread)


def adjusted(p_values: Sequence[float], correction: str = "holm") -> list[float]:
    """Returns p values of a family of tests, corrected for their number; NaN stay NaN and do not count.

    Args:
        p_values: Two-sided p values.
        correction: One of :data:`CORRECTIONS`. ``holm`` and ``bonferroni`` bound the chance of one false finding,
            ``bh`` the expected share of false ones among the findings.

    Raises:
        ValueError: If the correction is unknown.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction {correction!r}; use {', '.join(CORRECTIONS)}")
    found = np.asarray(p_values, dtype=float)
    there = ~np.isnan(found)
    p, m = found[there], int(there.sum())
    if m and correction == "bonferroni":
        p = np.minimum(p * m, 1.0)
    elif m and correction == "bh":
        p = stats.false_discovery_control(p, method="bh")
    elif m and correction == "holm":
        order = np.argsort(p, kind="stable")
        steps = np.maximum.accumulate(p[order] * (m - np.arange(m)))
        p = np.empty(m)
        p[order] = np.minimum(steps, 1.0)
    found[there] = p
    return found.tolist()


@dataclass(frozen=True)
class Ranks:
    """Friedman's test with Nemenyi's critical difference.

    Attributes:
        names: Methods, the best mean rank first.
        mean: Mean rank of each; 1 is best.
        n: Blocks.
        p: Friedman's p value.
        critical: Mean ranks that lie further apart than this differ at ``alpha``.
        alpha: Level.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    n: int
    p: float
    critical: float
    alpha: float

    def groups(self) -> list[tuple[int, int]]:
        """Returns the first and last place of each longest row of methods that do not differ."""
        found: list[tuple[int, int]] = []
        for i in range(len(self.mean)):
            j = max(k for k in range(i, len(self.mean)) if self.mean[k] - self.mean[i] <= self.critical)
            if j > i and (not found or j > found[-1][1]):
                found.append((i, j))
        return found


def ranks(names: Sequence[str], scores: ArrayLike, smaller: bool = False, alpha: float = 0.05) -> Ranks:
    """Ranks methods within blocks and tests whether the mean ranks differ.

    Args:
        names: Methods, k of them, at least three.
        scores: Shape ``[n, k]``, one row a block, at least two; none is NaN. Equal scores share their mean rank.
        smaller: Smaller scores are better.
        alpha: Level.

    Raises:
        ValueError: If there are too few methods or blocks, or a score is missing.
    """
    values = np.asarray(scores, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(names) or len(names) < 3 or len(values) < 2 or np.isnan(values).any():
        raise ValueError(
            f"ranks need scores of at least two blocks and three methods, without gaps; got {values.shape}"
        )
    n, k = values.shape
    placed = np.array([stats.rankdata(row if smaller else -row) for row in values])
    mean = placed.mean(axis=0)
    same = bool((placed == placed[:, :1]).all())
    p = 1.0 if same else float(stats.friedmanchisquare(*(placed[:, j] for j in range(k))).pvalue)
    q = float(stats.studentized_range.ppf(1 - alpha, k, np.inf)) / math.sqrt(2)
    critical = q * math.sqrt(k * (k + 1) / (6 * n))
    order = np.argsort(mean, kind="stable")
    return Ranks(tuple(names[i] for i in order), tuple(mean[order].tolist()), n, p, critical, alpha)
