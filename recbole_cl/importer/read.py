"""Reads a table of interactions: users and items as text, times as seconds, labels as numbers.

What is wrong is told with the file, the line and the remedy. Nothing is guessed that a person could not check: the
summary says which separator, encoding and clock were found.
"""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd

from recbole_cl.errors import DataError, nearest
from recbole_cl.importer.clock import seconds

USER, ITEM, TIME, LABEL = "user_id", "item_id", "timestamp", "label"
"""Columns of the log that is written."""
KINDS = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".inter": "csv", ".parquet": "parquet", ".pq": "parquet",
    ".dat": "csv", ".data": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
}  # fmt: skip
MISSING = frozenset({
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null", "[PAD]",
})  # fmt: skip
"""Tokens that do not survive being read by RecBole."""
SEPARATORS = (",", "\t", ";", "|")
ROW = "_row"
"""Column of the places of rows, for a log that has an order and no times."""


@dataclass(frozen=True)
class Columns:
    """How the columns of a table are named, and how it is read.

    Args:
        user: Column of users.
        item: Column of items.
        time: Column of times.
        label: Column of labels or ratings, or ``None``.
        unit: Clock: ``s``, ``ms``, ``us``, ``ns``, ``iso``, ``row`` (the place of the row, where a log has an order and
            no times), or ``None`` to find out.
        encoding: Encoding of text, or ``None`` to find out.
        separator: What separates the columns of a text file, or ``None`` to find out; several characters are allowed.
        kind: ``csv``, ``parquet`` or ``jsonl``, where the ending of the file does not say so.
        header: Names of the columns of a text file that has no line of them.
        keep: Column to the values of rows that count as interactions.
    """

    user: str = USER
    item: str = ITEM
    time: str = TIME
    label: str | None = None
    unit: str | None = None
    encoding: str | None = None
    separator: str | None = None
    kind: str | None = None
    header: tuple[str, ...] | None = None
    keep: Mapping[str, tuple[str, ...]] | None = None

    def names(self) -> dict[str, str]:
        """Returns the column of the log to that of the table."""
        named = {USER: self.user, ITEM: self.item, TIME: self.time}
        return named if self.label is None else {**named, LABEL: self.label}

    def to_dict(self) -> dict[str, Any]:
        """Returns it JSON-able."""
        return asdict(self)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Columns:
        """Returns what :meth:`to_dict` gave."""
        known = cls.__dataclass_fields__
        given = {name: value for name, value in saved.items() if name in known}
        if given.get("header") is not None:
            given["header"] = tuple(map(str, given["header"]))
        if given.get("keep") is not None:
            given["keep"] = {str(name): tuple(map(str, values)) for name, values in given["keep"].items()}
        return cls(**given)


KEYS = tuple(Columns.__dataclass_fields__)


def read_log(path: str | Path, columns: Columns, more: Sequence[str] = ()) -> tuple[pd.DataFrame, Columns]:
    """Reads the interactions of a file.

    Args:
        path: A CSV, TSV, parquet or JSON-lines file.
        columns: How its columns are named.
        more: Further columns that are wanted, as they stand there.

    Returns:
        Users and items as text, times in seconds (float64), labels as numbers; the index is the line of the file, or
        the row of a parquet file. And the columns with what was found out: clock, encoding, separator.

    Raises:
        DataError: If the file cannot be read, a column is missing, or a value makes no sense; with file and line.
    """
    path = Path(path).expanduser()
    table, found_of = read_table(path, columns)
    table = _kept(path, table, columns.keep)
    if columns.unit == "row":
        columns = replace(columns, time=ROW)
        table = table.assign(**{ROW: np.arange(len(table))})
    frame = _chosen(path, table, columns, more, found_of["kind"] == "csv")
    if frame.empty:
        raise DataError(f"{path.name}: it holds no interaction; give a file with at least one row")
    out = pd.DataFrame(index=frame.index)
    for name in (USER, ITEM):
        out[name] = tokens(path, frame[name], columns.names()[name])
    try:
        numbered = columns.unit == "row"
        out[TIME], unit = seconds(frame[TIME], "s" if numbered else columns.unit)
        unit = "row" if numbered else unit
    except ValueError as error:
        line, value = error.args
        raise DataError(
            f"{path.name}, line {line}: {value!r} in column {columns.time!r} is no time that can be read; write "
            f"seconds, milliseconds or an ISO date such as 2024-05-01T12:00:00, or remove the line"
        ) from error
    if LABEL in frame:
        number = pd.to_numeric(frame[LABEL], errors="coerce")
        bad = ~np.isfinite(number.to_numpy(dtype=np.float64))
        if bad.any():
            line, value = frame.index[bad][0], frame[LABEL][bad].iloc[0]
            raise DataError(
                f"{path.name}, line {line}: {value!r} in column {columns.label!r} is no number; write a number or "
                f"remove the line"
            )
        out[LABEL] = number.astype(np.float64)
    for name in more:
        out[name] = frame[name]
    out.attrs.update(found_of)
    return out, replace(columns, unit=unit)


