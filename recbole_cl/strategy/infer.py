"""Replay of the samples with the largest influence on what is to be kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.er_random import ERRandom
from recbole_cl.strategy.parts.checks import check_loss, check_number, check_samples
from recbole_cl.strategy.parts.exemplars import build_rows, join_rows
from recbole_cl.strategy.parts.influence import mean_gradient, products


@strategies.register()
class INFER(ERRandom):
    """Keeps the exemplars of which one training step lowers the loss on the past the most, and replays them.

    Our reading of Zhang et al. 2024, "Influential exemplar replay for incremental learning in recommender systems"
    (AAAI). Its equations are not public; read were the abstract and summaries: exemplars are chosen by influence
    functions, and a variant (INFERONCE) estimates it in one step, without the inverse Hessian. So, with reference
    samples R, half of them old exemplars and half new training targets, and the learning rate eta::

        score(z) = eta * g_R . g(z)        g(z): gradient of the loss of z,  g_R: mean of those of R

    This is by how much a step on z lowers the mean loss on R, to first order
    (:mod:`recbole_cl.strategy.parts.influence`). At the end of a stage, at its final weights and in eval mode, the old
    exemplars and ``samples`` of the stage's targets are scored; the ``memory_size`` best stay. Replay is ERRandom's:
    uniform draws join every batch. For models trained on all positions a sample is a window.

    Known risk: the best are alike. Scores of all targets (``samples: ~``) cost a forward and backward pass over the
    stage.
    """

    prefix = "infer"
    defaults = {"memory_size": 1000, "batch_size": 256, "samples": 2000, "reference": 500}

    def check(self, config: Any, model: nn.Module) -> None:
        super().check(config, model)
        check_samples(self)
        check_number(self, "reference", "the default is 500 samples, half of them old exemplars", least=1)
        check_loss(self.name, config, model)
        if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']}: its loss needs triples beside the "
                f"rows, so a row alone has no gradient; use ERRandom, ERFreq or another model"
            )

    def end_stage(self, ctx: StageContext) -> None:
        self.memory.check(ctx)
        own, generator = self.own_rows(ctx), ctx.generator(f"{self.name}/memory")
        limit = own.size if self.params["samples"] is None else min(own.size, int(self.params["samples"]))
        chosen = np.sort(generator.choice(own.size, limit, replace=False))
        if not limit:
            return
        rows = build_rows(ctx, own.units, chosen)
        count = int(self.params["reference"]) // 2
        new = _some(rows, generator.permutation(limit)[: max(count, 1)])
        rows = join_rows(self.memory.rows(np.arange(len(self.memory))), rows) if len(self.memory) else rows
        reference = join_rows(self.memory.sample(count, generator), new) if len(self.memory) else new
        scores = ctx.learning_rate * self.scores(ctx, rows, reference)
        best = np.sort(np.argsort(-scores, kind="stable")[: self.memory.size])
        self.memory.hold(ctx, -scores[best], _some(rows, best))

    def scores(self, ctx: StageContext, rows: Interaction, reference: Interaction) -> np.ndarray:
        """Returns ``g_R . g(z)`` of each row, shape ``[N]``; both without negatives, which are drawn here.

        A row with several negatives, or a pointwise row and its negatives, is one sample: its products are added.
        """
        own, parameters = self.own_rows(ctx), ctx.parameters()
        reference, complete = (own.complete(Interaction(dict(part.interaction))) for part in (reference, rows))
        direction = mean_gradient(ctx.model, reference, parameters)
        found = products(ctx.model, complete, direction, parameters)
        return found.view(-1, len(rows)).sum(dim=0).double().cpu().numpy()


def _some(rows: Interaction, index: np.ndarray) -> Interaction:
    chosen = torch.from_numpy(index)
    return Interaction({name: column[chosen] for name, column in rows.interaction.items()})
