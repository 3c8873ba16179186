"""How well: pure functions of the result matrix R[trained stage, evaluated stage] and of one stage's predictions.

Nothing here knows a model, a strategy or a runner. The modules hold numpy arrays and plain dictionaries only, so
that every number of a report can be computed again from ``result.json`` alone.

- :mod:`~recbole_cl.results.matrix` the matrix R[t, s] and all its summaries
- :mod:`~recbole_cl.results.measures` forgetting, transfer, plasticity and the others, one by one
- :mod:`~recbole_cl.results.records` the append-only list of results of which the matrix is a view
- :mod:`~recbole_cl.results.steps` Steps-to-95 % from the learning curve inside a stage
- :mod:`~recbole_cl.results.exposure` disparity of exposure over items and of quality over users
- :mod:`~recbole_cl.results.strata` warm, new and cold users and items
"""

from recbole_cl.results.exposure import exposure_disparity, head_mask
from recbole_cl.results.matrix import ResultMatrix, smaller_is_better, summarise, summarise_all
from recbole_cl.results.measures import Summary
from recbole_cl.results.records import Record, Records
from recbole_cl.results.steps import stage_curve, steps_to_95
from recbole_cl.results.strata import STRATA, StratumMean, mean_by_stratum, strata_masks

__all__ = [
    "STRATA",
    "Record",
    "Records",
    "ResultMatrix",
    "StratumMean",
    "Summary",
    "exposure_disparity",
    "head_mask",
    "mean_by_stratum",
    "smaller_is_better",
    "stage_curve",
    "steps_to_95",
    "strata_masks",
    "summarise",
    "summarise_all",
]
