"""``recbole-cl list``: what there is, a name and a line about it on each line."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.errors import printable
from recbole_cl.registry import (
    Registry,
    aggregators,
    commands,
    encoders,
    engines,
    llm_clients,
    models,
    schedulers,
    strata,
    strategies,
    tokenisers,
)

WIDTH = 100
"""Longest description."""


def first_line(text: str | None) -> str:
    """Returns the first sentence of a docstring or a comment, in one line."""
    paragraph = re.split(r"\n\s*\n", (text or "").strip())[0]
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))[0]
    sentence = re.sub(r":\w+:`([^`]*)`", r"\1", sentence)  # reStructuredText
    sentence = re.sub(r"(?<=\w)_(?=[\s(])|``", "", sentence)
    return sentence if len(sentence) <= WIDTH else f"{sentence[: WIDTH - 3].rstrip()}..."


def first_comment(file: Path) -> str:
    """Returns the first sentence of the comment that a YAML file begins with, if there is one."""
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return first_line("\n".join(lines))


def described(members: Registry) -> dict[str, str]:
    """Returns the members of a registry, by the first line of their docstrings or of their files of defaults."""
    from recbole_cl.config import properties_dir

    found = {}
    for name in members.names():
        own = vars(members.get(name)).get("__doc__")  # inspect.getdoc would tell a base's
        found[name] = first_line(own) or first_comment(properties_dir() / str(members.folder) / f"{name}.yaml")
    return found


def _models() -> dict[str, str]:
    """Returns all models. RecBole's files are read and not imported: some need a package that is not there."""
    from recbole_cl.config.models import list_models, recbole_models

    own = described(models)
    found = {}
    for name in list_models():
        if name in own:
            found[name] = own[name]
            continue
        _, module = recbole_models()[name.lower()]
        source = importlib.util.find_spec(module)
        tree = ast.parse(Path(str(source and source.origin)).read_text(encoding="utf-8"))
        classes = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef)}
        found[name] = first_line(classes.get(name))
    return found


def _files(folder: str, names: list[str]) -> dict[str, str]:
    from recbole_cl.config import properties_dir

    return {name: first_comment(properties_dir() / folder / f"{name}.yaml") for name in names}


def _datasets() -> dict[str, str]:
    from recbole_cl.config import list_datasets

    return _files("dataset", list_datasets())


def _studies() -> dict[str, str]:
    from recbole_cl.study import list_studies

    return _files("study", list_studies())


def _papers() -> dict[str, str]:
    from recbole_cl.study.plan import list_papers

    return _files("paper", list_papers())


def _formats() -> dict[str, str]:
    from recbole_cl.config import properties_dir
    from recbole_cl.importer import list_formats

    return _files("import", list_formats(properties_dir() / "import"))


def _metrics() -> dict[str, str]:
    from recbole.evaluator.register import metrics_dict

    from recbole_cl.config import list_metrics

    classes: Mapping[str, Any] = {cls.__name__: cls for cls in metrics_dict.values()}
    return {name: first_line(inspect.getdoc(classes[name]) if name in classes else "") for name in list_metrics()}


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "strategies": lambda: described(strategies),
    "schedulers": lambda: described(schedulers),
    "models": _models,
    "datasets": _datasets,
    "metrics": _metrics,
    "studies": _studies,
    "papers": _papers,
    "formats": _formats,
    "strata": lambda: described(strata),
    "encoders": lambda: described(encoders),
    "clients": lambda: described(llm_clients),
    "tokenisers": lambda: described(tokenisers),
    "aggregators": lambda: described(aggregators),
    "engines": lambda: described(engines),
}
"""What can be listed, and who tells its names and their descriptions."""


@commands.register("list")
class List(Command):
    """Prints names, each with a line about it."""

    summary = "list names, one a line"
    description = "List names, one a line: the name comes first, without spaces, then a line about it."
    place = 3

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("what", choices=tuple(KINDS))

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        found = {printable(name): text for name, text in KINDS[options.what]().items()}
        width = max(map(len, found), default=0)
        if found:
            show("\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in found.items()))
