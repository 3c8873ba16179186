"""What a log is like, in a few lines: how much, of whom, when, and what is odd about it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from recbole_cl.importer.read import ITEM, LABEL, TIME, USER
from recbole_cl.stream.quality import date


def health(frame: pd.DataFrame) -> dict[str, Any]:
    """Returns the figures of a log.

    Args:
        frame: As :func:`recbole_cl.importer.read.read_log` gives it.

    Returns:
        ``rows``, ``users``, ``items``, ``first`` and ``last`` (seconds), ``duplicates`` (rows that stand there before
        with the same user, item and time), ``ties`` (rows of a user that share their time with the one before),
        ``single_users`` (with one row only), ``mean_length``, and the share of labels above 0 where there are labels.
    """
    per_user = frame[USER].value_counts()
    numbers = {
        "rows": len(frame),
        "users": int(frame[USER].nunique()),
        "items": int(frame[ITEM].nunique()),
        "first": float(frame[TIME].min()),
        "last": float(frame[TIME].max()),
        "duplicates": int(frame.duplicated([USER, ITEM, TIME]).sum()),
        "ties": int(frame.duplicated([USER, TIME]).sum()),
        "single_users": int((per_user == 1).sum()),
        "mean_length": float(per_user.mean()),
    }
    if LABEL in frame:
        numbers["positive_labels"] = float((frame[LABEL] > 0).mean())
    return numbers


def health_lines(numbers: dict[str, Any]) -> list[str]:
    """Returns the figures as lines that a person reads."""
    one = f"mean {numbers['mean_length']:.1f} rows, {numbers['single_users']:,} with one only"
    lines = [
        f"rows          {numbers['rows']:,}",
        f"users         {numbers['users']:,} ({one})",
        f"items         {numbers['items']:,}",
        f"time          {date(numbers['first'])} to {date(numbers['last'])} UTC",
        f"duplicates    {numbers['duplicates']:,} rows repeat user, item and time of an earlier one",
        f"ties          {numbers['ties']:,} rows of a user share their time with an earlier one",
    ]
    if "positive_labels" in numbers:
        lines.append(f"labels        {numbers['positive_labels']:.1%} are above 0")
    for which in ("item", "user"):
        if f"{which}s_told" in numbers:
            left = f"{numbers[f'{which}_rows_left']:,} rows of others or repeated are left out"
            lines.append(f"{which}s told    {numbers[f'{which}s_told']:,} of {numbers[f'{which}s']:,}; {left}")
    return lines
