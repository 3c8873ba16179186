"""Weights of users that are learnt from how far their interests shifted (SAIL-PIW).

A part for strategies, not a strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.strategy.base import require

NAMES = ("centers", "maps", "hidden_weight", "hidden_bias", "out_weight", "out_bias")


class ImitationWeights:
    """The personalized imitation weights of Wang et al. 2023, with the DEC loss that trains their centres.

    With K item centres ``c_k`` and maps ``W_k`` (d x d)::

        g_u = softmax_k(c_k W_k e_u)                          a user's distribution over centres, shape [K]
        s_u = (g_u_old - g_u)^2                               elementwise
        w_u = softplus(MLP(s_u)) / mean over the batch's users

    Attributes:
        own: The trainable parameters by name, empty until :meth:`make`; none depends on the numbers of users and items.
    """

    def __init__(self) -> None:
        self.own: dict[str, nn.Parameter] = {}

    @staticmethod
    def check(prefix: str, params: Mapping[str, Any]) -> None:
        """Raises a :class:`ConfigError` where a strategy's ``centers`` or ``hidden`` are too few."""
        for key, least in (("centers", 2), ("hidden", 1)):
            if params[key] < least:
                raise ConfigError(f"{prefix}_{key}: {params[key]} is too small; it must be at least {least}")

    def make(self, centers: int, hidden: int, d: int, generator: torch.Generator, device: torch.device) -> None:
        """Makes the parameters.

        Args:
            centers: K, at least 2.
            hidden: Width of the network.
            d: Size of the users' and items' vectors.
            generator: Draws the initial values.
            device: Where they live.
        """
        k, h = centers, hidden
        values = {
            "centers": torch.randn(k, d, generator=generator) / d**0.5,
            "maps": torch.eye(d).repeat(k, 1, 1),  # at first g is the softmax of products with the centres
            "hidden_weight": torch.randn(h, k, generator=generator) / k**0.5,
            "hidden_bias": torch.zeros(h),
            "out_weight": torch.randn(1, h, generator=generator) / h**0.5,
            "out_bias": torch.zeros(1),
        }
        self.own = {name: nn.Parameter(value.to(device)) for name, value in values.items()}

    def distribution(self, users: torch.Tensor) -> torch.Tensor:
        """Returns g, shape ``[B, K]``, of users' vectors ``[B, d]``."""
        projected = torch.einsum("kd,kde->ke", self.own["centers"], self.own["maps"])
        return torch.softmax(users @ projected.T, dim=-1)

    def weights(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Returns w, shape ``[B]``, with mean 1, of vectors ``[B, d]``."""
        shift = (self.distribution(old) - self.distribution(new)).square()
        hidden = torch.relu(F.linear(shift, self.own["hidden_weight"], self.own["hidden_bias"]))
        raw = F.softplus(F.linear(hidden, self.own["out_weight"], self.own["out_bias"])).squeeze(-1)
        return raw / raw.mean()

    def clustering(self, items: torch.Tensor) -> torch.Tensor:
        """Returns DEC's KL(P || Q) (Xie et al. 2016), a mean over items ``[I, d]``."""
        q = 1 / (1 + (items.unsqueeze(1) - self.own["centers"]).square().sum(-1))
        q = q / q.sum(dim=1, keepdim=True)
        p = q.detach().square() / q.detach().sum(dim=0)
        p = p / p.sum(dim=1, keepdim=True)
        return (p * (p.log() - q.log())).sum(dim=1).mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns copies of the parameters by name."""
        return {name: p.detach().clone() for name, p in self.own.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Puts a state back.

        Raises:
            KeyError: If a key is missing; the message names it.
        """
        require(state, *NAMES)
        for name in NAMES:
            if name not in self.own:
                self.own[name] = nn.Parameter(state[name].clone())
            else:  # in place: the optimiser holds the parameters
                self.own[name].data.copy_(state[name])
