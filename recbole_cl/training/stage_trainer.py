"""Who trains the epochs of a pass: RecBole's trainer of the model with the hooks in it, or the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from recbole.trainer import trainer as recbole_trainer
from recbole.utils import get_trainer

from recbole_cl import compat, distributed
from recbole_cl.config.models import recbole_name
from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import StageTrainer, contract
from recbole_cl.strategy.base import STEP_HOOKS
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.task_loader import TaskLoader
from recbole_cl.training.data_parallel import DataParallelTrainer
from recbole_cl.training.trainer import HookedTrainer


class PassTrainer(Protocol):
    """What a pass asks of whoever trains its epochs: a :class:`StageTrainer`, and what goes beyond one epoch.

    Attributes:
        partial_loss: Loss of the batches of the running epoch, as ``save_between_steps`` calls.
    """

    partial_loss: Any

    @property
    def n_targets(self) -> int | None:
        """Training targets that the last epoch used, where they are not the loader's."""

    def train_epoch(self, loader: Any, epoch: int) -> Any:
        """Trains an epoch, or the rest of one; returns the loss summed over its steps, parts as a tuple, or None."""

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed pass needs beside the model."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state back."""

    def moments(self) -> dict[str, Any] | None:
        """Returns what the next stage's optimiser may go on from, by parameter name; ``None`` leaves what there is."""

    def load_moments(self, moments: Mapping[str, Any]) -> None:
        """Takes over what :meth:`moments` of an earlier stage returned."""

    def save_between_steps(self, every: int, save: Callable[[], None]) -> None:
        """Calls ``save`` after every so many steps, where there are steps to look between."""

    def resume_epoch(self, partial_loss: Any) -> None:
        """Goes on in the middle of an epoch."""


class OwnTrainer:
    """The trainer that a model brings, as a pass sees it: its epochs are whole, its optimiser its own.

    Args:
        own: What the model's ``stage_trainer`` returned.
    """

    partial_loss: Any = None

    def __init__(self, own: StageTrainer) -> None:
        self.own = own
        self.train_epoch, self.state_dict, self.load_state_dict = own.train_epoch, own.state_dict, own.load_state_dict
        if hasattr(own, "epochs"):
            self.epochs = int(own.epochs)

    @property
    def n_targets(self) -> int | None:
        """Training targets that the last epoch used, where the trainer counts them."""
        return getattr(self.own, "n_targets", None)

    def moments(self) -> None:
        """Returns nothing: what the trainer keeps between stages is the model's state, and RecBole's moments stay."""

    def load_moments(self, moments: Mapping[str, Any]) -> None:
        """Takes nothing over."""

    def save_between_steps(self, every: int, save: Callable[[], None]) -> None:
        """Does nothing: there are no steps to look between."""

    def resume_epoch(self, partial_loss: Any) -> None:
        """Does nothing: an epoch is trained as a whole."""


def pass_trainer(ctx: StageContext, strategy: Composite, learning_rate: float) -> PassTrainer:
    """Returns the trainer of the pass ``ctx.pass_``.

    Args:
        ctx: The stage; its model is trained.
        strategy: The strategies.
        learning_rate: Learning rate of the pass.

    Raises:
        ConfigError: If a model that trains its stages by itself is asked for steps that it does not have.
    """
    config, model = ctx.config, contract(ctx.model)
    own = model.stage_trainer(ctx, learning_rate)
    if own is None:
        return make_trainer(ctx, strategy, learning_rate)
    if distributed.current().size > 1:
        raise ConfigError(
            f"model: {config['model']} cannot be trained by several processes: it trains its stages by itself; "
            f"start it without torchrun"
        )
    hooked = strategy.hooked(*(hook for hook in STEP_HOOKS if hook not in model.strategy_hooks))
    if hooked:
        names = ", ".join(s.name for s in hooked)
        raise ConfigError(
            f"strategy: {names} cannot serve the model {config['model']}, which trains its stages by itself: there "
            f"are no optimiser steps to take part in; use FineTune, FullRetrain, Joint, Scratch or Pretrain"
        )
    if (asked := _asked(config)) is not None:
        raise ConfigError(
            f"property {asked!r} has no effect on the model {config['model']}, which trains its stages by itself; "
            f"leave it out"
        )
    ctx.learning_rate = learning_rate
    return OwnTrainer(own)


PACE = {"accumulate_gradients": 1, "warmup": 0, "lr_schedule": "constant"}
"""Properties of how the optimiser steps, and what leaves RecBole's way as it is."""


def _asked(config: Any) -> str | None:
    """Returns the first property that asks for other steps than RecBole's, if one does."""
    return next((key for key, neutral in PACE.items() if config[key] != neutral), None)


COOPERATIVE = ("Trainer", "KGTrainer", "KGATTrainer", "MKRTrainer", "TraditionalTrainer")
"""RecBole trainers whose epochs go through ``Trainer._train_epoch``, so hooks reach every step."""


