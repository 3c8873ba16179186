"""Words of a text as signed hashes: alike texts are near each other, without a language model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import torch

from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.registry import encoders

_WORD = re.compile(r"\w+")


@encoders.register("hashed_words")
class HashedWords(TextEncoder):
    """Feature hashing (Weinberger et al. 2009) of words and, half as much, of their trigrams; unit vectors.

    It needs nothing but the text: no weights, no network, the same numbers on every machine. It knows nothing of
    meaning: "mug" and "cup" are as far from each other as any two words. A text without a word is the zero vector.

    Args:
        parameters: ``width``.
        seed: Not used.
    """

    prefix = "hashed_words"

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        width = int(self.parameters["width"])
        out = torch.zeros(len(texts), width)
        places: dict[str, tuple[int, float]] = {}
        for row, text in enumerate(texts):
            for part, weight in _parts(text):
                if part not in places:
                    number = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
                    places[part] = (number // 2 % width, 1.0 if number % 2 else -1.0)
                place, sign = places[part]
                out[row, place] += sign * weight
        return torch.nn.functional.normalize(out, dim=-1)


def _parts(text: str) -> Iterator[tuple[str, float]]:
    """Yields words and trigrams, and what each weighs."""
    for word in _WORD.findall(text.lower()):
        yield word, 1.0
        padded = f"<{word}>"
        for start in range(len(padded) - 2):
            yield f"#{padded[start : start + 3]}", 0.5 / max(len(padded) - 2, 1)
