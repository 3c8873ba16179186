"""Self-correction: no larger errors than those of the model before."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.utils import InputType, ModelType
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.outputs import second_forward
from recbole_cl.strategy.parts.teacher import TeacherRows


def gives_probabilities(model: nn.Module) -> bool:
    """Tells whether ``predict`` gives the probability of a row's label, trained by binary cross-entropy."""
    losses = [m for m in model.children() if isinstance(m, nn.BCEWithLogitsLoss | nn.BCELoss)]
    has_sigmoid = isinstance(getattr(model, "sigmoid", None), nn.Sigmoid) and len(losses) == 1
    kinds = (ModelType.GENERAL, ModelType.CONTEXT, ModelType.SEQUENTIAL)
    return (
        has_sigmoid
        and getattr(model, "type", None) in kinds
        and getattr(model, "input_type", None) == InputType.POINTWISE
    )


@strategies.register()
class ReLoop(Strategy):
    """Trades a share of the cross-entropy for a penalty on rows where the model errs more than the one before did.

    Cai et al. 2022, "ReLoop: a self-correction continual learning loop for recommender systems" (SIGIR). With labels y,
    probabilities p and those of the frozen model of the stage before, p_last, a mean over the batch's rows::

        (1 - alpha) BCE + alpha R,    R = y max(p_last - p, 0) + (1 - y) max(p - p_last, 0)

    A strategy adds terms, so here ``alpha R`` and ``-alpha BCE`` come on top of the data loss. They run the model a
    second time with dropout of its own (``-alpha BCE`` matches the data loss in expectation), and regularisers in a
    model's data loss keep their weight. Rows with a user or item that the old model does not know have no p_last; they
    keep their whole cross-entropy.

    Read were the abstract and summaries of the paper, not its text; the equation is from this project's notes.

    It keeps a model, no exemplars, and composes with replay: replayed rows count as rows of the batch.

    Known mistakes elsewhere: p_last from a reference to the model in training (R is then 0 for ever); R of labels and
    of scores that are no probabilities.
    """

    prefix = "reloop"
    defaults = {"alpha": 0.2}
    neutral = {"alpha": 0.0}
    needs = frozenset({"gradient", "batch_rows", "pointwise"})

    def check(self, config: Any, model: nn.Module) -> None:
        if not 0 <= self.params["alpha"] <= 1:
            raise ConfigError(
                f"reloop_alpha: {self.params['alpha']} is not between 0 and 1, the share of the correction"
            )
        if not gives_probabilities(model):
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']}: it compares probabilities, and the "
                f"model has no module named sigmoid with one binary cross-entropy; use a pointwise model (NeuMF, DMF, "
                f"FM, DeepFM, DIN) or another strategy (LwF)"
            )

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        teacher = ctx.previous_model
        if teacher is None:
            return {}
        rows, read = TeacherRows(ctx, teacher).rows(batch, items=True)
        if not len(rows):
            return {}
        with torch.no_grad():
            last = teacher.predict(read).flatten()  # type: ignore[operator]
        with second_forward(ctx, self.name):
            p = ctx.model.predict(rows).flatten()
        label, alpha = rows[ctx.config["LABEL_FIELD"]].to(p.dtype), float(self.params["alpha"])
        worse = label * (last - p).clamp(min=0) + (1 - label) * (p - last).clamp(min=0)
        entropy = F.binary_cross_entropy(p, label, reduction="sum")
        share = alpha / len(batch[ctx.batcher.uid])
        return {f"{self.name}/correction": share * worse.sum(), f"{self.name}/entropy": -share * entropy}
