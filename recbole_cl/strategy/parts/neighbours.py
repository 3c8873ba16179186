"""Who interacted with what before a stage, for strategies that hold the structure of the old graph.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import numpy as np
import torch

from recbole_cl.strategy.context import StageContext


def past_pairs(ctx: StageContext) -> tuple[np.ndarray, np.ndarray]:
    """Returns users and items of the training targets of all stages before this one, each pair once."""
    past = ctx.stream.trained_targets(ctx.index - 1, "so_far").position
    table = ctx.stream.table
    pairs = np.unique(np.stack([table.user[past], table.item[past]]), axis=1)
    return pairs[0], pairs[1]


def draw_neighbours(
    anchors: np.ndarray, others: np.ndarray, n: int, size: int, generator: np.random.Generator
) -> torch.Tensor:
    """Returns up to ``size`` different neighbours of each node, uniformly drawn, shape ``[n, size]``, 0 where none.

    Args:
        anchors: Nodes from 0 to ``n - 1``, shape ``[E]``.
        others: Their neighbours, ids from 1 on, shape ``[E]``; no pair occurs twice.
        n: Number of nodes.
        size: Neighbours of a node at most.
        generator: Draws which of them, where there are more.
    """
    order = np.lexsort((generator.random(len(anchors)), anchors))
    sorted_anchors = anchors[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_anchors, sorted_anchors)
    kept = place < size
    table = np.zeros((n, size), dtype=np.int64)
    table[sorted_anchors[kept], place[kept]] = others[order][kept]
    return torch.from_numpy(table)
