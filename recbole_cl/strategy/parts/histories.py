"""What a sequential model makes of the histories of targets: its vectors, and its logits over items.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import nn

from recbole_cl.model.all_positions import AllPositions, last_items
from recbole_cl.model.prefixes import prefix_outputs
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.outputs import user_vectors
from recbole_cl.stream.stage import Targets
from recbole_cl.tree import answering

SHARED = 2**15
"""Targets that are read at a time where those of a sequence share a pass."""
ROWS = 2**8
"""Histories of a pass where each has a row of its own."""


def full_softmax(model: nn.Module) -> bool:
    """Tells whether a model is sequential and trained by a softmax over all items."""
    return getattr(model, "type", None) == ModelType.SEQUENTIAL and getattr(model, "loss_type", None) == "CE"


def known_targets(ctx: StageContext, targets: Targets) -> Targets:
    """Returns the targets that the model of this stage has rows for: user, item, and all items of a history."""
    table, n_items = ctx.batcher.table, ctx.stage.n_items
    known = (targets.user < ctx.stage.n_users) & (table.item[targets.position] < n_items)
    if ctx.batcher.sequential:
        seen = np.r_[0, np.cumsum(table.item[table.seq] < n_items)]
        length = targets.hi - targets.lo
        known &= (length > 0) & (seen[targets.hi] - seen[targets.lo] == length)
    return targets[known]


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode, without gradients."""
    with answering(model), torch.no_grad():
        yield


def last_outputs(model: AllPositions, rows: Interaction) -> torch.Tensor:
    """Returns the model's output after each row's history, shape ``[B, d]``."""
    sequence = rows[model.ITEM_SEQ]
    return model.outputs(sequence, last_items(rows[model.ITEM_SEQ_LEN], sequence.size(1)))


def item_logits(model: Any, rows: Interaction, n_items: int) -> torch.Tensor:
    """Returns logits over the items ``1 .. n_items - 1``, shape ``[B, n_items - 1]``; row 0 is padding."""
    if isinstance(model, AllPositions):
        return model.item_scores(last_outputs(model, rows))[:, 1:n_items]
    found: torch.Tensor = model.full_sort_predict(rows)
    return found.view(len(rows), -1)[:, 1:n_items]


def history_vectors(ctx: StageContext, targets: Targets) -> torch.Tensor:
    """Returns the model's vector after each target's history, in eval mode, shape ``[N, d]``.

    A causal model that gives all positions in one pass reads a sequence once and answers for all its targets; any
    other reads every history in a row of its own.

    Args:
        ctx: The stage, with the weights to use.
        targets: ``N`` targets (at least one) that the model knows (:func:`known_targets`).
    """
    model = ctx.model
    shared = isinstance(model, AllPositions) and model.shares_prefixes()
    order = np.lexsort((targets.hi, targets.lo) if shared else (targets.lo, targets.hi - targets.lo))
    found, size = [], SHARED if shared else ROWS
    with looking(model):
        for start in range(0, len(order), size):
            part = targets[order[start : start + size]]
            if shared:
                found.append(prefix_outputs(model, ctx.batcher, part))
            else:
                found.append(user_vectors(model, ctx.batcher.rows(part).to(ctx.device)))
    back = torch.from_numpy(np.argsort(order))
    vectors = torch.cat(found)
    return vectors[back.to(vectors.device)]
