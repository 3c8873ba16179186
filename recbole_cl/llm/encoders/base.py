"""What a text encoder is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch


class TextEncoder:
    """A frozen map from texts to vectors.

    An encoder is one file with one class, in this package or in another one (an entry point of the group
    ``recbole_cl.encoders``). A complete one, whose property on the command line is ``--lengths_width=4``::

        @encoders.register("lengths")
        class Lengths(TextEncoder):
            prefix = "lengths"
            defaults = {"lengths_width": 2}

            def encode(self, texts):
                lengths = torch.tensor([[len(text)] for text in texts], dtype=torch.float32)
                return lengths.repeat(1, self.parameters["width"])

    In place of ``defaults``, ``properties/encoder/<name>.yaml`` (in another package ``<ClassName>.yaml`` beside the
    module) gives them with types and words.

    Args:
        parameters: Own properties without prefix.
        seed: The run's seed, for encoders that draw.

    Attributes:
        prefix: What its own properties begin with; its name by default.
        draws: Whether vectors depend on the seed.
    """

    prefix: ClassVar[str | None] = None
    draws: ClassVar[bool] = False

    def __init__(self, parameters: Mapping[str, Any], seed: int) -> None:
        self.parameters = dict(parameters)
        self.seed = seed

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns a float32 vector of each text, shape ``[len(texts), width]``; the same for the same text.

        A model is loaded here and not by the constructor: where a store has all vectors, it is not needed.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement encode(texts)")

    def identity(self) -> dict[str, Any]:
        """Returns all that the vectors depend on beside the texts, JSON-able: a store keeps vectors by it."""
        return {"parameters": self.parameters, **({"seed": self.seed} if self.draws else {})}
