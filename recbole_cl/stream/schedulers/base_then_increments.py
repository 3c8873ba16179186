"""A large base, then equal increments."""

from __future__ import annotations

import numpy as np

from recbole_cl.registry import schedulers
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices, by_count, keep_ties_together


def base_shares(n_slices: int, base_ratio: float) -> np.ndarray:
    """Returns the shares of a base of ``base_ratio`` and ``n_slices - 1`` equal increments."""
    if n_slices == 1:
        return np.ones(1)
    return np.r_[base_ratio, np.full(n_slices - 1, (1 - base_ratio) / (n_slices - 1))]


@schedulers.register()
class BaseThenIncrements(Scheduler):
    """A base of ``base_ratio`` of the interactions, then ``n_stages - 1`` equal increments.

    ::

        time ──────────────────────────────────────────────────────────▶
        |            base (60 %)            | 10 % | 10 % | 10 % | 10 % |
        |             stage 0               |  1   |  2   |  3   |  4   |

    PESO: 60 % + 4 x 10 % with ``min_user_inter: 5`` and ``stage_split: leave_one_out``; CCD: 50 % + 5 increments.
    A run of equal timestamps at a cut goes to the earlier stage.
    """

    remedy = "lower n_stages or base_ratio: equal timestamps stay in one stage, and may fill a whole increment"

    def assign(self, log: Log) -> Slices:
        self.require_rows(log)
        order = log.order
        shares = base_shares(self.n_slices, self.config["base_ratio"])
        stage = keep_ties_together(by_count(order, shares), log.time, order)
        return Slices(stage, ["base", *(f"increment {k}" for k in range(1, self.n_slices))])
