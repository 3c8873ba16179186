"""``recbole-cl update``: last night's model up to date with today's log."""

from __future__ import annotations

import argparse
import json
import logging

from recbole_cl.commands.base import Command
from recbole_cl.commands.import_log import column_arguments, given_columns
from recbole_cl.commands.terminal import setup_logging, show
from recbole_cl.errors import ConfigError
from recbole_cl.registry import commands

LOGGER = logging.getLogger("recbole_cl")
KEPT = 3
"""Exit code where the old model is kept."""


@commands.register("update")
class Update(Command):
    """Trains one more stage on a saved run and serves it unless it is worse."""

    summary = "train a saved run on new interactions, and serve what comes out unless it is worse"
    description = (
        "Train the champion of a run on new interactions, compare old and new model on a held-out tail of them, and "
        "promote the new one unless it is worse by more than a margin. Exit codes for a timer: 0 promoted, 3 the old "
        "model is kept, 2 the file or the run cannot be used, 1 anything else; the champion is whole whatever happens. "
        "--strategy=... and other properties of how it trains (--epochs=5) may be set. Without --new-data, items are "
        "retired or restored and users forgotten, and nothing is trained."
    )
    place = 11
    takes_properties = True
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="RUN", help="output folder of the run")
        parser.add_argument("--new-data", metavar="FILE", help="new interactions, as for import")
        column_arguments(parser, " (default: as the log was imported)")
        parser.add_argument("--guard", help="metric that must not fall (default: valid_metric); none: always promote")
        parser.add_argument("--margin", type=float, default=0.05, help="share of it that may be lost (default: 0.05)")
        parser.add_argument("--keep", type=int, default=5, help="versions that are kept (default: 5)")
        parser.add_argument(
            "--new-ids", action="store_true", help="take a file that has no item in common with the run"
        )
        parser.add_argument("--retire", metavar="FILE", help="items that no version recommends any more, one a line")
        parser.add_argument("--restore", metavar="FILE", help="retired items that are recommended again, one a line")
        parser.add_argument("--forget", metavar="FILE", help="users to be removed from all that is kept, one a line")
        parser.add_argument(
            "--as-challenger", action="store_true", help="keep the new version aside, even where it is as good"
        )
        parser.add_argument("--dry-run", action="store_true", help="train and compare, but change nothing")
        parser.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.config import parse_arguments

        changes = parse_arguments(properties)
        state = changes.pop("state", None)
        setup_logging(state if state is None else str(state))
        lists = {name: getattr(options, name) for name in ("retire", "restore", "forget")}
        if options.new_data is None and not any(lists.values()):
            raise ConfigError("update: give --new-data FILE, or --retire, --restore or --forget")
        if options.dry_run and any(lists.values()):
            raise ConfigError("--dry-run changes nothing, but --retire, --restore and --forget do; leave one out")
        if options.new_data is None and (changes or options.json):
            raise ConfigError("update: properties and --json belong to an update with --new-data; leave them out")
        forgotten = self.lists(options.folder, lists)
        if options.new_data is None:
            return
        from recbole_cl.serve.update import update

        done = update(
            options.folder,
            options.new_data,
            changes,
            columns=given_columns(options),
            guard=options.guard,
            margin=options.margin,
            keep=options.keep,
            new_ids=options.new_ids,
            without=forgotten,
            as_challenger=options.as_challenger,
            dry_run=options.dry_run,
        )
        if options.json:
            show(json.dumps(done.to_dict()))
        else:
            rows = done.rows
            used = (
                f"{rows['used']} of {rows['read']} rows, {rows['new_users']} new users, {rows['new_items']} new items"
            )
            head = "promoted" if done.promoted else "not promoted"
            served = f"version {done.champion} is served"
            if done.challenger is not None:
                served += f", version {done.challenger} is the challenger"
            show("\n".join([f"{head}: {done.reason}", used, *done.notes, f"{served} ({done.seconds:.1f} s)"]))
        if not done.promoted and not options.dry_run:
            raise SystemExit(KEPT)

    @staticmethod
    def lists(folder: str, files: dict[str, str | None]) -> list[str]:
        """Retires and restores items and forgets users; returns who was to be forgotten."""
        from recbole_cl.serve.forget import forget, retire
        from recbole_cl.serve.tokens import read_tokens

        tokens = {name: [] if file is None else read_tokens(file, f"--{name}") for name, file in files.items()}
        if tokens["retire"] or tokens["restore"]:
            retired = retire(folder, tokens["retire"], tokens["restore"])
            LOGGER.info("update: %d items are retired", len(retired))
        if tokens["forget"]:
            forget(folder, tokens["forget"])
        return tokens["forget"]
