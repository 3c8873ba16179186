"""Weights of several objectives whose gradients are to be followed at once (MGDA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def min_norm_weights(gram: torch.Tensor, steps: int = 1000, tolerance: float = 1e-10) -> torch.Tensor:
    """Returns the weights of the point of least norm in the convex hull of n gradients.

    Désidéri 2012; Sener and Koltun 2018, "Multi-task learning as multi-objective optimization", eq. 3 to 5::

        min || sum_i a_i g_i ||^2,    a_i >= 0,  sum_i a_i = 1

    Either the minimum is 0 (no step improves every objective) or stepping against the combination improves all of them.
    Two objectives have a closed form. For more, Frank-Wolfe runs in its pairwise variant (Lacoste-Julien and Jaggi
    2015): weight moves from the worst objective in use to the best one, by an exact line search. It finds the same
    point as the plain one of the paper, in tens of steps instead of thousands.

    Args:
        gram: Inner products of the gradients, shape ``[n, n]``.
        steps: Frank-Wolfe steps at most.
        tolerance: Duality gap at which to stop, as a share of the largest squared norm.

    Returns:
        Weights, float64, on the CPU, shape ``[n]``; non-negative, with sum 1.
    """
    m = gram.detach().to("cpu", torch.float64)
    n = len(m)
    if n == 1:
        return torch.ones(1, dtype=torch.float64)
    if n == 2:
        first = _share_of_first(m[0, 0], m[0, 1], m[1, 1])
        return torch.stack([first, 1 - first])
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    scale = float(m.diagonal().max())
    for _ in range(steps):
        slope = m @ weights  # half of the gradient
        used = weights > 0
        best = int(slope.argmin())
        worst = int(torch.where(used, slope, -torch.inf).argmax())
        if float(slope[worst] - slope[best]) <= tolerance * scale:
            break
        curvature = float(m[best, best] - 2 * m[best, worst] + m[worst, worst])
        step = float(slope[worst] - slope[best]) / curvature if curvature > 0 else float("inf")
        step = min(step, float(weights[worst]))
        weights[best] += step
        weights[worst] = 0.0 if step == float(weights[worst]) else weights[worst] - step
    return weights / weights.sum()


def _share_of_first(aa: torch.Tensor, ab: torch.Tensor, bb: torch.Tensor) -> torch.Tensor:
    """Returns a in [0, 1] with the least ``|a g_1 + (1-a) g_2|^2``: ``(g_2 - g_1) . g_2 / |g_1 - g_2|^2``, clipped."""
    distance = aa - 2 * ab + bb
    if float(distance) <= 0:  # equal gradients: every share gives the same point
        return torch.full((), 0.5, dtype=torch.float64)
    return ((bb - ab) / distance).clamp(0.0, 1.0)


def gram_matrix(gradients: Sequence[Sequence[torch.Tensor | None]]) -> torch.Tensor:
    """Returns the inner products of gradients over the same parameters, float64, shape ``[n, n]``.

    Args:
        gradients: For each objective one tensor a parameter; ``None`` stands for zeros.
    """
    n = len(gradients)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            pairs = zip(gradients[i], gradients[j], strict=True)
            total = sum(float((a.double() * b.double()).sum()) for a, b in pairs if a is not None and b is not None)
            gram[i, j] = gram[j, i] = total
    return gram
