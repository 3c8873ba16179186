"""``recbole-cl report``: the pages of a run, made again."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.errors import ConfigError
from recbole_cl.registry import commands


@commands.register("report")
class Report(Command):
    """Renders the report of a folder."""

    summary = "render the report of a run again"
    place = 4

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="DIR", help="output folder of the run")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        folder: str = options.folder
        if not (Path(folder) / "result.json").is_file():
            cells = sorted(Path(folder).glob("**/cell.json"))[:1]
            if cells:
                raise ConfigError(
                    f"{folder!r} is the folder of a study: 'recbole-cl study STUDY --output_dir={folder} --only_table' "
                    f"writes its tables and plots; a run of it is {str(cells[0].parent)!r}"
                )
            raise ConfigError(f"{folder!r} holds no result.json; give the output folder of a run that has finished")
        from recbole_cl.report import render_folder

        summary = render_folder(Path(folder))
        if summary is not None:
            show(summary)
