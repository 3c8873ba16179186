"""Learning without forgetting."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.utils import InputType, ModelType
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import StageContext, Strategy
from recbole_cl.strategy.outputs import second_forward
from recbole_cl.strategy.teacher import TeacherRows
from recbole_cl.stream.batch import TARGETS


@strategies.register()
class LwF(Strategy):
    """Distils the frozen model of the stage before into the new one, on the data of the new stage.

    Li and Hoiem 2016, "Learning without forgetting", eq. 2 and 3. Under a full softmax (sequential models with
    ``loss_type: CE``), at every training position, with logits z over the items that the old model knows::

        L(theta) + lambda * T^2 * KL(softmax(z_old / T) || softmax(z / T)),      T = 2

    The factor T^2 keeps the size of the gradient (Hinton et al. 2015); KL differs from the paper's cross-entropy by a
    constant. Under pairwise and pointwise losses, where logits have no common scale over items, on the batch's own
    positive and negative pairs, without a temperature::

        L(theta) + lambda * mean over pairs of BCE(sigmoid(s), sigmoid(s_old))

    What the old model does not know is left out: users, items of the softmax and of pairs, and items of the histories
    that the old model reads (closed up, as in evaluation; a history with nothing left teaches nothing). A sequential
    model whose ``forward`` takes no user knows every user. The old model reads in eval mode, the new one runs a second
    time with dropout of its own.

    Known mistakes elsewhere: a softmax over new items too, for which the old model has no or random scores; a teacher
    that is a reference to the model in training; T without T^2.
    """

    prefix = "lwf"
    defaults = {"lambda": 1.0, "temperature": 2.0}
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient", "batch_rows"})

    def check(self, config: Any, model: nn.Module) -> None:
        temperature = self.params["temperature"]
        if not temperature > 0:
            raise ConfigError(f"lwf_temperature: {temperature} is not positive; the usual value is 2")
        pointwise = config["MODEL_INPUT_TYPE"] == InputType.POINTWISE
        if not _full_softmax(model) and pointwise and not isinstance(getattr(model, "sigmoid", None), nn.Sigmoid):
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']}: it trains on points, and without a "
                f"module named sigmoid it cannot be told whether predict gives logits or probabilities; use EWC, SI, a "
                f"replay strategy or another model"
            )

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        teacher = ctx.previous_model
        if teacher is None:
            return {}
        with second_forward(ctx, self.name):
            distil = self.softmax if _full_softmax(ctx.model) else self.pairs
            found = distil(ctx, teacher, batch)
        return {} if found is None else {f"{self.name}/distillation": float(self.params["lambda"]) * found}

    def softmax(self, ctx: StageContext, teacher: Any, batch: Interaction) -> torch.Tensor | None:
        """Returns the mean of T^2 KL over the positions that the teacher can answer; ``None`` without one."""
        model, known = ctx.model, TeacherRows(ctx, teacher)
        if TARGETS in batch:
            new, old, _ = known.positions(model, batch, batch[TARGETS] > 0)
            items = slice(1, known.n_items)  # row 0 is padding
            new, old = new @ model.item_embedding.weight[items].T, old @ teacher.item_embedding.weight[items].T
        else:
            rows, read = known.rows(batch)
            if not len(rows):
                return None
            with torch.no_grad():
                old = teacher.full_sort_predict(read).view(len(rows), -1)[:, 1 : known.n_items]
            new = model.full_sort_predict(rows).view(len(rows), -1)[:, 1 : known.n_items]
        if not len(new):
            return None
        t = float(self.params["temperature"])
        logs = F.log_softmax(new / t, dim=-1), F.log_softmax(old.detach() / t, dim=-1)
        return t * t * F.kl_div(*logs, reduction="batchmean", log_target=True)

    def pairs(self, ctx: StageContext, teacher: Any, batch: Interaction) -> torch.Tensor | None:
        """Returns the mean BCE between scores over the batch's pairs that the teacher knows; ``None`` without one."""
        model, known = ctx.model, TeacherRows(ctx, teacher)
        if TARGETS in batch:
            both = torch.stack([batch[TARGETS], batch[model.config_neg_prefix + TARGETS]], dim=-1)  # [B, L, 2]
            new, old, at = known.positions(model, batch, batch[TARGETS] > 0)
            pairs = both[at]
            new = (new.unsqueeze(1) * model.item_embedding(pairs)).sum(-1)
            known_pairs = pairs < known.n_items
            old = (old.unsqueeze(1) * teacher.item_embedding(pairs * known_pairs)).sum(-1)
            new, old = new[known_pairs], old[known_pairs]
        else:
            rows, read = known.rows(_both_items(ctx, batch), items=True)
            if not len(rows):
                return None
            with torch.no_grad():
                old = teacher.predict(read)
            new = model.predict(rows)
            if ctx.config["MODEL_INPUT_TYPE"] == InputType.POINTWISE:  # RecBole's predict gives probabilities
                new, old = (torch.logit(p.float(), eps=1e-6) for p in (new, old))
        if not len(new):
            return None
        return F.binary_cross_entropy_with_logits(new.flatten(), torch.sigmoid(old.detach().flatten()))


def _full_softmax(model: nn.Module) -> bool:
    return getattr(model, "type", None) == ModelType.SEQUENTIAL and getattr(model, "loss_type", None) == "CE"


def _both_items(ctx: StageContext, batch: Interaction) -> Interaction:
    """Returns the rows with their own items, followed by the same with their negatives where there are some."""
    uid, prefix = ctx.batcher.uid, ctx.config["NEG_PREFIX"]
    own = {name: c for name, c in batch.interaction.items() if len(c) == len(batch[uid])}  # triples have other lengths
    if prefix + ctx.batcher.iid not in own:
        return Interaction(own)
    return Interaction({name: torch.cat([c, own.get(prefix + name, c)]) for name, c in own.items()})
