"""One adapter that goes on from stage to stage, held by nothing."""

from __future__ import annotations

from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.composite import PARTS


@strategies.register()
class SingleLoRA(Strategy):
    """The single evolving LoRA of PESO's paper: what FineTune is for a model with a continual adapter."""

    prefix = "single_lora"
    neutral = {}
    needs = frozenset({"continual_lora"})
    base_is_finetune = True
    kind = PARTS
