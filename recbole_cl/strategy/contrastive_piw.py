"""Contrastive distillation of neighbourhoods, as strongly as each user's interests have stayed the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.registry import strategies
from recbole_cl.rng import torch_generator
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.contrastive import Contrastive
from recbole_cl.strategy.parts.checks import check_number
from recbole_cl.strategy.parts.imitation import ImitationWeights
from recbole_cl.strategy.parts.outputs import Towers, final, layers


@strategies.register()
class ContrastivePIW(Contrastive):
    """:class:`Contrastive` with the learnt weights of PersonalizedImitation on its user side ("Contrastive + PIW").

    Wang et al. 2023, "Structure aware incremental learning with personalized imitation weights for recommender
    systems" (SAIL-PIW), on LWC-KD::

        L(theta) + lambda * mean over layers of ( mean_u w_u l_u + mean_i l_i ) + cluster * KL(P || Q)

    The weights and KL are those of :class:`~recbole_cl.strategy.parts.imitation.ImitationWeights`, over the final
    vectors (the mean of the layers), one weight a user for all layers, with mean 1 over a batch's users. Vectors are
    constants in both, so the model can neither buy a small weight by moving a user nor is drawn into clusters. Centres,
    maps and network are trained with the model by its optimiser, from the first stage on.

    Our reading: the public code of CCD (Models/LWCKD.py) has weights and centres of their own in each layer, the paper
    speaks of a user's weight; items are not weighted in either.
    """

    prefix = "contrastive_piw"
    base_is_finetune = False  # its weights of users learn from the first stage on
    defaults = {**Contrastive.defaults, "centers": 10, "cluster": 0.1, "hidden": 16}

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.imitation = ImitationWeights()

    def check(self, config: Any, model: nn.Module) -> None:
        super().check(config, model)
        self.imitation.check(self.prefix, self.params)
        check_number(self, "cluster", "it weighs the loss that trains the centres; the default is 0.1", least=0)

    def prepare_model(self, ctx: StageContext) -> None:
        """Makes its own parameters once; they do not depend on the numbers of users and items."""
        if self.imitation.own:
            return
        self.check(ctx.config, ctx.model)  # the run checks later
        d = ctx.model.user_embedding.weight.size(1)
        generator = torch_generator(ctx.config["seed"], 0, self.name)
        self.imitation.make(int(self.params["centers"]), int(self.params["hidden"]), d, generator, ctx.device)

    def weigh(self, ctx: StageContext, users: torch.Tensor, new: list[Towers], old: list[Towers]) -> torch.Tensor:
        with torch.no_grad():
            now, before = final(new)[0][users], final(old)[0][users]
        return self.imitation.weights(now, before)

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        new, teacher = layers(ctx.model), ctx.previous_model
        with torch.no_grad():
            items = final(new)[1][torch.unique(batch[ctx.batcher.iid])]
        terms = {f"{self.name}/clusters": float(self.params["cluster"]) * self.imitation.clustering(items)}
        return terms if teacher is None else terms | self.distil(ctx, batch, new, teacher)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.imitation.own.values())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.imitation.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.imitation.load_state_dict(state)
