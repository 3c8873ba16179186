"""Prompts: versioned files ``properties/prompts/<kind>.<version>.txt`` with fields in braces."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recbole_cl.config.files import properties_dir
from recbole_cl.errors import ConfigError

FIELDS = {"summary": ("profile", "behaviours"), "shift": ("previous", "current")}
"""What each kind of prompt is filled with."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of one version.

    Attributes:
        kind: ``summary`` or ``shift``.
        version: Name of the version, with the beginning of the text's hash: a file that was edited is another one.
        text: The text, with its fields.
    """

    kind: str
    version: str
    text: str

    def fill(self, values: Mapping[str, str]) -> str:
        """Returns the text with its fields filled; braces in what fills them stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.text)


def read_prompt(kind: str, version: str) -> Prompt:
    """Reads a prompt.

    Args:
        kind: ``summary`` or ``shift``.
        version: A version that the package has (``v1``), or a folder that holds ``<kind>.txt``.

    Raises:
        ConfigError: If there is none, or it lacks a field; the message names the file.
    """
    folder = properties_dir() / "prompts"
    file = folder / f"{kind}.{version}.txt"
    if not re.fullmatch(r"[\w-]+", version) or not file.is_file():
        file = Path(version).expanduser() / f"{kind}.txt"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeError, ValueError) as error:
        known = ", ".join(sorted(path.name.split(".")[1] for path in folder.glob(f"{kind}.*.txt")))
        raise ConfigError(
            f"property 'liber_prompts' is {version!r}: it is neither a version ({known}) nor a folder with "
            f"{kind}.txt, which can be read"
        ) from error
    missing = [field for field in FIELDS[kind] if "{" + field + "}" not in text]
    if missing:
        raise ConfigError(f"the prompt {file.name} lacks the field {{{missing[0]}}}; write it where its text belongs")
    name = version if file.parent == folder else file.parent.name
    return Prompt(kind, f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text)
