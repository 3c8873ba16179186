"""Features of users and items that come with an update, as the dataset holds those of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType

from recbole_cl.errors import DataError

KINDS = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ, FeatureType.FLOAT, FeatureType.FLOAT_SEQ)


def filled(dataset: Any, feature: Interaction, field: str, first: int, given: pd.DataFrame) -> Interaction:
    """Returns a table of features in which new rows have what is told of them; known rows stay.

    Words that no row had before have no id and count as none; a list longer than the table's is cut.

    Args:
        dataset: The dataset with the new users or items.
        feature: Its table, rows of the new ones at its end.
        field: The field of users or items.
        first: The first new id.
        given: A row a token (the index), a column a field; empty cells say nothing.

    Raises:
        DataError: If a number is none.
    """
    ids = dataset.field2token_id[field]
    rows = [(ids[token], number) for number, token in enumerate(given.index) if ids.get(token, 0) >= first]
    columns = dict(feature.interaction)
    for name in given.columns:
        column, kind = columns[name].clone(), dataset.field2type[name]
        separator = str(dataset.config["seq_separator"])
        words: Mapping[str, int] = dataset.field2token_id.get(name, {})
        for row, number in rows:
            text = str(given[name].iloc[number]).strip()
            if not text:
                continue
            parts = text.split(separator) if kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ) else [text]
            if kind in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ):
                values: list[float] = [words.get(part, 0) for part in parts if part]
                values = values if kind == FeatureType.TOKEN else [value for value in values if value]
            else:
                values = [_number(part, name, given.index[number]) for part in parts if part]
            if column.dim() == 1:
                column[row] = values[0]
            else:
                kept = torch.tensor(values[: column.size(1)], dtype=column.dtype)
                column[row] = 0
                column[row, : len(kept)] = kept
        columns[name] = column
    return Interaction(columns)


def _number(text: str, name: str, token: Any) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise DataError(f"{text!r} in column {name!r} of {token!r} is no number; write a number, or leave it empty")
    return value
