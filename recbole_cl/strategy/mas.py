"""Memory aware synapses."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.func import functional_call, grad, vmap

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.base import StageContext, Strategy, require
from recbole_cl.strategy.importance import ELEMENTS
from recbole_cl.strategy.outputs import check_user_vectors, user_vectors
from recbole_cl.strategy.rows import OwnRows
from recbole_cl.stream.vocabulary import Growth


@strategies.register()
class MAS(Strategy):
    """Holds parameters by how much moving them changes the user representation f; labels are not read.

    Aljundi et al. 2018, "Memory aware synapses", eq. 2 to 4 with the squared norm of their section 4.1, each stage::

        Omega_t = 1/N sum_n |d ||f(x_n)||^2 / d theta|
        Omega <- alpha Omega + (1 - alpha) Omega_t   (Omega_1 at first),      anchor = theta_t
        L(theta) + lambda * sum_i Omega_i (theta_i - anchor_i)^2

    The absolute value is inside the mean, per sample. ``alpha`` = 0.5 is our reading of the value that is given without
    an equation: the share of the old importance in the mix, as Avalanche's MAS has it (the paper's own code keeps a
    running mean over samples). A row that a stage brought has Omega = 0 from before.

    f is the model's ``user_representation``; of RecBole's own models the vector of the row's user (BPR: the embedding,
    so nothing holds the items; LightGCN: the propagated row, through which all of a user's graph is held) or the output
    of ``forward(item_seq, item_seq_len)``. For models trained on all positions a sample is a window, f its last output.

    Known mistakes elsewhere: the absolute value of a batch's mean gradient, where samples of opposite sign cancel and
    Omega depends on the batch size; dropout left on.
    """

    prefix = "mas"
    defaults = {"lambda": 1.0, "alpha": 0.5, "samples": 2000}
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient", "batch_rows"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.importance: dict[str, torch.Tensor] = {}
        self.anchor: dict[str, torch.Tensor] = {}

    def check(self, config: Any, model: nn.Module) -> None:
        check_user_vectors(self.name, config, model)
        samples, alpha = self.params["samples"], self.params["alpha"]
        if samples is not None and samples < 1:
            raise ConfigError(f"mas_samples: {samples} is too small; it must be at least 1, or ~ for all")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"mas_alpha: {alpha} is not in [0, 1]; it is the old importance's share, 0.5 by default")

    def add_gradients(self, ctx: StageContext) -> None:
        strength = float(self.params["lambda"])
        for name, p in ctx.parameters().items():
            if name not in self.importance:
                continue
            if p.grad is None:
                if not strength:  # a gradient of zeros would make the optimiser decay what FineTune leaves alone
                    continue
                p.grad = torch.zeros_like(p)
            p.grad.addcmul_(self.importance[name], p.detach() - self.anchor[name], value=2 * strength)
        if f"{self.name}/penalty" not in ctx.terms:  # once an epoch
            ctx.log(f"{self.name}/penalty", self.penalty(ctx))

    def penalty(self, ctx: StageContext) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, p in ctx.parameters().items():
            if name in self.importance:
                drift = p.detach().double() - self.anchor[name]
                total += (self.importance[name] * drift.square()).sum().cpu()
        return float(self.params["lambda"]) * total

    def end_stage(self, ctx: StageContext) -> None:
        found = sensitivities(ctx.model, OwnRows(ctx, self.name).batches(self.params["samples"]), ctx.parameters())
        alpha = float(self.params["alpha"])
        for name, p in ctx.parameters().items():
            old = self.importance.get(name)
            self.importance[name] = found[name] if old is None else alpha * old + (1 - alpha) * found[name]
            self.anchor[name] = p.detach().clone()

    def grow(self, growth: Growth) -> None:
        for state in (self.importance, self.anchor):
            for name in state:
                state[name] = growth.expand(name, state[name])

    def state_dict(self) -> dict[str, Any]:
        return {"importance": dict(self.importance), "anchor": dict(self.anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "importance", "anchor")
        self.importance, self.anchor = dict(state["importance"]), dict(state["anchor"])


class _Norm(nn.Module):
    """The model with the squared norm of one row's user vector as its forward, as ``functional_call`` needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: Mapping[str, torch.Tensor]) -> torch.Tensor:
        batch = Interaction({name: column.unsqueeze(0) for name, column in row.items()})
        return user_vectors(self.model, batch).square().sum()


def sensitivities(
    model: nn.Module, batches: Iterable[Interaction], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the mean over all rows of ``|d ||f(row)||^2 / d theta|``, in eval mode, leaving no trace.

    Sums are kept in float64, so neither chunks nor batches matter beyond rounding.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    chunk = max(1, min(32, ELEMENTS // max(sum(p.numel() for p in parameters.values()), 1)))
    values = {f"model.{name}": p.detach() for name, p in parameters.items()}
    norm, count, together = _Norm(model), 0, True
    modes = [(module, module.training) for module in model.modules()]
    device = next(iter(parameters.values())).device

    def of_row(values: dict[str, torch.Tensor], row: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(norm, values, (row,))

    model.eval()
    try:
        # RecBole's SINE switches anomaly detection on for the whole process when it is imported: several times slower.
        with ModelRandomness(0).owned(), torch.autograd.set_detect_anomaly(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operation without a batching rule is slow, not wrong
            for batch in batches:
                count += len(batch)
                columns = batch.to(device).interaction
                for start in range(0, len(batch), chunk):
                    rows = {name: column[start : start + chunk] for name, column in columns.items()}
                    found = _together(of_row, values, rows) if together else None
                    together = found is not None
                    samples = [found] if found is not None else _one_by_one(of_row, values, rows)
                    for part in samples:
                        for name, total in sums.items():
                            total += part[f"model.{name}"].abs().sum(dim=0)
    finally:
        for module, mode in modes:
            module.training = mode
    return {name: (total / max(count, 1)).to(parameters[name].dtype) for name, total in sums.items()}


def _together(of_row: Any, values: Any, rows: Any) -> dict[str, torch.Tensor] | None:
    """Returns the gradients of all rows in one vectorised pass; ``None`` where the model's code does not allow one."""
    try:
        found: dict[str, torch.Tensor] = vmap(grad(of_row), in_dims=(None, 0))(values, rows)
    except (RuntimeError, ValueError, NotImplementedError):  # recurrent or sparse operations, branches on values
        return None
    return found


def _one_by_one(of_row: Any, values: Any, rows: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields each row's gradients, with a first dimension of one."""
    for n in range(len(next(iter(rows.values())))):
        found = grad(of_row)(values, {name: column[n] for name, column in rows.items()})
        yield {name: value.unsqueeze(0) for name, value in found.items()}
