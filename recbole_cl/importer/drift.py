"""How a log changes over time: slices of equally many rows, and what of each is new.

Popularity shift is the total variation distance between the item popularities of two slices, 1/2 sum |p - q|: the share
of interactions that would have to move. Two samples of one distribution are not at 0 either, so beside it stands what
chance alone gives: the mean distance of random halves of the pooled rows of both slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from recbole_cl.importer.read import ITEM, TIME, USER

DAY = 86_400.0


def slices(frame: pd.DataFrame, n: int) -> list[pd.DataFrame]:
    """Returns n slices of equally many rows, in the order of time; rows of one time may be parted."""
    ordered = frame.sort_values(TIME, kind="stable")
    return [ordered.iloc[rows] for rows in np.array_split(np.arange(len(ordered)), n)]


def distance(one: pd.Series, other: pd.Series) -> float:
    """Returns the total variation distance of two samples of items, from 0 to 1."""
    p, q = one.value_counts(normalize=True), other.value_counts(normalize=True)
    p, q = p.align(q, fill_value=0.0)
    return float((p - q).abs().sum() / 2)


def by_chance(one: pd.Series, other: pd.Series, draws: int = 5, seed: int = 0) -> float:
    """Returns the mean distance of random parts, of the same sizes, of the rows of both samples."""
    pool, rng = pd.concat([one, other]).to_numpy(), np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        mixed = rng.permutation(pool)
        found.append(distance(pd.Series(mixed[: len(one)]), pd.Series(mixed[len(one) :])))
    return float(np.mean(found))


def drift(frame: pd.DataFrame, n: int, vectors: Mapping[str, np.ndarray] | None = None) -> list[dict[str, Any]]:
    """Returns what is new in each slice.

    Args:
        frame: The log, as :func:`recbole_cl.importer.read.read_log` gives it.
        n: Slices.
        vectors: Vector of each item that a model knows, for ``embedding_shift``.

    Returns:
        One entry a slice: ``start``, ``end`` (seconds), ``rows``, ``users``, ``items``; the shares ``new_users`` and
        ``new_items`` (of its users and items), ``rows_of_new_items``, ``returning_users`` (of the slice before, seen
        again), ``popularity_shift`` and ``shift_by_chance`` from the slice before, ``repeat`` (rows whose user had that
        item before), and ``embedding_shift``, 1 - cosine between the mean item vectors of this slice and the one
        before. What needs a slice before is ``None`` in the first.
    """
    seen_users: set[str] = set()
    seen_items: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    found: list[dict[str, Any]] = []
    before: pd.DataFrame | None = None
    for part in slices(frame, n):
        users, items = set(part[USER]), set(part[ITEM])
        here = list(zip(part[USER], part[ITEM], strict=True))
        again = 0
        for pair in here:
            again += pair in pairs
            pairs.add(pair)
        entry: dict[str, Any] = {
            "start": float(part[TIME].min()), "end": float(part[TIME].max()), "rows": len(part), "users": len(users),
            "items": len(items), "repeat": again / len(part), "new_users": None, "new_items": None,
            "rows_of_new_items": None, "returning_users": None, "popularity_shift": None, "shift_by_chance": None,
            "embedding_shift": None,
        }  # fmt: skip
        if before is not None:
            entry["new_users"] = len(users - seen_users) / len(users)
            entry["new_items"] = len(items - seen_items) / len(items)
            entry["rows_of_new_items"] = float((~part[ITEM].isin(seen_items)).mean())
            last = set(before[USER])
            entry["returning_users"] = len(users & last) / len(last)
            entry["popularity_shift"] = distance(part[ITEM], before[ITEM])
            entry["shift_by_chance"] = by_chance(part[ITEM], before[ITEM])
            if vectors is not None:
                entry["embedding_shift"] = _moved(before[ITEM], part[ITEM], vectors)
        found.append(entry)
        seen_users |= users
        seen_items |= items
        before = part
    return found


def _moved(one: pd.Series, other: pd.Series, vectors: Mapping[str, np.ndarray]) -> float | None:
    means = []
    for items in (one, other):
        known = [vectors[item] for item in items if item in vectors]
        if not known:
            return None
        means.append(np.mean(known, axis=0))
    size = float(np.linalg.norm(means[0]) * np.linalg.norm(means[1]))
    return None if size == 0 else 1.0 - float(means[0] @ means[1]) / size


def suggested_stages(frame: pd.DataFrame) -> tuple[int, str]:
    """Returns a number of stages and why: as many as leave each 2,000 rows, from 2 to 10."""
    rows = len(frame)
    n = int(np.clip(rows // 2000, 2, 10))
    days = (float(frame[TIME].max()) - float(frame[TIME].min())) / DAY / n
    return n, f"{rows:,} rows in {n} stages are {rows // n:,} rows and about {days:,.1f} days a stage"


def worth_trying(figures: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns strategies and reasons, by rules of thumb over the slices after the first; no run stands behind them."""
    later = figures[1:]
    if not later:
        return []

    def mean(name: str) -> float:
        values = [entry[name] for entry in later if entry[name] is not None]
        return float(np.mean(values)) if values else 0.0

    excess = mean("popularity_shift") - mean("shift_by_chance")
    found = [("FineTune", "the cheapest, and what every other one is to beat")]
    if mean("rows_of_new_items") > 0.2:
        share = f"{mean('rows_of_new_items'):.0%} of the rows are of items that came with their slice"
        found.append(("content, such as content_rows or LIBER", f"{share}: ids alone cannot rank them"))
    if excess > 0.25:
        found.append(("short memory: FineTune, stage_optimizer: carry",
                      f"popularity moves by {excess:.2f} more than chance: what holds old weights (EWC, SI, MAS) may "
                      f"cost more than it keeps"))  # fmt: skip
    else:
        found.append(("LwF, or EWC with a tuned strength",
                      f"popularity moves by {excess:.2f} more than chance: what was learnt stays useful"))  # fmt: skip
    if mean("returning_users") > 0.3:
        found.append(("ERRandom, ADER or PersonalizedImitation",
                      f"{mean('returning_users'):.0%} of a slice's users come back in the next: their past is asked "
                      f"for again"))  # fmt: skip
    if mean("repeat") > 0.2:
        found.append(("ERFreq, repeatable: True", f"{mean('repeat'):.0%} of the rows repeat an item of their user"))
    found.append(("Joint, as the bound", "how much is there to be gained by keeping everything"))
    return found
