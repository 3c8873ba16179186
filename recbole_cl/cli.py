"""The program ``recbole-cl``: finds the command that was asked for, runs it, and tells how it ended.

Exit codes: 0 done, 2 what was asked for makes no sense (one line says what and how to mend it), 1 anything else,
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_cl import __version__, interrupt
from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import PROGRAM, rank, tell
from recbole_cl.errors import ConfigError, RecBoleCLError
from recbole_cl.registry import IMPORTED, commands


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other wrong input."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; '{self.prog} --help' tells what there is")


def _table() -> dict[str, Command]:
    """Returns the commands by name, in the order of ``--help``."""
    made: dict[str, Command] = {name: commands.get(name)() for name in commands.names()}
    return dict(sorted(made.items(), key=lambda entry: (entry[1].place, entry[0])))


def _parsers(table: Mapping[str, Command]) -> tuple[_Parser, dict[str, _Parser]]:
    """Returns the parser of all, and that of each command."""
    parser = _Parser(prog=PROGRAM, description="Continual recommendation for RecBole.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    own = {}
    for name, command in table.items():
        own[name] = added.add_parser(
            name, help=command.summary, description=command.description or None, allow_abbrev=False
        )
        command.arguments(own[name])
        own[name].add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="MODULE",
            help="a module to import first, from the current folder too: what it registers answers to its name",
        )
    return parser, own


def _import(modules: Sequence[str]) -> None:
    """Imports modules of the current folder, so that the models, strategies and the like in them answer to their names.

    Raises:
        ConfigError: If there is no such module.
    """
    for name in modules:
        if (folder := os.getcwd()) not in sys.path:
            sys.path.insert(0, folder)
        try:
            importlib.import_module(name)
            IMPORTED.append(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"--import={name}: there is no module {error.name!r} in {folder} or on the Python path; give the name "
                f"of the file without .py"
            ) from error


def _joined(arguments: Sequence[str], parser: _Parser) -> list[str]:
    """Returns the arguments with ``--key value`` written ``--key=value``; options that the parser declares are left."""
    declared = parser._option_string_actions
    found: list[str] = []
    waits = False  # for the value of the last one
    for argument in arguments:
        if waits and not argument.startswith("--") and argument not in declared:
            found[-1] += f"={argument}"
            waits = False
        else:
            found.append(argument)
            waits = argument.startswith("--") and "=" not in argument and argument not in declared
    return found


def _asked(arguments: list[str]) -> tuple[Command, argparse.Namespace, list[str]]:
    """Returns the command that a command line asks for, its options, and the properties.

    Raises:
        ConfigError: If there is no such command, or it has no such argument.
        SystemExit: After ``--help`` and ``--version``.
    """
    table = _table()
    former = {old: name for name, command in table.items() for old in command.former_names if old not in table}
    if arguments and arguments[0] in former:
        tell(f"'{arguments[0]}' is now called '{former[arguments[0]]}'; the old name goes on working")
        arguments = [former[arguments[0]], *arguments[1:]]
    parser, own = _parsers(table)
    if arguments and arguments[0] in table and table[arguments[0]].takes_properties:
        arguments = [arguments[0], *_joined(arguments[1:], own[arguments[0]])]
    options, rest = parser.parse_known_args(arguments)
    command = table[options.command]
    if rest and not command.takes_properties:
        raise ConfigError(f"cannot read the argument {rest[0]!r}; '{PROGRAM} --help' tells what there is")
    return command, options, rest


def _interrupted(goes_on_by: str) -> int:
    tell(f"interrupted; run {goes_on_by} to go on from the newest checkpoint")
    return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--state=debug" in " ".join(arguments).lower().replace("--state debug", "--state=debug").split(" ")
    goes_on_by = Command.goes_on_by
    try:
        rank()
        command, options, properties = _asked(arguments)
        goes_on_by = command.goes_on_by
        _import(options.imports)
        for module in command.imports:
            importlib.import_module(module)
        interrupt.raise_from_here()
        command.run(options, properties)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, not at exit: a reader that has gone away (| head) is no error
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _interrupted(goes_on_by)
    except RecBoleCLError as error:
        if interrupt.was_seen():
            return _interrupted(goes_on_by)
        if debug:
            traceback.print_exc()
        tell(f"error: {error}")
        return error.exit_code
    except Exception as error:
        if interrupt.was_seen():  # a library has made an error of its own of it
            return _interrupted(goes_on_by)
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--state=debug shows the traceback)"
        tell(f"error: {type(error).__name__}: {error}{hint}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