def read_table(path: Path, columns: Columns) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Reads all of a file as it stands there.

    Args:
        path: The file; one that ends in ``.gz`` is unpacked as it is read.
        columns: Its kind, encoding, separator and header are read.

    Returns:
        The table, whose index is the line of the file or the row of a parquet file; and ``kind``, ``encoding`` and
        ``separator`` as they were found.

    Raises:
        DataError: If the file cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    ending = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    kind = columns.kind or KINDS.get(ending.lower())
    if kind is None:
        raise DataError(
            f"{path.name}: {ending or 'no ending'} is no kind of file that can be imported; give a file ending in "
            f"{', '.join(sorted(KINDS))}"
        )
    encoding = separator = None
    if kind == "csv":
        encoding = columns.encoding or _encoding(path)
        separator = columns.separator or _separator(path, encoding)
        frame = _csv(path, encoding, separator, columns.header)
    elif kind == "parquet":
        frame = _parquet(path)
    else:
        encoding = columns.encoding or _encoding(path)
        frame = _jsonl(path, encoding)
    return frame, {"encoding": encoding, "separator": separator, "kind": kind}


def _kept(path: Path, frame: pd.DataFrame, keep: Mapping[str, Sequence[str]] | None) -> pd.DataFrame:
    for name, values in (keep or {}).items():
        if name not in frame:
            hint = nearest(name, map(str, frame.columns)) or "."
            raise DataError(
                f"{path.name}: there is no column {name!r} to keep rows by{hint} "
                f"It has {', '.join(map(str, frame.columns))}"
            )
        frame = frame[frame[name].map(_token).isin(values)]
    return frame


# -- kinds of files -----------------------------------------------------------------------------------------------


def _opened(path: Path, mode: str, encoding: str | None = None) -> IO[Any]:
    """Opens a file, unpacked where it ends in ``.gz``."""
    if path.suffix.lower() == ".gz":
        return cast(IO[Any], gzip.open(path, mode, encoding=encoding))
    return path.open(mode.replace("t", ""), encoding=encoding)


def _encoding(path: Path) -> str:
    """Returns the first encoding that reads the whole file: UTF-8, UTF-16 by its mark, else Windows' Western one."""
    with _opened(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            with _opened(path, "rt", encoding) as file:
                while file.read(1 << 20):
                    pass
            return encoding
        except UnicodeDecodeError:
            continue
    return "latin-1"


def _separator(path: Path, encoding: str) -> str:
    """Returns the separator that parts the first line into most columns."""
    with _opened(path, "rt", encoding) as file:
        header = file.readline()
    return max(SEPARATORS, key=header.count)


def _csv(path: Path, encoding: str, separator: str, header: Sequence[str] | None = None) -> pd.DataFrame:
    if len(separator) > 1:
        return _long_separator(path, encoding, separator, header)
    names: dict[str, Any] = {} if header is None else {"names": list(header), "header": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the first line names
            frame = pd.read_csv(
                path, sep=separator, encoding=encoding, dtype=str, na_filter=False, index_col=False, **names
            )
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path.name}: it is empty; give a file with a line of column names and rows below") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name}: it is not written in {encoding} ({error.reason}); give another --encoding"
        ) from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as error:
        raise DataError(f"{path.name}: {_words(error)}; mend the line, or give the right --separator") from error
    first = 1 if header is not None else 2  # line 1 names the columns
    frame.index = pd.RangeIndex(first, len(frame) + first)
    return frame


