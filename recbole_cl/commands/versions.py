"""``recbole-cl versions`` and ``recbole-cl rollback``: which models a run has, and which one is served."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.registry import commands


def described(entry: dict[str, Any], champion: int, challenger: int | None = None) -> str:
    """Returns the line of a version."""
    mark = "*" if entry["number"] == champion else " "
    parts = [f"{mark} {entry['number']:>3}", entry.get("created") or "the run itself    "]
    if entry.get("file"):
        parts += [f"{entry['file']}: {entry['rows']['used']} rows", str(entry.get("strategy", ""))]
    if entry.get("metric"):
        old, new = (f"{entry[side]:.4f}" if entry.get(side) is not None else "?" for side in ("old", "new"))
        parts.append(f"{entry['metric']} {old} -> {new}")
    if entry.get("all_rows"):
        parts.append("trained on all rows")
    if entry["number"] == challenger:
        parts.append("challenger")
    return "  ".join(parts)


@commands.register("versions")
class ListVersions(Command):
    """Lists the versions of a run."""

    summary = "list the versions of a run; * is the one that is served; promote another"
    place = 13
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="RUN", help="output folder of the run")
        parser.add_argument("--promote", type=int, metavar="N", help="serve this version from now on (the challenger)")
        parser.add_argument("--json", action="store_true", help="print one line of JSON")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.training.versions import Versions, locked

        folder = Path(options.folder).expanduser()
        found = Versions.of(folder)
        if options.promote is not None:
            with locked(folder, "promotion"):
                found = Versions.of(folder)
                found.roll_back(options.promote)
        if options.json:
            numbers = {"champion": found.champion, "challenger": found.challenger, "versions": found.entries}
            show(json.dumps({**numbers, "retired": len(found.retired)}))
        else:
            lines = [described(entry, found.champion, found.challenger) for entry in found.entries]
            show("\n".join([*lines, *([f"{len(found.retired)} items are retired"] if found.retired else [])]))


@commands.register("rollback")
class Rollback(Command):
    """Serves the version before."""

    summary = "serve the champion before this one again, or another version"
    place = 14
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="RUN", help="output folder of the run")
        parser.add_argument("--to", type=int, metavar="N", help="number of a version (default: the one before)")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.training.versions import Versions, locked

        folder = Path(options.folder).expanduser()
        found = Versions.of(folder)
        with locked(folder, "rollback"):
            number = Versions.of(folder).roll_back(options.to)
        show(f"version {number} is served; it was {found.champion}")
