"""``recbole-cl recommend``: lists of a saved run, one line of JSON each."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.errors import ConfigError
from recbole_cl.registry import commands


def listed(text: str | None) -> list[str] | None:
    """Returns the tokens of a comma-separated list."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


@commands.register("recommend")
class Recommend(Command):
    """Loads a run and prints what it recommends."""

    summary = "print what a saved run recommends, a line of JSON for each user"
    description = (
        "Load a run, without its log, and print the best items for users or histories: one line of JSON each, in the "
        "order of the requests. Unknown users get an empty list and a reason."
    )
    place = 12
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="RUN", help="output folder of the run")
        parser.add_argument("--users", help="users, separated by commas")
        parser.add_argument("--users-file", metavar="FILE", help="users, one a line")
        parser.add_argument(
            "--history", action="append", metavar="ITEMS", help="items of somebody, oldest first; may be given again"
        )
        parser.add_argument("--k", type=int, default=10, help="items wanted (default: 10)")
        parser.add_argument("--allowed", metavar="ITEMS", help="recommend only these, separated by commas")
        parser.add_argument("--excluded", metavar="ITEMS", help="never recommend these, separated by commas")
        parser.add_argument(
            "--seen", choices=["keep", "drop"], help="items that the user has had (default: as the run)"
        )
        parser.add_argument("--task", help="task that is asked, where the stream has several")
        parser.add_argument("--run-version", type=int, metavar="N", help="version of the run (default: the champion)")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        users = listed(options.users)
        if options.users_file is not None:
            path = Path(options.users_file).expanduser()
            if not path.is_file():
                raise ConfigError(f"--users-file: {options.users_file!r} is no file; give one with a user a line")
            users = [*(users or []), *(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())]
        histories = None if options.history is None else [listed(items) or [] for items in options.history]
        if (users is None) == (histories is None):
            raise ConfigError("recommend: give --users (or --users-file), or --history")
        from recbole_cl.serve import load

        run = load(options.folder, options.run_version)
        filter_seen = None if options.seen is None else options.seen == "drop"
        for answer in run.recommend(
            users,
            options.k,
            histories=histories,
            allowed=listed(options.allowed),
            excluded=listed(options.excluded),
            filter_seen=filter_seen,
            task=options.task,
        ):
            show(answer.to_json())
