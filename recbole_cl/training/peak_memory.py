"""Peak memory of a stage."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Forgets the peak so far, where the system allows it (CUDA; Linux)."""
    if device.type == "cuda":
        torch.cuda.init()  # before that there is no allocator whose peak could be reset
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is the process's since its start
        return


def peak_megabytes(device: torch.device) -> float:
    """Returns the peak since :func:`reset_peak` in MB (10^6 bytes): of the GPU's allocator, or the resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 1e6)
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1024 if sys.platform != "darwin" else 1) / 1e6
