"""New data for a saved run: what is read, what is refused, what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.utils import FeatureType

from recbole_cl.errors import DataError
from recbole_cl.importer.read import ITEM, LABEL, TIME, USER, Columns, read_log
from recbole_cl.stream.quality import date
from recbole_cl.training.load import SavedRun

LONGEST_GAP = 10 * 365.25 * 86400
"""Seconds after a stream's end beyond which a clock is not believed."""


@dataclass
class Incoming:
    """New rows that a run can be updated with.

    Args:
        rows: A column for each of the run's interactions: users and items as tokens, times in seconds.
        notes: What was left out or looks odd, as sentences.
        figures: ``read``, ``duplicates``, ``older``, ``used``, ``new_users``, ``new_items``.
    """

    rows: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)


def read_incoming(
    saved: SavedRun,
    path: str | Path,
    columns: Mapping[str, Any] | None = None,
    new_ids: bool = False,
    without: Sequence[str] = (),
) -> Incoming:
    """Reads new interactions and checks them against what the run was trained over.

    Args:
        saved: The run.
        path: A CSV, TSV, parquet or JSON-lines file.
        columns: Names of its columns (``user``, ``item``, ``time``, ``label``, ...) where they differ from those of the
            file that the log was imported from.
        new_ids: Take a file in which no item is known to the run.
        without: Users whose rows are left out.

    Raises:
        DataError: If it cannot be read, is wholly older than the run or wholly known to it, is of another id space or
            another clock; the message names what to do.
    """
    path = Path(path).expanduser()
    saved_columns = dict((saved.log or {}).get("columns") or {})
    # A clock is found out anew: an export may change from seconds to dates, and the gap below shows a wrong guess.
    wanted = Columns.of({**saved_columns, "unit": None, **{k: v for k, v in (columns or {}).items() if v is not None}})
    if path.suffix == ".inter" and not columns:
        wanted = Columns(saved.config["USER_ID_FIELD"], saved.config["ITEM_ID_FIELD"], saved.config["TIME_FIELD"])
    dataset = saved.stream.dataset
    others = [name for name in dataset.inter_feat.interaction if name not in _ids_and_clock(dataset)]
    source = {name: _source(saved.config, name, wanted) for name in others}
    frame, _ = read_log(path, wanted, [name for name in source.values() if name != LABEL])
    rows = pd.DataFrame(
        {dataset.uid_field: frame[USER], dataset.iid_field: frame[ITEM], dataset.time_field: frame[TIME]}
    )
    for name, column in source.items():
        rows[name] = _values(saved.config, path, name, column, frame[column], dataset)
    unwanted = rows[dataset.uid_field].isin(list(without)).to_numpy()
    if unwanted.all():
        raise DataError(f"{path.name}: all {len(rows)} rows are of users who are to be forgotten; nothing is left")
    found = _checked(saved, path, rows[~unwanted], new_ids)
    if unwanted.any():
        found.notes.append(f"{int(unwanted.sum())} rows of users who are to be forgotten are left out")
    return found


def _ids_and_clock(dataset: Any) -> tuple[str, str, str]:
    return dataset.uid_field, dataset.iid_field, dataset.time_field


def _source(config: Any, name: str, columns: Columns) -> str:
    """Returns the column of the file that a column of the interactions comes from."""
    if name == config["LABEL_FIELD"]:
        if config["threshold"]:
            return str(next(iter(config["threshold"])))
        if columns.label is not None:
            return LABEL
    return name


def _values(config: Any, path: Path, name: str, column: str, values: pd.Series, dataset: Any) -> pd.Series:
    """Returns a column as the dataset holds it: numbers as numbers, a label cut by the run's threshold."""
    if dataset.field2type[name] != FeatureType.FLOAT:
        return values.astype(str)
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    bad = ~np.isfinite(numbers.to_numpy())
    if bad.any():
        raise DataError(
            f"{path.name}, line {values.index[bad][0]}: {values[bad].iloc[0]!r} in column {column!r} is no number; "
            f"write a number or remove the line"
        )
    if name == config["LABEL_FIELD"] and config["threshold"]:
        return (numbers >= float(config["threshold"][column])).astype(np.float64)
    return numbers


