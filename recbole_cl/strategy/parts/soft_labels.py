"""Soft labels that one scorer gives another, where their rankings differ most (CCD's replay).

A part for strategies, not a strategy.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from recbole_cl.strategy.parts.outputs import Towers

CHUNK = 1024
"""Users whose scores for all items are held at a time."""


def draw_soft_labels(
    source: torch.Tensor, learner: torch.Tensor, top: int, count: int, sharpness: float, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws items that the source ranks high, preferably those that the learner ranks lower.

    Among the ``top`` items of the source, ``count`` different ones, with probability ~ exp(sharpness (r_learner -
    r_source) / I), ranks from 0 (best) to I - 1.

    Args:
        source: Its scores, shape ``[U, I]``; -inf for what is not to be drawn.
        learner: Its scores, shape ``[U, I]``, -inf in the same places.
        top: Items of the source that come into question.
        count: Items drawn for a user.
        sharpness: Weight of the discrepancy; 0 draws uniformly.
        generator: Draws.

    Returns:
        Items ``[U, count]``, 0 where there are fewer, and the source's probabilities sigmoid(score) ``[U, count]``.
    """
    n = source.size(1)
    top = min(top, n)
    best, items = source.topk(top, dim=1)
    ascending = learner.sort(dim=1).values
    ranks = n - torch.searchsorted(ascending, learner.gather(1, items), right=True)
    gap = (ranks - torch.arange(top, device=items.device)) / n
    noise = torch.from_numpy(generator.gumbel(size=tuple(best.shape))).to(best)
    keys = torch.where(torch.isfinite(best), sharpness * gap + noise, -torch.inf)  # Gumbel: without replacement
    chosen = keys.topk(min(count, top), dim=1).indices
    scores = best.gather(1, chosen)
    real = torch.isfinite(scores)
    return torch.where(real, items.gather(1, chosen), 0), torch.where(real, torch.sigmoid(scores), 0.0)


def soft_labels_of_all(
    sources: list[Towers],
    learner: Towers,
    seen: tuple[torch.Tensor, torch.Tensor],
    sizes: tuple[int, int],
    drawing: tuple[int, int, float],
    generator: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws soft labels from several sources for all users.

    Args:
        sources: Final vectors of each source.
        learner: Final vectors of the learner.
        seen: Users and items of interactions, each shape ``[E]``, which are not drawn; users in ascending order.
        sizes: Users and items, from id 0 on, that take part; row 0 is padding.
        drawing: ``top``, ``count`` and ``sharpness`` of :func:`draw_soft_labels`.
        generator: Draws.

    Returns:
        Items ``[n_users, sources * count]``, 0 where there is none, and labels of the same shape.
    """
    n_users, n_items = sizes
    parts = []
    for start in range(0, n_users, CHUNK):
        end = min(start + CHUNK, n_users)
        first, last = (int(torch.searchsorted(seen[0], bound)) for bound in (start, end))
        hidden = seen[0][first:last] - start, seen[1][first:last]
        known = hidden[1] < n_items
        hidden = hidden[0][known], hidden[1][known]
        scores = []
        for users, items in (*sources, learner):
            found = users[start:end] @ items[:n_items].T
            found[hidden] = -torch.inf
            found[:, 0] = -torch.inf
            scores.append(found)
        drawn = [draw_soft_labels(source, scores[-1], *drawing, generator) for source in scores[:-1]]
        parts.append(tuple(torch.cat(columns, dim=1) for columns in zip(*drawn, strict=True)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def soft_label_loss(towers: Towers, users: torch.Tensor, items: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean BCE between scores and soft labels over the items drawn for users, a scalar.

    Args:
        towers: Final vectors of the learner.
        users: Ids, shape ``[B]``.
        items: Soft labels, shape ``[B, S]``, 0 where there is none.
        labels: Probabilities, shape ``[B, S]``.
    """
    real = items > 0
    scores = (towers[0][users].unsqueeze(1) * towers[1][items]).sum(-1)
    each = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return (each * real).sum() / real.sum().clamp(min=1)
