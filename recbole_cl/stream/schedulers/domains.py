"""Stages by an item or interaction column: one domain after the other."""

from __future__ import annotations

import numpy as np

from recbole_cl.registry import schedulers
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices
from recbole_cl.stream.schedulers.periods import column


@schedulers.register()
class Domains(Scheduler):
    """One stage a value of ``period_field`` (category, market, country), in the order of first appearance.

    ::

        domain A  ───────────────────────▶ time      stage 0
        domain B       ──────────────────▶ time      stage 1
        domain C  ───────────────────────▶ time      stage 2

    Domains overlap in time, so the default is ``history: stage``: a target sees only its own domain's past. With
    ``history: all`` it sees all of the earlier domains, later interactions included; the report counts them.
    """

    time_ordered = False

    def assign(self, log: Log) -> Slices:
        values = column(log, self.config["period_field"], "Domains").astype(str).to_numpy()
        names, first, stage = np.unique(values[log.order], return_index=True, return_inverse=True)
        rank = np.empty(len(names), dtype=np.int64)
        by_first = np.argsort(first, kind="stable")
        rank[by_first] = np.arange(len(names))
        out = np.empty(len(log), dtype=np.int64)
        out[log.order] = rank[stage]
        wanted = len(names) if self.n_stages is None else min(self.n_slices, len(names))
        return Slices(np.where(out < wanted, out, -1), [str(names[k]) for k in by_first[:wanted]])
