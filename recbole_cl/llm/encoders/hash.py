"""Vectors of texts without any model: each word has a direction of its own."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch

from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.registry import encoders


@encoders.register("hash")
class HashEncoder(TextEncoder):
    """The mean of its words' random unit vectors: texts with words in common are near, synonyms are not.

    The fallback where no sentence encoder is installed.

    Args:
        parameters: ``width``.
        seed: Not used: a word's direction follows from its letters.
    """

    prefix = "hash"

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        width = int(self.parameters["width"])

        @functools.cache
        def direction(word: str) -> np.ndarray:
            digest = hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()
            drawn = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32)).standard_normal(width)
            return (drawn / np.linalg.norm(drawn)).astype(np.float32)

        rows = np.zeros((len(texts), width), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            words = re.findall(r"\w+", text.lower())
            if words:
                row += np.mean([direction(word) for word in words], axis=0)
        return torch.from_numpy(rows)
