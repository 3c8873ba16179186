"""What a prompt may tell of items and users: the columns that are allowed, and never an id."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_cl import disk
from recbole_cl.config.columns import read_header
from recbole_cl.errors import ConfigError, nearest
from recbole_cl.llm.texts import clean, quoted

_LOG = logging.getLogger("recbole_cl")
Words = dict[str, list[str]]
"""Column to its words."""


class Catalogue:
    """Texts of items or users, from the dataset's atomic file, or as they were when it was last there.

    A saved run is updated where its log may not be: what prompts may tell is kept in a file of its own, the allowed
    columns alone, and read from there where the dataset has no file any more.

    Args:
        config: The run's configuration: ``data_path`` and how its files are read.
        side: ``item`` or ``user``.
        key: The property that allows columns, for messages.
        allowed: Columns that a prompt may tell; ``None`` allows all words of items, and nothing of users.
        kept: Folder that keeps the words for where the dataset's file is not, or ``None``.

    Raises:
        ConfigError: If there is no such column, or an id is asked for.
    """

    def __init__(
        self, config: Any, side: str, key: str, allowed: Sequence[str] | None, kept: Path | None = None
    ) -> None:
        final: Mapping[str, Any] = config.final_config_dict
        own = config["ITEM_ID_FIELD"] if side == "item" else config["USER_ID_FIELD"]
        ids = {config["ITEM_ID_FIELD"], config["USER_ID_FIELD"]}
        file = Path(config["data_path"]) / f"{config['dataset']}.{side}"
        self._words: dict[str, Words] = {}
        self.fields: list[str] = []
        about = hashlib.sha256(json.dumps([config["dataset"], allowed]).encode()).hexdigest()[:16]
        copy = None if kept is None else kept / f"{side}-{about}.json"
        if not file.is_file():
            if copy is not None and self._recalled(copy):
                return
            if allowed:
                raise ConfigError(f"property {key!r} names {allowed[0]!r}, but the dataset has no file {file.name}")
            return
        header = [column.rpartition(":") for column in read_header(file, final)]
        kinds = {name: kind for name, _, kind in header}
        for name in allowed or ():
            if name not in kinds or name in ids:
                reason = "is an id, which never leaves" if name in ids else f"is no column of {file.name}"
                raise ConfigError(f"property {key!r} names {name!r}, which {reason}{nearest(name, kinds)}")
        if allowed is None:
            allowed = [n for n, k in kinds.items() if k in ("token", "token_seq") and n not in ids] * (side == "item")
        self.fields = list(allowed)
        columns = [name for name, _, _ in header]
        at, wanted = columns.index(own), [(columns.index(name), name) for name in self.fields]
        with file.open(encoding=config["encoding"] or "utf-8", errors="replace") as lines:
            next(lines, None)
            for line in lines:
                cells = line.rstrip("\r\n").split(config["field_separator"])
                if len(cells) <= at:
                    continue
                self._words[cells[at]] = {
                    name: self._parts(cells[place], kinds[name], config["seq_separator"])
                    for place, name in wanted
                    if place < len(cells) and cells[place].strip()
                }
        if copy is not None and self.fields:
            self._keep(copy)

    def _keep(self, file: Path) -> None:
        """Writes the words; a disk that is full costs the copy and no more."""
        content = json.dumps({"fields": self.fields, "words": self._words}, sort_keys=True)
        with contextlib.suppress(OSError):
            if file.is_file() and file.read_text(encoding="utf-8") == content:
                return
        part = file.with_name(f".{os.getpid()}-{file.name}.part")
        try:
            disk.own_folder(file.parent, "liber_cache")
            with open(disk.create(part), "w", encoding="utf-8") as out:
                out.write(content)
            os.replace(part, file)  # a link in its place goes, what it leads to stays
        except OSError as error:
            _LOG.warning("LIBER: the words of prompts are not kept in %s: %s", file.parent, error.strerror or error)

    def _recalled(self, file: Path) -> bool:
        """Reads the words that were kept; tells whether there are any that can be read."""
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            words = {
                str(token): {str(name): [clean(str(part)) for part in parts] for name, parts in own.items()}
                for token, own in saved["words"].items()
            }
            fields = [str(name) for name in saved["fields"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        self.fields, self._words = fields, words
        return True

    @staticmethod
    def _parts(cell: str, kind: str, separator: str) -> list[str]:
        parts = cell.split(separator) if kind == "token_seq" else [cell]
        return [part for part in (clean(part) for part in parts) if part]

    def words(self, token: str) -> Words:
        """Returns what is told of an item or user, by its token; nothing of one that the file does not have."""
        return self._words.get(token, {})


def line(words: Words, liked: bool | None = None) -> str:
    """Returns a behaviour's line in a prompt: every text quoted, cut and cleaned."""
    titled = [name for name in words if is_title(name)]
    parts = [quoted(" ".join(words[name])) for name in titled] or ["an item"]
    parts += [f"{name}: {quoted(' '.join(words[name]))}" for name in words if name not in titled]
    return "- " + ", ".join(parts) + {None: "", True: " (liked)", False: " (not liked)"}[liked]


def profile(words: Words) -> str:
    """Returns what a prompt tells of the person."""
    return ", ".join(f"{name}: {quoted(' '.join(values))}" for name, values in words.items()) or "unknown"


def is_title(name: str) -> bool:
    """Tells whether a column names an item rather than describing it."""
    return name in ("title", "name") or name.endswith(("_title", "_name"))
