"""One pass trained by several processes: each takes its share of every batch.

All processes draw the same global batches, negatives and replayed rows. Process r of P computes the data loss of its
rows alone, and the gradients are added::

    grad = sum_r w_r * grad loss(rows of r)        w_r = n_r / sum_k n_k

with ``n_r`` its rows, or its supervised positions where a model trains on all of them. For a loss that is a mean over
those this is the single process's gradient. Where it is not, the first process trains on the whole batch and the others
follow, which is the single process's gradient again, at its speed. That is found by a trial of the loss at the start of
a pass, and holds for what ties the rows of a batch together: BatchNorm, memory-based models, triples of a knowledge
graph, and models whose class says ``ties_rows = True``.

The strategies' terms are those of the whole batch, taken by the first process; every process computes them, so that
their generators stay alike.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.loss import EmbLoss
from recbole.utils import ModelType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from recbole_cl import checkpoint, distributed
from recbole_cl.distributed import Group
from recbole_cl.errors import ConfigError, TrainingError
from recbole_cl.model.state import load_owned_state, owned_state
from recbole_cl.rng import ModelRandomness, derive, seeded
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.training.trainer import HookedTrainer, size_of
from recbole_cl.tree import answering, clone_tree, tree_hash

LOGGER = logging.getLogger("recbole_cl")
TOLERANCE = 2e-6
"""Relative difference between the loss of a batch and that of its shares from which the loss is no mean over rows."""


class DataParallelTrainer(HookedTrainer):
    """The trainer with hooks, on one of several processes."""

    always_hooked = True

    def __init__(self, config: Any, model: nn.Module) -> None:
        super().__init__(config, model)
        self.group = distributed.current()
        self._verdicts: dict[str, str] = {}  # loss function to the reason why it cannot be shared, "" where it can
        self._norms = [m for m in model.modules() if type(m) is EmbLoss]

    def _gradients(self, batch: Interaction, loss_func: Any, scaler: Any) -> Any:
        main, failure, losses, weight = self.group.main, None, None, 0.0
        self.ctx.data_gradients = {}
        pieces = self._pieces(batch, loss_func)
        whole = batch.to(self.device) if pieces is None or self.strategy.hooked("loss_terms") else batch
        try:
            with torch.autocast(device_type=self.device.type, enabled=self.enable_amp):
                if pieces is None:
                    losses, weight = loss_func(whole), float(main)
                else:
                    with self._own_part():
                        losses = loss_func(batch[pieces[self.group.rank]].to(self.device))
                    sizes = [size_of(batch[piece]) for piece in pieces]
                    weight = sizes[self.group.rank] / sum(sizes)
                terms = self._terms(whole)
            if weight:
                scaled = tuple(weight * part for part in losses) if isinstance(losses, tuple) else weight * losses
                self._backward(scaler, sum(scaled) if isinstance(scaled, tuple) else scaled, terms if main else {})
        except TrainingError as error:  # not finite: the others hear of it before gradients are exchanged
            failure = error
        parts = losses if isinstance(losses, tuple) else (losses,)
        values = self._combine(failure, [] if failure else [weight * part.detach() for part in parts])
        return values if isinstance(losses, tuple) else values[0]

    # -- shares ---------------------------------------------------------------------------------------------------

    def _pieces(self, batch: Interaction, loss_func: Any) -> list[torch.Tensor] | None:
        """Returns the rows of each process, or ``None`` where the whole batch is taken by one."""
        rows = {len(column) for column in batch.interaction.values()}
        if len(rows) > 1:  # interactions and triples
            return None
        pieces = pieces_of(rows.pop(), self.group.size, self._times())
        if pieces is None:
            return None
        loss = getattr(loss_func, "loss_func", loss_func)
        name = getattr(loss, "__name__", "loss")
        if name not in self._verdicts:
            self._verdicts[name] = self._verdict(batch, pieces, loss)
            if self._verdicts[name]:
                self._tell(self._verdicts[name])
        return None if self._verdicts[name] else pieces

    def _tell(self, reason: str) -> None:
        consequence = "trains on whole batches in the first process, no faster than alone, because"
        message = f"several processes: {self.config['model']} {consequence} {reason}"
        if message not in self.config.warnings:
            self.config.warnings.append(message)
            LOGGER.warning(message)

    def _times(self) -> int:
        loader = getattr(self.ctx.loader, "general", self.ctx.loader)
        return int(loader.negatives.times) if hasattr(loader, "negatives") else 1

    def _verdict(self, batch: Interaction, pieces: list[torch.Tensor], loss: Any) -> str:
        """Returns why the loss is no mean over rows, or an empty text; compares it with that of the shares."""
        if self.config["MODEL_TYPE"] == ModelType.TRADITIONAL:
            return "it counts what it sees"
        if any(getattr(module, "ties_rows", False) for module in self.model.modules()):
            return "it says so (ties_rows)"
        if any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            return "BatchNorm ties the rows of a batch together"
        kept = clone_tree(owned_state(self.model))
        failure = ""
        try:
            with torch.no_grad(), answering(self.model), ModelRandomness(0).owned():
                together = _values(loss(batch.to(self.device)))
                sizes = [size_of(batch[piece]) for piece in pieces]
                with self._own_part():
                    own = _values(loss(batch[pieces[self.group.rank]].to(self.device)))
            own = own * (sizes[self.group.rank] / sum(sizes))
        except Exception as error:  # a loss that cannot take a share of its rows
            together, own, failure = torch.zeros(1), torch.zeros(1), f"{type(error).__name__}: {error}"[:200]
        finally:
            load_owned_state(self.model, kept)
        if self.group.any(torch.tensor([bool(failure)])).any():
            return f"its loss cannot be computed for a part of a batch ({failure or 'in another process'})"
        gap = (together - self.group.sum(own)).abs() / together.abs().max().clamp(min=1e-12)
        difference = float(gap.max()) if bool(torch.isfinite(together).all()) else 0.0  # training will tell of NaN
        apart = self.group.any(torch.tensor([difference > TOLERANCE])).any()
        return "its loss is no mean over the rows of a batch" if apart else ""

    @contextlib.contextmanager
    def _own_part(self) -> Iterator[None]:
        """Dropout of this share alone, from (seed, stage, pass, step, rank); RecBole's norms over all shares."""
        ctx = self.ctx
        for module in self._norms:
            module.forward = functools.partial(norms_of_part, self.group, module)
        try:
            with seeded(derive(self.config["seed"], ctx.index, f"share/{ctx.pass_.name}/{ctx.step}/{self.group.rank}")):
                yield
        finally:
            for module in self._norms:
                del module.forward

    # -- exchange -------------------------------------------------------------------------------------------------

    def _combine(self, failure: TrainingError | None, values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Adds the processes' gradients in place (and the data loss's own, and its values, which are returned)."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        there = torch.tensor([p.grad is not None for p in parameters])
        somewhere = self.group.agree(failure, there)
        assert somewhere is not None
        shared = [p for p, flag in zip(parameters, somewhere.tolist(), strict=True) if flag]
        for p in shared:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.layout != torch.strided:
                raise ConfigError(
                    "several processes: the model has sparse gradients (an embedding with sparse=True), which cannot "
                    "be added; run it in one process"
                )
        data = self._data_gradients(shared)
        tensors = [p.grad for p in shared if p.grad is not None]
        tensors += list(data.values())
        flat = torch.cat([t.reshape(-1) for t in [*tensors, *(v.reshape(-1)[:1].to(self.device) for v in values)]])
        self.group.sum(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors] + [1] * len(values)), strict=False):
            tensor.copy_(part.view_as(tensor))
        self.ctx.data_gradients = data
        return tuple(flat[len(flat) - len(values) + i] for i in range(len(values)))

    def _data_gradients(self, shared: list[nn.Parameter]) -> dict[str, torch.Tensor]:
        """Returns the data loss's gradients where a strategy wants them, zeros where this process has none."""
        if not self.strategy.wants_data_gradients:
            return {}
        held = {id(p) for p in shared}
        own = self.ctx.data_gradients
        return {n: own.get(n, torch.zeros_like(p)) for n, p in self.ctx.parameters().items() if id(p) in held}


