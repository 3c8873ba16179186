"""Summaries of the result matrix R[t, s]: the score on stage ``s`` of the model trained up to stage ``t``.

Rows are trained stages, columns evaluated stages; both triangles are kept, and a cell that was not evaluated is NaN
(``None`` in JSON). In formulas and reasons stages count from 1 to T, as in the papers; arrays count from 0.

The same names mean different things in other libraries (forgetting as first minus last, or with a maximum that
includes the last row, or clamped at zero), so every :class:`Summary` carries the formula that was computed.

Direction. Where smaller is better (LogLoss, RMSE, MAE) the best value is a minimum and every difference changes its
sign: a positive AF always means that something was forgotten, a positive BWT or FWT always means a gain. Levels (LA,
next-stage, averages) stay in the metric's own units.

Nulls. A stage without test targets has no column; it is left out of a mean and named in ``reason`` beside the value:

- measures on or below the diagonal (AF, BWT, LA, averages, stability, plasticity) leave out a column whose diagonal
  R[s,s] is null;
- measures above the diagonal (FWT, next-stage) leave out a column only where it is null throughout, because a
  prequential column may be null from its diagonal down and still hold R[s-1,s].

Any other null cell that the formula needs makes the value ``None``, with the cells named in ``reason``: a mean over
whatever happens to be there would be another measure under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Floats",
    "Summary",
    "average_forgetting",
    "average_over_time",
    "backward_transfer",
    "final_average",
    "forward_transfer",
    "h_mean",
    "learning_accuracy",
    "next_stage",
    "plasticity",
    "square",
    "stability",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """One number about a matrix, with the formula that was computed.

    Attributes:
        name: Short name (``"AF"``).
        value: The number, or None where the matrix does not hold what the formula needs.
        formula: The formula, stages counted from 1 to T.
        reason: Why the value is None, or which stages were left out of it; None where nothing is to be said.
    """

    name: str
    value: float | None
    formula: str
    reason: str | None = None


def square(matrix: ArrayLike) -> Floats:
    """Returns the matrix as float64 [T, T], None read as NaN.

    Raises:
        ValueError: The array is not square, is empty, or holds an infinite number.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.shape[0] == 0:
        raise ValueError(f"a result matrix has shape [T, T] with T >= 1, not {list(values.shape)}")
    if np.isinf(values).any():
        cells = [f"R[{t + 1},{s + 1}]" for t, s in np.argwhere(np.isinf(values))]
        raise ValueError(f"a result matrix holds numbers or null, but {_names(cells)} is infinite")
    return values