def _checked(saved: SavedRun, path: Path, rows: pd.DataFrame, new_ids: bool) -> Incoming:
    stream = saved.stream
    dataset = stream.dataset
    uid, iid, clock = _ids_and_clock(dataset)
    n, last = len(rows), float(dataset.raw_time.max())
    time = rows[clock].to_numpy(dtype=np.float64)
    _check_clock(path, time, last)
    users = _ids(dataset, uid, rows[uid])
    items = _ids(dataset, iid, rows[iid])
    known = _in_the_log(stream, users, items, time)
    if known.all():
        raise DataError(
            f"{path.name}: all {n} rows are in the run's log already, so there is nothing to learn; was the file given "
            f"twice?"
        )
    older = (time < last) & ~known
    if not (~known & ~older).any():
        raise DataError(
            f"{path.name}: it ends {date(time.max())} UTC, but the model has seen everything up to {date(last)} UTC; "
            f"give a file with later rows, or run again over a log that holds these"
        )
    if not new_ids and not (items > 0).any():
        some = ", ".join(map(repr, rows[iid].iloc[:3]))
        raise DataError(
            f"{path.name}: not one of its {rows[iid].nunique()} items ({some}, ...) is known to the run, whose items "
            f"are called {', '.join(map(repr, dataset.field2id_token[iid][1:4].tolist()))}, ...; give the file "
            f"with the run's ids, or --new-ids if these items are truly new"
        )
    notes = []
    if known.any():
        notes.append(f"{int(known.sum())} of {n} rows are in the log already and are left out")
    if older.any():
        notes.append(
            f"{int(older.sum())} of {n} rows are older than the model ({date(last)} UTC) and are left out: training "
            f"goes forward in time"
        )
    active = [
        key for key in ("val_interval", "user_inter_num_interval", "item_inter_num_interval") if _filters(saved, key)
    ]
    if active:
        notes.append(f"{', '.join(active)} of the configuration looked at the whole log and is not applied to new rows")
    kept = ~known & ~older
    repeated = int(rows[kept].duplicated([uid, iid, clock]).sum())
    if repeated:
        notes.append(f"{repeated} rows repeat another row of the file; they are kept, as an import keeps them")
    rows, users, items = rows[kept], users[kept], items[kept]
    figures = {
        "read": n,
        "duplicates": int(known.sum()),
        "older": int(older.sum()),
        "used": len(rows),
        "new_users": int(rows[uid][users == 0].nunique()),
        "new_items": int(rows[iid][items == 0].nunique()),
    }
    return Incoming(rows, notes, figures)


def _check_clock(path: Path, time: np.ndarray, last: float) -> None:
    gap = float(np.median(time)) - last
    if abs(gap) > LONGEST_GAP:
        years, side = abs(gap) / 86400 / 365.25, "after" if gap > 0 else "before"
        raise DataError(
            f"{path.name}: its times lie around {date(float(np.median(time)))} UTC, {years:.0f} years {side} the end "
            f"of the run's log ({date(last)} UTC); say how its clock counts with --unit=s, ms, us, ns or iso"
        )


def _ids(dataset: Any, field_: str, tokens: pd.Series) -> np.ndarray:
    lookup = dataset.field2token_id[field_]
    return np.fromiter((lookup.get(token, 0) for token in tokens), dtype=np.int64, count=len(tokens))


def _in_the_log(stream: Any, users: np.ndarray, items: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Returns which rows the log has, by user, item and time."""
    raw = stream.dataset.raw_time
    since = np.flatnonzero(raw >= time.min())
    have = pd.DataFrame(
        {"u": stream.table.user[since], "i": stream.table.item[since], "t": raw[since]}
    ).drop_duplicates()
    asked = pd.DataFrame({"u": users, "i": items, "t": time})
    return (asked.merge(have, how="left", on=["u", "i", "t"], indicator=True)["_merge"] == "both").to_numpy()


def _filters(saved: SavedRun, key: str) -> bool:
    value = saved.config[key]
    return bool(value) and str(value).replace(" ", "") not in ("[0,inf)", "[0,inf]")
