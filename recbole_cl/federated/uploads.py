"""What clients send, and which of it a server takes: everything else is refused with a reason, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 1e-5
"""How much longer than R a vector may be: clients may hold it in float32. The server clips once more."""


@dataclass(frozen=True)
class Upload:
    """What one client sends in one round. It says nothing of how many examples it stands for: every user counts alike.

    Args:
        client: Who sends it.
        round_id: The round that it answers.
        vector: The clipped vector, shape ``[d']``; whatever came over the wire.
    """

    client: Any
    round_id: Any
    vector: Any


@dataclass(frozen=True)
class Accepted:
    """What a server takes of a round.

    Attributes:
        clients: Ids, shape ``[n]``, rising.
        vectors: float64, shape ``[n, d']``.
        refused: Reason to number of uploads.
    """

    clients: np.ndarray
    vectors: np.ndarray
    refused: dict[str, int]


def accept(uploads: Sequence[Upload], round_id: str, sampled: Collection[int], width: int, radius: float) -> Accepted:
    """Returns the uploads that count, one a client.

    Args:
        uploads: What came in, in the order in which it came.
        round_id: The round that is open.
        sampled: Clients whom the server has asked.
        width: d'.
        radius: R.
    """
    refused: Counter[str] = Counter()
    taken: dict[int, np.ndarray] = {}
    asked = set(map(int, sampled))
    for upload in uploads:
        why, vector = _refusal(upload, round_id, asked, taken, width, radius)
        if why:
            refused[why] += 1
        else:
            assert vector is not None
            taken[int(upload.client)] = vector
    clients = np.array(sorted(taken), dtype=np.int64)
    vectors = np.stack([taken[c] for c in clients.tolist()]) if taken else np.zeros((0, width))
    return Accepted(clients, vectors, dict(sorted(refused.items())))


def _refusal(
    upload: Upload, round_id: str, asked: Collection[int], taken: Collection[int], width: int, radius: float
) -> tuple[str, np.ndarray | None]:
    """Returns why an upload is refused, or nothing and its vector."""
    if upload.round_id != round_id:
        return "another round: replayed, stale or from the future", None
    if not isinstance(upload.client, int | np.integer) or isinstance(upload.client, bool):
        return "a client that is no number", None
    if int(upload.client) not in asked:
        return "a client that was not asked", None
    if int(upload.client) in taken:
        return "a second upload of one client", None
    vector = upload.vector
    if not isinstance(vector, np.ndarray) or vector.dtype.kind != "f":
        return "no array of floating-point numbers", None
    if vector.shape != (width,):
        return "another shape", None
    reasons = unfit(vector[None].astype(np.float64), radius)
    return (str(reasons[0]), None) if reasons[0] else ("", vector.astype(np.float64))


def unfit(vectors: np.ndarray, radius: float) -> np.ndarray:
    """Returns why vectors are refused, an empty text for one that is fit, shape ``[n]``.

    Args:
        vectors: Shape ``[n, d']``, float64.
        radius: R; a client has clipped its vector to it.
    """
    finite = np.isfinite(vectors).all(axis=1)
    largest = np.abs(np.where(np.isfinite(vectors), vectors, 0.0)).max(axis=1, initial=0.0)
    scaled = vectors / np.where(largest > 0, largest, 1.0)[:, None]
    norm = largest * np.linalg.norm(np.where(finite[:, None], scaled, 0.0), axis=1)
    return np.select(
        [~finite, largest == 0, norm > radius * (1 + TOLERANCE)],
        ["numbers that are not finite", "a zero vector", "longer than the clip radius"],
        default="",
    )
