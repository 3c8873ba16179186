"""Which samples of each label stay in a memory: quotas per label, and who fills them.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import numpy as np
import torch

PADDED = 2**24
"""Numbers that one padded block of vectors may hold (64 MiB of float32)."""


def quotas(counts: np.ndarray, size: int, equal: bool, generator: np.random.Generator) -> np.ndarray:
    """Returns how many samples of each label stay.

    Proportional: label i is due ``size * c_i / sum(c)`` samples, equal: ``size / (labels that occur)``. Fractions are
    rounded systematically, with one random offset u: ``floor(C_i + u) - floor(C_{i-1} + u)``, C the running sum of
    what is due. So each quota is within one of its due, has it as expectation, and they sum to ``size``; then none
    exceeds what there is. (ADER's public code draws them from a multinomial: the same expectation, more noise.)

    Args:
        counts: Samples there are of each label, shape ``[n]``.
        size: Samples that stay at most.
        equal: The same for every label that occurs.
        generator: Draws the offset.
    """
    weight = (counts > 0).astype(np.float64) if equal else counts.astype(np.float64)
    total = weight.sum()
    if not total:
        return np.zeros(len(counts), dtype=np.int64)
    if counts.sum() <= size and not equal:
        return counts.astype(np.int64)
    reached = np.floor(np.cumsum(weight) / total * size + generator.random() + 1e-9).astype(np.int64)
    return np.minimum(np.diff(reached, prepend=0), counts)


def smallest(keys: np.ndarray, labels: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """Returns the sorted indices of each label's samples with the smallest keys.

    Args:
        keys: Shape ``[N]``.
        labels: Label of each sample, shape ``[N]``.
        quota: Samples of each label that stay, shape ``[n labels]``.
    """
    order = np.lexsort((keys, labels))
    grouped = labels[order]
    rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    return np.sort(order[rank < quota[grouped]])


def herding(vectors: torch.Tensor, labels: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """Returns the sorted indices of the samples that herding picks for each label.

    Welling 2009, "Herding dynamical weights to learn": with unit vectors ``phi`` of a label's samples and their mean
    ``mu``, start at ``w = mu`` and repeat::

        pick  x = argmax over samples not yet picked of  w . phi(x);    w <- w + mu - phi(x)

    so that the mean of the picked follows mu. All labels of about the same size advance together, one batched product
    a step, and a label costs (picked) x (samples) x d.

    Args:
        vectors: One row a sample, shape ``[N, d]``.
        labels: Label of each sample, shape ``[N]``.
        quota: Samples of each label to pick, at most as many as there are, shape ``[n labels]``.
    """
    unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    order = np.argsort(labels, kind="stable")
    present, start, counts = np.unique(labels[order], return_index=True, return_counts=True)
    wanted = np.minimum(quota[present], counts)
    picked = [order[np.repeat(wanted == counts, counts)]]  # nothing to choose
    open_ = np.flatnonzero((wanted > 0) & (wanted < counts))
    open_ = open_[np.lexsort((wanted[open_], np.ceil(np.log2(counts[open_]))))]
    for group in _blocks(open_, counts, unit.size(1)):
        inside = np.arange(counts[group].max())[None, :]
        real = inside < counts[group][:, None]
        index = order[np.where(real, start[group][:, None] + inside, start[group][:, None])]
        flags = torch.from_numpy(real).to(unit.device)
        chosen = _herd(unit[torch.from_numpy(index).to(unit.device)], flags, wanted[group])
        picked.append(index[chosen.cpu().numpy()])
    return np.sort(np.concatenate(picked))


def _blocks(open_: np.ndarray, counts: np.ndarray, d: int) -> list[np.ndarray]:
    """Cuts labels, ordered by size, where the size doubles and where a padded block would be too large."""
    blocks, begin = [], 0
    for at in range(1, len(open_) + 1):
        last = at == len(open_)
        double = not last and np.ceil(np.log2(counts[open_[at]])) != np.ceil(np.log2(counts[open_[begin]]))
        full = not last and (at + 1 - begin) * 2 ** np.ceil(np.log2(counts[open_[at]])) * d > PADDED
        if last or double or full:
            blocks.append(open_[begin:at])
            begin = at
    return [block for block in blocks if len(block)]


def _herd(phi: torch.Tensor, real: torch.Tensor, wanted: np.ndarray) -> torch.Tensor:
    """Returns flags of what is picked, shape ``[G, n]``.

    Args:
        phi: Unit vectors, shape ``[G, n, d]``.
        real: Those that exist, shape ``[G, n]``.
        wanted: Samples to pick, ascending, shape ``[G]``.
    """
    mean = (phi * real.unsqueeze(-1)).sum(dim=1) / real.sum(dim=1, keepdim=True)
    free, w = real.clone(), mean.clone()
    for step in range(int(wanted[-1])):
        rest = slice(int(np.searchsorted(wanted, step, side="right")), None)  # labels that still want some
        match = (phi[rest] @ w[rest].unsqueeze(-1)).squeeze(-1)
        best = match.masked_fill(~free[rest], -torch.inf).argmax(dim=1, keepdim=True)
        free[rest].scatter_(1, best, False)
        w[rest] += mean[rest] - phi[rest].gather(1, best.unsqueeze(-1).expand(-1, 1, phi.size(-1))).squeeze(1)
    return real & ~free
