"""Vectors of texts on disk, for runs to come: each is computed once, however many processes ask.

::

    <folder>/<sha256 of the encoder>/<sha256 of the keys>.safetensors    keys [n, 32] uint8, vectors [n, width] float32

A vector's key is the sha256 of (encoder's name, all that its vectors depend on, text). Files are never changed: new
vectors are a new file, which appears by one rename, so that processes which write at the same time at worst keep a
vector twice. A file whose bytes are not those that were written (cut off, damaged, another's) is told, removed and its
vectors computed again. Files are read and not mapped, so that one that is cut off meanwhile cannot end the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from recbole_cl import disk
from recbole_cl.errors import ConfigError

_LOG = logging.getLogger(__name__)
_FORMAT = "recbole-cl text vectors 1"
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class VectorStore:
    """The vectors that one encoder has made.

    Args:
        folder: The property ``text_cache``; made if it is not there.
        encoder: The encoder's registered name.
        identity: All that its vectors depend on beside the texts, JSON-able.

    Raises:
        ConfigError: If the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: str, identity: Mapping[str, Any]) -> None:
        self._encoder = json.dumps([encoder, identity], sort_keys=True, default=str).encode()
        try:
            self.folder = Path(folder).expanduser() / hashlib.sha256(self._encoder).hexdigest()
            disk.own_folder(self.folder, "text_cache")
        except (OSError, ValueError, RuntimeError) as error:  # no ~nosuch, a byte NUL
            raise ConfigError(
                f"property 'text_cache' is {str(folder)!r}, where no folder can be made ({error}); choose another one, "
                f"or ~ to keep no vectors"
            ) from error

    def key(self, text: str) -> bytes:
        """Returns the key of a text, 32 bytes."""
        return hashlib.sha256(self._encoder + b"\0" + text.encode("utf-8", "surrogatepass")).digest()

    def find(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns the vectors that are there, by text, shape ``[width]`` each."""
        missing = {self.key(text): text for text in texts}
        found: dict[str, torch.Tensor] = {}
        for file in sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)):
            if not missing:
                break
            keys, vectors = self._read(file)
            for row, key in enumerate(keys):
                text = missing.pop(key, None)
                if text is not None:
                    found[text] = vectors[row].clone()  # not a view, which would hold the whole file
        return found

    def _read(self, file: Path) -> tuple[list[bytes], torch.Tensor]:
        """Returns keys and vectors of a file: none, and the file is removed, if its bytes are not as written."""
        try:
            content = file.read_bytes()
            tensors = load(content)
            keys, vectors = tensors["keys"], tensors["vectors"]
            whole = (
                keys.dtype == torch.uint8
                and vectors.dtype == torch.float32
                and keys.shape == (len(vectors), 32)
                and vectors.dim() == 2
                and bytes(tensors["sha256"].tolist()) == _digest(keys, vectors)
            )
        except OSError as error:
            _LOG.warning("text_cache: cannot read %s (%s); its vectors are computed again", file, error.strerror)
            return [], torch.empty(0, 0)
        except (SafetensorError, KeyError, ValueError):
            whole = False
        if not whole:
            _LOG.warning("text_cache: %s is damaged; it is removed and its vectors are computed again", file)
            with contextlib.suppress(OSError):
                file.unlink()
            return [], torch.empty(0, 0)
        return [bytes(key) for key in keys.numpy()], vectors

    def keep(self, texts: Sequence[str], vectors: torch.Tensor) -> None:
        """Writes new vectors; a disk that is full costs them and no more.

        Args:
            texts: The texts, each once.
            vectors: A row for each, shape ``[len(texts), width]``.
        """
        raw = b"".join(self.key(text) for text in texts)
        keys = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, 32)
        vectors = vectors.to("cpu", torch.float32).contiguous()
        digest = torch.frombuffer(bytearray(_digest(keys, vectors)), dtype=torch.uint8)
        content = save({"keys": keys, "vectors": vectors, "sha256": digest}, {"format": _FORMAT})
        part = self.folder / f".{os.getpid()}-{secrets.token_hex(8)}.part"
        try:
            with open(disk.create(part), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.folder / f"{hashlib.sha256(raw).hexdigest()}.safetensors")
        except OSError as error:
            _LOG.warning("text_cache: %d vectors are not kept in %s: %s", len(texts), self.folder, error.strerror)
            with contextlib.suppress(OSError):
                part.unlink()


def _digest(keys: torch.Tensor, vectors: torch.Tensor) -> bytes:
    """Returns the sha256 of what a file holds."""
    width = str(tuple(vectors.shape)).encode()
    return hashlib.sha256(width + keys.numpy().tobytes() + vectors.numpy().tobytes()).digest()
