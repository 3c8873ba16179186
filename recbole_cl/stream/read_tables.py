"""What a dataset has read of its files, as a hash: every column of every table, every token, every link."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction

_TABLES = (Interaction, pd.DataFrame)
_LINKS = ("field2id_token", "item2entity", "entity2item", "_preloaded_weight")
"""Attributes of RecBole's datasets that hold what was read beside tables."""


def tables_digest(dataset: Any) -> Iterator[bytes]:
    """Yields a hash of each part of what a dataset has read; the names of the parts are in it.

    Args:
        dataset: RecBole's, with its tables (``inter_feat``, ``item_feat``, ``kg_feat``, ``net_feat`` and the like),
            tokens, links of items to entities, and vectors that were loaded for a field.
    """
    for name, value in sorted(vars(dataset).items()):
        if isinstance(value, _TABLES):
            for column in sorted(map(str, value.columns)):
                yield _digest(f"{name}/{column}", value[column])
        elif name in _LINKS and isinstance(value, Mapping):
            links = {str(key): value[key] for key in value}
            if all(isinstance(link, str) for link in links.values()):
                yield _digest(name, json.dumps(links, sort_keys=True))
            else:
                for key in sorted(links):
                    yield _digest(f"{name}/{key}", links[key])


def _digest(name: str, value: Any) -> bytes:
    if isinstance(value, pd.Series):
        value = value.to_numpy()
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    digest = hashlib.sha256(f"{name}\0".encode())
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        digest.update(f"{value.dtype.kind}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, np.ndarray):
        entries = (entry.tolist() if isinstance(entry, np.ndarray) else entry for entry in value.ravel().tolist())
        digest.update("\x1f".join(map(repr, entries)).encode())
    else:
        digest.update(str(value).encode())
    return digest.digest()
