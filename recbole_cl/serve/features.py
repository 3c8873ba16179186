"""Features of new users and items that are given with an update: which columns are read, and which are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.importer.read import Columns, read_table
from recbole_cl.stream.features import KINDS
from recbole_cl.training.load import SavedRun


def read_features(saved: SavedRun, path: str | Path, side: str) -> tuple[pd.DataFrame, list[str]]:
    """Reads features of users or items: RecBole's atomic file, or a table as for the new rows.

    Args:
        saved: The run.
        path: The file.
        side: ``user`` or ``item``.

    Returns:
        A row a token (the index), a column a field that the run reads; and what was left out, as sentences.

    Raises:
        ConfigError: If the run reads no features of that side.
        DataError: If there is no column of tokens, or one stands there twice.
    """
    dataset: Any = saved.stream.dataset
    field, feature = getattr(dataset, f"{side[0]}id_field"), getattr(dataset, f"{side}_feat")
    option = f"--new-{side}s"
    if feature is None:
        raise ConfigError(f"{option}: the run reads no features of {side}s (load_col); leave it out")
    file = Path(path).expanduser()
    frame, _ = read_table(file, Columns(kind="csv" if file.suffix in (".user", ".item") else None))
    if frame.empty:
        raise DataError(f"{file.name}: it holds no row")
    frame = frame.astype(object).where(frame.notna(), "").astype(str)
    frame.columns = [str(name).partition(":")[0] for name in frame.columns]
    saved_columns = dict((saved.log or {}).get("columns") or {})
    name = next((name for name in (field, saved_columns.get(side), side) if name in frame.columns), None)
    if name is None:
        raise DataError(f"{file.name}: there is no column {field!r} of {side}s; it has {', '.join(frame.columns)}")
    tokens = frame[name].str.strip()
    if tokens.duplicated().any():
        raise DataError(
            f"{file.name}: {side} {tokens[tokens.duplicated()].iloc[0]!r} stands there twice; keep one line"
        )
    scaled = set(saved.config["normalize_field"] or ()) | set(saved.config["discretization"] or ())
    if saved.config["normalize_all"]:
        scaled |= {one for one in feature.interaction if feature[one].is_floating_point()}
    wanted = [one for one in feature.interaction if one != field and dataset.field2type[one] in KINDS]
    read = [one for one in wanted if one in frame.columns and one not in scaled]
    notes = []
    for what, names in (
        ("has no column", [one for one in wanted if one not in frame.columns]),
        ("has columns that the run does not read:", [c for c in frame.columns if c not in (name, *wanted)]),
        ("has columns that were scaled by the whole log and are left out:", [c for c in wanted if c in scaled]),
    ):
        if names:
            notes.append(f"{file.name} {what} {', '.join(names)}")
    lookup = dataset.field2token_id[field]
    known = int(sum(token in lookup for token in tokens))
    if known:
        notes.append(f"{known} {side}s of {file.name} are known to the run; their features stay what they are")
    return frame.set_index(tokens)[read], notes
