"""Vectors of partitions on disk, mapped into memory: each is made once, whatever runs and stages ask for it.

::

    <folder>/<sha256 of the content>.npy     float32 [n, width], mapped
    <folder>/<sha256 of the content>.keys    n keys of 32 bytes, in the order of the rows

The folder belongs to one encoder and one projection. A key is the sha256 of the names of the partition's questions.
Files never change: new rows are a new pair, the keys after the vectors, each by one rename; a pair that is not whole,
or whose bytes are not what its name says, is told, removed, and its vectors are made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from recbole_cl import disk

_LOG = logging.getLogger("recbole_cl")
_NAME = re.compile(r"[0-9a-f]{64}\.keys")
KEY = 32


def partition_key(*names: str) -> bytes:
    """Returns the key of a partition by the names of its questions."""
    return hashlib.sha256("\0".join(names).encode()).digest()


class PartitionStore:
    """The vectors of one encoder and one projection.

    Args:
        folder: Where they lie; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> Iterator[Path]:
        """Yields the files of keys."""
        if self.folder.is_dir():
            yield from sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    @staticmethod
    def read(file: Path) -> tuple[list[bytes], np.ndarray] | None:
        """Returns the keys of a file and their vectors, mapped; ``None`` where they are not what the name says."""
        try:
            raw = file.read_bytes()
            vectors = np.load(file.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        fits = vectors.dtype == np.float32 and vectors.ndim == 2 and len(raw) == KEY * len(vectors)
        if not fits or _digest(raw, vectors) != file.stem:
            return None
        return [raw[i : i + KEY] for i in range(0, len(raw), KEY)], vectors

    def find(self, keys: Sequence[bytes], width: int) -> dict[bytes, np.ndarray]:
        """Returns the vectors that are there, by key, shape ``[width]`` each."""
        missing, found = set(keys), {}
        for file in self.files():
            if not missing:
                break
            pair = self.read(file)
            if pair is None or pair[1].shape[1] != width:
                _LOG.warning("LIBER: %s is damaged; its vectors are made anew", file)
                for suffix in (".keys", ".npy"):
                    with contextlib.suppress(OSError):
                        file.with_suffix(suffix).unlink()
                continue
            for row, key in enumerate(pair[0]):
                if key in missing:
                    missing.remove(key)
                    found[key] = np.array(pair[1][row])
        return found

    def keep(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Writes new vectors; a disk that is full costs them and no more.

        Args:
            keys: Keys, each once.
            vectors: Float32, shape ``[len(keys), width]``.
        """
        raw, vectors = b"".join(keys), np.ascontiguousarray(vectors, dtype=np.float32)
        name = _digest(raw, vectors)
        mark = f"{os.getpid()}-{secrets.token_hex(6)}"
        parts = {suffix: self.folder / f".{mark}{suffix}" for suffix in (".npy", ".keys")}
        try:
            disk.own_folder(self.folder, "liber_cache")
            with open(disk.create(parts[".npy"]), "wb") as file:
                np.save(file, vectors, allow_pickle=False)
            with open(disk.create(parts[".keys"]), "wb") as file:
                file.write(raw)
            for suffix, part in parts.items():  # the keys last: without them nobody looks at the vectors
                os.replace(part, self.folder / f"{name}{suffix}")
        except OSError as error:
            _LOG.warning("LIBER: vectors are not kept in %s: %s", self.folder, error.strerror or error)
            for part in parts.values():
                with contextlib.suppress(OSError):
                    part.unlink()


def _digest(keys: bytes, vectors: np.ndarray) -> str:
    found = hashlib.sha256(str(vectors.shape).encode() + keys)
    found.update(np.ascontiguousarray(vectors).data)
    return found.hexdigest()
