"""Negatives of training rows: drawn among what a stage knows, laid out as RecBole's loaders lay them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import InputType

from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.sampler import NegativeSampler
from recbole_cl.tree import answering


class Negatives:
    """Adds RecBole's negatives to rows: ``neg_item_id`` for pairwise, rows of label 0 for pointwise models.

    Args:
        batcher: Knows columns and features.
        config: ``train_neg_sample_args`` and ``MODEL_INPUT_TYPE`` are read.
        sampler: Draws the items; ``None`` where the configuration asks for none.
        repeatable: Exclude only a row's own target, not everything its user had (sequential models in RecBole).
    """

    def __init__(self, batcher: Batcher, config: Any, sampler: NegativeSampler | None, repeatable: bool) -> None:
        args = config["train_neg_sample_args"]
        wanted = sampler is not None and args["distribution"] != "none" and args["sample_num"] != "none"
        self.sampler = sampler if wanted else None
        self.batcher, self.config, self.repeatable = batcher, config, repeatable
        self.num: int = args["sample_num"] if wanted else 0
        self.dynamic = bool(args.get("dynamic", False)) and wanted
        self.candidates: int = args.get("candidate_num", 0)
        self.pairwise = config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE
        self.times = 1 if not wanted else (self.num if self.pairwise else 1 + self.num)
        self.model: Any = None

    def __call__(self, rows: Interaction) -> Interaction:
        """Returns the rows with negatives, laid out as RecBole's loaders do."""
        if self.sampler is None:
            return rows
        users = rows[self.batcher.uid].numpy()
        positives = rows[self.batcher.iid].numpy()
        num = self.num * (self.candidates if self.dynamic else 1)
        if self.repeatable:
            drawn = self.sampler.sample_repeatable(num, positives)
        else:
            drawn = self.sampler.sample(users, num, positives)
        ids = torch.from_numpy(drawn)
        if self.dynamic:
            ids = self._hardest(rows, ids)
        return self._pairwise(rows, ids) if self.pairwise else self._pointwise(rows, ids)

    def _hardest(self, rows: Interaction, ids: torch.Tensor) -> torch.Tensor:
        """Keeps the best scored of ``candidate_num`` candidates (RecBole's dynamic negative sampling)."""
        model = self.model
        repeated = rows.repeat(self.num * self.candidates)
        repeated.update(Interaction({self.batcher.iid: ids}))
        with torch.no_grad(), answering(model):
            scores = model.predict(repeated.to(model.device)).cpu().view(self.candidates, -1)
        return ids.view(self.candidates, -1).gather(0, scores.argmax(dim=0, keepdim=True)).flatten()

    def _pairwise(self, rows: Interaction, ids: torch.Tensor) -> Interaction:
        prefix, iid = self.config["NEG_PREFIX"], self.batcher.iid
        out = rows.repeat(self.times) if self.times > 1 else rows
        negative = self.batcher.join(Interaction({iid: ids}))
        for name, column in negative.interaction.items():
            out.interaction[prefix + name] = column
        return out

    def _pointwise(self, rows: Interaction, ids: torch.Tensor) -> Interaction:
        n = len(rows)
        out = rows.repeat(self.times)
        out.interaction[self.batcher.iid][n:] = ids
        out = self.batcher.join(out)
        labels = torch.zeros(n * self.times)
        labels[:n] = 1.0
        out.interaction[self.config["LABEL_FIELD"]] = labels
        return out


def make_sampler(
    config: Any, stream: Any, stage: int, n_items: int, generator: np.random.Generator
) -> NegativeSampler | None:
    """Returns a sampler of negatives that knows the training interactions up to ``stage``, or ``None`` without any.

    Args:
        config: ``train_neg_sample_args`` is read.
        stream: The stream.
        stage: The trained stage.
        n_items: Items that the model has rows for.
        generator: Owned by the caller.
    """
    args = config["train_neg_sample_args"]
    if args["distribution"] == "none":
        return None
    past = stream.trained_targets(stage, "so_far").position
    table = stream.table
    return NegativeSampler(
        table.user[past], table.item[past], n_items, generator, args["distribution"], float(args.get("alpha", 1.0))
    )
