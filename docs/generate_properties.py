"""Makes properties.md of properties/: ``python docs/generate_properties.py > docs/properties.md``."""

from __future__ import annotations

import re
from pathlib import Path

from recbole_cl.config.recbole_properties import markdown

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^(?P<key>\w+):\s*(?P<default>.*?)\s*(?:#\s*(?:\((?P<type>[^)]*)\))?\s*(?P<meaning>.*))?$")
HEAD = """# Properties

<!-- Made by docs/generate_properties.py from the files in properties/. Do not edit. -->

Every property of RecBole-CL with its default. RecBole's own properties (`embedding_size`, `learning_rate`,
`train_batch_size`, `eval_args`, `load_col`, ...) keep their names and, but for those in the last table of the first
part, their defaults. `~` is "not set". How values are given, and which one wins, is told in the
[quick start](quick_start.md#settings-who-wins).
"""

RECBOLE = """What becomes of each property that RecBole documents, tried one by one. *works*: it does what RecBole's
pages say, as far as the last column goes. *refused*: a value other than RecBole's default ends the run before it
begins, with the reason. *nothing reads it*: such a value changes no result, and a warning says so. Properties that
RecBole's own pages do not have (`n_heads`, `reg_weight`) are read by its models, and are checked for type and range."""


def table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Returns a Markdown table of (property, default, type, meaning)."""
    lines = ["| property | default | type | meaning |", "|---|---|---|---|"]
    for key, default, kind, meaning in rows:
        told = meaning.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{key}` | `{default}` | {kind} | {told or 'as above or in RecBole'} |")
    return [*lines, ""]


def rows_of(text: str) -> list[tuple[str, str, str, str]]:
    """Returns the properties of a file's lines; continuation lines (of a dict) are passed over."""
    found = [match for line in text.splitlines() if (match := LINE.match(line))]
    return [(m["key"], m["default"], m["type"] or "", m["meaning"] or "") for m in found]


def overall() -> list[str]:
    """Returns a heading and a table for each section of overall.yaml; a comment line is a section's title."""
    lines = ["## General", ""]
    for block in (ROOT / "properties" / "overall.yaml").read_text(encoding="utf-8").split("\n\n"):
        title, _, rest = block.partition("\n")
        if rows := rows_of(rest):
            lines += [f"### {title.lstrip('# ')}", "", *table(rows)]
    return lines


def folder(name: str, title: str, intro: str) -> list[str]:
    """Returns a table for each file of a folder that sets something, with the comment at its top."""
    lines = [f"## {title}", "", intro, ""]
    silent = []
    for file in sorted((ROOT / "properties" / name).glob("*.yaml"), key=lambda file: file.stem.lower()):
        text = file.read_text(encoding="utf-8")
        rows = rows_of(text)
        if not rows:
            silent.append(f"`{file.stem}`")
            continue
        told = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        lines += [f"### {file.stem}", "", *([told, ""] if told else []), *table(rows)]
    if silent:
        lines += [f"Nothing of their own: {', '.join(silent)}.", ""]
    return lines


def page() -> str:
    """Returns the page."""
    parts = [
        HEAD.rstrip(),
        "",
        *overall(),
        "## RecBole's properties",
        "",
        RECBOLE,
        "",
        markdown(),
        *folder("strategy", "Strategies", "Parameters of a strategy have its prefix: `--ewc_lambda=10`."),
        *folder("stream", "Schedulers", "What a scheduler sets differently from the general defaults."),
        *folder("encoder", "Text encoders", "Where a model names an encoder: `--minilm_batch_size=64`."),
        *folder("aggregator", "Aggregators", "Where `protofed_aggregator` names it: `--kmeans_momentum=0.3`."),
        *folder("engine", "Engines", "Where `protofed_engine` names it."),
        *folder("llm_client", "LLM clients", "Where a model names a client: `--openai_model=...`."),
        *folder("preset", "Presets", "Settings that belong together: `--config_files=peso_paper`; later files win."),
        *folder("model", "Models", "What a model sets or adds; the properties of RecBole's models are RecBole's."),
    ]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