def make_trainer(ctx: StageContext, strategy: Composite, learning_rate: float) -> HookedTrainer:
    """Returns a trainer of the model's RecBole class with the hooks in it.

    Args:
        ctx: The stage; its model is trained.
        strategy: The strategies.
        learning_rate: Learning rate of the pass.

    Raises:
        ConfigError: If RecBole's trainer of the model bypasses ``Trainer._train_epoch`` and a strategy needs steps.
    """
    config, model = ctx.config, ctx.model
    base = get_trainer(config["MODEL_TYPE"], recbole_name(type(model)))
    if strategy.steps and base.__name__ not in COOPERATIVE:
        names = ", ".join(s.name for s in strategy.members)
        raise ConfigError(
            f"strategy: {names} cannot serve the model {config['model']}: RecBole's {base.__name__} has a training "
            f"loop of its own without steps to hook into; use FineTune, FullRetrain, Joint, Scratch or Pretrain"
        )
    hooked: type[HookedTrainer] = HookedTrainer
    if distributed.current().size > 1:
        hooked = DataParallelTrainer
        if base.__name__ not in COOPERATIVE:
            raise ConfigError(
                f"model: {config['model']} cannot be trained by several processes: RecBole's {base.__name__} has a "
                f"training loop of its own; start it without torchrun"
            )
    bases = (hooked,) if base is recbole_trainer.Trainer else (base, hooked)
    with compat.without_side_effects():
        trainer = type(f"Hooked{base.__name__}", bases, {})(config, model)
    trainer.strategy, trainer.ctx = strategy, ctx
    groups = _groups(ctx, learning_rate)
    own = strategy.parameters()
    if groups[0]["params"] or own:
        groups += [{"params": own}] if own else []
        trainer.optimizer = trainer._build_optimizer(params=groups, learning_rate=learning_rate)
        if config["train_positions"] == "all" and contract(model).trains_all_positions:
            _fuse(trainer.optimizer)
    ctx.learning_rate = learning_rate
    return trainer


def _groups(ctx: StageContext, learning_rate: float) -> list[dict[str, Any]]:
    """Returns the optimiser's groups: one of all trainable parameters, or those that the model gives.

    Raises:
        ConfigError: If the groups leave a trainable parameter out, or name one twice or one that is not the model's.
    """
    named = ctx.parameters()
    groups = contract(ctx.model).parameter_groups(ctx, learning_rate)
    if groups is None:
        return [{"params": list(named.values())}]
    given = [id(p) for group in groups for p in group["params"]]
    missing = [name for name, p in named.items() if id(p) not in given]
    strange = set(given) - {id(p) for p in ctx.model.parameters()}
    if missing or strange or len(given) != len(set(given)):
        what = f"leave out {', '.join(missing[:3])}" if missing else "name a parameter twice"
        what = "name a parameter that is none of the model's" if strange else what
        raise ConfigError(
            f"model: the parameter_groups of {ctx.config['model']} {what}; every trainable parameter stands in one"
        )
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]


def pace(trainer: PassTrainer, config: Any, epochs: int, loader: Any) -> None:
    """Lets a trainer accumulate gradients and change its learning rate, as the configuration asks.

    Args:
        trainer: The trainer.
        config: ``accumulate_gradients``, ``warmup`` and ``lr_schedule`` are read.
        epochs: Epochs of the pass at most; the schedule ends with them.
        loader: Its length is the batches of an epoch.

    Raises:
        ConfigError: If several processes or a pass over several tasks shall accumulate gradients, or the trainer's
            epochs are no walks over the loader.
    """
    accumulate, warmup, name = (config[key] for key in PACE)
    asked = _asked(config)
    if not isinstance(trainer, HookedTrainer) or asked is None:
        return
    base = get_trainer(config["MODEL_TYPE"], recbole_name(config.model_class)).__name__
    alternates = base == "KGTrainer" and None not in (config["train_rec_step"], config["train_kg_step"])
    if base not in ("Trainer", "KGTrainer") or alternates:
        raise ConfigError(
            f"property {asked!r} cannot serve the model {config['model']}: an epoch of RecBole's {base} is not one "
            f"walk over the batches with a step for each; leave it out"
        )
    if accumulate > 1 and distributed.current().size > 1:
        raise ConfigError(
            f"property 'accumulate_gradients' is {accumulate}, which several processes cannot do yet; set "
            f"train_batch_size to what one of their steps shall see, or start it without torchrun"
        )
    if accumulate > 1 and isinstance(loader, TaskLoader):
        raise ConfigError(
            f"property 'accumulate_gradients' is {accumulate}, but each step of this strategy already has a batch of "
            f"every task; leave it out, or set train_batch_size"
        )
    steps = epochs * -(-len(loader) // accumulate)
    schedule = None
    if name != "constant" or warmup:
        warm = round(warmup * steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)

        def schedule(optimizer: torch.optim.Optimizer) -> Any:
            from transformers import get_scheduler  # it takes seconds to import

            kind = "constant_with_warmup" if name == "constant" else name
            return get_scheduler(kind, optimizer, num_warmup_steps=warm, num_training_steps=steps)

    trainer.pace(accumulate, schedule)


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Lets Adam take its step in one operation a tensor. Elsewhere the bits stay those of RecBole's optimiser."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if type(optimizer) is torch.optim.Adam and all(p.is_floating_point() for p in parameters):
        for group in optimizer.param_groups:
            group["fused"] = True
