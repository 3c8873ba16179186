"""What semantic ids are worth: collisions before and after repair, entropies, items that are new at a stage."""

from __future__ import annotations

from typing import Any

import numpy as np


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """Returns how many items share all their codes with another one.

    Args:
        codes: Shape ``[n, levels]``.

    Returns:
        ``unique`` different codes, ``colliding`` items that are not alone with theirs, their ``share`` of all, and the
        items of the ``largest`` leaf.
    """
    if not len(codes):
        return {"unique": 0, "colliding": 0, "share": 0.0, "largest": 0}
    _, counts = np.unique(codes, axis=0, return_counts=True)
    colliding = int(counts[counts > 1].sum())
    return {
        "unique": len(counts),
        "colliding": colliding,
        "share": colliding / len(codes),
        "largest": int(counts.max()),
    }


def entropy(values: np.ndarray) -> float:
    """Returns the entropy in bits of how often different rows of ``values``, shape ``[n, ...]``, occur."""
    if not len(values):
        return 0.0
    _, counts = np.unique(values, axis=0, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def quality(
    before: np.ndarray, after: np.ndarray, sizes: tuple[int, ...], stage: np.ndarray | None = None
) -> dict[str, Any]:
    """Returns the report of semantic ids.

    Args:
        before: Codes as the tokeniser gave them, shape ``[n, levels]``.
        after: Codes after repair, shape ``[n, levels]`` or one level more.
        sizes: Codes that each level of ``after`` may have.
        stage: Stage at which each item is first seen, shape ``[n]``.

    Returns:
        ``items``; ``before`` and ``after`` (:func:`collisions`); ``levels``, a row for each with its ``size``, ``used``
        codes and ``entropy_bits``; ``entropy_bits`` of whole ids and ``most_bits``, what they would have if all were
        different; ``new_items`` of each stage.
    """
    report: dict[str, Any] = {
        "items": len(after),
        "before": collisions(before),
        "after": collisions(after),
        "levels": [
            {
                "level": level + 1,
                "size": size,
                "used": len(np.unique(after[:, level])),
                "entropy_bits": entropy(after[:, level]),
            }
            for level, size in enumerate(sizes)
        ],
        "entropy_bits": entropy(after),
        "most_bits": float(np.log2(len(after))) if len(after) else 0.0,
    }
    if stage is not None:
        report["new_items"] = np.bincount(stage).tolist()
    return report
