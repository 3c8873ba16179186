"""Exact per-sample squared gradients: the diagonal of the empirical Fisher information.

A part for strategies, not a strategy::

    F_i = 1/N sum_n (d loss_n / d theta_i)^2

The square is inside the sum. Squaring the gradient of a batch's mean loss, as much code does, is another quantity:
``E[(mean g)^2] = E[g^2] / B + (1 - 1/B) (E g)^2``, so a penalty built on it depends on the batch size, and near an
optimum (``E g = 0``) it is B times too small.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from logging import getLogger
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from recbole_cl.errors import TrainingError
from recbole_cl.model.capabilities import capabilities
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.per_sample_gradients import Collected, PerSample, Reduce, Rows
from recbole_cl.strategy.parts.rows import OwnRows
from recbole_cl.tree import answering

LOGGER = getLogger("recbole_cl")

ELEMENTS = 2**24
"""Numbers that the gradients of one chunk of samples may hold where they are formed whole (64 MiB of float32)."""
PROBE = 4
"""Rows on which the fast sums are compared with plain per-sample gradients."""


class Objective(nn.Module):
    """The model with a scalar of a one-row batch as its forward, as ``functional_call`` needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def of(self, batch: Interaction) -> torch.Tensor:
        """Returns a value of a batch of one row; it is summed."""
        raise NotImplementedError

    copies = 1

    def forward(self, row: Rows) -> torch.Tensor:
        """Returns the scalar of one sample; fields come without their batch dimension."""
        rows = {name: column.unsqueeze(0) for name, column in row.items()}
        if self.copies > 1:
            rows = {name: column.expand(self.copies, *column.shape[1:]) for name, column in rows.items()}
        return self.of(Interaction(rows)).sum()

    def at(self, values: Mapping[str, torch.Tensor], row: Rows) -> torch.Tensor:
        """Returns the scalar of one sample with other values of the parameters (names as in this module).

        A parameter may stand in several places, and a module under several names. ``functional_call`` leaves such a
        module with the values it was given, so each place is named once here, and it is told of no ties.
        """
        if not hasattr(self, "_places"):
            names = {id(p): name for name, p in self.named_parameters()}
            self._places = [
                (f"{path}.{name}", names[id(p)])
                for path, module in self.named_modules()
                for name, p in module._parameters.items()
                if p is not None
            ]
        given = {place: values[name] for place, name in self._places if name in values}
        found: torch.Tensor = functional_call(self, given, (row,), tie_weights=False)
        return found


class SampleLoss(Objective):
    """The loss of one sample."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.by_row = "per_sample_loss" in capabilities(model)

    def of(self, batch: Interaction) -> torch.Tensor:
        """Returns the model's ``per_sample_loss`` where it has one, otherwise the sum of its losses."""
        if self.by_row:
            loss: torch.Tensor = self.model.per_sample_loss(batch)  # type: ignore[operator]
            return loss
        parts = self.model.calculate_loss(batch)  # type: ignore[operator]
        return torch.stack([part.sum() for part in (parts if isinstance(parts, tuple) else (parts,))])


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Interaction],
    parameters: Mapping[str, torch.Tensor] | None = None,
    chunk: int | None = None,
    fast: bool = True,
) -> dict[str, torch.Tensor]:
    """Returns the mean over all rows of the squared gradient of a row's loss.

    A row is a sample: a target with its negative (pairwise), a labelled pair (pointwise, a negative is a row of its
    own), a window (training on all positions: the gradient of its mean over positions is squared as one). The loss is
    the model's ``per_sample_loss`` where it has one, otherwise ``calculate_loss`` of a batch of one row; a loss that
    contrasts the rows of a batch with each other degenerates there. See :func:`mean_of_gradients`.

    Args:
        model: The model.
        batches: Rows with their negatives, on any device.
        parameters: Parameters by name; default all that are trained.
        chunk: Samples that are held at once; default by the size of what is held.
        fast: Try :mod:`recbole_cl.strategy.parts.per_sample_gradients`.

    Returns:
        For each name a tensor of the parameter's shape and type, zeros where there is no row.
    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return mean_of_gradients(SampleLoss(model), batches, parameters, torch.square, chunk, fast)


def mean_of_gradients(
    objective: Objective,
    batches: Iterable[Interaction],
    parameters: Mapping[str, torch.Tensor],
    reduce: Reduce,
    chunk: int | None = None,
    fast: bool = True,
) -> dict[str, torch.Tensor]:
    """Returns the mean over all rows of ``reduce`` of the gradient of a row's objective.

    Exact on each of three paths: sums from activations and their gradients
    (:mod:`recbole_cl.strategy.parts.per_sample_gradients`), where that has a rule for every use of a parameter and
    agrees with the next path on the first rows; gradients formed by ``vmap``; one backward pass a row, where PyTorch
    cannot vectorise the model's code. The log's debug level says which. Everything is taken in eval mode (no dropout,
    BatchNorm with its running statistics), with the global generators, ``p.grad`` and the modes of all modules left as
    they were. Sums are kept in float64, so neither the chunk nor the batches matter beyond rounding.

    Args:
        objective: What is differentiated.
        batches: Rows, on any device.
        parameters: Parameters by name.
        reduce: Elementwise function with ``f(x y) = f(x) f(y)``: ``torch.square``, ``torch.abs``.
        chunk: Samples that are held at once; default by the size of what is held.
        fast: Try the first path.

    Returns:
        For each name a tensor of the parameter's shape and type, zeros where there is no row.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    work = _Work(objective, parameters, reduce, chunk, fast)
    count = 0
    # The fused attention has no rule for vectorising, plain mathematics have.
    with differentiating(objective), sdpa_kernel(SDPBackend.MATH):
        for rows in _grouped(batches, next(iter(parameters.values())).device):
            count += len(next(iter(rows.values())))
            work.add(rows, sums)
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise TrainingError(
                f"the importance of {name!r} is not finite: the model's loss has no finite gradient at some training "
                f"target; lower learning_rate, or use a replay strategy"
            )
    return {name: (total / max(count, 1)).to(parameters[name].dtype) for name, total in sums.items()}


