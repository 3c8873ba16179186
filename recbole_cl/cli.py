"""The command ``recbole-cl``: run a stream or a study, list what there is, render a report again.

Exit codes: 0 done, 2 what was asked for makes no sense (one line says what and how to mend it), 1 anything else,
130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_cl import __version__
from recbole_cl.errors import ConfigError, RecBoleCLError, nearest

PROGRAM = "recbole-cl"
_LISTS = ("strategies", "schedulers", "models", "datasets", "metrics", "studies")
_LEVELS = ("debug", "info", "warning", "error", "critical")
_HANDLER = "recbole_cl"


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other wrong input."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; '{self.prog} --help' tells what there is")


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is now: a process that redirects it would keep a closed file."""

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Ignores the stream of the moment in which the handler was made."""


def setup_logging(state: str | None = None) -> None:
    """Sends log records to stderr, and nowhere else: RecBole's own set-up writes a folder ``log`` and works only once.

    Args:
        state: RecBole's name of a level: debug, info, warning, error or critical; None means info.

    Raises:
        ConfigError: If it is none of these.
    """
    name = (state or "info").lower()
    if name not in _LEVELS:
        raise ConfigError(
            f"property 'state' is {state!r}; it must be one of {', '.join(_LEVELS)}{nearest(name, _LEVELS)}"
        )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _HANDLER]:
        root.removeHandler(handler)
    handler = _Stderr()
    handler.set_name(_HANDLER)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%d %b %H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(name.upper() if _rank() in (None, 0) else "ERROR")


def _parser() -> _Parser:
    parser = _Parser(prog=PROGRAM, description="Continual recommendation for RecBole.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    run = commands.add_parser(
        "run",
        help="train a model through a stream of stages",
        description="Train a model through a stream of stages. Any property is set with --name=value, "
        "such as --strategy=EWC --ewc_lambda=10 --n_stages=5.",
        allow_abbrev=False,
    )
    compare = commands.add_parser(
        "compare",
        help="train a model with RecBole and with RecBole-CL, and lay the results side by side",
        description="Train a model on one stage with RecBole itself and with RecBole-CL (parity: recbole), and print "
        "losses and metrics side by side. Any property is set with --name=value.",
        allow_abbrev=False,
    )
    for command in (run, compare):
        command.add_argument("--model", "-m", help="name of the model (default: SASRec)")
        command.add_argument("--dataset", "-d", help="name of the dataset (default: ml-100k)")
        command.add_argument(
            "--config_files", "-c", help="YAML files with properties, separated by spaces; later ones win"
        )
    study = commands.add_parser(
        "study",
        help="run a table of methods, models, logs and seeds",
        description="Run every cell of a study that is not done yet, and write its tables. The same command goes on "
        "after an interruption.",
        allow_abbrev=False,
    )
    study.add_argument("name", metavar="STUDY", help="name of a study ('list studies'), or a .yaml file")
    study.add_argument("--preset", default="laptop", help="laptop (two cores) or full (a GPU); default: laptop")
    study.add_argument("--output_dir", help="folder of the study (default: studies/STUDY-PRESET)")
    study.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")
    study.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    study.add_argument("--only_table", action="store_true", help="write the tables of what is done, run nothing")
    listing = commands.add_parser("list", help="list names, one a line", allow_abbrev=False)
    listing.add_argument("what", choices=_LISTS)
    report = commands.add_parser("report", help="render the report of a run again", allow_abbrev=False)
    report.add_argument("folder", metavar="DIR", help="output folder of the run")
    return parser


def _names(what: str) -> list[str]:
    """Returns the names of one kind of component."""
    from recbole_cl import config, registry

    if what == "strategies":
        return registry.strategies.names()
    if what == "schedulers":
        return registry.schedulers.names()
    if what == "models":
        return config.list_models()
    if what == "datasets":
        return config.list_datasets()
    if what == "studies":
        from recbole_cl.study import list_studies

        return list_studies()
    return config.list_metrics()


def _configured(options: argparse.Namespace, properties: list[str]) -> Any:
    """Returns the configuration of a command line, with the log at the level it asks for."""
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


def _run(options: argparse.Namespace, properties: list[str]) -> None:
    config = _configured(options, properties)
    from recbole_cl.training.runner import Runner

    result = Runner(config).run()
    from recbole_cl.report import terminal_summary

    if _rank() in (None, 0):
        print(terminal_summary(result))


def _compare(options: argparse.Namespace, properties: list[str]) -> None:
    if not any(argument.startswith("--parity=") for argument in properties):
        properties = [*properties, "--parity=recbole"]
    config = _configured(options, properties)
    from recbole_cl.study.parity import compare, comparison_table

    print(comparison_table(compare(config)))


def _study(options: argparse.Namespace) -> None:
    from recbole_cl.study import read_plan, walk, write_tables

    setup_logging()
    for name in ("jobs", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}={getattr(options, name)}: give a number from 1 on")
    plan = read_plan(options.name, options.preset)
    folder = Path(options.output_dir or f"studies/{plan.name}-{plan.preset}").expanduser()
    failures = [] if options.only_table else walk(plan, folder, options.jobs, options.threads)
    print(write_tables(plan, folder), end="")
    if failures:
        raise RecBoleCLError(f"{len(failures)} runs failed; the same command tries them again: " + "; ".join(failures))


def _report(folder: str) -> None:
    if not (Path(folder) / "result.json").is_file():
        raise ConfigError(f"{folder!r} holds no result.json; give the output folder of a run that has finished")
    from recbole_cl.report import render_folder

    summary = render_folder(Path(folder))
    if summary is not None:
        print(summary)


def _rank() -> int | None:
    """Returns the number of this process among several under torchrun, without importing torch."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1" else None


def _tell(message: str) -> None:
    who = PROGRAM if _rank() is None else f"{PROGRAM} (rank {_rank()})"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = any(argument.lower() == "--state=debug" for argument in arguments)
    try:
        options, properties = _parser().parse_known_args(arguments)
        if options.command == "run":
            _run(options, properties)
        elif options.command == "compare":
            _compare(options, properties)
        elif properties:
            raise ConfigError(f"cannot read the argument {properties[0]!r}; '{PROGRAM} --help' tells what there is")
        elif options.command == "study":
            _study(options)
        elif options.command == "list":
            print("\n".join(_names(options.what)))
        else:
            _report(options.folder)
        # Here, not at exit: a reader that has gone away (| head) is no error.
        sys.stdout.flush()
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        again = "the same command" if arguments[:1] == ["study"] else "the same command with --resume=True"
        _tell(f"interrupted; run {again} to go on from the newest checkpoint")
        return 130
    except RecBoleCLError as error:
        if debug:
            traceback.print_exc()
        _tell(f"error: {error}")
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--state=debug shows the traceback)"
        _tell(f"error: {type(error).__name__}: {error}{hint}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
