"""Distillation of users, as strongly as each user's interests have stayed the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.rng import torch_generator
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_number, check_strength
from recbole_cl.strategy.parts.imitation import ImitationWeights
from recbole_cl.strategy.parts.outputs import has_vectors, second_forward, vectors


@strategies.register()
class PersonalizedImitation(Strategy):
    """Holds users' vectors near the old model's, with a weight for each user that is learnt from the user's shift.

    Wang et al. 2023, "Structure aware incremental learning with personalized imitation weights for recommender
    systems" (SAIL-PIW), its weights. With K item centres ``c_k`` and maps ``W_k`` (d x d)::

        g_u = softmax_k(c_k W_k e_u)                          a user's distribution over centres, shape [K]
        s_u = (g_u_old - g_u)^2                               elementwise
        w_u = softplus(MLP(s_u)) / mean over the batch's users
        L(theta) + lambda * mean_u w_u |e_u - e_u_old|^2 + cluster * KL(P || Q)

    The last term is DEC (Xie et al. 2016) over the batch's items: ``q_ik ~ 1 / (1 + |e_i - c_k|^2)``,
    ``p_ik ~ q_ik^2 / sum_i q_ik`` held fixed, a mean over items. The users are the different users of a batch that the
    old model knows; ``e`` is the embedding (BPR) or the propagated row (LightGCN and its kin).

    Our reading where the text leaves it open: the paper weights the user side of several distillations, here it is the
    squared distance; both distributions use today's centres and maps, so a user who did not move has s = 0; e is a
    constant in w and in DEC, so the model can neither buy a small weight by moving a user nor is drawn into clusters.
    Centres, maps and MLP are trained with the model by its optimiser, from the first stage on.

    Known mistakes elsewhere: weights without normalisation, which training sends to zero.
    """

    prefix = "piw"
    defaults = {"lambda": 1.0, "centers": 10, "cluster": 0.1, "hidden": 16}
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient", "batch_rows", "pairwise"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.imitation = ImitationWeights()

    def check(self, config: Any, model: nn.Module) -> None:
        if not has_vectors(model):
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']}: it needs vectors of users and items, "
                f"by get_user_embedding(user) and get_item_embedding(item) or by a forward() of all; use BPR, LightGCN "
                f"or another strategy (LwF)"
            )
        self.imitation.check(self.prefix, self.params)
        check_strength(self)
        check_number(self, "cluster", "it weighs the loss that trains the centres; the default is 0.1", least=0)

    def prepare_model(self, ctx: StageContext) -> None:
        """Makes its own parameters once; they do not depend on the numbers of users and items."""
        if self.imitation.own:
            return
        self.check(ctx.config, ctx.model)  # the run checks later
        first = torch.zeros(1, dtype=torch.int64, device=ctx.device)
        with second_forward(ctx, f"{self.name}/size"), torch.no_grad():
            d = vectors(ctx.model, first, first)[0].size(1)
        generator = torch_generator(ctx.config["seed"], 0, self.name)
        self.imitation.make(int(self.params["centers"]), int(self.params["hidden"]), d, generator, ctx.device)

    def weights(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Returns w, shape ``[B]``, with mean 1, of vectors ``[B, d]``."""
        return self.imitation.weights(new, old)

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        model, teacher = ctx.model, ctx.previous_model
        items, users = torch.unique(batch[ctx.batcher.iid]), torch.unique(batch[ctx.batcher.uid])
        if teacher is not None:
            users = users[users < ctx.stream.stages[ctx.index - 1].n_users]
        with second_forward(ctx, self.name), torch.set_grad_enabled(teacher is not None):
            new, item_vectors = vectors(model, users, items)
        clusters = self.imitation.clustering(item_vectors.detach())
        terms = {f"{self.name}/clusters": float(self.params["cluster"]) * clusters}
        if teacher is None or not len(users):
            return terms
        with torch.no_grad():
            old = vectors(teacher, users, users[:0])[0]
        distance = (new - old).square().sum(-1)
        strength = float(self.params["lambda"])
        terms[f"{self.name}/distillation"] = strength * (self.weights(new.detach(), old) * distance).mean()
        return terms

    def parameters(self) -> list[nn.Parameter]:
        return list(self.imitation.own.values())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.imitation.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.imitation.load_state_dict(state)
