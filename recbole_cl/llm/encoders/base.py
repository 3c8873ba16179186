"""What a sentence encoder is, and the one function that calls it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class TextEncoder:
    """A frozen map from texts to vectors.

    An encoder is one file with a class that derives from this one, decorated with ``@encoders.register()``.

    Args:
        seed: The run's seed, for encoders that draw.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns a float32 vector of each text, shape ``[len(texts), width]``; the same for the same text."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode(texts)")
