"""Rows by how active their users have been so far."""

from __future__ import annotations

import numpy as np

from recbole_cl.evaluation.strata.base import Stratum
from recbole_cl.registry import strata
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets


@strata.register("activity")
class Activity(Stratum):
    """Terciles of users by their training interactions in the stages up to the evaluated one.

    A third of the users who have any have at most q_1, two thirds at most q_2 of them (the smallest such numbers).
    ``activity_low`` holds the rows whose user has at most q_1 so far, none included; ``activity_high`` more than q_2;
    ``activity_middle`` the rest. What a user did at or after the target does not count. Where many users have the same
    number the groups are of unequal size, or empty.
    """

    def groups(self, stream: Stream, stage: Stage, targets: Targets) -> dict[str, np.ndarray]:
        """Returns three groups."""
        table = stream.table
        past = np.unique(np.concatenate([s.train.position for s in stream.stages[: stage.index + 1]]))
        counts = np.bincount(table.user[past], minlength=table.n_users)
        one, two = np.quantile(counts[counts > 0], [1 / 3, 2 / 3], method="inverted_cdf")
        keys = np.sort(table.user[past] * len(table) + past)  # by user, then by position
        begin = np.searchsorted(keys, targets.user * len(table))
        own = np.searchsorted(keys, targets.user * len(table) + targets.position) - begin
        return {
            "activity_low": own <= one,
            "activity_middle": (own > one) & (own <= two),
            "activity_high": own > two,
        }
