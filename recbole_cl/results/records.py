"""The append-only list of results, of which the matrix R[t, s] is a view.

One record is one number: what was scored (split, mode, stratum, level, metric), by the model of which stage ``t``, on
which stage ``s``. Stages count from 0; ``t = -1`` with ``mode="reference"`` is the model of forward transfer that never
saw the stage.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_cl.disk import write_atomically
from recbole_cl.errors import CheckpointError, DataError

__all__ = ["REFERENCE", "Record", "Records"]

#: Mode of the records with t = -1.
REFERENCE = "reference"

Key = tuple[str, str, str, str, str, int, int]


@dataclass(frozen=True)
class Record:
    """One evaluated number.

    Attributes:
        split: ``"test"`` or ``"valid"``.
        mode: How items were ranked (``"full"``, ``"uni100"``), or ``"reference"``.
        stratum: Who it is told for (:data:`recbole_cl.results.strata.STRATA`).
        level: What is ranked: ``"item"``, or a coarser level that a model tells (``item_levels``).
        metric: Name of the metric.
        t: Stage that the model was trained up to, from 0; -1 for the reference.
        s: Stage that was evaluated, from 0.
        value: The number, or None = evaluated over no target.
        n: Number of targets in it.
    """

    split: str
    mode: str
    stratum: str
    level: str
    metric: str
    t: int
    s: int
    value: float | None
    n: int = 0

    @property
    def key(self) -> Key:
        """Everything but the value and its number of targets."""
        return (self.split, self.mode, self.stratum, self.level, self.metric, self.t, self.s)


COLUMNS = tuple(field.name for field in fields(Record))


class Records:
    """An append-only list of :class:`Record` in which no key occurs twice.

    Args:
        records: Records to begin with.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records: dict[Key, Record] = {}
        for record in records:
            self._append(record)

    def add(
        self,
        *,
        metric: str,
        t: int,
        s: int,
        value: float | None,
        n: int = 0,
        split: str = "test",
        mode: str = "full",
        stratum: str = "all",
        level: str = "item",
    ) -> Record:
        """Appends one result.

        A result that is there already with the same value is passed over, because a resumed run may evaluate again
        what it had evaluated before it was killed.

        Args:
            metric: Name of the metric.
            t: Trained stage, from 0, or -1 for the reference.
            s: Evaluated stage, from 0.
            value: The number; None or NaN = not evaluated.
            n: Number of targets in it.
            split: ``"test"`` or ``"valid"``.
            mode: How items were ranked, or ``"reference"``.
            stratum: Who it is told for.
            level: What is ranked.

        Returns:
            The record.

        Raises:
            ValueError: The value is infinite, a stage is out of range, or the key is there with another value.
        """
        number = None if value is None or math.isnan(value) else float(value)
        record = Record(split, mode, stratum, level, metric, int(t), int(s), number, int(n))
        self._append(record)
        return record

    def _append(self, record: Record) -> None:
        if record.value is not None and not math.isfinite(record.value):
            raise ValueError(f"the value of {record} is not finite")
        if record.s < 0 or record.t < -1:
            raise ValueError(f"stages count from 0 (the reference is t = -1), not t = {record.t}, s = {record.s}")
        if (record.t == -1) != (record.mode == REFERENCE):
            raise ValueError(f"t = -1 and mode {REFERENCE!r} go together, not t = {record.t} and mode {record.mode!r}")
        known = self._records.setdefault(record.key, record)
        if known != record:
            raise ValueError(
                f"{record.metric} of stage {record.s} after stage {record.t} ({record.split}, {record.mode}, "
                f"{record.stratum}, {record.level}) is {known.value} over {known.n} targets already, "
                f"not {record.value} over {record.n}"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Records) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def metrics(self, level: str = "item") -> list[str]:
        """Returns the metrics of a level, in the order in which they first came."""
        return list(dict.fromkeys(record.metric for record in self if record.level == level))

    def levels(self) -> list[str]:
        """Returns the levels beside that of items, in the order in which they first came."""
        return [level for level in self._distinct("level") if level != "item"]

    def strata(self) -> list[str]:
        """Returns the strata, in the order in which they first came."""
        return self._distinct("stratum")

    def modes(self) -> list[str]:
        """Returns the modes without the reference, in the order in which they first came."""
        return [mode for mode in self._distinct("mode") if mode != REFERENCE]

    def _distinct(self, field: str) -> list[str]:
        return list(dict.fromkeys(getattr(record, field) for record in self))

    @property
    def n_stages(self) -> int:
        """Number of stages that occur, trained or evaluated."""
        return max((max(record.t, record.s) + 1 for record in self), default=0)

    def select(self, **wanted: Any) -> list[Record]:
        """Returns the records whose fields have the given values.

        Args:
            wanted: Fields of :class:`Record`, e.g. ``metric="NDCG@10", stratum="new_user"``.

        Raises:
            ValueError: A field does not exist.
        """
        for field in wanted:
            if field not in COLUMNS:
                raise ValueError(f"a record has no field {field!r}; it has {', '.join(COLUMNS)}")
        return [r for r in self if all(getattr(r, field) == value for field, value in wanted.items())]

    def matrix(
        self,
        metric: str,
        split: str = "test",
        mode: str | None = None,
        stratum: str = "all",
        level: str = "item",
        n_stages: int | None = None,
        field: str = "value",
    ) -> NDArray[np.float64]:
        """Returns the view R[t, s].

        Args:
            metric: Name of the metric.
            split: ``"test"`` or ``"valid"``.
            mode: How items were ranked. None: the only mode there is.
            stratum: Who it is told for.
            level: What is ranked.
            n_stages: T. Default: the stages that occur in all records.
            field: ``"value"``, or ``"n"`` for the number of targets in each cell.

        Returns:
            float64 [T, T], NaN where there is no record or no value.

        Raises:
            ValueError: There are several modes and none was named, or a stage is not below ``n_stages``.
        """
        chosen = [
            r
            for r in self.select(metric=metric, split=split, stratum=stratum, level=level)
            if (r.mode != REFERENCE if mode is None else r.mode == mode) and r.t >= 0
        ]
        modes = sorted({r.mode for r in chosen})
        if len(modes) > 1:
            raise ValueError(f"{metric} was evaluated in several modes ({', '.join(modes)}): name one")
        size = self.n_stages if n_stages is None else n_stages
        values = np.full((size, size), np.nan)
        for r in chosen:
            if max(r.t, r.s) >= size:
                raise ValueError(f"{metric} has a result at t = {r.t}, s = {r.s}, beyond the {size} stages")
            number = getattr(r, field)
            values[r.t, r.s] = np.nan if number is None else number
        return values

    def reference(
        self, metric: str, split: str = "test", stratum: str = "all", level: str = "item", n_stages: int | None = None
    ) -> NDArray[np.float64] | None:
        """Returns the reference b[s] of forward transfer.

        Args:
            metric: Name of the metric.
            split: ``"test"`` or ``"valid"``.
            stratum: Who it is told for.
            level: What is ranked.
            n_stages: T. Default: the stages that occur in all records.

        Returns:
            float64 [T], NaN where there is no record; None where no reference was run at all.
        """
        chosen = self.select(metric=metric, split=split, stratum=stratum, level=level, mode=REFERENCE)
        if not chosen:
            return None
        values = np.full(self.n_stages if n_stages is None else n_stages, np.nan)
        for r in chosen:
            values[r.s] = np.nan if r.value is None else r.value
        return values

    def to_csv(self, path: str | Path) -> Path:
        """Writes one line a record; an empty value is None. Floats keep every bit.

        Args:
            path: The file.

        Returns:
            The file.

        Raises:
            OutputError: It cannot be written, or a link stands in its place.
        """
        path = Path(path)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for record in self:
            writer.writerow(["" if v is None else repr(v) if isinstance(v, float) else v for v in astuple(record)])
        write_atomically(path, text.getvalue())
        return path

    @classmethod
    def from_csv(cls, path: str | Path) -> Records:
        """Reads what :meth:`to_csv` wrote.

        Args:
            path: The file.

        Raises:
            DataError: A column is missing or a line cannot be read.
        """
        records = cls()
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path} has no column {', '.join(missing)}; it is not a table of results")
            for line, row in enumerate(reader, start=2):
                try:
                    records._append(_from_fields(row))
                except (TypeError, ValueError) as error:
                    raise DataError(f"{path}, line {line}: {error}") from error
        return records

    def state_dict(self) -> dict[str, Any]:
        """Returns the records as JSON-able lists."""
        return {"columns": list(COLUMNS), "rows": [list(astuple(record)) for record in self]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the records by those of :meth:`state_dict`.

        Args:
            state: The state.

        Raises:
            CheckpointError: A key or column is missing or a row cannot be read. The records are then as before.
        """
        missing = [key for key in ("columns", "rows") if key not in state]
        missing += [name for name in COLUMNS if name not in state.get("columns", COLUMNS)]
        if missing:
            raise CheckpointError(f"the state of the results lacks {', '.join(missing)}")
        fresh = Records()
        for row in state["rows"]:
            try:
                fresh._append(_from_fields(dict(zip(state["columns"], row, strict=True))))
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"the state of the results holds the row {row}: {error}") from error
        self._records = fresh._records


def _from_fields(row: Mapping[str, Any]) -> Record:
    value = row["value"]
    return Record(
        split=str(row["split"]),
        mode=str(row["mode"]),
        stratum=str(row["stratum"]),
        level=str(row["level"]),
        metric=str(row["metric"]),
        t=int(row["t"]),
        s=int(row["s"]),
        value=None if value is None or value == "" else float(value),
        n=int(row["n"]),
    )
