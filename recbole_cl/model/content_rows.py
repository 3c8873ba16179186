"""Rows of items that a frozen table never trained, from vectors of their content (texts, images)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from recbole_cl.errors import ConfigError


def read_vectors(path: str | Path, tokens: Sequence[str], key: str) -> np.ndarray:
    """Returns the vector of each item, float64 ``[n, width]``; NaN where the file has none.

    The file is a matrix, ``X.npy`` or ``X.safetensors`` with one tensor, and beside it stands ``X.txt`` with the item's
    token of each row, one a line. Nothing in either is executed.

    Args:
        path: The matrix.
        tokens: Items, in the order of their ids.
        key: Property that named the file, for messages.

    Raises:
        ConfigError: If the files are not there or do not fit together.
    """
    file = Path(path).expanduser()
    names = file.with_suffix(".txt")
    try:
        if file.suffix == ".npy":
            matrix = np.load(file, allow_pickle=False)
        elif file.suffix == ".safetensors":
            held = load_file(file)
            if len(held) != 1:
                raise ConfigError(f"{key}: {file} holds {len(held)} tensors; it must hold one")
            matrix = next(iter(held.values()))
        else:
            raise ConfigError(f"{key}: {file} is neither a .npy nor a .safetensors file")
        lines = names.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{key}: {file} or the tokens of its rows in {names.name} cannot be read ({error}); give a matrix and, "
            f"beside it, a text file with one item a line"
        ) from error
    if matrix.ndim != 2 or len(matrix) != len(lines) or len(set(lines)) != len(lines) or matrix.dtype.kind != "f":
        raise ConfigError(
            f"{key}: {file} has the shape {list(matrix.shape)} of {matrix.dtype} and {names.name} {len(set(lines))} "
            f"different tokens in {len(lines)} lines; it takes a row of floating-point numbers for each line"
        )
    place = {token: row for row, token in enumerate(lines)}
    out = np.full((len(tokens), matrix.shape[1]), np.nan)
    have = [(number, place[token]) for number, token in enumerate(tokens) if token in place]
    if have:
        to, of = np.array(have).T
        out[to] = matrix[of]
    out[~np.isfinite(out).all(axis=1)] = np.nan
    return out


def projected_rows(vectors: np.ndarray, rows: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Returns the rows that a linear map gives to all vectors, ``[n, d]``, fitted by ridge regression on known ones.

    Args:
        vectors: Shape ``[n, width]``; NaN rows give NaN.
        rows: Trained rows ``[n, d]``; NaN for items without one.
        ridge: Weight of the squared map, beside the mean squared error a vector of unit variance; the mean is free.

    Raises:
        ConfigError: If no item has both.
    """
    both = np.isfinite(vectors).all(1) & np.isfinite(rows).all(1)
    if not both.any():
        raise ConfigError("protofed_item_vectors: no item of the base stage has a vector; give it those of the log's")
    x, y = vectors[both], rows[both]
    centre, level = x.mean(0), y.mean(0)
    scale = np.sqrt(((x - centre) ** 2).mean()) or 1.0
    x = (x - centre) / scale
    map_ = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (y - level))
    return (vectors - centre) / scale @ map_ + level  # type: ignore[no-any-return]
