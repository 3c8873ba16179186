"""``recbole-cl import``: a table of interactions becomes a dataset."""

from __future__ import annotations

import argparse

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.registry import commands


def column_arguments(parser: argparse.ArgumentParser, told: str = "") -> None:
    """Declares how a table's columns are named and how it is read.

    Args:
        parser: The command's parser.
        told: What is added to each name's help.
    """
    parser.add_argument("--user", help=f"column of users{told}")
    parser.add_argument("--item", help=f"column of items{told}")
    parser.add_argument("--time", help=f"column of times{told}")
    parser.add_argument("--label", help="column of labels or ratings, if there is one")
    parser.add_argument("--unit", choices=["s", "ms", "us", "ns", "iso"], help="clock (default: found out)")
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
        parser.add_argument("--name", help="name of the dataset (default: that of the file)")
        parser.add_argument("--data_path", help="folder of the datasets (default: $RECBOLE_CL_DATA, else ./dataset)")
        parser.add_argument("--overwrite", action="store_true", help="replace a dataset of that name")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.importer import Columns, import_log
        from recbole_cl.importer.health import health_lines

        columns = Columns(**given_columns(options))
        path, told, found = import_log(options.file, columns, options.name, options.data_path, options.overwrite)
        lines = [f"{path}", *health_lines(told), f"clock         {found.unit}"]
        show("\n".join([*lines, f"next          recbole-cl run --dataset={path.parent.name} --serve=True"]))