def _long_separator(path: Path, encoding: str, separator: str, header: Sequence[str] | None) -> pd.DataFrame:
    """Reads columns that several characters part, such as ``::``; values hold no quotation."""
    names, rows, lines = list(header or ()), [], []
    for number, text in _lines(path, encoding):
        values = text.rstrip("\r\n").split(separator)
        if not names:
            names = values
            continue
        if len(values) != len(names):
            raise DataError(
                f"{path.name}, line {number}: it has {len(values)} columns, not {len(names)} ({', '.join(names)}); "
                f"mend the line, or give the right --separator"
            )
        rows.append(values)
        lines.append(number)
    return pd.DataFrame(rows, columns=names, index=pd.Index(lines, dtype=np.int64), dtype=object)


def _parquet(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except ImportError as error:
        raise DataError(
            f"{path.name}: reading parquet needs pyarrow; pip install pyarrow, or give a CSV file"
        ) from error
    except Exception as error:  # whatever a broken file makes pyarrow raise
        raise DataError(f"{path.name}: it is no parquet file ({_words(error)}); write it again") from error
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return frame


def _jsonl(path: Path, encoding: str) -> pd.DataFrame:
    rows, lines = [], []
    for number, text in _lines(path, encoding):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path.name}, line {number}: it is no JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path.name}, line {number}: it is no JSON object; write one object a line")
        rows.append(row)
        lines.append(number)
    return pd.DataFrame(rows, index=pd.Index(lines, dtype=np.int64), dtype=object)


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    with _opened(path, "rt", encoding) as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, text


def _words(error: Exception) -> str:
    return " ".join(str(error).replace("Error tokenizing data. C error: ", "").split())


# -- columns ------------------------------------------------------------------------------------------------------


def _chosen(path: Path, frame: pd.DataFrame, columns: Columns, more: Sequence[str], typed: bool) -> pd.DataFrame:
    """Returns the columns that are wanted, under the log's names.

    Args:
        path: The file.
        frame: All of it.
        columns: What is wanted.
        more: What else is wanted.
        typed: Names may carry a type, as in RecBole's files (``user_id:token``).
    """
    known = {str(name): name for name in frame.columns}
    if typed:
        known.update({str(name).partition(":")[0]: name for name in frame.columns if ":" in str(name)})
    out = {}
    for name, asked in [*columns.names().items(), *((name, name) for name in more)]:
        if asked not in known:
            hint = nearest(asked, known) or "."
            option = {USER: "--user", ITEM: "--item", TIME: "--time", LABEL: "--label"}.get(name)
            remedy = f"name the right one with {option}" if option else "the model was trained with it; add it"
            raise DataError(
                f"{path.name}: there is no column {asked!r}{hint} It has {', '.join(known) or 'no column'}; {remedy}"
            )
        out[name] = frame[known[asked]]
    return pd.DataFrame(out, index=frame.index)


def tokens(path: Path, column: pd.Series, name: str) -> pd.Series:
    """Returns users or items as text; none may be empty, or hold what separates the columns of an atomic file."""
    text = column.map(_token)
    for bad, why in (
        (text == "", "is empty; remove the line or name the user or item"),
        (text.str.contains(r'[\t\n\r"]', regex=True), "holds a tab, a line break or a quotation mark; replace it"),
        (text.isin(MISSING), "is what RecBole takes for a missing value, or for nobody; rename it"),
    ):
        if bad.any():
            line, value = column.index[bad][0], column[bad].iloc[0]
            raise DataError(
                f"{path.name}, line {line}: {value!r} in column {name!r} {why} ({int(bad.sum())} such lines)"
            )
    return text


def _token(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return ""
    if isinstance(value, float | np.floating) and value == int(value):
        return str(int(value))
    return str(value).strip()
