"""Weights of several objectives whose gradients are to be followed at once (MGDA)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def min_norm_weights(gram: torch.Tensor, steps: int = 1000, tolerance: float = 1e-10) -> torch.Tensor:
    """Returns the weights of the point of least norm in the convex hull of n gradients.

    Désidéri 2012; Sener and Koltun 2018, "Multi-task learning as multi-objective optimization", eq. 3 to 5::

        min || sum_i a_i g_i ||^2,    a_i >= 0,  sum_i a_i = 1

    Either the minimum is 0 (no step improves every objective) or stepping against the combination improves all of them.
    Two objectives have a closed form. For more, Frank-Wolfe runs in its fully corrective variant (Wolfe 1976, "Finding
    the nearest point in a polytope"; Lacoste-Julien and Jaggi 2015): the best objective joins those in use, whose best
    weights are then solved for. It finds the point of the paper's plain one in a few steps, however unlike the sizes
    of the gradients are.

    Args:
        gram: Inner products of the gradients, shape ``[n, n]``.
        steps: Frank-Wolfe steps at most.
        tolerance: Duality gap at which to stop, as a share of the point's own squared norm.

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
    return torch.from_numpy(_wolfe(m.numpy(), steps, tolerance))


def _wolfe(m: np.ndarray, steps: int, tolerance: float) -> np.ndarray:
    """Returns the weights of the point of least norm, shape ``[n]``; see :func:`min_norm_weights`."""
    if not np.isfinite(m).all():  # of a gradient that is not finite; the trainer tells so
        return np.full(len(m), np.nan)
    if (m.diagonal() <= 0).any():  # a gradient of zeros is that point
        zero = (m.diagonal() <= 0).astype(np.float64)
        return np.asarray(zero / zero.sum())
    weights = np.full(len(m), 1 / len(m))
    length, rounding = np.sqrt(m.diagonal()), 4 * np.finfo(np.float64).eps
    for _ in range(steps):
        slope = m @ weights  # half of the gradient
        norm, size = float(weights @ slope), np.abs(m) @ weights
        gap = slope[weights > 0].max() - slope.min()
        # The rounding errors of slopes and norm: where the minimum is 0, the gap never gets small against the norm.
        if gap <= max(tolerance * norm, rounding * size.max()) or norm <= rounding * float(weights @ size):
            break
        used = weights > 0
        used[((slope - norm) / length).argmin()] = True  # by length, for what a long one wins is soon won
        found = _corrected(m, weights, used)
        if found @ m @ found >= (1 - rounding) * norm:  # nothing is left to gain but rounding
            break
        weights = found
    return weights


def _corrected(m: np.ndarray, weights: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Returns weights of the objectives in use that no other weights of the same ones are better than."""
    weights, used = weights.copy(), used.copy()
    while True:
        at = np.flatnonzero(used)
        wanted = _affine(m[np.ix_(at, at)])
        if (wanted > 0).all():
            weights[at] = wanted
            return np.asarray(weights / weights.sum())
        now, down = weights[at], wanted <= 0
        ratio = np.full(len(at), np.inf)  # how far to go until a weight is used up
        ratio[down] = now[down] / np.maximum(now[down] - wanted[down], np.finfo(np.float64).tiny)
        weights[at] = np.maximum(now + ratio.min() * (wanted - now), 0.0)
        gone = at[ratio <= ratio.min()]
        weights[gone], used[gone] = 0.0, False


def _affine(m: np.ndarray) -> np.ndarray:
    """Returns weights of any sign, with sum 1, of the point of least norm; the smallest ones where there are many."""
    # In gradients of length 1, so that the system is as well posed as their angles allow, whatever their lengths are.
    length = np.sqrt(m.diagonal())
    share = length.min() / length
    system = np.zeros((len(m) + 1, len(m) + 1))
    system[:-1, :-1] = m / np.outer(length, length)
    system[:-1, -1] = system[-1, :-1] = share
    found = np.linalg.lstsq(system, np.r_[np.zeros(len(m)), 1.0], rcond=None)[0][:-1] * share
    return np.asarray(found / found.sum())


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
