"""Test-time correction by a memory of recent errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_number
from recbole_cl.strategy.parts.error_memory import ErrorMemory
from recbole_cl.strategy.parts.histories import full_softmax, item_logits, known_targets, looking
from recbole_cl.strategy.parts.outputs import check_user_vectors, user_vectors
from recbole_cl.strategy.parts.rows import OwnRows
from recbole_cl.strategy.reloop import gives_probabilities
from recbole_cl.stream.stage import Targets

CHUNK = 256
"""Targets written at a time."""
TINY = 1e-12
"""Least probability that a correction leaves, so that what it pushes down can still be ranked."""


@strategies.register()
class ReLoop2(Strategy):
    """Adds to a prediction the mean error of the base on similar, recently observed pairs. Nothing is trained.

    Zhu et al. 2023, "ReLoop2: building self-adaptive recommendation models via responsive error compensation loop"
    (KDD). With an error memory of hashed buckets (:class:`~recbole_cl.strategy.parts.error_memory.ErrorMemory`)::

        y = clip(y_base + lambda * y_err),    y_err = mean over K arrays of the mean of (label - y_base) in the bucket

    The memory is emptied when the base begins to change, and filled when a stage ends, with the errors of the
    finished base on the stage's validation targets (training targets where it has none, or as ``observed`` says).
    So it holds nothing of a test target. It is not refreshed while test targets are scored: evaluation here is pure.

    Read were the abstract and summaries of the paper, not its text; the equation is from this project's notes. Our
    reading of what it leaves open, by what a model's scores are:

    - probabilities of a label (pointwise models): y_base is ``predict``. Errors are those of observed rows and
      of negatives drawn as in training. Vectors are the model's embeddings of the user and of the item.
    - a softmax over items (sequential models with ``loss_type: CE``): y_base is the softmax, the label one-hot; every
      target writes its error on every known item, so that the mean error of a bucket is on the scale of y_base.
      Vectors are the history's and the item's. Scores go back to logits, so lambda 0 leaves every bit.

    It is no replay: it keeps no rows and composes with every strategy.
    """

    prefix = "reloop2"
    defaults = {"lambda": 0.5, "arrays": 8, "bits": 10, "observed": "valid"}
    neutral = {"lambda": 0.0}
    needs = frozenset({"batch_rows"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        # The memory is made here, so its size is checked here: 40 bits would ask for terabytes.
        check_number(self, "arrays", "the default is 8", least=1, most=64)
        check_number(self, "bits", "an array has 2^bits buckets; the default is 10", least=2, most=20)
        self.memory = ErrorMemory(int(self.params["arrays"]), int(self.params["bits"]))

    def check(self, config: Any, model: nn.Module) -> None:
        check_number(self, "lambda", "it is the share of the remembered error that is added, 0.5 by default", least=0)
        if self.params["observed"] not in ("valid", "train", "both"):
            raise ConfigError(f"reloop2_observed: {self.params['observed']!r} is none of valid, train, both")
        if full_softmax(model):
            check_user_vectors(self.name, config, model)
            if isinstance(getattr(model, "item_embedding", None), nn.Embedding):
                return
        elif gives_probabilities(model) and model.type != ModelType.SEQUENTIAL:
            fields = (config["USER_ID_FIELD"], config["ITEM_ID_FIELD"])
            if all(_tables(model, side, field) for side, field in zip(("user", "item"), fields, strict=True)):
                return
        raise ConfigError(
            f"strategy: {self.name} cannot serve the model {config['model']}: it corrects probabilities, of a label "
            f"(pointwise models with embeddings of users and items: NeuMF, FM, DeepFM) or of the next item (sequential "
            f"models with loss_type: CE and an item_embedding: SASRec, GRU4Rec); use one of them"
        )

    def begin_stage(self, ctx: StageContext) -> None:
        """Empties the memory: the base of its errors begins to change."""
        self.memory.clear()

    def end_stage(self, ctx: StageContext) -> None:
        self.memory.clear()
        wanted = self.params["observed"]
        valid, train = known_targets(ctx, ctx.stage.valid), ctx.stage.train
        observed = {"valid": valid if len(valid) else train, "train": train, "both": Targets.concat([train, valid])}
        targets = observed[wanted][np.argsort(observed[wanted].position, kind="stable")]
        own = None if full_softmax(ctx.model) else OwnRows(ctx, self.name)
        with looking(ctx.model):
            for at in _chunks(len(targets)):
                rows = ctx.batcher.rows(targets[at], collate=own is None)
                if own is None:
                    rows = rows.to(ctx.device)
                    error = -torch.softmax(item_logits(ctx.model, rows, ctx.stage.n_items), dim=-1)
                    error[torch.arange(len(rows)), rows["_label"] - 1] += 1
                    self.memory.write_grid(self._users(ctx, rows), self._items(ctx)[1:], error)
                else:
                    rows = own.complete(rows).to(ctx.device)
                    error = rows[ctx.config["LABEL_FIELD"]] - ctx.model.predict(rows).flatten()
                    items = self._items(ctx)[rows[ctx.batcher.iid].cpu()]
                    self.memory.write(self._users(ctx, rows), items, error)

    def adjust_scores(self, ctx: StageContext, batch: Interaction, scores: torch.Tensor) -> torch.Tensor:
        users, items = self._users(ctx, batch), self._items(ctx)
        if scores.dim() == 1:
            error = self.memory.read(users, items[batch[ctx.batcher.iid].cpu()])
        else:
            error = self.memory.read_grid(users, items[: scores.size(1)])
        change = float(self.params["lambda"]) * error.to(scores)
        real = torch.isfinite(scores)
        if not full_softmax(ctx.model):
            return torch.where(real, (scores + change).clamp(0, 1), scores)
        real[:, 0] = False  # padding
        partition = torch.where(real, scores, -torch.inf).logsumexp(dim=1, keepdim=True)
        base = torch.where(real, scores - partition, -torch.inf).exp().clamp(max=1)
        new = torch.maximum((base + change).clamp(max=1), base.clamp(max=TINY))
        return torch.where(real & (new != base), partition + new.log(), scores)

    def _users(self, ctx: StageContext, rows: Interaction) -> torch.Tensor:
        """Returns the codes of the rows' users (histories), shape ``[B, K]``."""
        if full_softmax(ctx.model):
            vectors = user_vectors(ctx.model, rows)
        else:
            vectors = _vectors(ctx.model, "user", ctx.batcher.uid, rows[ctx.batcher.uid])
        return self.memory.codes(vectors, "user", ctx.config["seed"])

    def _items(self, ctx: StageContext) -> torch.Tensor:
        """Returns the codes of all items, shape ``[n_items, K]``."""
        if full_softmax(ctx.model):
            vectors = ctx.model.item_embedding.weight[: ctx.stage.n_items]
        else:
            ids = torch.arange(ctx.stage.n_items, device=ctx.device)
            vectors = _vectors(ctx.model, "item", ctx.batcher.iid, ids)
        return self.memory.codes(vectors, "item", ctx.config["seed"])

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.memory.sums, "counts": self.memory.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "sums", "counts")
        self.memory.sums, self.memory.counts = state["sums"].clone(), state["counts"].clone()


def _tables(model: Any, side: str, field: str) -> list[tuple[nn.Embedding, int]]:
    """Returns the model's embedding tables of users or of items, each with the row of id 0."""
    context = getattr(model, "token_embedding_table", None)
    if context is not None and field in model.token_field_names:
        return [(context.embedding, int(context.offsets[model.token_field_names.index(field)]))]
    size = getattr(model, f"n_{side}s", None)
    named = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and side in name]
    return [(m, 0) for m in named if m.num_embeddings == size]


def _vectors(model: Any, side: str, field: str, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([table.weight[ids + first] for table, first in _tables(model, side, field)], dim=1)


def _chunks(size: int) -> Iterator[np.ndarray]:
    for start in range(0, size, CHUNK):
        yield np.arange(start, min(start + CHUNK, size))
