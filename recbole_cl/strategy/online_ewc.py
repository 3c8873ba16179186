"""Elastic weight consolidation with one importance that fades and one anchor that moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recbole_cl.registry import strategies
from recbole_cl.strategy.ewc import EWC
from recbole_cl.strategy.parts.checks import check_number


@strategies.register()
class OnlineEWC(EWC):
    """Pulls every parameter back to where the last stage left it; what earlier stages held fast fades.

    Schwarz et al. 2018, "Progress and compress", eq. 9, after every stage t::

        F <- gamma F + F_t,      anchor = theta_t
        L(theta) + lambda / 2 * sum_i F_i (theta_i - anchor_i)^2

    ``F_t`` is that of :class:`~recbole_cl.strategy.ewc.EWC`: the mean of per-sample squared gradients. ``gamma`` = 1
    forgets nothing and differs from EWC by its anchor alone; ``gamma`` = 0 holds what the last stage needs. The
    default of 0.95 is ours. The paper also normalises each ``F_t``; here stages keep their scales, as in EWC. Rows of
    new users and items have F = 0.

    Known mistakes elsewhere: those of EWC; ``F <- gamma F + (1 - gamma) F_t``, whose strength after the first stage
    is ``1 - gamma`` of what lambda says.
    """

    prefix = "online_ewc"
    defaults = {"lambda": 100.0, "gamma": 0.95, "samples": 2000}

    def check(self, config: Any, model: nn.Module) -> None:
        super().check(config, model)
        check_number(self, "gamma", "1 keeps all importance, 0.95 lets it fade", least=0, most=1)

    def _add_anchor(self, name: str, fisher: torch.Tensor, theta: torch.Tensor) -> None:
        """Fades the importance, adds the stage's and moves the anchor to ``theta``; nothing is left over."""
        self.bring(name, theta)
        if name in self.importance:
            fisher = float(self.params["gamma"]) * self.importance[name] + fisher
        self.importance[name], self.anchor[name] = fisher.clone(), theta.clone()  # theta is a view of the parameter
