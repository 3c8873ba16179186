"""Texts to frozen vectors: who answers to an encoder's name, and the vectors kept for the process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recbole_cl.config.components import choose
from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.registry import encoders
from recbole_cl.rng import seeded

_CACHE: dict[tuple[str, str, int, tuple[str, ...]], torch.Tensor] = {}


def encode_texts(
    name: str, texts: Sequence[str], seed: int, key: str = "encoder", parameters: Mapping[str, Any] | None = None
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
            _CACHE[at] = encoder.encode(texts).to("cpu", torch.float32)
    return _CACHE[at].clone()
