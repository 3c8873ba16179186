"""Prints the table of docs/benchmarks.md: ratios of CPU seconds, medians of alternating pairs on one thread.

RECBOLE_CL_DATA=... OMP_NUM_THREADS=1 python tests/benchmarks/report.py
"""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version

import cases
from side_by_side import Ratio, alternate, peak_bytes


def row(what: str, found: Ratio, aim: str) -> str:
    """One line of the table."""
    return f"| {what} | {found.ours:.3f} | {found.theirs:.3f} | {found.ratio:.1f}x | {aim} | {found.pairs} |"


def main() -> None:
    """Runs every comparison that the data at hand allow."""
    print("| comparison | ours, CPU s | RecBole, CPU s | RecBole / ours | aim | pairs |")
    print("|---|---|---|---|---|---|")
    memory = ""
    if os.environ.get("RECBOLE_CL_DATA"):
        ours, theirs = cases.augmentation()
        print(row("ten stages of sequences, online-retail", alternate(ours, theirs, 3), ">= 30x"), flush=True)
        memory = f"Memory of the sequences of online-retail: ours {peak_bytes(ours) / 1e6:.0f} MB (numpy)."
    ours, theirs, difference = cases.epoch_of_all_positions()
    told = f"SASRec epoch on ml-100k, length 50 ({difference:+d} targets on our side)"
    print(row(told, alternate(ours, theirs, 1), ">= 20x"), flush=True)
    for model in ("SASRec", "BPR"):
        found = alternate(*cases.matrix_of_five(model), 3)
        print(row(f"5 x 5 matrix, {model}, ml-100k", found, ">= 3x"), flush=True)
    for model in ("BPR", "LightGCN"):
        found = alternate(*cases.finetune_epoch(model), 21)
        print(row(f"FineTune epoch against bare _train_epoch, {model}", found, ">= 0.9x"), flush=True)
    peak, rows = cases.memory_of_windows()
    print(
        f"\n{memory} Table and windows of {rows:,} interactions: peak {peak:.0f} MB, "
        f"{peak * 1e6 / rows:.0f} bytes a row."
    )
    print(
        f"One thread of {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch "
        f"{version('torch')}, {datetime.date.today().isoformat()}."
    )


if __name__ == "__main__":
    main()
