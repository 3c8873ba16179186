"""Blocks of different users: the second setting of PESO."""

from __future__ import annotations

import numpy as np

from recbole_cl.registry import schedulers
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices
from recbole_cl.stream.schedulers.base_then_increments import base_shares


@schedulers.register()
class UserDisjoint(Scheduler):
    """The block sizes of :class:`BaseThenIncrements` over disjoint users (PESO, table 1, second setting).

    ::

        users, by the time of their first interaction
        u1 ───── u2 ─────── u3 ───────── | u4 ──── | u5 ─── u6 ── |
        |            stage 0             | stage 1 |   stage 2    |

    Users are ordered by their first interaction (ties by the file's order) and dealt to the stages until a stage
    holds its share of interactions; all interactions of a user lie in one stage. Stages therefore overlap in time.
    """

    time_ordered = False
    remedy = "lower n_stages or base_ratio: a stage holds whole users, and one of them may fill it"

    def assign(self, log: Log) -> Slices:
        self.require_rows(log)
        order = log.order
        users, first = np.unique(log.user[order], return_index=True)
        by_first = users[np.argsort(first, kind="stable")]
        counts = np.bincount(log.user)[by_first]
        cuts = np.cumsum(base_shares(self.n_slices, self.config["base_ratio"]))[:-1] * len(log)
        # A user belongs to the stage in which the middle of his interactions falls.
        middle = np.cumsum(counts) - counts / 2
        stage_of = np.empty(int(users.max()) + 1, dtype=np.int64)
        stage_of[by_first] = np.searchsorted(cuts, middle, side="right")
        return Slices(stage_of[log.user], [f"users {k + 1}" for k in range(self.n_slices)])
