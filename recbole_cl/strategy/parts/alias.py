"""Weighted draws in constant time.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import numpy as np


class AliasTable:
    """Draws indices with given weights, with replacement: O(n) to make, O(1) a draw whatever n is.

    Walker 1977 in the form of Vose 1991: every slot of equal chance holds two indices, itself and an alias.

    Args:
        weights: Not negative, at least one positive, shape ``[n]``.
    """

    def __init__(self, weights: np.ndarray) -> None:
        n = len(weights)
        scaled = (np.asarray(weights, dtype=np.float64) * n / weights.sum()).tolist()
        self.keep, self.alias = np.ones(n), np.arange(n)
        small = [i for i, w in enumerate(scaled) if w < 1]
        large = [i for i, w in enumerate(scaled) if w >= 1]
        while small and large:
            i, j = small.pop(), large[-1]
            self.keep[i], self.alias[i] = scaled[i], j
            scaled[j] -= 1 - scaled[i]
            if scaled[j] < 1:
                small.append(large.pop())

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Returns ``count`` indices, shape ``[count]``."""
        slot = generator.integers(len(self.keep), size=count)
        return np.where(generator.random(count) < self.keep[slot], slot, self.alias[slot])
