"""Timing of two sides in turn, in CPU seconds of this process.

Not collected by default. ``python -m pytest tests/benchmarks --benchmark-only`` prints pytest-benchmark's tables;
``python tests/benchmarks/report.py`` prints the ratios that docs/benchmarks.md shows.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """Medians of alternating pairs.

    Args:
        ours: CPU seconds of our side, median.
        theirs: CPU seconds of the rival, median.
        ratio: Median of the pairs' quotients theirs / ours.
        pairs: How many pairs.
    """

    ours: float
    theirs: float
    ratio: float
    pairs: int


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of all threads of this process while ``work`` runs."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int = 5, warm: bool = True) -> Ratio:
    """Runs both sides in turn, so that a machine that slows down slows both."""
    if warm:
        ours()
    times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(pairs)]
    return Ratio(
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
        pairs,
    )


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak of Python's and numpy's allocations while ``work`` runs (torch's allocator is not seen)."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