def keep_alike(ctx: StageContext, strategy: Composite, *drawn: Any, trained: bool = True) -> None:
    """Makes sure that all processes hold the same, after an epoch or at a stage's end.

    A GPU may add in any order, so there BatchNorm's statistics, and importances that each process took by itself, are
    taken from the first process. Anything else that differs is a mistake.

    Args:
        ctx: The stage.
        strategy: The strategies.
        drawn: States of the generators.
        trained: An epoch was trained, in which parameters get the same bits also on a GPU.

    Raises:
        TrainingError: If something differs that should not.
    """
    group = distributed.current()
    if group.size == 1:
        return
    state = {"model": owned_state(ctx.model), "strategy": strategy.state_dict()}
    exact = ctx.device.type == "cpu"
    parts = {
        "weights": dict(ctx.model.named_parameters()) if trained or exact else {},
        "random states": list(drawn),
        "model's state": state["model"] if exact else {},
        "strategies' state": state["strategy"] if exact else {},
    }
    for part, value in parts.items():
        own = group.texts(tree_hash(value))
        others = [str(rank) for rank, text in enumerate(own) if text != own[0]]
        if others:
            raise TrainingError(
                f"stage {ctx.index + 1}, pass {ctx.pass_.name!r}, epoch {ctx.epoch}: the {part} of rank "
                f"{', '.join(others)} differ from rank 0's: the model or a strategy keeps what it sees of a batch, or "
                f"draws by itself; set ties_rows = True on the model's class, or run it in one process"
            )
    if not exact and len(set(group.texts(tree_hash(state)))) > 1:
        state = checkpoint.from_bytes(group.from_main(checkpoint.to_bytes(state) if group.main else b""))
        load_owned_state(ctx.model, state["model"])
        strategy.load_state_dict(state["strategy"])


