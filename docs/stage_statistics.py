"""Prints what each stage of a stream holds, as table 4 of PESO's paper does: users, items, length, sparsity.

    python docs/stage_statistics.py peso-video-games

Further words are properties, ``--scheduler=TimeSlices``. A sequence is what a user has within the stage.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def table(stream: Any) -> str:
    """Returns the table in Markdown.

    Args:
        stream: A :class:`recbole_cl.stream.build.Stream`.
    """
    log = stream.table
    head = ["stage", "users", "new users", "items", "new items", "interactions", "length", "sparsity"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    seen: tuple[set[int], set[int]] = (set(), set())
    for index in range(len(stream.stages)):
        rows = np.flatnonzero(log.stage[: len(log)] == index)
        users, items = (set(column[rows].tolist()) for column in (log.user, log.item))
        told = [index + 1, len(users), len(users - seen[0]), len(items), len(items - seen[1]), len(rows)]
        shares = [f"{len(rows) / max(len(users), 1):.2f}", f"{1 - len(rows) / max(len(users) * len(items), 1):.4f}"]
        lines.append("| " + " | ".join([f"{number:,}" for number in told] + shares) + " |")
        seen = (seen[0] | users, seen[1] | items)
    return "\n".join(lines)


def main(dataset: str, *properties: str) -> None:
    """Prints the table of a dataset."""
    from recbole_cl.config import CLConfig
    from recbole_cl.stream.build import build_stream

    print(table(build_stream(CLConfig("PESO" if "peso" in dataset else "BPR", dataset, args=properties))))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
