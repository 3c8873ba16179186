"""Semantic ids: the codes of items, and the JSON file that keeps them.

The format is that of LC-Rec, LETTER and PESO: item token to its codes, coarse to fine, the letter telling the level::

    {"0": ["<a_128>", "<b_72>", "<c_95>", "<d_83>"], "1": ["<a_103>", "<b_28>", "<c_240>", "<d_125>"]}
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_cl.disk import write_atomically
from recbole_cl.errors import DataError

_CODE = re.compile(r"<([a-z])_(\d{1,9})>")


@dataclass(frozen=True)
class SemanticIds:
    """Codes of items.

    Args:
        items: Item tokens, ``n`` of them, each once.
        codes: Their codes, shape ``[n, levels]``, int64.
        sizes: Codes that each level may have; a code lies in ``[0, size)``.
    """

    items: tuple[str, ...]
    codes: np.ndarray
    sizes: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Codes an item."""
        return len(self.sizes)

    def of(self, tokens: Sequence[str], source: str = "the index") -> np.ndarray:
        """Returns the codes of item tokens, shape ``[len(tokens), levels]``.

        Args:
            tokens: Item tokens.
            source: Where the codes come from, for messages.

        Raises:
            DataError: If an item has none; the message counts them and names some.
        """
        place = {item: row for row, item in enumerate(self.items)}
        missing = [token for token in tokens if token not in place]
        if missing:
            some = ", ".join(repr(token) for token in missing[:3])
            raise DataError(
                f"semantic_ids: {len(missing)} of {len(tokens)} items have no codes in {source} ({some}"
                f"{', ...' if len(missing) > 3 else ''}); make codes for all items with 'recbole-cl semantic-ids', or "
                f"leave those items out of the log"
            )
        return self.codes[[place[token] for token in tokens]]


def read_index(path: str | os.PathLike[str], size: int | None = None) -> SemanticIds:
    """Reads an index file.

    Args:
        path: The file.
        size: Codes a level; by default one more than the largest code of each, rounded up to a power of two.

    Raises:
        DataError: If it cannot be read, holds no item, or codes are malformed; the message names the item.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise DataError(f"semantic_ids: cannot read {os.fspath(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"semantic_ids: {os.fspath(path)!r} is no index of items: {error}; it must be JSON of the form "
            '{"item": ["<a_1>", "<b_2>", "<c_3>"]}'
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise DataError(
            f"semantic_ids: {os.fspath(path)!r} holds no items; it must be JSON of the form "
            '{"item": ["<a_1>", "<b_2>", "<c_3>"]}'
        )
    rows = [_codes(os.fspath(path), item, words) for item, words in content.items()]
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        item = next(item for item, row in zip(content, rows, strict=True) if len(row) != len(rows[0]))
        raise DataError(
            f"semantic_ids: in {os.fspath(path)!r} the item {item!r} has {len(content[item])} codes, the first item "
            f"{len(rows[0])}; every item has as many"
        )
    codes = np.array(rows, dtype=np.int64)
    most = codes.max(axis=0) + 1
    if size is not None and (most > size).any():
        level = int((most > size).argmax())
        raise DataError(
            f"semantic_ids: in {os.fspath(path)!r} the codes of level {level + 1} go up to {most[level] - 1}, but a "
            f"level has {size} codes"
        )
    sizes = tuple(size or 1 << int(n - 1).bit_length() for n in most.tolist())
    return SemanticIds(tuple(map(str, content)), codes, sizes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the item {twice!r} stands in it twice")
    return found


def _codes(path: str, item: str, words: Any) -> list[int]:
    """Returns the codes of one entry."""
    entries = words if isinstance(words, list) else []
    matches = [_CODE.fullmatch(word) if isinstance(word, str) else None for word in entries]
    letters = "".join(match.group(1) for match in matches if match)
    if not matches or None in matches or letters != string.ascii_lowercase[: len(matches)]:
        raise DataError(
            f"semantic_ids: in {path!r} the codes of item {item!r} are {words!r}; they must be of the form "
            '["<a_1>", "<b_2>", "<c_3>"], one a level'
        )
    return [int(match.group(2)) for match in matches if match]


def write_index(path: str | os.PathLike[str], ids: SemanticIds) -> None:
    """Writes an index file; a reader sees the old or the new one, never a part.

    Raises:
        OutputError: If it cannot be written.
    """
    letters = string.ascii_lowercase
    content = {
        item: [f"<{letters[level]}_{code}>" for level, code in enumerate(row)]
        for item, row in zip(ids.items, ids.codes.tolist(), strict=True)
    }
    write_atomically(Path(path), json.dumps(content, indent=0), "semantic_ids")