def pieces_of(n: int, processes: int, times: int = 1) -> list[torch.Tensor] | None:
    """Returns the rows of each process, ``None`` where there are too few for all.

    RecBole lays negatives out in ``times`` blocks of all targets; each process gets the same targets of every block.

    Args:
        n: Rows of the batch.
        processes: How many share them.
        times: Blocks; rows that are no multiple of it are one block.
    """
    times = times if n % times == 0 else 1
    targets = n // times
    if targets < processes:
        return None
    starts = torch.arange(times).unsqueeze(1) * targets
    pieces = []
    for rank in range(processes):
        part = Group(rank, processes).share(targets)
        pieces.append((starts + torch.arange(part.start, part.stop)).flatten())
    return pieces


def _values(losses: Any) -> torch.Tensor:
    return torch.stack([part.double().sum() for part in (losses if isinstance(losses, tuple) else (losses,))])


def norms_of_part(group: Group, module: EmbLoss, *embeddings: torch.Tensor, require_pow: bool = False) -> torch.Tensor:
    """Returns this share's part of RecBole's ``EmbLoss`` of the whole batch.

    Without ``require_pow`` that is ``sum_k |E_k| / B``, and a norm is no mean over rows. With S_k the sum over all
    processes of ``sum |e|^p``, ``|E_k| = S_k^(1/p)`` and its gradient is that of ``S_k / (p S_k^(1 - 1/p))`` with the
    denominator held fixed. The value is made up to ``|E_k|`` by a constant.
    """
    if require_pow:  # a mean over rows
        return EmbLoss.forward(module, *embeddings, require_pow=True)
    p = module.norm
    own = torch.stack([embedding.abs().pow(p).sum() for embedding in embeddings])
    total = group.sum(own.detach().clone()).clamp(min=torch.finfo(own.dtype).tiny)
    linear = own / total.pow(1 - 1 / p) / p
    return (linear + (p - 1) * linear.detach()).sum().reshape(1) / embeddings[-1].shape[0]
