"""Stages between explicit points in time."""

from __future__ import annotations

import numpy as np

from recbole_cl.errors import ConfigError
from recbole_cl.registry import schedulers
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices, parse_time


@schedulers.register()
class Boundaries(Scheduler):
    """Stages [.., b_1), [b_1, b_2), ..., [b_k, ..]: ``boundaries`` lists timestamps or ISO dates (UTC).

    ::

        time ──────────────────────────────────────────────────────────▶
        |      stage 0      |    stage 1     |        stage 2          |
                      2011-03-01       2011-06-01

    An interaction at a boundary belongs to the later stage. ``n_stages`` follows from the list.
    """

    remedy = "move the boundaries to where the log has interactions"

    def assign(self, log: Log) -> Slices:
        given = self.config["boundaries"]
        if not given:
            raise ConfigError("boundaries: the scheduler Boundaries needs a list of timestamps or ISO dates")
        edges = np.array([parse_time(value, "boundaries", log.ticks) for value in given])
        if (np.diff(edges) <= 0).any():
            raise ConfigError(f"boundaries: {list(given)!r} must increase from one to the next")
        slices = len(edges) + 1
        if self.n_stages is not None and self.n_slices != slices:
            stages = slices - (self.n_slices - self.n_stages)
            raise ConfigError(
                f"n_stages: {self.n_stages} contradicts {len(edges)} boundaries, which make {stages} stages under "
                f"stage_split: {self.config['stage_split']}; leave n_stages out"
            )
        names = [f"before {given[0]}", *(f"from {value}" for value in given)]
        return Slices(np.searchsorted(edges, log.time, side="right"), names)
