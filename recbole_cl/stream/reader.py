"""Reading atomic files: the rows that are read are the lines of the file.

RecBole hands its files to pandas, which knows no ill-formed file: a quote that nothing closes swallows the lines up to
the next one, a field too many on the first line moves all columns by one, further ones are dropped. So every line is
looked at before, and what cannot be read as it stands is refused with its number.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_cl.errors import DataError

SHOWN = 3
"""Lines that a message names at most."""


@dataclass
class Lines:
    """What a file's lines are like.

    Attributes:
        rows: Lines below the header that are not blank.
        stray: Line number and columns of fields that begin with a quote which does not close at the field's end.
    """

    rows: int = 0
    stray: list[tuple[int, list[int]]] = field(default_factory=list)


def split_quoted(line: str, separator: str) -> tuple[int, list[int]]:
    """Returns how many fields a line has where quoted ones may hold separators, and which begin with a stray quote.

    ::

        a|"b|c"|d        3, []      a quoted field
        a|"b "" c"       2, []      a quote in it is doubled
        a|"b|c           3, [1]     never closed
        a|"b" c          2, [1]     closed before its end

    Args:
        line: The line, without its end.
        separator: Between two fields.
    """
    fields: list[int] = []
    count, start = 0, 0
    while True:
        end = line.find(separator, start)
        if line.startswith('"', start):
            close = _closing(line, start)
            if close >= 0 and (close + 1 == len(line) or line.startswith(separator, close + 1)):
                end = close + 1 if close + 1 < len(line) else -1
            else:
                fields.append(count)
        count += 1
        if end < 0:
            return count, fields
        start = end + len(separator)


def _closing(line: str, start: int) -> int:
    """Returns where the quote that begins at a place is closed, -1 where it is not."""
    at = line.find('"', start + 1)
    while at >= 0 and line.startswith('""', at):
        at = line.find('"', at + 2)
    return at


def look(path: Path, encoding: str, separator: str) -> Lines:
    """Looks at every line of an atomic file.

    Args:
        path: The file.
        encoding: Property ``encoding``.
        separator: Property ``field_separator``; one that pandas takes for a pattern is not looked for.

    Raises:
        DataError: If a line has more fields than the header names or is not in the encoding; it is named by number.
    """
    found = Lines()
    plain = len(separator) == 1 or re.escape(separator) == separator
    blank = " \t".replace(separator, "")
    quoted: list[tuple[int, str]] = []
    short: set[int] = set()  # lines with a field too few that hold a quote or follow one
    try:
        with path.open(encoding=encoding) as file:
            wanted = file.readline().rstrip("\n").count(separator) + 1
            for number, line in enumerate(file, 2):
                if not line.strip(blank + "\n"):
                    continue
                found.rows += 1
                if not plain:
                    continue
                count = line.count(separator) + 1
                if '"' in line:
                    quoted.append((number, line.rstrip("\n")))
                if count < wanted and quoted and number - quoted[-1][0] <= 1:
                    short.add(number)
                if '"' not in line and count > wanted:
                    _check_count(path, number, line.rstrip("\n").split(separator), wanted)
    except UnicodeDecodeError as error:
        raise _not_encoded(path, encoding, error) from error
    parted = [(number, *split_quoted(line, separator)) for number, line in quoted]
    found.stray = [(number, stray) for number, _, stray in parted if stray]
    broken = next((number for number, _ in found.stray if {number, number + 1} & short), None)
    if broken is not None:
        raise DataError(
            f"{path.name}, line {broken}: a text in quotes goes on in the next line; write it in one line, or "
            f"remove the quote that it begins with"
        )
    for (number, line), (_, count, _) in zip(quoted, parted, strict=True):
        if found.stray:
            _check_count(path, number, line.split(separator), wanted)
        elif count > wanted:
            _check_count(path, number, next(csv.reader([line], delimiter=separator)), wanted)
    return found


def _check_count(path: Path, number: int, fields: list[str], wanted: int) -> None:
    """Raises a :class:`DataError` for a line with more fields than wanted, unless they are empty at its end."""
    if any(word.strip() for word in fields[wanted:]):
        raise DataError(
            f"{path.name}, line {number}: it has {len(fields)} fields, but the first line names {wanted} columns; "
            f"remove what is too many (first {fields[wanted]!r}), name the column in the first line, or set "
            f"field_separator to what separates the fields"
        )


def _not_encoded(path: Path, encoding: str, error: UnicodeDecodeError) -> DataError:
    where = ""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode(encoding)
        except UnicodeDecodeError:
            where = f", line {number}"
            break
    return DataError(
        f"{path.name}{where}: it is not written in {encoding} ({error.reason}); set encoding to what it is written in, "
        f"such as latin-1 or utf-16"
    )


class Reader:
    """Stands for pandas while RecBole reads atomic files: the C parser, and lines as they are.

    Args:
        ids: Columns of ids, whose quotes cannot be guessed.
        messages: Gets a sentence about each file that is read otherwise than a spreadsheet would.
    """

    def __init__(self, ids: Collection[str] = (), messages: list[str] | None = None) -> None:
        self.ids, self.messages = ids, messages if messages is not None else []

    def __getattr__(self, name: str) -> Any:
        return getattr(pd, name)

    def read_csv(self, path: str, **given: Any) -> pd.DataFrame:
        """Reads a file as ``recbole/data/dataset/dataset.py:482`` asks; see :func:`fast_reader`."""
        file, separator, encoding = Path(path), given["delimiter"], given.get("encoding") or "utf-8"
        lines = look(file, encoding, separator)
        # Never a column of labels: a field too many at the ends of lines, which are empty, would make one of the first.
        given["index_col"] = False
        if lines.stray:
            given["quoting"] = csv.QUOTE_NONE
            self._tell(file, encoding, separator, lines, given["usecols"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            try:
                frame = pd.read_csv(path, **{**given, "engine": "c"})
            except Exception:
                frame = pd.read_csv(path, **given)
        if len(frame) != lines.rows:
            raise DataError(
                f"{file.name}: {len(frame)} rows were read of {lines.rows} lines; look for control characters and for "
                f"quoted texts of several lines, and write each row in one line"
            )
        return _unquoted(frame) if lines.stray else frame

    def _tell(self, file: Path, encoding: str, separator: str, lines: Lines, columns: list[str]) -> None:
        with file.open(encoding=encoding) as opened:
            header = opened.readline().rstrip("\n").split(separator)
        numbers = {header[at]: [n for n, stray in lines.stray if at in stray] for at in range(len(header))}
        for column in columns:
            where = numbers[column]
            if not where:
                continue
            name = column.partition(":")[0]
            shown = f"line {', '.join(map(str, where[:SHOWN]))}{', ...' if len(where) > SHOWN else ''}"
            if name in self.ids:
                raise DataError(
                    f"{file.name}, {shown}: {len(where)} values of {name!r} begin with a quote that does not close at "
                    f"their end; remove the quotes, so that each id is written in one way throughout the files"
                )
            self.messages.append(
                f"{file.name}: {len(where)} values of {name!r} begin with a quote that does not close at their end "
                f"({shown}); they are read as they stand; remove the quotes where they mean nothing"
            )


def _unquoted(frame: pd.DataFrame) -> pd.DataFrame:
    """Takes the quotes off the fields that are wholly in quotes, as pandas does in a file without stray ones."""
    for name in frame.select_dtypes(object):
        frame[name] = [
            word[1:-1].replace('""', '"')
            if isinstance(word, str) and split_quoted(word, "\0") == (1, []) and word.startswith('"')
            else word
            for word in frame[name]
        ]
    return frame


@contextlib.contextmanager
def fast_reader(ids: Collection[str] = (), messages: list[str] | None = None) -> Iterator[None]:
    """A context in which RecBole reads atomic files with pandas' C parser: a fifth of the time, the same values.

    ``recbole/data/dataset/dataset.py:482`` asks for ``engine="python"``, the slow one. It is called through the
    module's global ``pd``, which is put back on the way out. What the C parser does not take (a separator of several
    characters, a malformed number) goes to the slow one, errors included. Not for several threads.

    Args:
        ids: See :class:`Reader`.
        messages: See :class:`Reader`.
    """
    module: Any = importlib.import_module("recbole.data.dataset.dataset")
    module.pd = Reader(ids, messages)
    try:
        yield
    finally:
        module.pd = pd
