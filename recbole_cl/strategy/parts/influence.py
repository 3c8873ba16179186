"""How much one step on a sample lowers the loss on others: products of per-sample gradients with one direction.

A part for strategies, not a strategy. A step of size eta on a sample z moves the parameters by ``-eta g(z)`` and the
mean loss of reference samples, to first order, by ``-eta g_ref . g(z)``. The products for all samples are one
derivative of their losses along ``g_ref``, taken forward: no gradient of a sample is ever formed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.func import grad, jvp, vmap

from recbole_cl.strategy.parts.importance import SampleLoss, differentiating

CHUNK = 256
"""Samples taken at once."""
REFUSALS = (RuntimeError, ValueError, NotImplementedError)
"""What PyTorch raises where it cannot vectorise a model's code or has no forward derivative of it (GRU)."""
Values = dict[str, torch.Tensor]


def mean_gradient(model: nn.Module, batch: Interaction, parameters: Mapping[str, torch.Tensor]) -> Values:
    """Returns the mean over the rows of the gradient of a row's loss, by parameter name; in eval mode.

    Args:
        model: The model.
        batch: Rows with their negatives (at least one), on any device.
        parameters: Parameters by name.
    """
    losses, values = _Losses(model), {f"model.{name}": p.detach() for name, p in parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    with differentiating(model):
        for rows in _chunks(batch, values):
            try:
                found = grad(losses.total)(values, rows)
            except REFUSALS:
                found = grad(losses.total_one_by_one)(values, rows)
            for name, value in found.items():
                total[name] += value.detach()
    return {name.removeprefix("model."): value / len(batch) for name, value in total.items()}


def products(
    model: nn.Module, batch: Interaction, direction: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Returns ``direction . g(z)`` for the gradient of each row's loss, shape ``[B]``; in eval mode.

    Args:
        model: The model.
        batch: Rows with their negatives, on any device.
        direction: A tensor of the parameter's shape for each name.
        parameters: Parameters by name.
    """
    losses, values = _Losses(model), {f"model.{name}": p.detach() for name, p in parameters.items()}
    tangents = {name: direction[name.removeprefix("model.")] for name in values}
    parts = [next(iter(values.values())).new_zeros(0)]
    with differentiating(model):
        for rows in _chunks(batch, values):
            try:
                found = jvp(functools.partial(losses.each, rows=rows), (values,), (tangents,))[1]
            except REFUSALS:
                grads = [grad(losses.one)(values, row) for row in _single(rows)]
                found = torch.stack([torch.stack([(g[n] * t).sum() for n, t in tangents.items()]).sum() for g in grads])
            parts.append(found.detach())
    return torch.cat(parts)


class _Losses:
    """The losses of rows as functions of the parameters' values."""

    def __init__(self, model: nn.Module) -> None:
        self.objective = SampleLoss(model)

    def one(self, values: Values, row: Values) -> torch.Tensor:
        return self.objective.at(values, row)

    def each(self, values: Values, rows: Values) -> torch.Tensor:
        found: torch.Tensor = vmap(self.one, in_dims=(None, 0))(values, rows)
        return found

    def total(self, values: Values, rows: Values) -> torch.Tensor:
        return self.each(values, rows).sum()

    def total_one_by_one(self, values: Values, rows: Values) -> torch.Tensor:
        return torch.stack([self.one(values, row) for row in _single(rows)]).sum()


def _chunks(batch: Interaction, values: Values) -> Iterator[Values]:
    device = next(iter(values.values())).device
    for start in range(0, len(batch), CHUNK):
        yield {name: column[start : start + CHUNK].to(device) for name, column in batch.interaction.items()}


def _single(rows: Values) -> Iterator[Values]:
    for n in range(len(next(iter(rows.values())))):
        yield {name: column[n] for name, column in rows.items()}
