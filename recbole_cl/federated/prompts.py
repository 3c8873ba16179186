"""The arithmetic of prototype-aligned prompts on batched arrays: one client is one row, and no row sees another.

Names are those of Xiao and Hou (2026): prompts ``p_long`` and ``p_short`` ``[C, Lp, d]``, prototypes ``v`` ``[K, d']``
with their prompts ``c = dec(v)``, queries ``q`` ``[C, d]``, encoders g (of queries) and phi (of prompts).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError


def soft_threshold(values: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """Returns ``sign(z) max(|z| - t, 0)``, the proximal step of ``t |z|_1``, element by element."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


def short_step(prompt: torch.Tensor, gradient: torch.Tensor, rate: float, sparsity: float) -> torch.Tensor:
    """Returns the short prompts after a proximal step (eq. 2).

    Args:
        prompt: Shape ``[C, Lp, d]``.
        gradient: Of the recommendation loss.
        rate: The step size eta_s.
        sparsity: The weight lambda_p of the l1 norm.
    """
    return soft_threshold(prompt - rate * gradient, rate * sparsity)


def route(
    query: torch.Tensor, prototypes: torch.Tensor, most: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the prototypes of each query and their weights (eq. 4), shape ``[C, M]`` each.

    Args:
        query: h = g(q), shape ``[C, d']``.
        prototypes: v, shape ``[K, d']``; they are compared by cosine.
        most: M; all of them, if there are fewer.
        temperature: tau.
    """
    likeness = F.normalize(query, dim=-1) @ F.normalize(prototypes, dim=-1).T / temperature
    best, chosen = likeness.topk(min(most, len(prototypes)), dim=-1)
    return chosen, best.softmax(dim=-1)


def mixed(chosen: torch.Tensor, weights: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Returns ``sum_k w_k c_k`` of each row, shape ``[C, Lp, d]``, for prompts of prototypes ``[K, Lp, d]``."""
    dense = weights.new_zeros(len(chosen), len(prompts)).scatter(1, chosen, weights)
    return (dense @ prompts.flatten(1)).view(-1, *prompts.shape[1:])


def alignment(encoded: torch.Tensor, prototypes: torch.Tensor, sharpness: float, temperature: float) -> torch.Tensor:
    """Returns the alignment of each row (eq. 5), shape ``[C]``: half the squared distance to the nearest prototype,
    and how badly it is told from the others.

    Args:
        encoded: z = phi(p_long), shape ``[C, d']``.
        prototypes: v, shape ``[K, d']``.
        sharpness: gamma, the weight of the InfoNCE term.
        temperature: tau_a.
    """
    # (z - v)^2 by differences: the expanded form loses the digits that its gradient needs near a prototype.
    gaps = 0.5 * (encoded.unsqueeze(1) - prototypes).square().sum(-1)
    pull, nearest = gaps.min(dim=1)
    if sharpness == 0:
        return pull
    likeness = encoded @ prototypes.T / temperature
    return pull + sharpness * F.cross_entropy(likeness, nearest, reduction="none")


def wasserstein(atoms: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Returns the squared 2-Wasserstein distance (eq. 6) of each row's atoms to the prototypes, shape ``[C]``.

    Both have atoms of equal mass. The plans are exact (POT) and constant in the gradient, as they may be at an optimum.

    Args:
        atoms: Shape ``[C, n, d']``.
        prototypes: v, shape ``[K, d']``.
    """
    gaps = (atoms.unsqueeze(2) - prototypes).square().sum(-1)
    costs = gaps.detach().cpu().double().numpy()
    plans = np.stack([exact_plan(cost) for cost in costs]) if len(costs) else costs
    return (torch.from_numpy(plans).to(gaps) * gaps).sum((1, 2))


def exact_plan(cost: np.ndarray) -> np.ndarray:
    """Returns the optimal plan between atoms of equal masses for a matrix of costs ``[n, K]``.

    Raises:
        ConfigError: If POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise ConfigError("POT, which computes transport plans, is not installed: recbole-cl[federated]") from error
    left, right = (np.full(size, 1 / size) for size in cost.shape)
    return np.asarray(ot.emd(left, right, cost))


def stability(drift: torch.Tensor, most: float, decay: float) -> torch.Tensor:
    """Returns lambda_s of each user, ``lambda_max exp(-kappa drift)`` (eq. 16)."""
    return most * torch.exp(-decay * drift)


def plasticity(drift: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Returns alpha of each user, ``sigma(softplus(a) drift + b)``: it grows with drift whatever a is."""
    return torch.sigmoid(F.softplus(slope) * drift + offset)


def roll(
    mean: torch.Tensor, query: torch.Tensor, seen: torch.Tensor, window: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rolling mean of each user's queries and how far it has moved, ``[C, d]`` and ``[C]``.

    Args:
        mean: Before.
        query: The new ones.
        seen: How many queries the mean is of, shape ``[C]``; with 0 the mean begins at the query and has not moved.
        window: Queries that it is over, as an exponential mean of weight ``2 / (window + 1)``.
    """
    first = (seen == 0).unsqueeze(1)
    moved = torch.where(first, query, mean + 2.0 / (window + 1.0) * (query - mean))
    return moved, torch.where(first, torch.zeros_like(moved), moved - mean).norm(dim=1)


class SharedParts(nn.Module):
    """What is trained on the base stage and then frozen and shared: g, phi, the decoder, alpha's a and b, first v.

    Encoders end in a fixed orthonormal projection onto d' numbers, drawn from a seed that everybody knows; behind a
    LayerNorm it leaves vectors of a length near 1, which is what the clip radius is measured in.

    Args:
        width: d of the backbone.
        tokens: Lp.
        hidden: d_phi, width of the encoders.
        prototypes: K.
        size: d'.
        seed: Of the projection.
    """

    projection: torch.Tensor

    def __init__(self, width: int, tokens: int, hidden: int, prototypes: int, size: int, seed: int) -> None:
        super().__init__()
        self.tokens, self.width, self.size = tokens, width, size
        self.query = _encoder(width, hidden)
        self.prompt = _encoder(width, hidden)
        self.decoder = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, tokens * width))
        nn.init.normal_(self.decoder[-1].weight, std=0.02)  # type: ignore[arg-type]
        self.slope = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(()))
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, size), dim=-1))
        draws = torch.randn(hidden, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.register_buffer("projection", torch.linalg.qr(draws).Q.to(torch.float32))

    def encode_query(self, query: torch.Tensor) -> torch.Tensor:
        """Returns h = g(q), shape ``[C, d']``."""
        return self._projected(self.query(query))

    def encode_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        """Returns z = phi(p), shape ``[C, d']``, of prompts ``[C, Lp, d]``: their mean token, encoded."""
        return self._projected(self.prompt(prompt.mean(dim=1)))

    def encode_tokens(self, prompt: torch.Tensor) -> torch.Tensor:
        """Returns phi of each token alone, shape ``[C, Lp, d']``."""
        return self._projected(self.prompt(prompt))

    def decode(self, prototypes: torch.Tensor | None = None) -> torch.Tensor:
        """Returns c = dec(v), shape ``[K, Lp, d]``."""
        v = self.prototypes if prototypes is None else prototypes
        return self.decoder(v).view(-1, self.tokens, self.width)  # type: ignore[no-any-return]

    def _projected(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.projection / self.size**0.5


def _encoder(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
