"""Learning without forgetting."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import BPR
from recbole.utils import InputType, ModelType
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import contract
from recbole_cl.model.fused import distillation, divergence
from recbole_cl.model.task_model import TaskModel
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_strength
from recbole_cl.strategy.parts.outputs import second_forward
from recbole_cl.strategy.parts.teacher import TeacherRows
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
    model whose ``forward`` takes no user knows every user. The old model reads in eval mode. On all positions the new
    outputs are those of the data loss, as in the paper; elsewhere the new model runs a second time, with dropout of
    its own.

    Known mistakes elsewhere: a softmax over new items too, for which the old model has no or random scores; a teacher
    that is a reference to the model in training; T without T^2.
    """

    prefix = "lwf"
    base_is_finetune = True
    defaults = {"lambda": 1.0, "temperature": 2.0}
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient", "batch_rows"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self._known: TeacherRows | None = None  # made anew from the context where a run is resumed: no state

    def check(self, config: Any, model: nn.Module) -> None:
        check_strength(self)
        if isinstance(model, TaskModel):
            instead = (
                "FineTune, under which its answers to earlier tasks stay as they are"
                if contract(model).builds_on_stages
                else "TERACON with the model SoftMask, which distils answers to earlier tasks, EWC, CONURE or FineAll"
            )
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']}: it holds on to what the model of the "
                f"stage before answers to the rows of this stage, whose task that model has not learnt; use {instead}"
            )
        temperature = self.params["temperature"]
        if not temperature > 0:
            raise ConfigError(f"lwf_temperature: {temperature} is not positive; the usual value is 2")
        pointwise = config["MODEL_INPUT_TYPE"] == InputType.POINTWISE
        if (
            not _full_softmax(contract(model).causal_part())
            and pointwise
            and not isinstance(getattr(model, "sigmoid", None), nn.Sigmoid)
        ):
            raise ConfigError(
                f"strategy: {self.name} cannot serve the model {config['model']}: it trains on points, and without a "
                f"module named sigmoid it cannot be told whether predict gives logits or probabilities; use EWC, SI, a "
                f"replay strategy or another model"
            )

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        teacher = ctx.previous_model
        if teacher is None:
            return {}
        if self._known is None or self._known.ctx is not ctx or self._known.loader is not ctx.loader:
            self._known = TeacherRows(ctx, teacher)
        known, encoder = self._known, contract(ctx.model).causal_part()
        distil = self.positions if TARGETS in batch else self.softmax if _full_softmax(encoder) else self.pairs
        with contextlib.nullcontext() if _draws_nothing(ctx.model, batch) else second_forward(ctx, self.name):
            found = distil(ctx, known, batch)
        return {} if found is None else {f"{self.name}/distillation": float(self.params["lambda"]) * found}

    def positions(self, ctx: StageContext, known: TeacherRows, batch: Interaction) -> torch.Tensor | None:
        """Returns the term over all positions that the teacher can answer; ``None`` without one."""
        model, teacher, supervised = contract(ctx.model).causal_part(), known.encoder, batch[TARGETS] > 0
        old, at = known.positions(batch, supervised)
        if not len(old):
            return None
        outputs = vars(batch).get("outputs")
        if outputs is None:  # the loss was another's, or is taken of shares of the batch
            new = model.outputs(batch[model.ITEM_SEQ], at)
            added = contract(ctx.model).added_at(batch, at)
            new = new if added is None else new + added
        else:
            new = outputs if len(outputs) == len(old) else outputs[at[supervised]]
        if _full_softmax(model):
            items = slice(1, known.n_items)  # row 0 is padding
            tables = model.item_embedding.weight[items], teacher.item_embedding.weight[items]
            return distillation(new, tables[0], old, tables[1], float(self.params["temperature"]))
        pairs = torch.stack([batch[TARGETS], batch[model.config_neg_prefix + TARGETS]], dim=-1)[at]
        return _agreement(new, model.item_embedding, old, teacher.item_embedding, pairs, pairs < known.n_items)

    def softmax(self, ctx: StageContext, known: TeacherRows, batch: Interaction) -> torch.Tensor | None:
        """Returns the mean of T^2 KL over the rows that the teacher can answer; ``None`` without one."""
        rows, read = known.rows(batch)
        if not len(rows):
            return None
        with torch.no_grad():
            old = known.teacher.full_sort_predict(read).view(len(rows), -1)[:, 1 : known.n_items]
        new = ctx.model.full_sort_predict(rows).view(len(rows), -1)[:, 1 : known.n_items]
        return divergence(new, old, float(self.params["temperature"]))

    def pairs(self, ctx: StageContext, known: TeacherRows, batch: Interaction) -> torch.Tensor | None:
        """Returns the mean BCE between scores over the batch's pairs that the teacher knows; ``None`` without one."""
        model, teacher = ctx.model, known.teacher
        if _is_bpr(model):  # the general way looks a user up for each of both items
            pairs, users = torch.stack([batch[model.ITEM_ID], batch[model.NEG_ITEM_ID]], dim=-1), batch[model.USER_ID]
            at = (pairs < known.n_items) & (users < known.n_users).unsqueeze(1)
            index = at.any(dim=1).nonzero().squeeze(1)
            pairs, users, at = pairs[index], users[index], at[index]
            new, old = model.user_embedding(users), teacher.user_embedding(users)
            return _agreement(new, model.item_embedding, old, teacher.item_embedding, pairs, at)
        rows, read = known.rows(_both_items(ctx, batch), items=True)
        if not len(rows):
            return None
        with torch.no_grad():
            old = teacher.predict(read)
        new = model.predict(rows)
        if ctx.config["MODEL_INPUT_TYPE"] == InputType.POINTWISE:  # RecBole's predict gives probabilities
            new, old = (torch.logit(p.float(), eps=1e-6) for p in (new, old))
        return _bce(new, old)


def _full_softmax(model: nn.Module) -> bool:
    return getattr(model, "type", None) == ModelType.SEQUENTIAL and getattr(model, "loss_type", None) == "CE"


def _is_bpr(model: nn.Module) -> bool:
    return all(getattr(type(model), name, None) is getattr(BPR, name) for name in ("forward", "predict"))


def _draws_nothing(model: nn.Module, batch: Interaction) -> bool:
    """Tells whether no part of the model with dropout runs once more: products of look-ups, kept outputs."""
    return "outputs" in vars(batch) if TARGETS in batch else _is_bpr(model)


def _agreement(
    new: torch.Tensor, new_items: nn.Module, old: torch.Tensor, old_items: nn.Module, pairs: torch.Tensor,
    at: torch.Tensor,
) -> torch.Tensor | None:  # fmt: skip
    """Returns the mean BCE between the products of vectors ``[N, d]`` with two items each where ``at`` ``[N, 2]``."""
    new = (new.unsqueeze(1) * new_items(pairs)).sum(-1)[at]
    with torch.no_grad():
        old = (old.unsqueeze(1) * old_items(pairs * at)).sum(-1)[at]
    return _bce(new, old) if len(new) else None


def _bce(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(new.flatten(), torch.sigmoid(old.detach().flatten()))


def _both_items(ctx: StageContext, batch: Interaction) -> Interaction:
    """Returns the rows with their own items, followed by the same with their negatives where there are some."""
    uid, prefix = ctx.batcher.uid, ctx.config["NEG_PREFIX"]
    own = {name: c for name, c in batch.interaction.items() if len(c) == len(batch[uid])}  # triples have other lengths
    if prefix + ctx.batcher.iid not in own:
        return Interaction(own)
    return Interaction({name: torch.cat([c, own.get(prefix + name, c)]) for name, c in own.items()})
