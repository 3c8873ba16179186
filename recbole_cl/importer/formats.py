"""Named formats: how the files of well-known logs are laid out, as YAML in ``properties/import/``.

::

    about: UserBehavior.csv of Taobao.
    source: where the log is to be had
    inter:                        # how the interactions are read, as Columns are
      user: user_id
      item: item_id
      time: timestamp
      unit: s
      kind: csv                   # where the ending of the file does not say so
      separator: ","
      header: [user_id, item_id, category_id, behavior, timestamp]    # a file without a line of names
      keep: {behavior: [pv, buy]} # rows that count; the command's --keep wins
    item:                         # a file of items, given by --items
      id: article_id
      columns: {title: prod_name, price: price}
      types: {title: token_seq, price: float}
    user: ...                     # a file of users, given by --users
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from recbole_cl.errors import ConfigError, DataError, nearest
from recbole_cl.importer.read import KEYS, Columns, read_table, tokens

TYPES = ("token", "token_seq", "float")
_TOP = ("about", "source", "inter", "item", "user")
_SIDE = ("id", "columns", "types", "kind", "separator", "encoding", "header")


@dataclass(frozen=True)
class Side:
    """How a file of items or of users is laid out.

    Args:
        id: Its column of items or users.
        columns: Column of the dataset to column of the file.
        types: Column of the dataset to RecBole's type; ``token`` where it is not told.
        kind, separator, encoding, header: As in :class:`recbole_cl.importer.read.Columns`.
    """

    id: str
    columns: Mapping[str, str]
    types: Mapping[str, str] = field(default_factory=dict)
    kind: str | None = None
    separator: str | None = None
    encoding: str | None = None
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Format:
    """A named format.

    Args:
        name: Its name.
        about: What it is, in a sentence.
        source: Where the log is to be had.
        inter: How the interactions are read.
        item: How a file of items is read, or ``None``.
        user: How a file of users is read, or ``None``.
    """

    name: str
    about: str
    source: str
    inter: Columns
    item: Side | None
    user: Side | None


def list_formats(folder: Path) -> list[str]:
    """Returns the names of the formats in a folder (``properties/import``)."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_format(name: str, folder: Path) -> Format:
    """Reads a format, by its name or as a YAML file.

    Raises:
        ConfigError: If there is none, or the file makes no sense; the message names what.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = list_formats(folder)
        raise ConfigError(
            f"--format={name}: unknown format{nearest(name, known)} Known: {', '.join(known)}; or give a .yaml file"
        )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name}: it is no YAML ({error})") from error
    _only(found, _TOP, path.name)
    if "inter" not in found:
        raise ConfigError(f"{path.name}: there is no key 'inter'; say how the interactions are read")
    _only(found["inter"], KEYS, f"{path.name}, inter")
    inter = Columns.of(found["inter"])
    sides = {name: _side(found[name], f"{path.name}, {name}") if found.get(name) else None for name in ("item", "user")}
    texts = {key: " ".join(str(found.get(key) or "").split()) for key in ("about", "source")}
    return Format(path.stem, texts["about"], texts["source"], inter, sides["item"], sides["user"])


def _side(given: Any, where: str) -> Side:
    _only(given, _SIDE, where)
    for key in ("id", "columns"):
        if key not in given:
            raise ConfigError(f"{where}: there is no key {key!r}; give id: COLUMN and columns: {{name: COLUMN}}")
    for name, kind in (given.get("types") or {}).items():
        if kind not in TYPES or name not in given["columns"]:
            raise ConfigError(
                f"{where}: types: {name}: {kind!r}; give one of {', '.join(TYPES)} for one of "
                f"{', '.join(given['columns'])}"
            )
    header = given.get("header")
    return Side(**{**given, "types": given.get("types") or {}, "header": None if header is None else tuple(header)})


def _only(given: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {given!r} is no mapping")
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), known)} Known: {', '.join(known)}")


def read_side(path: str | Path, side: Side, key: str, known: set[str]) -> tuple[pd.DataFrame, int]:
    """Reads the features of items or users that a log holds.

    Args:
        path: The file.
        side: How it is laid out.
        key: ``item_id`` or ``user_id``.
        known: The items or users of the log; what is told of others is left out, for an item must not be known before
            its first interaction.

    Returns:
        Text by typed column (``title:token_seq``), ``key:token`` first, one row an id (the first that tells of it); and
        how many rows were left out.

    Raises:
        DataError: If the file cannot be read or lacks a column.
    """
    path = Path(path).expanduser()
    frame, _ = read_table(path, Columns(kind=side.kind, separator=side.separator, encoding=side.encoding,
                                        header=side.header))  # fmt: skip
    there = {str(name).partition(":")[0]: name for name in frame.columns}
    wanted = {key: side.id, **side.columns}
    for name in wanted.values():
        if name not in there:
            raise DataError(f"{path.name}: there is no column {name!r}{nearest(name, there)} It has {', '.join(there)}")
    ids = tokens(path, frame[there[side.id]], side.id)
    keep = ids.isin(known) & ~ids.duplicated()
    out = pd.DataFrame({f"{key}:token": ids[keep]})
    for name, source in side.columns.items():
        kind = side.types.get(name, "token")
        out[f"{name}:{kind}"] = frame[there[source]][keep].map(_number if kind == "float" else _words)
    return out, int((~keep).sum())


def _words(value: Any) -> str:
    """Returns what an atomic file can hold of a value: one line, no quotation marks, lists as their members."""
    if isinstance(value, list):
        return " ".join(_words(member) for member in value)
    if isinstance(value, Mapping):
        return " ".join(f"{_words(name)} {_words(member)}" for name, member in value.items())
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return " ".join(str(value).replace('"', "'").split())


def _number(value: Any) -> str:
    text = _words(value).replace("$", "").replace(",", "")
    try:
        number = float(text)
    except ValueError:
        return ""
    return repr(number) if number == number and abs(number) != float("inf") else ""
