"""Vectors of a saved run in files that other programs read: numpy, parquet, faiss."""

from __future__ import annotations

import os
from pathlib import Path

import faiss
import numpy as np

from recbole_cl.disk import create, explained, refuse_link, write_atomically
from recbole_cl.errors import ConfigError
from recbole_cl.serve.answers import Vectors
from recbole_cl.serve.recommender import Recommender
from recbole_cl.serve.search import make_index

FORMATS = ("npy", "parquet", "faiss")


def export(
    run: Recommender, folder: str | Path, of: str = "items", kind: str = "npy", approximate: bool = False
) -> list[Path]:
    """Writes the vectors of items or users, with their tokens.

    Row ``i`` of the vectors, and number ``i`` of the index, is line ``i`` of the tokens. Retired items are left out.

    Args:
        run: The loaded run.
        folder: Where the files are written; made if it is not there. Files of the same names are replaced.
        of: ``items`` or ``users``.
        kind: ``npy`` (float32, and a text file of tokens), ``parquet`` (columns ``token`` and ``vector``; needs
            pyarrow) or ``faiss`` (an index of inner products, and a text file of tokens).
        approximate: For ``faiss``: inverted lists in place of all vectors.

    Returns:
        The files.

    Raises:
        ConfigError: If the model has no vectors, or pyarrow is missing.
        OutputError: If the folder cannot be written.
    """
    if kind not in FORMATS:
        raise ConfigError(f"export: {kind!r} is none of {', '.join(FORMATS)}")
    found = run.vectors(of)
    kept = [row for row, name in enumerate(found.tokens) if of == "users" or name not in run.retired]
    tokens, values = [found.tokens[row] for row in kept], np.ascontiguousarray(found.values[kept], dtype=np.float32)
    folder = Path(folder).expanduser()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            return [_parquet(folder / f"{of}.parquet", Vectors(tokens, values))]
        target = folder / f"{of}.{kind}"
        refuse_link(target)
        part = target.with_name(f".{os.getpid()}-{target.name}")
        if kind == "npy":
            with open(create(part), "wb") as file:
                np.save(file, values, allow_pickle=False)
        else:
            os.close(create(part))
            faiss.write_index(make_index(values, approximate), str(part))
        names = folder / f"{of}.tokens.txt"
        write_atomically(names, "".join(f"{name}\n" for name in tokens))
        os.replace(part, target)
    return [target, names]


def _parquet(target: Path, found: Vectors) -> Path:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("export: parquet needs pyarrow; install it (pip install 'recbole-cl[parquet]')") from error
    flat = pa.array(found.values.ravel())
    vectors = pa.FixedSizeListArray.from_arrays(flat, found.values.shape[1])
    refuse_link(target)
    part = target.with_name(f".{os.getpid()}-{target.name}")
    os.close(create(part))
    pq.write_table(pa.table({"token": pa.array(found.tokens, pa.string()), "vector": vectors}), part)
    os.replace(part, target)
    return target
