"""One training pass: RecBole's trainers with the hooks of the strategies.

RecBole's trainer class of the model (``Trainer``, ``KGTrainer``, ...) keeps its optimiser and its epoch. Where no
strategy takes part in steps, RecBole's own ``_train_epoch`` runs unchanged; otherwise :class:`HookedTrainer` runs the
same operations in the same order with the hooks between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.trainer import trainer as recbole_trainer
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from recbole_cl import distributed
from recbole_cl.config.models import traits_of
from recbole_cl.errors import TrainingError
from recbole_cl.strategy.composite import Composite, told_by
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import TARGETS


class HookedTrainer(recbole_trainer.Trainer):
    """RecBole's trainer with hooks around each optimiser step."""

    strategy: Composite
    ctx: StageContext
    n_targets: int | None = None  # those of the loader
    after_batch: Callable[[], None] | None = None
    partial_loss: Any = None
    resumed_loss: Any = None
    always_hooked = False
    group = distributed.current()
    accumulate = 1
    rates: list[tuple[float, Callable[[int], float]]] | None = None  # of each group: its own rate, its factor by step
    share = 1.0  # of a batch in its optimiser step

    # -- what a pass asks of a trainer (:class:`recbole_cl.training.stage_trainer.PassTrainer`) -----------------------

    def train_epoch(self, loader: Any, epoch: int) -> float | tuple[float, ...]:
        """Trains an epoch, or the rest of one; returns the data loss summed over its steps."""
        if self.resumed_loss is None:
            self.begin_epoch(epoch)
        return self._train_epoch(loader, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser's state by parameter name."""
        return {"optimizer": self.moments()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state back."""
        self.load_moments(state["optimizer"])

    def moments(self) -> dict[str, Any]:
        """Returns the optimiser's state by parameter name; names survive a change of shapes, indices do not."""
        names = self._names()
        return {names[id(p)]: dict(state) for p, state in self.optimizer.state.items() if id(p) in names}

    def load_moments(self, moments: Mapping[str, Any]) -> None:
        """Puts states back for the parameters that still exist with the same shape."""
        names = self._names()
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                saved = moments.get(names.get(id(p), ""))
                if not saved:
                    continue
                if any(v.shape != p.shape for v in saved.values() if torch.is_tensor(v) and v.dim()):
                    continue
                self.optimizer.state[p] = {
                    # A fused step counts on the parameter's device, any other on the CPU.
                    key: (value.to(p.device) if value.dim() or group.get("fused") else value).clone()
                    if torch.is_tensor(value)
                    else value
                    for key, value in saved.items()
                }

    def save_between_steps(self, every: int, save: Callable[[], None]) -> None:
        """Calls ``save`` after every so many steps; ``partial_loss`` then holds the loss of the epoch so far."""
        done = itertools.count(1)

        def after_batch() -> None:
            if next(done) % every == 0:
                save()

        self.after_batch = after_batch

    def resume_epoch(self, partial_loss: Any) -> None:
        """Goes on in the middle of an epoch whose batches so far had this loss; ``None`` at the start of one."""
        self.resumed_loss = partial_loss

    def pace(self, accumulate: int, schedule: Callable[[Any], Any] | None) -> None:
        """Sets how many batches make a step, and how the learning rate goes.

        Args:
            accumulate: Batches of a step; the mean of their gradients is taken, each weighted by its rows, so that
                where the loss is a mean over rows they count as one batch.
            schedule: Returns a ``LambdaLR`` of the optimiser, or ``None`` for a constant rate.
        """
        self.accumulate = accumulate
        if schedule is not None:
            made = schedule(self.optimizer)
            self.rates = list(zip(made.base_lrs, made.lr_lambdas, strict=True))

    def _names(self) -> dict[int, str]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        for member in self.strategy.members:
            for number, p in enumerate(member.parameters()):
                names[id(p)] = f"strategy:{member.name}:{number}"
        return names

    # -- an epoch -------------------------------------------------------------------------------------------------

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float | tuple[float, ...]:
        """Runs one epoch; see RecBole's method. Losses that are not finite end it with stage, batch and term named."""
        checked = _Checked(self, loss_func or self.model.calculate_loss)
        plain = self.accumulate == 1 and self.rates is None and not self.always_hooked
        if plain and not self.strategy.steps and self.after_batch is None:
            return super()._train_epoch(_Counted(train_data, self), epoch_idx, checked)
        return self._hooked_epoch(train_data, checked)

    def begin_epoch(self, epoch: int) -> None:
        """Does what RecBole's ``fit`` does before an epoch: NCL clusters its embeddings every ``m_step`` epochs."""
        every = traits_of(self.model).e_step_every
        if every and epoch % self.config[every] == 0:
            self.model.e_step()

    def _check_nan(self, loss: torch.Tensor) -> None:
        """Named checks are done where the loss is computed."""

    def _hooked_epoch(self, train_data: Any, loss_func: Any) -> float | tuple[float, ...]:
        ctx, members = self.ctx, self.strategy.members
        self.model.train()
        total: Any = self.resumed_loss
        self.resumed_loss = None
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.enable_scaler)
        for batches in _grouped(train_data, self.accumulate):
            self.optimizer.zero_grad()
            shares = _shares(batches)
            for number, batch in enumerate(batches):
                self.share = shares[number]
                for member in members:
                    batch = _rows(member.augment_batch(ctx, batch), member.name)
                if number == 0:
                    ctx.data_gradients = {}
                total = _add(total, self._gradients(batch, loss_func, scaler), self.share)
            scaler.unscale_(self.optimizer) if self.enable_scaler else None
            for member in members:
                with told_by(member, "add_gradients"):
                    member.add_gradients(ctx)
            for member in members:
                with told_by(member, "mask_gradients"):
                    member.mask_gradients(ctx)
            for group, (rate, factor) in zip(self.optimizer.param_groups, self.rates or (), strict=False):
                group["lr"] = rate * factor(ctx.step)
            if self.clip_grad_norm:
                clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
            scaler.step(self.optimizer)
            scaler.update()
            ctx.step += 1
            for member in members:
                member.after_step(ctx)
            if self.after_batch is not None:
                self.partial_loss = total
                self.after_batch()
        return total

    def _gradients(self, batch: Any, loss_func: Any, scaler: Any) -> Any:
        """Leaves the gradients of data loss and terms in ``p.grad``; returns the data loss, or a tuple of its parts."""
        batch = batch.to(self.device)
        with torch.autocast(device_type=self.device.type, enabled=self.enable_amp):
            losses = loss_func(batch)
            terms = self._terms(batch)
        self._backward(scaler, sum(losses) if isinstance(losses, tuple) else losses, terms)
        return losses

    def _terms(self, batch: Any) -> dict[str, torch.Tensor]:
        terms = self.strategy.loss_terms(self.ctx, batch)
        for name, term in terms.items():
            self.check_finite(term, name)
            self.ctx.log(name, term.detach(), self.share)
        return terms

    def _backward(self, scaler: Any, loss: Any, terms: dict[str, torch.Tensor]) -> None:
        differentiable = [term for term in terms.values() if term.requires_grad]
        if self.share != 1:
            loss, differentiable = self.share * loss, [self.share * term for term in differentiable]
        if not self.strategy.wants_data_gradients:
            scaler.scale(sum(differentiable, loss)).backward()
            return
        parameters = self.ctx.parameters()
        before = {
            name: p.grad for name, p in parameters.items() if p.grad is not None
        }  # of this step's earlier batches
        for name in before:
            parameters[name].grad = None
        scaler.scale(loss).backward(retain_graph=bool(differentiable))
        factor = scaler.get_scale() if self.enable_scaler else 1.0
        for name, p in parameters.items():
            if p.grad is None:
                p.grad = before.get(name)
                continue
            gradient = p.grad.detach().clone()
            gradient = gradient / factor if self.enable_scaler else gradient
            earlier = self.ctx.data_gradients.get(name)
            self.ctx.data_gradients[name] = gradient if earlier is None else earlier + gradient
            if name in before:
                p.grad += before[name]
        if differentiable:
            scaler.scale(sum(differentiable[1:], differentiable[0])).backward()

    def check_finite(self, value: torch.Tensor, term: str) -> None:
        """Raises a :class:`TrainingError` naming stage, epoch, batch and term where a loss is NaN or infinite."""
        if not torch.isfinite(value).all():
            where = f"rank {self.group.rank}, " if self.group.size > 1 else ""
            raise TrainingError(
                f"{where}stage {self.ctx.index + 1}, pass {self.ctx.pass_.name!r}, epoch {self.ctx.epoch}, "
                f"batch {self.batch_number}: the term {term!r} is {float(value.detach().float().sum())}; lower "
                f"learning_rate (now {self.ctx.learning_rate:g}) or the strategy's weight, or set "
                f"clip_grad_norm: {{max_norm: 5.0}}"
            )

    batch_number: int = -1


class _Wrapped:
    """A loader around another; everything but iteration is the other's (``set_mode`` of knowledge loaders)."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class Watched(_Wrapped):
    """A loader with a progress bar.

    Args:
        loader: The loader.
        disable: True for no bar, ``None`` for one where stderr is a terminal.
        what: The bar's words.
    """

    def __init__(self, loader: Any, disable: bool | None, what: str) -> None:
        super().__init__(loader)
        self.disable, self.what = disable, what

    def __iter__(self) -> Iterator[Any]:
        yield from tqdm(self.loader, total=len(self.loader), desc=self.what, disable=self.disable, leave=False)


class _Counted(_Wrapped):
    """A loader that counts steps for a trainer that knows no hooks."""

    def __init__(self, loader: Any, trainer: HookedTrainer) -> None:
        super().__init__(loader)
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch
            self.trainer.ctx.step += 1


class _Checked:
    """A loss function whose value is checked, with the batch's number kept for the message."""

    def __init__(self, trainer: HookedTrainer, loss_func: Any) -> None:
        self.trainer, self.loss_func = trainer, loss_func
        self.counter = itertools.count()

    def __call__(self, batch: Any) -> Any:
        self.trainer.batch_number = next(self.counter)
        losses = self.loss_func(batch)
        parts = losses if isinstance(losses, tuple) else (losses,)
        for number, part in enumerate(parts):
            self.trainer.check_finite(part, "data" if len(parts) == 1 else f"data/{number}")
        return losses


def _rows(batch: Any, strategy: str) -> Any:
    """Returns the rows that a strategy's ``augment_batch`` returned, if they are some."""
    if not isinstance(batch, Interaction):
        raise TrainingError(
            f"strategy: {strategy}.augment_batch returned {type(batch).__name__}; it must return the batch, an "
            f"Interaction, with or without rows of its own"
        )
    return batch


def size_of(batch: Interaction) -> int:
    """Returns what the loss of a batch is a mean over: rows, or supervised positions."""
    return int((batch[TARGETS] > 0).sum()) if TARGETS in batch else len(batch)


def _shares(batches: list[Any]) -> list[float]:
    """Returns what each batch of a step counts in it: 1 where it is alone."""
    if len(batches) == 1:
        return [1.0]
    sizes = [size_of(batch) for batch in batches]
    return [size / max(sum(sizes), 1) for size in sizes]


def _grouped(loader: Any, size: int) -> Iterator[list[Any]]:
    """Yields the loader's batches, so many at a time; the last ones may be fewer."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, size)):
        yield group


def _add(total: Any, losses: Any, share: float) -> Any:
    parts = losses if isinstance(losses, tuple) else (losses,)
    values = tuple(part.item() if share == 1 else share * part.item() for part in parts)
    values = (
        values
        if total is None
        else tuple(a + b for a, b in zip(total if isinstance(total, tuple) else (total,), values, strict=True))
    )
    return values if isinstance(losses, tuple) else values[0]
