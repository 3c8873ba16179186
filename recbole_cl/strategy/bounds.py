"""The bounds between which every strategy lies: no update, plain update, full retraining."""

from __future__ import annotations

from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import Pass, StageContext

_NOT_NEUTRAL = "a bound has no strength that could be zero"


def only_last_row(ctx: StageContext) -> bool:
    """Tells whether a strategy that starts afresh at each stage need not train this one.

    That is where no result is asked of the stage, and no strategy beside it learns from the stage's model.
    """
    alone = len(ctx.config.strategy_specs()) == 1
    return alone and ctx.config["matrix_cells"] == "last_row" and ctx.index + 1 < len(ctx.stream)


@strategies.register()
class FineTune(Strategy):
    """Goes on training on each stage's data: the lower bound that a strategy must beat on old stages."""

    prefix = "finetune"
    base_is_finetune = True
    neutral = {}
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass] | None:
        return None


@strategies.register()
class Pretrain(Strategy):
    """Trains on the first stage, then is only evaluated: nothing is forgotten, nothing is learnt."""

    prefix = "pretrain"
    base_is_finetune = True
    plans_passes = True
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass()] if ctx.index == 0 else []


@strategies.register()
class FullRetrain(Strategy):
    """Trains from a new initialisation on all data so far, at every stage: the costly upper bound.

    Where only the last row of the matrix is asked for (``matrix_cells: last_row``) it trains at the last stage only,
    to the same weights, for a fresh start depends on no stage before.
    """

    prefix = "fullretrain"
    plans_passes = True
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    @property
    def begins_anew(self) -> bool:
        return True

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        if only_last_row(ctx):
            return []
        return [Pass(init="fresh", data="so_far")]


@strategies.register()
class Joint(Strategy):
    """Goes on training, on all data so far."""

    prefix = "joint"
    base_is_finetune = True
    plans_passes = True
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass(data="so_far")]


@strategies.register()
class Scratch(Strategy):
    """Trains from a new initialisation on the stage alone: plasticity without any past."""

    prefix = "scratch"
    plans_passes = True
    why_not_neutral = _NOT_NEUTRAL
    kind = "bound"

    @property
    def begins_anew(self) -> bool:
        return True

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass(init="fresh", data="stage", graph="stage")]
