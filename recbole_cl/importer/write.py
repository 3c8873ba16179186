"""Writes a log as RecBole's atomic files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_cl.disk import check_name, write_atomically
from recbole_cl.errors import ConfigError
from recbole_cl.importer.formats import Side, read_side
from recbole_cl.importer.health import health
from recbole_cl.importer.read import ITEM, LABEL, TIME, USER, Columns, read_log

HEADER = {USER: "user_id:token", ITEM: "item_id:token", TIME: "timestamp:float", LABEL: "label:float"}


def import_log(
    path: str | Path,
    columns: Columns,
    name: str | None = None,
    root: str | Path | None = None,
    overwrite: bool = False,
    sides: Mapping[str, tuple[str | Path, Side]] | None = None,
) -> tuple[Path, dict[str, Any], Columns]:
    """Makes a dataset of a table: ``<root>/<name>/<name>.inter``, and beside it how the columns were named.

    Args:
        path: The table.
        columns: How its columns are named.
        name: Name of the dataset; default the stem of the file.
        root: Folder of the datasets; default the one that ``RECBOLE_CL_DATA`` names, else ``dataset``.
        overwrite: Replace a dataset of that name.
        sides: ``item`` or ``user`` to a file of features and how it is laid out; written as ``<name>.item`` and
            ``<name>.user``.

    Returns:
        The ``.inter`` file, the log's figures (:func:`recbole_cl.importer.health.health`), and the columns as read.

    Raises:
        ConfigError: If the name is none, or taken.
        DataError: If the table cannot be read; with file, line and remedy.
        OutputError: If the folder cannot be written, or a link stands in the place of a file.
    """
    name = Path(path).name.partition(".")[0] if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(f"name: {name!r} is no name of a dataset; use letters, digits, '-', '_' and '.'")
    check_name(name, "name:", "use letters, digits, '-', '_' and '.'")
    folder = Path(root or os.environ.get("RECBOLE_CL_DATA") or "dataset").expanduser() / name
    target = folder / f"{name}.inter"
    if target.exists() and not overwrite:
        raise ConfigError(
            f"name: the dataset {name!r} is there already ({target}); give another --name, or --overwrite"
        )
    frame, found = read_log(path, columns)
    numbers = health(frame)
    frame = frame.sort_values(TIME, kind="stable")
    kept = [column for column in HEADER if column in frame]
    whole = bool((frame[TIME] == frame[TIME].round()).all())
    text = frame.assign(**{TIME: frame[TIME].map(lambda t: str(int(t)) if whole else repr(float(t)))})
    features = {}
    for which, (file, side) in (sides or {}).items():
        key = {"item": ITEM, "user": USER}[which]
        table, left = read_side(file, side, key, set(frame[key]))
        features[which] = table
        numbers[f"{which}s_told"], numbers[f"{which}_rows_left"] = len(table), left
    lines = "\n".join("\t".join(map(str, row)) for row in text[kept].itertuples(index=False, name=None))
    write_atomically(target, "\t".join(HEADER[column] for column in kept) + "\n" + lines + "\n", "data_path")
    for which, table in features.items():
        body = "\n".join("\t".join(row) for row in table.itertuples(index=False, name=None))
        text_of = "\t".join(table.columns) + "\n" + (body + "\n" if body else "")
        write_atomically(folder / f"{name}.{which}", text_of, "data_path")
    note = {"columns": found.to_dict(), "file": Path(path).name, "health": numbers}
    write_atomically(folder / f"{name}.import.json", json.dumps(note, indent=1), "data_path")
    return target, numbers, found
