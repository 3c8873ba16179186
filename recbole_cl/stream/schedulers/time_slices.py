"""Equal slices of the log, by count or by wall-clock time."""

from __future__ import annotations

import numpy as np

from recbole_cl.registry import schedulers
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices, by_count, keep_ties_together


@schedulers.register()
class TimeSlices(Scheduler):
    """``n_stages`` slices of equal size (ProtoFed-SP, appendix B; prequential with ``stage_split: next_stage``).

    ::

        time ──────────────────────────────────────────────────────────▶
        |   stage 0    |   stage 1    |   stage 2    |   stage 3    |
        |train  |va|te |train  |va|te |train  |va|te |train  |va|te |      stage_split: tail
        t0             t1             t2             t3             t4

    ``stage_by: count`` cuts at equal numbers of interactions; a run of equal timestamps at a cut goes to the earlier
    stage as a whole. ``stage_by: time`` cuts [first, last] into equal half-open intervals [t_k, t_{k+1}), the last
    one closed.
    """

    remedy = (
        "lower n_stages (stage_by: count keeps equal timestamps in one stage), cut by stage_by: count where it is "
        "'time', or leave far-off timestamps out with time_range"
    )

    def assign(self, log: Log) -> Slices:
        self.require_rows(log)
        n = self.n_slices
        if self.config["stage_by"] == "time":
            edges = np.linspace(log.time.min(), log.time.max(), n + 1)
            stage = np.clip(np.searchsorted(edges, log.time, side="right") - 1, 0, n - 1)
        else:
            order = log.order
            stage = keep_ties_together(by_count(order, np.full(n, 1 / n)), log.time, order)
        return Slices(stage, [f"slice {k + 1}" for k in range(n)])