@contextlib.contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """A context for gradients of single samples: eval mode, random numbers of its own; all is as before afterwards.

    The graphs that some models draw for their loss (SGL) are the same ones here, whatever went before.
    """
    with (
        answering(model),
        ModelRandomness(0).owned(),
        # RecBole's SINE switches anomaly detection on for the whole process when it is imported: several times slower.
        torch.autograd.set_detect_anomaly(False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # an operation without a batching rule is slow, not wrong
        model.train()  # where such graphs are drawn
        model.eval()
        yield


GROUP = 8192
"""Rows of equal shape that are joined before they are cut into chunks."""


def _grouped(batches: Iterable[Interaction], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Joins consecutive batches whose rows have the same shapes."""
    held: list[dict[str, torch.Tensor]] = []
    size, before = 0, None
    for batch in batches:
        if not len(batch):
            continue
        shapes = [(name, column.shape[1:]) for name, column in batch.interaction.items()]
        if held and (shapes != before or size >= GROUP):
            yield _joined(held)
            held, size = [], 0
        held.append(batch.to(device).interaction)
        size, before = size + len(batch), shapes
    if held:
        yield _joined(held)


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


class _Work:
    """The three paths, and which of them the model has allowed so far."""

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, torch.Tensor],
        reduce: Reduce,
        chunk: int | None,
        fast: bool,
    ) -> None:
        self.objective, self.parameters, self.reduce, self.chunk = objective, parameters, reduce, chunk
        owned = dict(objective.model.named_parameters())
        self.fast = fast and all(owned.get(name) is p for name, p in parameters.items())
        self.together, self.probed = True, False
        self.samplers: dict[Any, PerSample] = {}
        self.values = {f"model.{name}": p.detach() for name, p in parameters.items()}
        self.whole = chunk or max(1, min(32, ELEMENTS // max(sum(p.numel() for p in parameters.values()), 1)))

    def add(self, rows: Rows, sums: Mapping[str, torch.Tensor]) -> None:
        """Adds the reduced gradients of all rows to ``sums``."""
        sampler = self._sampler(rows) if self.fast else None
        for part in _cut(rows, len(next(iter(rows.values()))) if sampler is None else self.chunk or sampler.chunk):
            found = None if sampler is None else self._collected(sampler, part)
            if sampler is None or found is None:
                self._add_whole(part, sums)
            else:
                sampler.add(found, sums)

    def _sampler(self, rows: Rows) -> PerSample | None:
        """Returns the first path for rows of this shape; ``None`` where it refuses the model or disagrees."""
        size = len(next(iter(rows.values())))
        shape = tuple((name, column.shape[1:]) for name, column in rows.items())
        if shape in self.samplers:
            return self.samplers[shape]
        try:
            with _frozen(self.parameters):
                sampler = PerSample(self.objective, self.parameters, self.reduce, {n: c[0] for n, c in rows.items()})
        except Exception as error:  # whatever a model's code raises comes again, and out, on the next path
            self._refuse(f"{type(error).__name__}: {error}")
            return None
        if self.probed:
            self.samplers[shape] = sampler
            return sampler
        at = torch.linspace(0, size - 1, min(PROBE, size)).long()
        probe = {name: column[at.to(column.device)] for name, column in rows.items()}
        shapes = {name: p.shape for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        mine, theirs = (
            {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
            for _ in range(2)
        )
        found = self._collected(sampler, probe)
        if found is None:
            return None
        sampler.add(found, mine)
        self._add_whole(probe, theirs)
        if unlike := self._unlike(mine, theirs):
            self._refuse(f"{', '.join(unlike)}: other values than plain per-sample gradients")
            return None
        self.probed, self.samplers[shape] = True, sampler
        LOGGER.debug("per-sample gradients of %s: from activations", type(self.objective.model).__name__)
        return sampler

    def _collected(self, sampler: PerSample, rows: Rows) -> Collected | None:
        """Returns what the first path needs of these rows; ``None``, then and from then on, where the model refuses."""
        if not self.fast:
            return None
        try:
            with _frozen(self.parameters):
                return sampler.collect(rows)
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {error}")
            return None

    def _refuse(self, reason: str) -> None:
        self.fast = False
        LOGGER.debug("per-sample gradients of %s: formed whole (%s)", type(self.objective.model).__name__, reason)

    def _unlike(self, mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
        """Returns the names whose sums differ by more than 1e-4, rounding of what should be 0 aside."""
        largest = max(float(value.max()) for value in theirs.values())
        noise = float(self.reduce(torch.tensor(1e-6, dtype=torch.float64))) * largest
        return [
            name
            for name, value in theirs.items()
            if not torch.allclose(mine[name], value, rtol=1e-4, atol=1e-5 * float(value.max()) + noise)
        ]

    def _add_whole(self, rows: Rows, sums: Mapping[str, torch.Tensor]) -> None:
        """The second path, the third where PyTorch refuses it."""
        for part in _cut(rows, self.whole):
            found = self._vectorised(part) if self.together else None
            self.together = found is not None
            for samples in [found] if found is not None else self._one_by_one(part):
                kept_rows = self._with_a_loss(samples)
                for name, total in sums.items():
                    total += self.reduce(samples[name] if kept_rows is None else samples[name][kept_rows]).sum(dim=0)

    def _with_a_loss(self, samples: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Returns the samples that have a loss at all, ``None`` for all.

        A row of BERT4Rec in which no item was masked has none, a mean over nothing; in a batch it adds nothing.
        """
        finite = torch.stack([torch.isfinite(g).flatten(1).all(dim=1) for g in samples.values()]).all(dim=0)
        return None if bool(finite.all()) else finite

    def _vectorised(self, rows: Rows) -> dict[str, torch.Tensor] | None:
        """Returns the gradients of all rows in one pass; ``None`` where the model's code does not allow one."""

        def of_row(values: dict[str, torch.Tensor], row: Rows) -> torch.Tensor:
            return self.objective.at(values, row)

        try:
            found = vmap(grad(of_row), in_dims=(None, 0))(self.values, dict(rows))
        except Exception:
            # A recurrent or sparse operation, a branch on values, code that asks for real parameters. An error of the
            # model itself comes again, and out, in the plain loop.
            return None
        return {name: found[f"model.{name}"] for name in self.parameters}

    def _one_by_one(self, rows: Rows) -> Iterator[dict[str, torch.Tensor]]:
        """Yields each row's gradients, with a first dimension of one."""
        for n in range(len(next(iter(rows.values())))):
            value = self._alone({name: column[n] for name, column in rows.items()})
            found = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
            pairs = zip(self.parameters.items(), found, strict=True)
            yield {name: (torch.zeros_like(p) if g is None else g).unsqueeze(0) for (name, p), g in pairs}

    def _alone(self, row: Rows) -> torch.Tensor:
        """Returns the objective of a row; of copies of it where the model's code squeezes a batch of one away.

        A mean over rows is the same for any number of copies. A loss that is none is not measured this way.
        """
        try:
            return self.objective(row)
        except Exception:
            if self.objective.copies > 1:
                raise
            found = []
            for self.objective.copies in (4, 2):
                found.append(self.objective(row))
            if not torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-7):
                raise
            return found[1]


@contextlib.contextmanager
def _frozen(parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets autograd pass by the parameters: gradients are taken by shifts alone."""
    trained = [p for p in parameters.values() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _cut(rows: Rows, size: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(next(iter(rows.values()))), size):
        yield {name: column[start : start + size] for name, column in rows.items()}


def stage_importance(ctx: StageContext, name: str, limit: int | None = None) -> dict[str, torch.Tensor]:
    """Returns :func:`squared_gradients` over the stage's training targets (or windows).

    Args:
        ctx: The stage, with the weights to take the gradients at.
        name: Owner of the generators of samples and negatives.
        limit: Targets (windows) used at most, drawn without replacement; ``None`` for all.
    """
    return squared_gradients(ctx.model, OwnRows(ctx, name).batches(limit), ctx.parameters())
