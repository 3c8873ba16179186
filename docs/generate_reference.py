"""Makes reference.md of docstrings: ``python docs/generate_reference.py > docs/reference.md``."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

HEAD = """# Reference

<!-- Made by docs/generate_reference.py from docstrings. Do not edit. -->

What another program or package may call. Everything else may change; the modules' docstrings tell of it.
"""
SECTIONS = {
    "Run": ["recbole_cl.run_recbole_cl", "recbole_cl.config.CLConfig", "recbole_cl.training.runner.Runner"],
    "Load and ask": ["recbole_cl.load", "recbole_cl.serve.Recommender", "recbole_cl.serve.Recommendation",
                     "recbole_cl.serve.Vectors"],
    "Import and look": ["recbole_cl.importer.Columns", "recbole_cl.importer.read_log", "recbole_cl.importer.import_log",
                        "recbole_cl.importer.read_format", "recbole_cl.importer.drift.drift"],
    "Results": ["recbole_cl.results.matrix.ResultMatrix", "recbole_cl.results.matrix.summarise"],
    "Compare": ["recbole_cl.study.read_plan", "recbole_cl.study.walk", "recbole_cl.study.found_plan",
                "recbole_cl.study.statistics.paired", "recbole_cl.study.statistics.adjusted",
                "recbole_cl.study.statistics.ranks", "recbole_cl.study.compare.tables_of",
                "recbole_cl.study.tune.tune"],
    "Extend": ["recbole_cl.strategy.base.Strategy", "recbole_cl.strategy.context.StageContext",
               "recbole_cl.strategy.context.Pass", "recbole_cl.model.contract.contract",
               "recbole_cl.evaluation.strata.Stratum", "recbole_cl.commands.base.Command"],
    "Errors": ["recbole_cl.errors.RecBoleCLError", "recbole_cl.errors.ConfigError", "recbole_cl.errors.DataError"],
}  # fmt: skip


def find(path: str) -> Any:
    """Returns what a dotted path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def signature(what: Any) -> str:
    """Returns the parameters of something that is called; types as they stand in the source."""
    try:
        told = str(inspect.signature(what))
    except (TypeError, ValueError):
        return ""
    told = re.sub(r"(?<!\w)(?:typing\.|collections\.abc\.|pathlib\.\w+\.)", "", told).replace("'", "")
    return re.sub(r"<factory>|<(?:[^<>]|<[^<>]*>)* at 0x[0-9a-f]+>", "...", told)


def prose(docstring: str | None) -> list[str]:
    """Returns a docstring in Google's style as Markdown: sections as bold words, their entries as lists."""
    lines: list[str] = []
    entry, code = False, False
    for line in inspect.cleandoc(docstring or "").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", line):
            entry = True
            lines += ["", f"**{line[:-1]}**", ""]
            continue
        if line and not line.startswith(" "):
            entry = False
        if not entry and line.startswith("    "):
            if not code:
                lines.append("```text")
            code = True
            lines.append(line[4:])
            continue
        if code and line:
            lines.append("```")
            code = False
        told = roles(line)
        if entry and re.match(r"    \S", line):
            name, colon, rest = told.strip().partition(": ")
            is_name = bool(colon) and re.fullmatch(r"[\w*., ]+", name) and not name.count(" ") > 3
            lines.append(
                f"- `{name}`: {rest}" if is_name else f"- {told.strip()}" if new(lines) else f"  {told.strip()}"
            )
        else:
            lines.append(f"  {told.strip()}" if entry and told.strip() else told)
    return [*lines, "```"] if code else lines


def new(lines: list[str]) -> bool:
    """Tells whether a list begins here."""
    return not lines or not lines[-1].startswith(("- ", "  "))


def roles(line: str) -> str:
    """Returns a line with reStructuredText's roles and literals as code."""
    line = re.sub(r":\w+:`~?([^`]*)`", lambda m: f"`{m[1]}`", line)
    line = re.sub(r"``([^`]*)``", r"`\1`", line)
    parts = re.split(r"(`[^`]*`)", line.rstrip(":") + ":" if line.endswith("::") else line)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts)


def entry(path: str) -> list[str]:
    """Returns the part about one class or function: its docstring, and those of a class's public methods."""
    what, name = find(path), path.rpartition(".")[2]
    lines = [
        f"### {name}",
        "",
        f"`{path}`",
        "",
        "```text",
        f"{name}{signature(what)}",
        "```",
        "",
        *prose(what.__doc__),
        "",
    ]
    if inspect.isclass(what):
        for own, member in vars(what).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if own.startswith("_") or not (inspect.isfunction(function) or isinstance(member, property)):
                continue
            inside = member.fget if isinstance(member, property) else function
            if not inside.__doc__:
                continue
            shown = own if isinstance(member, property) else f"{own}{signature(inside)}"
            lines += [f"#### {name}.{own}", "", "```text", shown, "```", "", *prose(inside.__doc__), ""]
    return lines


def page() -> str:
    """Returns the page."""
    lines = [HEAD, ""]
    for title, paths in SECTIONS.items():
        lines += [f"## {title}", ""]
        for path in paths:
            lines += entry(path)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
