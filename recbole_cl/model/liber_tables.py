"""The vectors that the fusion reads: what was learnt, or what a control puts in its place."""

from __future__ import annotations

import torch

from recbole_cl.model.liber_knowledge import Knowledge
from recbole_cl.rng import torch_generator

VECTORS = ("real", "zeros", "shuffled", "random", "none")
SHIFTS = ("cascade", "difference", "none")
READINGS = ("partitions", "whole")


def interest_tables(
    known: Knowledge, vectors: str, shift: str, size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the vectors of summaries and of shifts, shape ``[P, size]`` each.

    Args:
        known: What was learnt.
        vectors: ``real``, or a control: ``zeros``, ``shuffled`` (another partition's, for good) or ``random``.
        shift: ``difference`` takes a summary less the one before it in place of what was written.
        size: Numbers of a vector.
        seed: The run's seed.
    """
    summaries, shifts = known.summary, known.shift
    if not len(known):
        return torch.zeros(0, size), torch.zeros(0, size)
    if shift == "difference":
        before = torch.cat([summaries[:1], summaries[:-1]])
        shifts = (summaries - before) * (known.number > 0).unsqueeze(1)
    if vectors == "zeros":
        return torch.zeros_like(summaries), torch.zeros_like(shifts)
    if vectors in ("shuffled", "random"):
        # By (user, number), so that a partition keeps what it was given as others join it.
        pairs = zip(known.user.tolist(), known.number.tolist(), strict=True)
        drawn = torch.stack([_drawn(seed, number, f"liber/control/{user}", 2 * size) for user, number in pairs])
        if vectors == "random":
            return drawn[:, :size] * size**-0.5, drawn[:, size:] * size**-0.5
        order = _another(drawn[:, 0])
        return summaries[order], shifts[order]
    return summaries, shifts


def item_table(items: torch.Tensor, vectors: str, seed: int) -> torch.Tensor:
    """Returns the vectors of items, shape ``[n_items, size]``, under the same controls; row 0 is padding."""
    if vectors == "zeros":
        return torch.zeros_like(items)
    if vectors in ("shuffled", "random"):
        size = items.size(1)
        drawn = torch.stack([_drawn(seed, number, "liber/control/item", size) for number in range(len(items))])
        found = drawn * size**-0.5 if vectors == "random" else items.clone()
        if vectors == "shuffled" and len(items) > 1:
            found[1:] = items[1:][_another(drawn[1:, 0])]
        found[0] = 0
        return found
    return items


def _another(drawn: torch.Tensor) -> torch.Tensor:
    """Returns a permutation without a fixed point: each goes to the next in the order of what was drawn."""
    order = drawn.argsort()
    return order[(order.argsort() + 1).remainder(len(drawn))]


def _drawn(seed: int, number: int, name: str, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch_generator(seed, number, name))
