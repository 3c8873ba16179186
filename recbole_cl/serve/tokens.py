"""Lists of users or items in files: one token a line."""

from __future__ import annotations

from pathlib import Path

from recbole_cl.errors import ConfigError, DataError


def read_tokens(path: str | Path, option: str) -> list[str]:
    """Returns the tokens of a file, each once.

    Args:
        path: A text file (UTF-8) with a token a line; empty lines are left out.
        option: What it was given with, for the message.

    Raises:
        ConfigError: If there is no such file.
        DataError: If it holds no token, or is no text.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"{option}: {str(path)!r} is no file; give one with a token a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{option}: {path.name} is no text in UTF-8 ({error}); write one token a line") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise DataError(f"{option}: {path.name} is empty; write one token a line")
    return found
