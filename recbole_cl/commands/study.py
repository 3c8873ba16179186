"""``recbole-cl study``: a table of methods, models, logs and seeds."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import ended_by_sigterm, setup_logging, show
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
        parser.add_argument(
            "name",
            metavar="STUDY",
            help="name of a study ('list studies'), a .yaml file, or with --table a folder of runs",
        )
        parser.add_argument("--preset", default="laptop", help="laptop (two cores) or full (a GPU); default: laptop")
        parser.add_argument("--output_dir", help="folder of the study (default: studies/STUDY-PRESET)")
        parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")
        parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
        parser.add_argument(
            "--only_table", "--table", action="store_true", help="write the tables of what is done, run nothing"
        )
        parser.add_argument("--shard", metavar="I/N", help="this is process I of N that share the folder: 1/2, 2/2")
        parser.add_argument("--max-hours", type=float, help="stop after so long; the same command goes on")
        comparing = parser.add_argument_group("statistics")
        comparing.add_argument("--compare", action="store_true", help="write compare.md, .tex and .csv, and figures")
        comparing.add_argument("--against", help="the method that others are tested against (default: FineTune)")
        comparing.add_argument("--test", default="t", help="t or wilcoxon, paired over seeds (default: t)")
        comparing.add_argument("--correction", default="holm", help="holm, bh, bonferroni or none (default: holm)")
        comparing.add_argument("--alpha", type=float, default=0.05, help="level of significance (default: 0.05)")
        comparing.add_argument("--formats", help="of the figures: pdf, svg, png (default: pdf,svg where matplotlib is)")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.study import found_plan, list_studies, read_plan, walk, write_tables
        from recbole_cl.study.claims import TABLES, alone, deadline

        setup_logging()
        for name in ("jobs", "threads"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name}={getattr(options, name)}: give a number from 1 on")
        comparison = self._asked(options)
        searched = Path(options.name).expanduser()
        if searched.is_dir() and options.only_table:
            plan, folder = found_plan(searched), Path(options.output_dir or searched).expanduser()
            if folder != searched:
                raise ConfigError("--output_dir: the tables of a folder of runs go there; leave it out")
        else:
            if searched.is_dir() and options.name not in list_studies():
                raise ConfigError(f"{options.name} is a folder; add --table for the tables of the runs in it")
            plan = read_plan(options.name, options.preset)
            folder = Path(options.output_dir or f"studies/{plan.name}-{plan.preset}").expanduser()
        shard = self._shard(options.shard)
        if options.max_hours is not None and not options.max_hours > 0:
            raise ConfigError(f"--max-hours={options.max_hours:g}: give a number above 0")
        failures = []
        if not options.only_table:
            until = deadline(options.max_hours)
            try:
                with ended_by_sigterm():
                    failures = walk(plan, folder, options.jobs, options.threads, shard, until)
            except KeyboardInterrupt:
                with alone(folder / TABLES) if shard else contextlib.nullcontext():
                    write_tables(plan, folder)
                raise
        with alone(folder / TABLES) if shard else contextlib.nullcontext():
            table = write_tables(plan, folder)
        show(table.removesuffix("\n"))
        if comparison is not None:
            self._compare(plan, folder, comparison, options.formats)
        if failures:
            reasons = "; ".join(failures)
            raise RecBoleCLError(f"{len(failures)} runs failed; the same command tries them again: {reasons}")

    def _shard(self, asked: str | None) -> tuple[int, int] | None:
        from recbole_cl.study.claims import shard_of

        try:
            return None if asked is None else shard_of(asked)
        except ValueError as error:
            raise ConfigError(f"--shard={asked}: give I/N with I from 1 to N, such as 1/2") from error

    def _asked(self, options: argparse.Namespace) -> Any:
        """Returns how methods are compared, or ``None`` where that was not asked for."""
        from recbole_cl.study.compare import Asked

        asked = Asked(options.against, options.test, options.correction, options.alpha)
        if options.compare:
            return asked
        if asked != Asked() or options.formats:
            raise ConfigError("--against, --test, --correction, --alpha and --formats go with --compare; add it")
        return None

    def _compare(self, plan: Any, folder: Path, asked: Any, formats: str | None) -> None:
        from recbole_cl.study.compare import write_comparison
        from recbole_cl.study.pictures import drawable, write_pictures

        show("\n" + write_comparison(plan, folder, asked).removesuffix("\n"))
        if formats is None and not drawable():
            show("\nno figures: they need matplotlib (pip install 'recbole-cl[plots]')")
            return
        files = write_pictures(plan, folder, asked, tuple((formats or "pdf,svg").replace(",", " ").split()))
        show("\n" + "\n".join(map(str, files)))
