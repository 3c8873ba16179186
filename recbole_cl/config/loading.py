"""Columns that properties name: whether they are in a file, of a type that serves, and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from recbole.utils import ModelType

from recbole_cl.config.columns import LogFiles, read_header
from recbole_cl.errors import ConfigError, nearest

FEATURES = {
    "normalize_field": ("float", "float_seq"),
    "numerical_features": ("float", "float_seq"),
    "discretization": ("float", "float_seq"),
    "seq_len": ("token_seq", "float_seq"),
    "alias_of_user_id": ("token", "token_seq"),
    "alias_of_item_id": ("token", "token_seq"),
    "alias_of_entity_id": ("token", "token_seq"),
    "alias_of_relation_id": ("token", "token_seq"),
    "val_interval": ("token", "float", "token_seq", "float_seq"),
}
"""Properties that name columns, and the types which these may have."""

GRAPH = ("HEAD_ENTITY_ID_FIELD", "TAIL_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "ENTITY_ID_FIELD")


class Tables:
    """The atomic files of a dataset by suffix: which columns they declare, and which of them are loaded.

    Args:
        final: The effective properties.
        log: The dataset's files.
    """

    def __init__(self, final: Mapping[str, Any], log: LogFiles) -> None:
        self.final, self.log = final, log
        self.declared: dict[str, dict[str, str]] = {"inter": dict.fromkeys(log.columns, "")}
        extra = final.get("additional_feat_suffix") or []
        graph = ("kg",) if final["MODEL_TYPE"] == ModelType.KNOWLEDGE else ()
        for suffix in ("inter", "user", "item", *graph, *([extra] if isinstance(extra, str) else extra)):
            file = log.folder / f"{log.dataset}.{suffix}"
            if file.is_file():
                self.declared[suffix] = dict(word.partition(":")[::2] for word in read_header(file, final))

    def where(self, column: str) -> list[str]:
        """Returns the suffixes of the files that declare a column."""
        return [suffix for suffix, columns in self.declared.items() if column in columns]

    def loaded(self, suffix: str, column: str) -> bool:
        """Tells whether a column of a file is loaded."""
        load, unload = self.final.get("load_col"), self.final.get("unload_col") or {}
        if column in (unload.get(suffix) or ()):
            return False
        return load is None or load.get(suffix) == "*" or column in (load.get(suffix) or ())

    def names(self) -> list[str]:
        """Returns every column."""
        return [column for columns in self.declared.values() for column in columns]


def check_loading(final: dict[str, Any], log: LogFiles, asked: Mapping[str, Any]) -> None:
    """Checks the columns that properties name; those of ``val_interval`` are loaded.

    Args:
        final: The effective properties; ``load_col`` is completed.
        log: The dataset's files.
        asked: Properties that were given.

    Raises:
        ConfigError: If a column is in no file, of another type or not loaded, or one that a stream needs is left out.
    """
    tables = Tables(final, log)
    if asked.get("val_interval"):
        _load(final, tables, asked["val_interval"])
    _check_left_out(final, asked)
    for key, kinds in FEATURES.items():
        if key in ("alias_of_entity_id", "alias_of_relation_id") and "kg" not in tables.declared:
            continue  # a warning says that it has no effect
        for column in asked.get(key) or ():
            _check_column(tables, key, column, kinds)
    for column in asked.get("discretization") or ():
        if column not in (final.get("numerical_features") or ()):
            raise ConfigError(
                f"property 'discretization' names {column!r}, which is no numerical feature; add it to "
                f"numerical_features: [{column}]"
            )
    if "RATING_FIELD" in asked:
        log.check("RATING_FIELD", [final["RATING_FIELD"]])
    name = final["ITEM_LIST_LENGTH_FIELD"]
    if final["MODEL_TYPE"] == ModelType.SEQUENTIAL and name in tables.names():
        raise ConfigError(
            f"property 'ITEM_LIST_LENGTH_FIELD' is {name!r}, which is a column of {log.dataset}; RecBole puts the "
            f"lengths of the histories there, so name it otherwise"
        )
    load = final.get("load_col")
    for suffix in tables.declared.keys() - {"inter", "user", "item", "kg"}:
        if load is not None and suffix not in load:
            raise ConfigError(
                f"property 'additional_feat_suffix' names {suffix!r}, of which load_col loads nothing; add it to "
                f"load_col: {{{suffix}: '*'}}"
            )


def _load(final: dict[str, Any], tables: Tables, columns: Iterable[str]) -> None:
    """Adds columns to ``load_col`` where it is not all columns that are loaded."""
    for column in columns:
        where = tables.where(column)
        if not where or any(tables.loaded(suffix, column) for suffix in where):
            continue
        suffix, load = where[0], final["load_col"]
        key = {"user": "USER_ID_FIELD", "item": "ITEM_ID_FIELD"}.get(suffix)
        given = [*(load.get(suffix) or ([final[key]] if key else [])), column]
        final["load_col"] = {**load, suffix: given}


def _check_left_out(final: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    needed = {final[key]: key for key in (*GRAPH, "USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD") if key in final}
    for key in ("unload_col", "unused_col"):
        for column in needed.keys() & {c for columns in (asked.get(key) or {}).values() for c in columns}:
            raise ConfigError(
                f"property {key!r} is {asked[key]!r}, but {column!r} ({needed[column]}) is needed; take it out"
            )
    load = final.get("load_col") or {}
    for suffix, columns in (asked.get("unload_col") or {}).items():
        if columns and load.get(suffix) not in (None, "*"):
            raise ConfigError(
                f"property 'unload_col' is {asked['unload_col']!r}, but property 'load_col' names what is loaded of "
                f".{suffix}, {load[suffix]!r}; set load_col: ~ to load all other columns"
            )


def _check_column(tables: Tables, key: str, column: str, kinds: tuple[str, ...]) -> None:
    where = tables.where(column)
    if not where:
        known = list(dict.fromkeys(tables.names()))
        hint = nearest(column, known) or f". They have {', '.join(known)}"
        raise ConfigError(
            f"property {key!r} names {column!r}, which is no column of the files of {tables.log.dataset}{hint}"
        )
    kind = tables.declared[where[0]][column]
    if kind and kind not in kinds:
        raise ConfigError(
            f"property {key!r} names {column!r}, which .{where[0]} declares as {kind!r}; it must be a column of type "
            f"{' or '.join(kinds)}"
        )
    if not any(tables.loaded(suffix, column) for suffix in where):
        raise ConfigError(
            f"property {key!r} names {column!r}, which is not loaded; add it to the list {where[0]!r} of load_col, "
            f"or set load_col: ~ to load all columns"
        )
