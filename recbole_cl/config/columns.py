"""The columns of a dataset's files, and those of them that a stream needs loaded."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_cl.config.blocks import HEADER
from recbole_cl.config.datasets import find_dataset
from recbole_cl.errors import ConfigError, nearest

ID_PROPERTIES = ("USER_ID_FIELD", "ITEM_ID_FIELD", "HEAD_ENTITY_ID_FIELD", "TAIL_ENTITY_ID_FIELD", "ENTITY_ID_FIELD")
"""Properties that name columns of ids."""


@dataclass(frozen=True)
class LogFiles:
    """The files of a dataset.

    Attributes:
        dataset: Its name, the stem of the files.
        folder: Where they lie.
        columns: Columns of the interaction file.
    """

    dataset: str
    folder: Path
    columns: list[str]

    def check(self, key: str, fields: Any) -> None:
        """Checks that columns which a property names are in the interaction file.

        Raises:
            ConfigError: If one is not; the message names the nearest.
        """
        for field in fields if isinstance(fields, list | tuple) else ():
            if field is not None and field not in self.columns:
                hint = nearest(field, self.columns) or f". It has {', '.join(self.columns)}"
                raise ConfigError(f"property {key!r} names {field!r}, which is no column of {self.dataset}.inter{hint}")


def read_header(file: Path, final: Mapping[str, Any]) -> list[str]:
    """Returns the words of an atomic file's first line, ``name:type`` each.

    Args:
        file: The file.
        final: ``encoding`` and ``field_separator`` are read.

    Raises:
        ConfigError: If the file cannot be read so; the message names an encoding to try.
    """
    encoding = final.get("encoding") or "utf-8"
    try:
        with file.open(encoding=encoding) as lines:
            header = lines.readline().rstrip("\r\n")
    except (OSError, UnicodeError, LookupError) as error:
        begins = file.read_bytes()[:2] if file.is_file() else b""
        other = "utf-16" if begins in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        remedy = f"; set encoding to what it is written in, such as {other}" if isinstance(error, ValueError) else ""
        raise ConfigError(f"cannot read {file.name} of dataset {file.stem!r}: {error}{remedy}") from error
    if header.startswith("\ufeff"):
        raise ConfigError(
            f"{file.name} begins with a byte order mark, as spreadsheets write it, which {encoding!r} takes for a "
            f"letter of the first column's name; set encoding: utf-8-sig"
        )
    separator = final["field_separator"]
    words: list[str] = header.split(separator)
    if len(words) == 1 and header.count(":") > 1:
        names = {",": "','", ";": "';'", "|": "'|'", "\t": '"\\t", a tab'}
        found = next((other for other in names if other != separator and other in header), None)
        if found is not None:
            raise ConfigError(
                f"property 'field_separator' is {separator!r}, which is nowhere in the first line of {file.name} "
                f"({header[:60]!r}); its fields are separated by {found!r}: set field_separator: {names[found]}"
            )
    return words


def check_header(file: Path, final: Mapping[str, Any]) -> None:
    """Checks that the columns of ids in an atomic file are declared as names.

    Args:
        file: The file.
        final: The effective properties; ``encoding``, ``field_separator`` and the names of the ids are read.

    Raises:
        ConfigError: If one is declared as a number or as several names, or the header cannot be read.
    """
    ids = {final.get(key): key for key in ID_PROPERTIES}
    for word in read_header(file, final):
        name, _, kind = word.partition(":")
        if name in ids and kind and kind != "token":
            raise ConfigError(
                f"property {ids[name]!r} is {name!r}, which {file.name} declares as {kind!r}; ids are names, so write "
                f"{name}:token in its first line"
            )


def column_names(header: Iterable[str]) -> list[str]:
    """Returns the names of the columns that a header declares."""
    return [word.partition(":")[0] for word in header]


def open_log(final: dict[str, Any], dataset: str, warnings: list[str]) -> LogFiles:
    """Finds a dataset's folder and reads the header of its interactions.

    Args:
        final: The effective properties; ``data_path`` becomes the folder.
        dataset: Name of the dataset.
        warnings: Gets a sentence where another folder than the one asked for is read.

    Raises:
        ConfigError: If there is no such dataset, its header cannot be read, or it comes in files split beforehand.
    """
    if final.get("benchmark_filename"):
        raise ConfigError(
            f"property 'benchmark_filename' is {final['benchmark_filename']!r}: stages are cut from one file "
            f"{dataset}.inter; join the files and leave the property out"
        )
    asked = final["data_path"]
    folder = find_dataset(dataset, asked)
    if asked and folder not in (Path(asked).expanduser().resolve() / p for p in ("", dataset)):
        warnings.append(f"{dataset}.inter is not in data_path {asked!r}; {folder} is read instead")
    final["data_path"] = str(folder)
    file, separator = folder / f"{dataset}.inter", final["field_separator"]
    header = read_header(file, final) if file.is_file() else list(HEADER)  # blocks: written as they are loaded
    if any(not word.partition(":")[2] for word in header):
        raise ConfigError(
            f"the first line of {file.name} is {separator.join(header)[:80]!r}; it must name each column and its type, "
            f"separated by property 'field_separator' {separator!r}, as in 'user_id:token'"
        )
    if file.is_file():
        check_header(file, final)
    return LogFiles(dataset, folder, column_names(header))


def settle_columns(final: dict[str, Any], log: LogFiles, asked: Container[str], specific: Container[str]) -> None:
    """Makes sure that the columns which were asked for exist, and that those a stream needs are loaded.

    Args:
        final: The effective properties; ``load_col`` is completed.
        log: The dataset's files.
        asked: Properties that were given. RecBole's defaults may name columns that are not there.
        specific: Properties that a file about this model, type of model or dataset sets.

    Raises:
        ConfigError: If a column that was asked for is not there.
    """
    ids = [final[key] for key in ("USER_ID_FIELD", "ITEM_ID_FIELD")]
    for key, field in zip(("USER_ID_FIELD", "ITEM_ID_FIELD"), ids, strict=True):
        log.check(key, [field])
    if "period_field" in asked:
        _settle_period_field(final, log)
    if "threshold" in asked:
        log.check("threshold", list(final["threshold"] or ()))
    needed = [*ids, final["TIME_FIELD"], final.get("period_field"), *(final.get("threshold") or {})]
    if final.get("load_col") is not None:
        columns = final["load_col"].get("inter")
        if "load_col" not in specific and "load_col" not in asked:
            # RecBole's last resort loads users and items only; a stream needs to know when.
            columns = [*ids, final["RATING_FIELD"], final["LABEL_FIELD"]]
        elif "load_col" in asked:
            log.check("load_col", columns)
        if isinstance(columns, list | tuple):
            wanted = dict.fromkeys([*columns, *(field for field in needed if field)])
            final["load_col"] = {**final["load_col"], "inter": [c for c in wanted if c in log.columns]}


def _settle_period_field(final: dict[str, Any], log: LogFiles) -> None:
    """Lets a stage be named by a column of the interactions or, for Domains, of the items, which is then loaded."""
    field = final["period_field"]
    items = log.folder / f"{log.dataset}.item"
    if field in log.columns or not items.is_file():
        log.check("period_field", [field])
        return
    columns = column_names(read_header(items, final))
    if field not in columns:
        known = [*log.columns, *columns]
        hint = nearest(field, known) or f". They have {', '.join(known)}"
        raise ConfigError(
            f"property 'period_field' names {field!r}, which is no column of {log.dataset}.inter or .item{hint}"
        )
    load = final.get("load_col")
    if load is not None:
        given = load.get("item") or []
        wanted = "*" if given == "*" else list(dict.fromkeys([final["ITEM_ID_FIELD"], *given, field]))
        final["load_col"] = {**load, "item": wanted}


def check_knowledge_graph(final: Mapping[str, Any], log: LogFiles, model: str) -> None:
    """Checks that the files of a knowledge graph are there, for a model that learns from one, with the named columns.

    Raises:
        ConfigError: If one is not.
    """
    for suffix in ("kg", "link"):
        if not (log.folder / f"{log.dataset}.{suffix}").is_file():
            raise ConfigError(
                f"model {model!r} learns from a knowledge graph, but dataset {log.dataset!r} has no file "
                f"{log.dataset}.{suffix}; use another model or add the file"
            )
    fields = {
        "kg": ("HEAD_ENTITY_ID_FIELD", "TAIL_ENTITY_ID_FIELD", "RELATION_ID_FIELD"),
        "link": ("ITEM_ID_FIELD", "ENTITY_ID_FIELD"),
    }
    for suffix, keys in fields.items():
        columns = column_names(read_header(log.folder / f"{log.dataset}.{suffix}", final))
        for key in keys:
            if final[key] not in columns:
                hint = nearest(final[key], columns) or f". It has {', '.join(columns)}"
                raise ConfigError(
                    f"property {key!r} is {final[key]!r}, which is no column of {log.dataset}.{suffix}{hint}"
                )


def loaded_columns(final: Mapping[str, Any], log: LogFiles) -> list[str]:
    """Returns the columns of the interaction file that RecBole will load."""
    load = final.get("load_col")
    if load is None or load.get("inter") == "*":
        return log.columns
    return [column for column in log.columns if column in (load.get("inter") or ())]
