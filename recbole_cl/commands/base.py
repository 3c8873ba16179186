"""What a command is, and the configuration of those that take properties."""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

from recbole_cl.commands.terminal import setup_logging


class Command:
    """A command of ``recbole-cl``: one file with one class, here or in another package.

    A complete one (in another package an entry point of the group ``recbole_cl.commands``)::

        @commands.register("users")
        class Users(Command):
            summary = "tell how many users a run knew"

            def arguments(self, parser):
                parser.add_argument("folder", metavar="DIR", help="output folder of the run")

            def run(self, options, properties):
                show(str(json.loads((Path(options.folder) / "result.json").read_text())["stages"][-1]["n_users"]))

    It says what was wrong by raising one of :mod:`recbole_cl.errors`, and speaks by
    :func:`recbole_cl.commands.terminal.show`. What is heavy is imported inside ``run``: the other commands do not wait.

    Attributes:
        summary: The line beside its name in ``recbole-cl --help``.
        description: What its own ``--help`` begins with; empty for nothing.
        takes_properties: Any ``--key=value`` that :meth:`arguments` does not declare is a property; else it is refused.
        place: Where it stands in ``--help``: smaller ones first.
        former_names: Names that it had; they go on working and say so.
        goes_on_by: What goes on where an interruption stopped it.
        imports: Modules that :meth:`run` needs and that take seconds to import: an interruption meanwhile ends at once.
    """

    summary: ClassVar[str]
    description: ClassVar[str] = ""
    takes_properties: ClassVar[bool] = False
    place: ClassVar[int] = 100
    former_names: ClassVar[tuple[str, ...]] = ()
    goes_on_by: ClassVar[str] = "the same command with --resume=True"
    imports: ClassVar[tuple[str, ...]] = ()

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the command's own arguments."""

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        """Does it.

        Args:
            options: What :meth:`arguments` declared.
            properties: ``--key=value`` strings, for a command that takes them.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement run(options, properties)")


class ConfiguredCommand(Command):
    """A command over a model and a dataset, which any property may describe."""

    takes_properties = True

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", "-m", help="name of the model (default: SASRec)")
        parser.add_argument("--dataset", "-d", help="name of the dataset (default: ml-100k)")
        parser.add_argument(
            "--config_files", "-c", help="YAML files with properties, separated by spaces; later ones win"
        )

    def configured(self, options: argparse.Namespace, properties: list[str]) -> Any:
        """Returns the configuration of a command line, with the log at the level that it asks for."""
        from recbole_cl.config import CLConfig, parse_arguments, read_properties

        # Known before anything else, so that everything else can be told at the right level.
        files = (options.config_files or "").split()
        asked: dict[str, Any] = {}
        for file in files:
            asked.update(read_properties(file))
        asked.update(parse_arguments(properties))
        state = asked.get("state")
        setup_logging(state if state is None else str(state))

        names = {
            "model": options.model or asked.get("model") or "SASRec",
            "dataset": options.dataset or asked.get("dataset"),
        }
        config = CLConfig(
            model=names["model"], dataset=names["dataset"] or "ml-100k", config_file_list=files, args=properties
        )
        config["saved"] = asked.get("saved", True) is not False
        return config
