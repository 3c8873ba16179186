"""Figures of the benchmarks, kept in a file and written from there into the pages of the documentation.

A script keeps what it printed (:func:`keep`) under a name; a page shows it where it says

    <!-- kept: NAME NAME -->
    <!-- end -->

Names whose lines belong to the same table stand in one; what a GPU gave stands in a table below.
``python tests/benchmarks/kept.py`` writes all pages anew, and ``tests/test_docs.py`` refuses a page that shows anything
else.
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

FILE = Path(__file__).with_name("kept.json")
PAGES = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"(<!-- kept: ([\w .-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machine(device: str = "cpu") -> str:
    """Returns where and when, as a sentence."""
    import torch

    where = f"One thread of {os.cpu_count()} cores ({platform.machine()})"
    if device != "cpu":
        where = f"{torch.cuda.get_device_name()}, one thread of {os.cpu_count()} cores"
    return (
        f"{where}, Python {platform.python_version()}, torch {version('torch')}, {datetime.date.today().isoformat()}."
    )


def keep(name: str, head: list[str], lines: list[str], device: str = "cpu") -> None:
    """Keeps the lines of a comparison and writes the pages.

    Args:
        name: Name of the comparison; what was kept under it goes.
        head: First lines of the table that the lines belong to; empty where they are no table.
        lines: What was printed.
        device: Device of the run; another one than the CPU is part of the name.
    """
    kept = read()
    kept[name if device == "cpu" else f"{name}.{device}"] = {"head": head, "lines": lines, "machine": machine(device)}
    FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    write_pages()


def read() -> dict[str, dict[str, Any]]:
    """Returns all that is kept."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def filled(page: str) -> str:
    """Returns a page with what is kept in its places."""
    kept = read()

    def block(found: re.Match[str]) -> str:
        asked = found[2].split()
        there = [kept[name] for name in (*asked, *(f"{name}.cuda" for name in asked)) if name in kept]
        parts = ["*Not measured yet.*"] if not there else []
        for head, group in groupby(there, key=lambda one: one["head"]):
            members = list(group)
            parts.append("\n".join([*head, *(line for one in members for line in one["lines"])]))
        where = {one["machine"] for one in there}
        parts.append("\n".join(sorted(where)))
        return found[1] + "\n" + "\n\n".join(part for part in parts if part) + "\n\n" + found[3]

    return _BLOCK.sub(block, page)


def write_pages() -> None:
    """Writes what is kept into every page that asks for it."""
    for path in sorted(PAGES.rglob("*.md")):
        page = path.read_text()
        if filled(page) != page:
            path.write_text(filled(page))


if __name__ == "__main__":
    write_pages()