def _names(names: Sequence[str], most: int = 6) -> str:
    """Joins names for a sentence, cutting a long list short."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _stages(columns: Iterable[int]) -> str:
    numbers = [str(s + 1) for s in columns]
    return ("stage " if len(numbers) == 1 else "stages ") + _names(numbers, 12)


class _Columns:
    """Which columns a measure can use, and what has to be said about the others."""

    def __init__(self, values: Floats, wanted: Iterable[int], *, diagonal: bool) -> None:
        wanted = list(wanted)
        empty = np.isnan(values)
        null = [bool(empty[s, s] if diagonal else empty[:, s].all()) for s in range(len(values))]
        self.used = [s for s in wanted if not null[s]]
        left = [s for s in wanted if null[s]]
        what = "R[s,s] is null" if diagonal else "the column is null"
        self.note = f"{_stages(left)} left out: {what} (no test targets, or not evaluated)" if left else None

    def result(
        self,
        name: str,
        formula: str,
        values: Floats,
        cells: Sequence[tuple[int, int]],
        compute: Callable[[], float],
    ) -> Summary:
        """Computes the measure, or says why it is null.

        Args:
            name: Name of the measure.
            formula: Its formula.
            values: The matrix [T, T].
            cells: Every (t, s) that the formula needs.
            compute: Called only where all those cells hold a number.
        """
        if not self.used:
            return Summary(name, None, formula, self.note or "no stage to average over")
        missing = [f"R[{t + 1},{s + 1}]" for t, s in cells if np.isnan(values[t, s])]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            reason = f"{_names(missing)} {verb} null: not evaluated, or the targets had been trained on by then"
            return Summary(name, None, formula, "; ".join(filter(None, [reason, self.note])))
        return Summary(name, float(compute()), formula, self.note)


def _one_stage(name: str, formula: str) -> Summary:
    return Summary(name, None, formula, "needs at least two stages; this stream has one")


def average_forgetting(matrix: ArrayLike, smaller_is_better: bool = False) -> Summary:
    """Average forgetting: how far the last model falls below the best earlier one.

    AF = mean_{s<T} ( max_{s<=t<=T-1} R[t,s] - R[T,s] )                              (ProtoFed-SP, eq. 17)

    The maximum starts at the diagonal: rows t < s, before the stage was seen, are transfer and not something that
    could be forgotten (the paper's max_{t' <= T-1} leaves that open). The last row is not in the maximum, so that AF is
    negative where the last model is the best one; nothing is clamped at zero. Chaudhry et al. 2018 (eq. 3) is the same
    apart from its rows t < s.

    Where smaller is better: AF = mean_{s<T} ( R[T,s] - min_{s<=t<=T-1} R[t,s] ). Positive still means forgetting.

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.
        smaller_is_better: True for losses and errors.

    Returns:
        The summary named ``AF``; None for T = 1 or where a needed cell is null.
    """
    values = square(matrix)
    last = len(values) - 1
    if smaller_is_better:
        formula = "mean_{s<T} (R[T,s] - min_{s<=t<=T-1} R[t,s])"
    else:
        formula = "mean_{s<T} (max_{s<=t<=T-1} R[t,s] - R[T,s])"
    if last == 0:
        return _one_stage("AF", formula)
    columns = _Columns(values, range(last), diagonal=True)
    signed = -values if smaller_is_better else values

    def compute() -> float:
        return float(np.mean([signed[s:last, s].max() - signed[last, s] for s in columns.used]))

    cells = [(t, s) for s in columns.used for t in range(s, last + 1)]
    return columns.result("AF", formula, values, cells, compute)


def backward_transfer(matrix: ArrayLike, smaller_is_better: bool = False) -> Summary:
    """Backward transfer: what later stages did to the score on earlier ones.

    BWT = mean_{s<T} ( R[T,s] - R[s,s] )              (Lopez-Paz and Ranzato 2017, eq. 3; ProtoFed-SP, eq. 18)

    Where smaller is better: BWT = mean_{s<T} ( R[s,s] - R[T,s] ). Positive always means a gain.

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.
        smaller_is_better: True for losses and errors.

    Returns:
        The summary named ``BWT``; None for T = 1 or where a needed cell is null.
    """
    values = square(matrix)
    last = len(values) - 1
    formula = "mean_{s<T} (R[s,s] - R[T,s])" if smaller_is_better else "mean_{s<T} (R[T,s] - R[s,s])"
    if last == 0:
        return _one_stage("BWT", formula)
    columns = _Columns(values, range(last), diagonal=True)
    sign = -1.0 if smaller_is_better else 1.0

    def compute() -> float:
        return sign * float(np.mean([values[last, s] - values[s, s] for s in columns.used]))

    return columns.result("BWT", formula, values, [(last, s) for s in columns.used], compute)


def forward_transfer(matrix: ArrayLike, reference: ArrayLike | None, smaller_is_better: bool = False) -> Summary:
    """Forward transfer: the score on the next stage before it is trained on, against a model that never saw it.

    FWT = mean_{s>=2} ( R[s-1,s] - b[s] )              (Lopez-Paz and Ranzato 2017, eq. 4; ProtoFed-SP, eq. 19)

    Where smaller is better: FWT = mean_{s>=2} ( b[s] - R[s-1,s] ). Positive always means a gain.

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.
        reference: b[s], [T]: the score on stage s of the reference model (``fwt_reference``: untrained, or trained
            on that stage only). b[1] is not used and may be null. None: no reference was run.
        smaller_is_better: True for losses and errors.

    Returns:
        The summary named ``FWT``; None for T = 1, without a reference, or where a needed cell is null.

    Raises:
        ValueError: ``reference`` does not have one value a stage.
    """
    values = square(matrix)
    stages = len(values)
    formula = "mean_{s>=2} (b[s] - R[s-1,s])" if smaller_is_better else "mean_{s>=2} (R[s-1,s] - b[s])"
    if stages == 1:
        return _one_stage("FWT", formula)
    if reference is None:
        return Summary("FWT", None, formula, "no reference b[s] was run")
    b = np.asarray(reference, dtype=np.float64)
    if b.shape != (stages,):
        raise ValueError(f"the reference has one value for each of the {stages} stages, not shape {list(b.shape)}")
    columns = _Columns(values, range(1, stages), diagonal=False)
    missing = [f"b[{s + 1}]" for s in columns.used if not np.isfinite(b[s])]
    if missing:
        reason = f"the reference {_names(missing)} is null"
        return Summary("FWT", None, formula, "; ".join(filter(None, [reason, columns.note])))
    sign = -1.0 if smaller_is_better else 1.0

    def compute() -> float:
        return sign * float(np.mean([values[s - 1, s] - b[s] for s in columns.used]))

    return columns.result("FWT", formula, values, [(s - 1, s) for s in columns.used], compute)


def learning_accuracy(matrix: ArrayLike) -> Summary:
    """Learning accuracy: the score on each stage right after training on it (Riemer et al. 2019).

    LA = mean_s R[s,s]

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.

    Returns:
        The summary named ``LA``, in the metric's own units; None where the whole diagonal is null.
    """
    return _diagonal_mean("LA", "mean_s R[s,s]", square(matrix))


def next_stage(matrix: ArrayLike) -> Summary:
    """Next-stage score: each model on the stage that comes next, what a deployed recommender is used for.

    next_stage = mean_{s<T} R[s,s+1]                                              (the protocol of ADER and PISA)

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.

    Returns:
        The summary named ``next_stage``, in the metric's own units; None for T = 1 or where a needed cell is null.
    """
    values = square(matrix)
    formula = "mean_{s<T} R[s,s+1]"
    if len(values) == 1:
        return _one_stage("next_stage", formula)
    columns = _Columns(values, range(1, len(values)), diagonal=False)
    cells = [(s - 1, s) for s in columns.used]
    return columns.result(
        "next_stage", formula, values, cells, lambda: float(np.mean([values[cell] for cell in cells]))
    )


def final_average(matrix: ArrayLike) -> Summary:
    """Final average: the last model on all stages (ACC of Lopez-Paz and Ranzato 2017, eq. 2).

    final_average = mean_s R[T,s]

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.

    Returns:
        The summary named ``final_average``, in the metric's own units; None where a needed cell is null.
    """
    values = square(matrix)
    last = len(values) - 1
    tested_once = bool(np.isnan(values[:-1]).all())  # matrix_cells: last_row
    columns = _Columns(values, range(last + 1), diagonal=not tested_once)
    cells = [(last, s) for s in columns.used]
    return columns.result(
        "final_average", "mean_s R[T,s]", values, cells, lambda: float(np.mean([values[c] for c in cells]))
    )


def average_over_time(matrix: ArrayLike) -> Summary:
    """Average over time: after every stage the mean over the stages seen so far, then the mean of those.

    average_over_time = mean_t mean_{s<=t} R[t,s]                    (average incremental accuracy, Rebuffi et al. 2017)

    A row whose seen columns are all left out is left out, too.

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.

    Returns:
        The summary named ``average_over_time``, in the metric's own units; None where a needed cell is null.
    """
    values = square(matrix)
    columns = _Columns(values, range(len(values)), diagonal=True)
    rows = [[(t, s) for s in columns.used if s <= t] for t in range(len(values))]
    cells = [cell for row in rows for cell in row]

    def compute() -> float:
        return float(np.mean([np.mean([values[cell] for cell in row]) for row in rows if row]))

    return columns.result("average_over_time", "mean_t mean_{s<=t} R[t,s]", values, cells, compute)


def stability(matrix: ArrayLike) -> Summary:
    """Stability: what the last model still scores on the stages before the last.

    stability = mean_{s<T} R[T,s]

    This is a level in the metric's own units, not a ratio to R[s,s]: for a metric in [0, 1] it is in [0, 1], and a
    model that never learnt anything is not called stable.

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.

    Returns:
        The summary named ``stability``; None for T = 1 or where a needed cell is null.
    """
    values = square(matrix)
    last = len(values) - 1
    formula = "mean_{s<T} R[T,s]"
    if last == 0:
        return _one_stage("stability", formula)
    columns = _Columns(values, range(last), diagonal=True)
    cells = [(last, s) for s in columns.used]
    return columns.result("stability", formula, values, cells, lambda: float(np.mean([values[c] for c in cells])))


def plasticity(matrix: ArrayLike) -> Summary:
    """Plasticity: the score right after training on a stage, the same number as LA.

    plasticity = mean_s R[s,s]

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.

    Returns:
        The summary named ``plasticity``; None where the whole diagonal is null.
    """
    return _diagonal_mean("plasticity", "mean_s R[s,s]", square(matrix))


def h_mean(matrix: ArrayLike, smaller_is_better: bool = False) -> Summary:
    """Harmonic mean of stability S and plasticity P: high only where both are.

    H = 2 S P / (S + P), with S = mean_{s<T} R[T,s] and P = mean_s R[s,s]; H = 0 where S = P = 0.

    Both must be scores in [0, 1] of which more is better. For losses, errors and scores outside [0, 1] a harmonic mean
    of the two has no meaning, and the value is None.

    Args:
        matrix: R[t, s], [T, T], null = NaN or None.
        smaller_is_better: True for losses and errors: the value is then None.

    Returns:
        The summary named ``h_mean``.
    """
    formula = "2 S P / (S + P), S = mean_{s<T} R[T,s], P = mean_s R[s,s]"
    s, p = stability(matrix), plasticity(matrix)
    if smaller_is_better:
        return Summary("h_mean", None, formula, "defined for scores of which more is better")
    if s.value is None or p.value is None:
        return Summary("h_mean", None, formula, s.reason if s.value is None else p.reason)
    if not (0.0 <= s.value <= 1.0 and 0.0 <= p.value <= 1.0):
        return Summary("h_mean", None, formula, f"defined for scores in [0, 1]; S = {s.value:g}, P = {p.value:g}")
    total = s.value + p.value
    # The quotient first: the product of two tiny scores would underflow to 0.
    value = 0.0 if total == 0.0 else 2.0 * s.value * (p.value / total)
    return Summary("h_mean", value, formula, s.reason or p.reason)


def _diagonal_mean(name: str, formula: str, values: Floats) -> Summary:
    columns = _Columns(values, range(len(values)), diagonal=True)
    return columns.result(name, formula, values, [], lambda: float(np.mean(np.diagonal(values)[columns.used])))
