"""Answers as vectors: the mean of their clauses', made narrower by a principal component analysis.

Few distinct clauses make up many answers, so each clause is encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recbole_cl.llm.texts import clauses

Encode = Callable[[Sequence[str]], torch.Tensor]
"""Texts to vectors ``[n, width]``."""


def clause_vectors(texts: Sequence[str], encode: Encode) -> tuple[torch.Tensor, int]:
    """Returns a vector for each text, the mean of its clauses', shape ``[n, width]``, and how many clauses there are.

    Args:
        texts: The texts, at least one of them with a clause.
        encode: Is given each distinct clause once, in the order of the alphabet.
    """
    parts = [clauses(text) or [text] for text in texts]
    distinct = sorted({clause for part in parts for clause in part})
    place = {clause: number for number, clause in enumerate(distinct)}
    vectors = encode(distinct)
    flat = torch.tensor([place[clause] for part in parts for clause in part])
    offsets = torch.from_numpy(np.cumsum([0, *(len(part) for part in parts[:-1])]))
    return torch.nn.functional.embedding_bag(flat, vectors, offsets, mode="mean"), len(distinct)


@dataclass
class Projection:
    """A principal component analysis that was fitted once.

    Attributes:
        mean: Shape ``[width]``.
        matrix: Shape ``[width, size]``; columns without variance are 0.
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    @classmethod
    def fit(cls, vectors: torch.Tensor, size: int) -> Projection:
        """Fits the ``size`` directions of most variance; projected, the vectors' squared length is 1 in the mean.

        Args:
            vectors: Shape ``[n, width]``, at least one.
            size: Numbers that are kept.
        """
        data = vectors.double()
        mean = data.mean(0)
        centred = data - mean
        values, directions = torch.linalg.eigh(centred.T @ centred / len(data))
        values, directions = values.flip(0)[:size].clamp(min=0), directions.flip(1)[:, :size]
        # An eigenvector's sign is nobody's choice: its largest number is positive.
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        directions = directions * (values > 1e-9 * values.sum().clamp(min=1e-12))
        matrix = torch.zeros(vectors.size(1), size, dtype=torch.float64)
        matrix[:, : directions.size(1)] = directions / values.sum().clamp(min=1e-12).sqrt()
        return cls(mean.float(), matrix.float())

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns vectors ``[n, size]`` for vectors ``[n, width]``."""
        return (vectors - self.mean) @ self.matrix
