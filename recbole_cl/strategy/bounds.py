"""The bounds between which every strategy lies: no update, plain update, full retraining."""

from __future__ import annotations

from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Pass, StageContext, Strategy

_NOT_NEUTRAL = "a bound has no strength that could be zero"


@strategies.register()
class FineTune(Strategy):
    """Goes on training on each stage's data: the lower bound that a strategy must beat on old stages."""

    prefix = "finetune"
    neutral = {}
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass] | None:
        return None


@strategies.register()
class Pretrain(Strategy):
    """Trains on the first stage, then is only evaluated: nothing is forgotten, nothing is learnt."""

    prefix = "pretrain"
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass()] if ctx.index == 0 else []


@strategies.register()
class FullRetrain(Strategy):
    """Trains from a new initialisation on all data so far, at every stage: the costly upper bound."""

    prefix = "fullretrain"
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass(init="fresh", data="so_far")]


@strategies.register()
class Joint(Strategy):
    """Goes on training, on all data so far."""

    prefix = "joint"
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass(data="so_far")]


@strategies.register()
class Scratch(Strategy):
    """Trains from a new initialisation on the stage alone: plasticity without any past."""

    prefix = "scratch"
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass(init="fresh", data="stage", graph="stage")]
