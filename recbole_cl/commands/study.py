"""``recbole-cl study``: a table of methods, models, logs and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import setup_logging, show
from recbole_cl.errors import ConfigError, RecBoleCLError
from recbole_cl.registry import commands


@commands.register("study")
class Study(Command):
    """Runs what is not done yet and writes the tables."""

    summary = "run a table of methods, models, logs and seeds"
    description = (
        "Run every cell of a study that is not done yet, and write its tables. The same command goes on "
        "after an interruption."
    )
    place = 2
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="STUDY", help="name of a study ('list studies'), or a .yaml file")
        parser.add_argument("--preset", default="laptop", help="laptop (two cores) or full (a GPU); default: laptop")
        parser.add_argument("--output_dir", help="folder of the study (default: studies/STUDY-PRESET)")
        parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")
        parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
        parser.add_argument("--only_table", action="store_true", help="write the tables of what is done, run nothing")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.study import read_plan, walk, write_tables

        setup_logging()
        for name in ("jobs", "threads"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name}={getattr(options, name)}: give a number from 1 on")
        plan = read_plan(options.name, options.preset)
        folder = Path(options.output_dir or f"studies/{plan.name}-{plan.preset}").expanduser()
        failures = [] if options.only_table else walk(plan, folder, options.jobs, options.threads)
        show(write_tables(plan, folder).removesuffix("\n"))
        if failures:
            told = "; ".join(failures)
            raise RecBoleCLError(f"{len(failures)} runs failed; the same command tries them again: {told}")
