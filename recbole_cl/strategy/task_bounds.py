"""Bounds of a stream of tasks that keep one model for each task."""

from __future__ import annotations

from recbole_cl.registry import strategies
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.parts.task_models import ModelPerTask, start_from

_NOT_NEUTRAL = "a bound has no strength that could be zero"


@strategies.register()
class SingleTask(ModelPerTask):
    """A model of its own for each task, from a new initialisation: no transfer, no forgetting, a backbone a task.

    The row "SASRec" among the baselines of Prompt-based Continual Learning (arXiv 2502.19628, section 4.1).
    """

    prefix = "single_task"
    plans_passes = True
    why_not_neutral = _NOT_NEUTRAL

    @property
    def begins_anew(self) -> bool:
        return True

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass(init="fresh", data="stage", graph="stage")]


@strategies.register()
class FineAll(ModelPerTask):
    """A model of its own for each task, every one fine-tuned from the first task's: transfer from the first task alone.

    The row "FineAll" among the baselines of Prompt-based Continual Learning (arXiv 2502.19628, section 4.1). At stage
    k > 0 training starts at the weights with which stage 0 ended, whatever the stages between learnt; users and items
    that are new since then start as in FineTune.
    """

    prefix = "fine_all"
    why_not_neutral = _NOT_NEUTRAL

    def begin_stage(self, ctx: StageContext) -> None:
        if ctx.index:
            start_from(ctx, self.models["0"]["model"], 0)
