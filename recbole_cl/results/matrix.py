"""The result matrix R[t, s] of a metric, and all its summaries in one call.

Rows are trained stages, columns evaluated stages; the measures themselves, their directions and their nulls are told in
:mod:`recbole_cl.results.measures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from recbole_cl.results.measures import (
    Floats,
    Summary,
    average_forgetting,
    average_over_time,
    backward_transfer,
    final_average,
    forward_transfer,
    h_mean,
    learning_accuracy,
    next_stage,
    plasticity,
    square,
    stability,
)

__all__ = ["SUMMARIES", "ResultMatrix", "smaller_is_better", "summarise", "summarise_all"]

#: RecBole metrics whose smaller value is the better one (its metric classes say ``smaller = True``).
SMALLER_IS_BETTER = frozenset({"logloss", "rmse", "mae", "averagepopularity", "giniindex"})

#: Names of all summaries, in the order in which they are told.
SUMMARIES = (
    "AF",
    "BWT",
    "FWT",
    "LA",
    "next_stage",
    "final_average",
    "average_over_time",
    "stability",
    "plasticity",
    "h_mean",
)


@dataclass(frozen=True, eq=False)
class ResultMatrix:
    """A checked matrix R[trained stage, evaluated stage] and its direction.

    Attributes:
        values: float64 [T, T], NaN where a cell was not evaluated. None is accepted for NaN; the array is a
            read-only copy.
        smaller_is_better: True for losses and errors.

    Raises:
        ValueError: ``values`` is not square, is empty, or holds an infinite number.
    """

    values: Floats
    smaller_is_better: bool = False

    def __post_init__(self) -> None:
        values = square(self.values).copy()
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        """Returns the values, so that a measure takes a matrix as it takes an array."""
        return np.array(self.values, dtype=dtype, copy=copy)

    @property
    def n_stages(self) -> int:
        """Number of stages T."""
        return self.values.shape[0]

    def summarise(self, reference: ArrayLike | None = None) -> dict[str, Summary]:
        """Returns all summaries of this matrix; see :func:`summarise`."""
        return summarise(self.values, reference, self.smaller_is_better)

    def to_list(self) -> list[list[float | None]]:
        """Returns the rows with None for NaN, as they are written to JSON."""
        return [[None if np.isnan(v) else float(v) for v in row] for row in self.values]


def smaller_is_better(metric: str) -> bool:
    """Tells whether the smaller value of a RecBole metric (``"RMSE"``, ``"LogLoss"``, ``"giniindex@10"``) is better."""
    return str(metric).split("@")[0].strip().lower() in SMALLER_IS_BETTER


def summarise(
    matrix: ArrayLike | ResultMatrix, reference: ArrayLike | None = None, smaller_is_better: bool = False
) -> dict[str, Summary]:
    """Computes every summary of one matrix.

    Args:
        matrix: R[t, s], [T, T], null = NaN or None. A :class:`ResultMatrix` brings its own direction.
        reference: b[s], [T], for FWT.
        smaller_is_better: True for losses and errors.

    Returns:
        ``{name: Summary}`` with the names and order of :data:`SUMMARIES`.

    Raises:
        ValueError: The matrix is not square, holds an infinite number, or the reference has another length.
    """
    smaller = smaller_is_better or (isinstance(matrix, ResultMatrix) and matrix.smaller_is_better)
    found = [
        average_forgetting(matrix, smaller),
        backward_transfer(matrix, smaller),
        forward_transfer(matrix, reference, smaller),
        learning_accuracy(matrix),
        next_stage(matrix),
        final_average(matrix),
        average_over_time(matrix),
        stability(matrix),
        plasticity(matrix),
        h_mean(matrix, smaller),
    ]
    return {summary.name: summary for summary in found}


def summarise_all(
    matrices: Mapping[str, ArrayLike | ResultMatrix],
    references: Mapping[str, ArrayLike | None] | None = None,
    smaller: Callable[[str], bool] = smaller_is_better,
) -> dict[str, Any]:
    """Computes every summary of every metric, in the shape of ``result.json``.

    Args:
        matrices: ``{metric: R[t, s]}``.
        references: ``{metric: b[s]}`` for FWT.
        smaller: Tells whether the smaller value of a metric is better.

    Returns:
        ``{"summary": {name: {metric: value or None}}, "formulas": {name: formula},
        "reasons": {name: {metric: reason}}}``. Where metrics of both directions are there, the formula names both.
    """
    references = references or {}
    summary: dict[str, dict[str, float | None]] = {name: {} for name in SUMMARIES}
    reasons: dict[str, dict[str, str]] = {}
    formulas: dict[str, dict[str, list[str]]] = {name: {} for name in SUMMARIES}
    # Metrics of which more is better come first, so that their formula is the one told first.
    for metric in sorted(matrices, key=smaller):
        for name, found in summarise(matrices[metric], references.get(metric), smaller(metric)).items():
            summary[name][metric] = found.value
            formulas[name].setdefault(found.formula, []).append(metric)
            if found.reason:
                reasons.setdefault(name, {})[metric] = found.reason
    formula_of = {}
    for name, variants in formulas.items():
        first, *others = variants or [""]
        formula_of[name] = first + "".join(f"; for {', '.join(variants[other])}: {other}" for other in others)
    ordered = {name: {metric: values[metric] for metric in matrices} for name, values in summary.items()}
    return {"summary": ordered, "formulas": formula_of, "reasons": reasons}
