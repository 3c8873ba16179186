"""Exact per-sample squared gradients: the diagonal of the empirical Fisher information.

A part for strategies, not a strategy::

    F_i = 1/N sum_n (d loss_n / d theta_i)^2

The square is inside the sum. Squaring the gradient of a batch's mean loss, as much code does, is another quantity:
``E[(mean g)^2] = E[g^2] / B + (1 - 1/B) (E g)^2``, so a penalty built on it depends on the batch size, and near an
optimum (``E g = 0``) it is B times too small.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.func import functional_call, grad, vmap

from recbole_cl.errors import ConfigError
from recbole_cl.model.capabilities import capabilities
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.base import StageContext
from recbole_cl.strategy.rows import OwnRows

ELEMENTS = 2**24
"""Numbers that the gradients of one chunk of samples may hold (64 MiB of float32)."""


class _SampleLoss(nn.Module):
    """The model with the loss of a one-row batch as its forward, as ``functional_call`` needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.by_row = "per_sample_loss" in capabilities(model)

    def forward(self, row: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the scalar loss of one sample; fields come without their batch dimension."""
        batch = Interaction({name: column.unsqueeze(0) for name, column in row.items()})
        loss = self.model.per_sample_loss(batch) if self.by_row else self.model.calculate_loss(batch)  # type: ignore[operator]
        return torch.stack([part.sum() for part in (loss if isinstance(loss, tuple) else (loss,))]).sum()


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Interaction],
    parameters: Mapping[str, torch.Tensor] | None = None,
    chunk: int | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the mean over all rows of the squared gradient of a row's loss.

    A row is a sample: a target with its negative (pairwise), a labelled pair (pointwise, a negative is a row of its
    own), a window (training on all positions: the gradient of its mean over positions is squared as one). The loss is
    the model's ``per_sample_loss`` where it has one, otherwise ``calculate_loss`` of a batch of one row; a loss that
    contrasts the rows of a batch with each other degenerates there. Everything is taken in eval mode (no dropout,
    BatchNorm with its running statistics), with the global generators, ``p.grad`` and the modes of all modules left
    as they were. Sums are kept in float64, so neither the chunk nor the batches matter beyond rounding.

    Args:
        model: The model.
        batches: Rows with their negatives, on any device.
        parameters: Parameters by name; default all that are trained.
        chunk: Samples whose gradients are held at once; default by the size of the parameters.

    Returns:
        For each name a tensor of the parameter's shape and type, zeros where there is no row.
    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    size = sum(p.numel() for p in parameters.values())
    chunk = chunk or max(1, min(32, ELEMENTS // max(size, 1)))
    loss = _SampleLoss(model)
    modes = [(module, module.training) for module in model.modules()]
    count, together = 0, True
    model.eval()
    try:
        # RecBole's SINE switches anomaly detection on for the whole process when it is imported: several times slower.
        with ModelRandomness(0).owned(), torch.autograd.set_detect_anomaly(False):
            for batch in batches:
                count += len(batch)
                for rows in _chunks(batch.to(next(iter(parameters.values())).device), chunk):
                    together = together and _add_together(loss, parameters, rows, sums)
                    if not together:
                        _add_one_by_one(loss, parameters, rows, sums)
    finally:
        for module, mode in modes:
            module.training = mode
    return {name: (total / max(count, 1)).to(parameters[name].dtype) for name, total in sums.items()}


def _chunks(batch: Interaction, chunk: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(batch), chunk):
        yield {name: column[start : start + chunk] for name, column in batch.interaction.items()}


def _add_together(
    loss: _SampleLoss,
    parameters: Mapping[str, torch.Tensor],
    rows: dict[str, torch.Tensor],
    sums: dict[str, torch.Tensor],
) -> bool:
    """Adds the squares of all rows in one vectorised pass; False where the model's code does not allow one."""
    values = {f"model.{name}": p.detach() for name, p in parameters.items()}

    def of_row(values: dict[str, torch.Tensor], row: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(loss, values, (row,))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operation without a batching rule is slow, not wrong
            found = vmap(grad(of_row), in_dims=(None, 0))(values, rows)
    except (RuntimeError, ValueError, NotImplementedError):
        # A recurrent or sparse operation, a branch on values: PyTorch refuses. An error of the model itself comes
        # again, and out, in the plain loop.
        return False
    for name in parameters:
        sums[name] += found[f"model.{name}"].square().sum(dim=0)
    return True


def _add_one_by_one(
    loss: _SampleLoss,
    parameters: Mapping[str, torch.Tensor],
    rows: dict[str, torch.Tensor],
    sums: dict[str, torch.Tensor],
) -> None:
    """Adds the squares of the rows' gradients, one backward pass a row."""
    for n in range(len(next(iter(rows.values())))):
        value = loss({name: column[n] for name, column in rows.items()})
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, g in zip(parameters, found, strict=True):
            if g is not None:
                sums[name] += g.square()


def check_loss(strategy: str, config: Any, model: nn.Module) -> None:
    """Raises a :class:`ConfigError` for models without a loss of one row (RecBole's MKR has two of its own)."""
    from recbole.model.abstract_recommender import AbstractRecommender

    if "per_sample_loss" not in capabilities(model) and (
        type(model).calculate_loss is AbstractRecommender.calculate_loss  # type: ignore[attr-defined]
    ):
        raise ConfigError(
            f"strategy: {strategy} cannot serve the model {config['model']}: it has neither calculate_loss nor "
            f"per_sample_loss; use a replay strategy or another model"
        )


def stage_importance(ctx: StageContext, name: str, limit: int | None = None) -> dict[str, torch.Tensor]:
    """Returns :func:`squared_gradients` over the stage's training targets (or windows).

    Args:
        ctx: The stage, with the weights to take the gradients at.
        name: Owner of the generators of samples and negatives.
        limit: Targets (windows) used at most, drawn without replacement; ``None`` for all.
    """
    return squared_gradients(ctx.model, OwnRows(ctx, name).batches(limit), ctx.parameters())
