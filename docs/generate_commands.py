"""Makes docs/commands/ of the commands' own parsers, a page each: ``python docs/generate_commands.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_cl import cli

FOLDER = Path(__file__).resolve().parent / "commands"
HEAD = "<!-- Made by docs/generate_commands.py from the command's parser. Do not edit. -->"
MORE = {
    "run": ["quick_start.md", "properties.md"], "study": ["studies.md"], "tune": ["studies.md"],
    "import": ["import.md", "update_and_recommend.md"], "health": ["import.md"], "update": ["update_and_recommend.md"],
    "recommend": ["update_and_recommend.md"], "versions": ["update_and_recommend.md"], "report": ["results.md"],
    "rollback": ["update_and_recommend.md"], "export": ["update_and_recommend.md"], "profile": ["liber.md"],
    "semantic-ids": ["peso.md"], "parity": ["reproducibility.md"], "list": ["strategies.md"],
}  # fmt: skip
"""Pages that tell more."""


def text(words: str) -> str:
    """Returns words that Markdown prints as they stand."""
    return words.replace("|", "\\|").replace("<", "&lt;").replace("%%", "%").replace("*", "\\*")


def usage(name: str, parser: argparse.ArgumentParser) -> str:
    """Returns the form of a command's line."""
    words = [f"recbole-cl {name}"]
    for action in parser._actions:
        if not action.option_strings:
            word = str(action.metavar or action.dest).upper()
            words.append(f"[{word}]" if action.nargs in ("?", "*") else word)
    return " ".join([*words, "[OPTIONS]"])


def page(name: str) -> str:
    """Returns the page of a command."""
    table = cli._table()
    command, parser = table[name], cli._parsers(table)[1][name]
    summary = command.summary[:1].upper() + command.summary[1:]
    lines = [f"# recbole-cl {name}", "", HEAD, "", f"{text(command.description or summary + '.')}", ""]
    lines += ["```text", usage(name, parser), "```", "", "| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        told = text(action.help or "").strip()
        if action.choices and len(action.option_strings) + 1:
            told += f" ({', '.join(map(str, action.choices))})"
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        lines.append(f"| {names} | {told} |")
    if command.takes_properties:
        lines += ["", "Any other `--key=value` is a [property](../properties.md)."]
    if command.former_names:
        lines += ["", f"It was called {', '.join(f'`{old}`' for old in command.former_names)}, which goes on working."]
    links = [f"[{Path(link).stem.replace('_', ' ')}](../{link})" for link in MORE.get(name, [])]
    lines += ["", "After an interruption: " + command.goes_on_by + "."]
    lines += ["", f"More: {', '.join(links)}."] if links else []
    return "\n".join(lines) + "\n"


def names() -> list[str]:
    """Returns the commands that come with the package."""
    return [name for name, command in cli._table().items() if type(command).__module__.startswith("recbole_cl.")]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for own in names():
        (FOLDER / f"{own}.md").write_text(page(own), encoding="utf-8")
