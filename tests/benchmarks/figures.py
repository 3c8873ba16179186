"""Figures of the benchmarks, recorded in a file and written from there into the pages of the documentation.

A script records what it printed (:func:`record`) under a name; a page shows it where it says

    <!-- figures: NAME NAME -->
    <!-- end -->

Names whose lines belong to the same table stand in one; what a GPU gave stands in a table below.
``python tests/benchmarks/figures.py`` writes all pages anew, and ``tests/test_docs.py`` refuses a page that shows
anything else.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("figures.json")
PAGES = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"(<!-- figures: ([\w .-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machine(device: str = "cpu") -> str:
    """Returns where and when, as a sentence."""
    import torch

    where = f"One thread of {os.cpu_count()} cores ({platform.machine()})"
    if device != "cpu":
        where = f"{torch.cuda.get_device_name()}, one thread of {os.cpu_count()} cores"
    return (
        f"{where}, Python {platform.python_version()}, torch {version('torch')}, {datetime.date.today().isoformat()}."
    )


def record(name: str, head: list[str], lines: list[str], device: str = "cpu") -> None:
    """Records the lines of a comparison and writes the pages.

    Args:
        name: Name of the comparison; what was recorded under it goes.
        head: First lines of the table that the lines belong to; empty where they are no table.
        lines: What was printed.
        device: Device of the run; another one than the CPU is part of the name.
    """
    recorded = read()
    recorded[name if device == "cpu" else f"{name}.{device}"] = {
        "head": head,
        "lines": lines,
        "machine": machine(device),
    }
    FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    write_pages()


def read() -> dict[str, dict[str, Any]]:
    """Returns all that is recorded."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def filled(page: str) -> str:
    """Returns a page with what is recorded in its places."""
    recorded = read()

    def block(found: re.Match[str]) -> str:
        asked = found[2].split()
        there = [recorded[name] for name in (*asked, *(f"{name}.cuda" for name in asked)) if name in recorded]
        parts = ["*Not measured yet.*"] if not there else []
        for head, group in groupby(there, key=lambda one: one["head"]):
            members = list(group)
            parts.append("\n".join([*head, *(line for one in members for line in one["lines"])]))
        where = {one["machine"] for one in there}
        parts.append("\n".join(sorted(where)))
        return found[1] + "\n" + "\n\n".join(part for part in parts if part) + "\n\n" + found[3]

    return _BLOCK.sub(block, page)


def write_pages() -> None:
    """Writes what is recorded into every page that asks for it."""
    for path in sorted(PAGES.rglob("*.md")):
        page = path.read_text()
        if filled(page) != page:
            path.write_text(filled(page))


if __name__ == "__main__":
    write_pages()
