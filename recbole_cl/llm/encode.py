"""Texts to frozen vectors: who answers to an encoder's name, and the vectors kept for the process and on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recbole_cl.config.components import choose
from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.llm.store import VectorStore
from recbole_cl.registry import encoders
from recbole_cl.rng import seeded

_CACHE: dict[tuple[str, str, int, tuple[str, ...]], torch.Tensor] = {}


def encode_texts(
    name: str,
    texts: Sequence[str],
    seed: int,
    key: str = "encoder",
    parameters: Mapping[str, Any] | None = None,
    store: str | None = None,
) -> torch.Tensor:
    """Returns the vectors of texts by a registered encoder or a folder of sentence-transformers.

    The result is kept for the process: a model is made anew at every stage. Whatever an encoder draws while it is
    loaded comes from a state of its own, so that a cached answer leaves the caller's randomness as a fresh one does.

    Args:
        name: Registered name (``minilm``, ``random``) or path of a sentence-transformers folder.
        texts: The texts.
        seed: The run's seed.
        key: The property that named the encoder, for messages.
        parameters: The encoder's own parameters (``config.component_parameters(key)``). Default: its defaults.
        store: The folder that keeps vectors for other runs (the property ``text_cache``), or ``None``. A vector from it
            may differ in the last bits from one computed here: texts are encoded in batches, in other company.

    Returns:
        Float32 vectors on the CPU, shape ``[len(texts), width]``.

    Raises:
        ConfigError: If nobody answers to the name, or a package is missing.
    """
    part = choose(key, encoders, str(name))
    parameters = part.parameters(part.defaults.values) if parameters is None else dict(parameters)
    at = (part.defaults.name, json.dumps(parameters, sort_keys=True, default=str), seed, tuple(texts))
    if at not in _CACHE:
        encoder: TextEncoder = part.component(parameters, seed)
        with seeded(seed):
            _CACHE[at] = (
                _encode(encoder, texts) if store is None else _stored(part.defaults.name, encoder, texts, store)
            )
    return _CACHE[at].clone()


def _encode(encoder: TextEncoder, texts: Sequence[str]) -> torch.Tensor:
    return encoder.encode(texts).to("cpu", torch.float32)


def _stored(name: str, encoder: TextEncoder, texts: Sequence[str], folder: str) -> torch.Tensor:
    """Returns the vectors of texts: those that a store has, and those that it lacks, which it then keeps."""
    store = VectorStore(folder, name, encoder.identity())
    found = store.find(texts)
    missing = [text for text in dict.fromkeys(texts) if text not in found]
    if missing:
        new = _encode(encoder, missing)
        store.keep(missing, new)
        found.update(zip(missing, new, strict=True))
    return torch.stack([found[text] for text in texts])
