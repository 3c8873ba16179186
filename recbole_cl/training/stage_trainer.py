"""Who trains a stage: RecBole's trainer of the model with the hooks in it, or the model's own."""

from __future__ import annotations

import torch
from recbole.trainer import trainer as recbole_trainer
from recbole.utils import get_trainer

from recbole_cl import compat, distributed
from recbole_cl.errors import ConfigError
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.training.data_parallel import SharedTrainer
from recbole_cl.training.trainer import HookedTrainer

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
    base = get_trainer(config["MODEL_TYPE"], config["model"])
    if strategy.steps and base.__name__ not in COOPERATIVE:
        names = ", ".join(s.name for s in strategy.members)
        raise ConfigError(
            f"strategy: {names} cannot serve the model {config['model']}: RecBole's {base.__name__} has a training "
            f"loop of its own without steps to hook into; use FineTune, FullRetrain, Joint, Scratch or Pretrain"
        )
    hooked: type[HookedTrainer] = HookedTrainer
    if distributed.current().size > 1:
        hooked = SharedTrainer
        if base.__name__ not in COOPERATIVE:
            raise ConfigError(
                f"model: {config['model']} cannot be trained by several processes: RecBole's {base.__name__} has a "
                f"training loop of its own; start it without torchrun"
            )
    bases = (hooked,) if base is recbole_trainer.Trainer else (base, hooked)
    with compat.without_side_effects():
        trainer = type(f"Hooked{base.__name__}", bases, {})(config, model)
    trainer.strategy, trainer.ctx = strategy, ctx
    trainable = [p for p in model.parameters() if p.requires_grad]
    own = strategy.parameters()
    if trainable or own:
        groups = [{"params": trainable}] + ([{"params": own}] if own else [])
        trainer.optimizer = trainer._build_optimizer(params=groups, learning_rate=learning_rate)
        if config["train_positions"] == "all" and getattr(model, "trains_all_positions", False):
            _fuse(trainer.optimizer)
    ctx.learning_rate = learning_rate
    return trainer


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Lets Adam take its step in one operation a tensor. Elsewhere the bits stay those of RecBole's optimiser."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if type(optimizer) is torch.optim.Adam and all(p.is_floating_point() for p in parameters):
        for group in optimizer.param_groups:
            group["fused"] = True
