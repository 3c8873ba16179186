"""Random vectors in place of a sentence encoder's: the ablation without a language model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.registry import encoders
from recbole_cl.rng import torch_generator


@encoders.register("random")
class RandomEncoder(TextEncoder):
    """A random unit vector of each text, as wide as MiniLM's; it knows that texts differ, and nothing else.

    Args:
        parameters: ``width``.
        seed: The run's seed; another one gives other vectors.
    """

    prefix = "random"
    draws = True

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            generator = torch_generator(self.seed, 0, f"encoder/{hashlib.sha256(text.encode()).hexdigest()}")
            rows.append(torch.randn(self.parameters["width"], generator=generator))
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)
