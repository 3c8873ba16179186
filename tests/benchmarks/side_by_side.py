"""Timing of two sides in turn, in CPU seconds of this process.

Not collected by default. ``python -m pytest tests/benchmarks --benchmark-only`` prints pytest-benchmark's tables;
``python tests/benchmarks/report.py`` prints the ratios that docs/benchmarks.md shows.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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


def clock(device: str = "cpu") -> Callable[[], float]:
    """Returns what counts: CPU seconds of all threads of this process, or wall-clock seconds behind a GPU's work."""
    if device == "cpu":
        return time.process_time

    def wall() -> float:
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int = 5, warm: bool = True, device: str = "cpu"
) -> Ratio:
    """Runs both sides in turn, so that a machine that slows down slows both."""
    now = clock(device)

    def seconds(work: Callable[[], Any]) -> float:
        begun = now()
        work()
        return now() - begun

    if warm:
        ours()
    return ratio([(seconds(ours), seconds(theirs)) for _ in range(pairs)])


def ratio(times: list[tuple[float, float]]) -> Ratio:
    """Returns the medians of pairs of (ours, theirs)."""
    return Ratio(
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
        len(times),
    )


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak of Python's and numpy's allocations while ``work`` runs (torch's allocator is not seen)."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident_growth(work: Callable[[], Any]) -> int:
    """Peak of the resident set while ``work`` runs, over what it was before, in bytes; numpy's memory and torch's.

    Linux only. Meant for a process of its own (:func:`fresh`), where little freed memory is left to be used again.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    kept = work()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def fresh(code: str) -> tuple[Any, float]:
    """Runs Python code in a new process beside these files.

    Returns:
        What it printed last, read as JSON (``None`` where it printed nothing), and its CPU seconds, start included.
    """
    before = os.times()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a benchmark's process failed:\n{done.stderr}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    lines = done.stdout.strip().splitlines()
    return (json.loads(lines[-1]) if lines else None), used


def alternate_fresh(ours: str, theirs: str, pairs: int) -> Ratio:
    """Runs two pieces of code in turn, each in a new process."""
    fresh(ours)  # the disk's cache
    return ratio([(fresh(ours)[1], fresh(theirs)[1]) for _ in range(pairs)])
