"""Memory aware synapses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.registry import strategies
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_number, check_samples, check_strength
from recbole_cl.strategy.parts.importance import Objective, mean_of_gradients
from recbole_cl.strategy.parts.outputs import check_user_vectors, user_vectors
from recbole_cl.strategy.parts.quadratic import QuadraticPenalty
from recbole_cl.strategy.parts.rows import OwnRows


@strategies.register()
class MAS(QuadraticPenalty):
    """Holds parameters by how much moving them changes the user representation f; labels are not read.

    Aljundi et al. 2018, "Memory aware synapses", eq. 2 to 4 with the squared norm of their section 4.1, each stage::

        Omega_t = 1/N sum_n |d ||f(x_n)||^2 / d theta|
        Omega <- alpha Omega + (1 - alpha) Omega_t   (Omega_1 at first),      anchor = theta_t
        L(theta) + lambda * sum_i Omega_i (theta_i - anchor_i)^2

    The absolute value is inside the mean, per sample. ``alpha`` = 0.5 is our reading of the value that is given without
    an equation: the share of the old importance in the mix, as Avalanche's MAS has it (the paper's own code keeps a
    running mean over samples). A row that a stage brought has Omega = 0 from before.

    f is the model's ``user_representation``; of RecBole's own models the vector of the row's user (BPR: the embedding,
    so nothing holds the items; LightGCN: the propagated row, through which all of a user's graph is held) or the output
    of ``forward(item_seq, item_seq_len)``. For models trained on all positions a sample is a window, f its last output.

    Known mistakes elsewhere: the absolute value of a batch's mean gradient, where samples of opposite sign cancel and
    Omega depends on the batch size; dropout left on.
    """

    prefix = "mas"
    base_is_finetune = True
    defaults = {"lambda": 1.0, "alpha": 0.5, "samples": 2000}
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient", "batch_rows"})

    def check(self, config: Any, model: nn.Module) -> None:
        check_user_vectors(self.name, config, model)
        check_strength(self)
        check_samples(self)
        check_number(self, "alpha", "it is the old importance's share, 0.5 by default", least=0, most=1)

    def weight(self) -> float:
        return float(self.params["lambda"])

    def end_stage(self, ctx: StageContext) -> None:
        found = sensitivities(ctx.model, OwnRows(ctx, self.name).batches(self.params["samples"]), ctx.parameters())
        alpha = float(self.params["alpha"])
        for name, p in ctx.parameters().items():
            self.bring(name, p)
            old = self.importance.get(name)
            self.importance[name] = found[name] if old is None else alpha * old + (1 - alpha) * found[name]
            self.anchor[name] = p.detach().clone()


class _Norm(Objective):
    """The squared norm of one row's user vector."""

    def of(self, batch: Interaction) -> torch.Tensor:
        """Returns the squares of the vector's entries."""
        return user_vectors(self.model, batch).square()


def sensitivities(
    model: nn.Module, batches: Iterable[Interaction], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the mean over all rows of ``|d ||f(row)||^2 / d theta|``, in eval mode, leaving no trace."""
    return mean_of_gradients(_Norm(model), batches, parameters, torch.abs)
