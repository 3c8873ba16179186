"""Texts to frozen vectors: who answers to an encoder's name, and the vectors kept for the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.llm.encoders.sentence_transformers_folder import SentenceTransformersFolder
from recbole_cl.registry import encoders
from recbole_cl.rng import seeded

_CACHE: dict[tuple[str, int, tuple[str, ...]], torch.Tensor] = {}


def encode_texts(name: str, texts: Sequence[str], seed: int, key: str = "encoder") -> torch.Tensor:
    """Returns the vectors of texts by a registered encoder or a folder of sentence-transformers.

    The result is kept for the process: a model is made anew at every stage. Whatever an encoder draws while it is
    loaded comes from a state of its own, so that a cached answer leaves the caller's randomness as a fresh one does.

    Args:
        name: Registered name (``minilm``, ``random``) or path of a sentence-transformers folder.
        texts: The texts.
        seed: The run's seed.
        key: The property that named the encoder, for messages.

    Raises:
        ConfigError: If nobody answers to the name, or a package is missing.
    """
    at = (str(name), seed, tuple(texts))
    if at not in _CACHE:
        with seeded(seed):
            _CACHE[at] = _encoder(str(name), seed, key).encode(texts).to("cpu", torch.float32)
    return _CACHE[at].clone()


def _encoder(name: str, seed: int, key: str) -> TextEncoder:
    if name in encoders:
        made: TextEncoder = encoders.get(name)(seed)
        return made
    folder = Path(name).expanduser()
    if (folder / "modules.json").is_file():
        return SentenceTransformersFolder(seed, folder)
    hint = nearest(name, encoders.names()) or "."
    raise ConfigError(
        f"{key}: {name!r} is neither an encoder{hint} Known: {', '.join(encoders.names())}, nor a folder of "
        f"sentence-transformers (one that holds modules.json)"
    )
