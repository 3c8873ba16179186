"""``recbole-cl import``: a table of interactions becomes a dataset."""

from __future__ import annotations

import argparse
from typing import Any

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.errors import ConfigError
from recbole_cl.registry import commands


def column_arguments(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Declares how a table's columns are named and how it is read.

    Args:
        parser: The command's parser.
        told: What is added to each name's help.
    """
    parser.add_argument("--user", help=f"column of users{note}")
    parser.add_argument("--item", help=f"column of items{note}")
    parser.add_argument("--time", help=f"column of times{note}")
    parser.add_argument("--label", help="column of labels or ratings, if there is one")
    parser.add_argument("--unit", choices=["s", "ms", "us", "ns", "iso", "row"], help="clock (default: found out)")
    parser.add_argument("--encoding", help="encoding of a text file (default: UTF-8, UTF-16 or Windows' Western one)")
    parser.add_argument("--separator", help="what separates the columns of a text file (default: found out)")


def given_columns(options: argparse.Namespace) -> dict[str, str]:
    """Returns what a command line says of a table's columns."""
    names = ("user", "item", "time", "label", "unit", "encoding", "separator")
    found = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "separator" in found:
        found["separator"] = {"\\t": "\t", "tab": "\t"}.get(found["separator"], found["separator"])
    return found


@commands.register("import")
class Import(Command):
    """Reads CSV, TSV, parquet or JSON lines and writes RecBole's atomic files."""

    summary = "make a dataset of a CSV, TSV, parquet or JSON-lines file"
    description = (
        "Make a dataset of a table of interactions: users, items, times. Prints what the log is like. A line that "
        "makes no sense is told with its number, and nothing is written."
    )
    place = 10
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE", help=".csv, .tsv, .parquet or .jsonl")
        column_arguments(parser, " (default: RecBole's own name)")
        parser.add_argument("--format", help="a named format ('list formats'), or a .yaml file; other options win")
        parser.add_argument("--items", metavar="FILE", help="a file of items, for a format that tells of one")
        parser.add_argument("--users", metavar="FILE", help="a file of users, for a format that tells of one")
        parser.add_argument("--keep", metavar="COLUMN=VALUE,...", help="only rows with one of these values")
        parser.add_argument("--name", help="name of the dataset (default: that of the file)")
        parser.add_argument("--data_path", help="folder of the datasets (default: $RECBOLE_CL_DATA, else ./dataset)")
        parser.add_argument("--overwrite", action="store_true", help="replace a dataset of that name")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.config import properties_dir
        from recbole_cl.importer import Columns, import_log, read_format
        from recbole_cl.importer.health import health_lines

        given: dict[str, Any] = dict(given_columns(options))
        if options.keep is not None:
            column, _, values = options.keep.partition("=")
            if not column or not values:
                raise ConfigError(f"--keep={options.keep}: give COLUMN=VALUE,VALUE")
            given["keep"] = {column: values.split(",")}
        sides = {}
        if options.format is not None:
            form = read_format(options.format, properties_dir() / "import")
            given = {**{k: v for k, v in form.inter.to_dict().items() if v is not None}, **given}
            for name, file in (("item", options.items), ("user", options.users)):
                side = getattr(form, name)
                if file is not None and side is None:
                    raise ConfigError(
                        f"--{name}s={file}: the format {form.name} tells of no file of {name}s; leave it out"
                    )
                if file is not None:
                    sides[name] = (file, side)
        elif options.items or options.users:
            raise ConfigError("--items and --users are read by a --format; give one")
        path, numbers, found = import_log(
            options.file, Columns.of(given), options.name, options.data_path, options.overwrite, sides
        )
        lines = [f"{path}", *health_lines(numbers), f"clock         {found.unit}"]
        show(
            "\n".join(
                [
                    *lines,
                    f"look at it    recbole-cl health {path.parent.name}",
                    f"next          recbole-cl run --dataset={path.parent.name} --serve=True",
                ]
            )
        )
