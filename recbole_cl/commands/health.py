"""``recbole-cl health``: what a log is like and how it drifts, as a page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from recbole_cl.commands.base import Command
from recbole_cl.commands.import_log import column_arguments, given_columns
from recbole_cl.commands.terminal import show
from recbole_cl.errors import ConfigError
from recbole_cl.registry import commands


@commands.register("health")
class Health(Command):
    """Writes the data-health page of a log."""

    summary = "look at a log: gaps, ties, drift, stages and strategies worth trying"
    description = (
        "Write a page about a log: figures, rows over time, gaps, and how users, items and popularity change from "
        "slice to slice; with --run also how far the mean item vector of a trained model moves. Prints the figures."
    )
    place = 11
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("log", metavar="LOG", help="name of a dataset, or a file that could be imported")
        column_arguments(parser, " (default: RecBole's own name)")
        parser.add_argument("--n_stages", type=int, help="slices of equally many rows (default: as suggested)")
        parser.add_argument("--run", metavar="DIR", help="a finished run whose item vectors are looked at")
        parser.add_argument("--data_path", help="folder of the datasets (default: $RECBOLE_CL_DATA, else ./dataset)")
        parser.add_argument("--output", metavar="FILE", help="the page (default: LOG.health.html)")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.importer import Columns, read_log
        from recbole_cl.importer.drift import drift, suggested_stages, worth_trying
        from recbole_cl.importer.health import health, health_lines
        from recbole_cl.importer.page import write_health_page

        path = Path(options.log).expanduser()
        if not path.is_file():
            root = Path(options.data_path or os.environ.get("RECBOLE_CL_DATA") or "dataset").expanduser()
            path = root / options.log / f"{options.log}.inter"
            if not path.is_file():
                raise ConfigError(
                    f"LOG: {options.log!r} is no file, and there is no {path}; import it, or name the folder"
                )
        frame, _ = read_log(path, Columns.of(given_columns(options)))
        advised, why = suggested_stages(frame)
        n = advised if options.n_stages is None else options.n_stages
        if not 2 <= n <= len(frame):
            raise ConfigError(f"--n_stages={n}: give a number from 2 to {len(frame)}, the rows of the log")
        vectors = None
        if options.run is not None:
            from recbole_cl.serve import load

            found = load(options.run).vectors("items")
            vectors = dict(zip(found.tokens, found.values, strict=True))
        name = path.name.partition(".")[0]
        page = write_health_page(Path(options.output or f"{name}.health.html"), name, frame, n, vectors)
        lines = [*health_lines(health(frame)), f"stages        {advised} ({why})"]
        for what, reason in worth_trying(drift(frame, n, vectors)):
            lines.append(f"try           {what}: {reason}")
        show("\n".join([*lines, f"{page}"]))
