"""Logs that come as blocks of users' items: the JSON files of PESO's authors, read as one interaction file.

``<name>.block_<k>.json`` holds, for each user of block k, ``{"previous_block": [item, ...], "current_block": [...]}``:
what the user had in all blocks before, and in this one, in order. There are no timestamps, so an interaction gets the
pseudo-time ``1,000,000 k + place`` in seconds, and its block as a column for the scheduler Periods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recbole_cl.errors import DataError

HEADER = ("user_id:token", "item_id:token", "timestamp:float", "block:float")
BLOCK_SECONDS = 1_000_000
_NAME = re.compile(r".*\.block_(\d+)\.json")


def block_files(folder: Path) -> list[Path]:
    """Returns the blocks in a folder by number; none where there is a gap or it is no folder."""
    found = {int(match.group(1)): path for path in _files(folder) if (match := _NAME.fullmatch(path.name))}
    return [found[k] for k in range(len(found))] if sorted(found) == list(range(len(found))) else []


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def block_rows(folder: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yields user, item, pseudo-time and block of each interaction, block by block.

    Raises:
        DataError: If a file is not of the form, a block is longer than its pseudo-times, or what it says came before is
            not what the blocks before hold.
    """
    had: dict[str, list[str]] = {}
    for number, path in enumerate(block_files(folder)):
        for user, entry in _read(path).items():
            before, now = _entry(path, user, entry)
            if before != had.get(user, []):
                raise DataError(
                    f"{path.name}: previous_block of user {user!r} has {len(before)} items, which are not the "
                    f"{len(had.get(user, []))} of the blocks before; the files belong to different logs or a block is "
                    f"missing"
                )
            had.setdefault(user, []).extend(now)
            for place, item in enumerate(now):
                yield user, item, number * BLOCK_SECONDS + place, number


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name}: it holds no users; it must be {{user: {{previous_block, current_block}}}}")
    return content


def _entry(path: Path, user: str, entry: Any) -> tuple[list[str], list[str]]:
    keys = ("previous_block", "current_block")
    lists = [entry.get(key) for key in keys] if isinstance(entry, dict) else []
    clean = [[str(item) for item in one] for one in lists if isinstance(one, list)]
    words = [item for one in clean for item in one]
    if len(clean) != 2 or any(not item or re.search(r"[\t\r\n]", item) for item in [user, *words]):
        raise DataError(
            f"{path.name}: the entry of user {user!r} is not of the form {{previous_block: [item, ...], current_block: "
            f"[item, ...]}} with item names on one line"
        )
    if len(clean[1]) > BLOCK_SECONDS:
        raise DataError(f"{path.name}: user {user!r} has {len(clean[1])} items in one block, more than {BLOCK_SECONDS}")
    return clean[0], clean[1]


def write_interactions(folder: Path, file: Path, separator: str) -> None:
    """Writes the blocks of a folder as one of RecBole's interaction files."""
    with file.open("w", encoding="utf-8") as lines:
        lines.write(separator.join(HEADER) + "\n")
        lines.writelines(separator.join(map(str, row)) + "\n" for row in block_rows(folder))
