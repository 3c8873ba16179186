"""The contract of a strategy, and what a stage gives it.

A strategy is one file with a class that derives from :class:`Strategy`, decorated with ``@strategies.register()``,
and a properties file ``properties/strategy/<Name>.yaml`` whose keys start with the class's ``prefix``. Hooks return
what they want; they never reach into the trainer. When each runs::

    a run begins, and each stage         prepare_model    the stage's model is new, old knowledge not yet in it
                                         grow             rows for who is new since the last stage (not at the first)
    a stage begins                       begin_stage      once: not where a run is resumed inside the stage
                                         plan_stage       also on resume; says the passes and changes nothing
      a pass begins                      begin_pass       also on resume, the checkpoint's weights and state in place;
                                                          says which parameters are trained, the optimiser comes next
                                         first_step       once, before the pass's first step: not on resume
        a batch                          augment_batch, loss_terms
        an optimiser step                add_gradients, mask_gradients, (clipping, step), after_step
      a pass ends, best weights in place end_pass
    a stage ends, best weights in place  end_stage
    targets are answered                 serving, adjust_scores
    users are forgotten                  without_users

On resume the order is: ``prepare_model``, the state as the stage began, ``plan_stage``, the checkpoint's weights and
state, ``begin_pass``, the optimiser's state; then training goes on with the next batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import nearest
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.stream.stage import Stage
from recbole_cl.stream.vocabulary import Growth

if TYPE_CHECKING:
    from recbole_cl.model.forget import Forgetting


class Strategy:
    """Base of all strategies; every hook has a neutral default.

    Args:
        parameters: The strategy's own parameters, without prefix, defaults filled in.

    Attributes:
        prefix: Prefix of its properties (``ewc`` for ``ewc_lambda``).
        defaults: Defaults of parameters without a properties file (a strategy in another package).
        neutral: Parameters under which it equals FineTune bit for bit with its code still running, or ``None``.
        why_not_neutral: The reason where there are none.
        needs: Capabilities that the model must have (see :func:`recbole_cl.model.capabilities.capabilities`).
        excludes: Kinds that cannot be combined with another strategy of the same kind (``bound``, ``replay``).
        kind: Its own kind.
        priority: Order of combination; equal priorities are ordered by name.
        plans_passes: Its :meth:`plan_stage` gives passes at some stage; two such strategies do not compose.
        wants_data_gradients: Keep the gradients of the data loss apart (``ctx.data_gradients``).
        base_is_finetune: It trains, scores and costs the first stage as FineTune does, and what it notes of it it notes
            in :meth:`end_stage` alone: its runs may take the first stage over from another run (``base_run``).
    """

    prefix: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any] | None] = None
    why_not_neutral: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    kind: ClassVar[str] = ""
    priority: ClassVar[int] = 50
    plans_passes: ClassVar[bool] = False
    wants_data_gradients: ClassVar[bool] = False
    base_is_finetune: ClassVar[bool] = False

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        self.params: dict[str, Any] = dict(parameters or {})

    @property
    def name(self) -> str:
        """Its registered name."""
        return type(self).__name__

    @property
    def begins_anew(self) -> bool:
        """True where it trains a stage after the first from new weights, which not every model can (PCL, parts)."""
        return False

    def check(self, config: Any, model: nn.Module) -> None:
        """Raises a :class:`ConfigError` where parameters or the model make no sense for it."""

    def prepare_model(self, ctx: StageContext) -> None:
        """Adds deterministic structure (adapters, masks) to ``ctx.model``; runs again before a checkpoint is loaded."""

    def begin_stage(self, ctx: StageContext) -> None:
        """Changes the model or its own state as a stage begins; never where a run is resumed inside the stage."""

    def plan_stage(self, ctx: StageContext) -> list[Pass] | None:
        """Returns the stage's passes, or ``None`` for one pass over the stage's own data; changes nothing."""
        return None

    def begin_pass(self, ctx: StageContext) -> None:
        """Says which parameters a pass (``ctx.pass_``) trains; also on resume, then with the checkpoint's weights."""

    def first_step(self, ctx: StageContext) -> None:
        """Notes what a pass starts from: right before its first step, never where a run is resumed inside the pass."""

    def augment_batch(self, ctx: StageContext, batch: Interaction) -> Interaction:
        """Returns the batch, with rows added (replay)."""
        return batch

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        """Returns scalar terms by name; the trainer adds them to the data loss, logs and checks each."""
        return {}

    def add_gradients(self, ctx: StageContext) -> None:
        """Adds to ``p.grad`` in closed form, after backward and before clipping."""

    def mask_gradients(self, ctx: StageContext) -> None:
        """Removes from ``p.grad`` what must not move; runs after every ``add_gradients``."""

    def after_step(self, ctx: StageContext) -> None:
        """Runs after each optimiser step."""

    def adjust_scores(self, ctx: StageContext, batch: Interaction, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores at test time, shape ``[B, n_items]``, or ``[B]`` of the rows' own items (value tasks)."""
        return scores

    def serving(self, ctx: StageContext, stage: Stage) -> StageContext:
        """Returns the context whose model answers for ``stage``: ``ctx``, or :meth:`StageContext.with_model`.

        For strategies that keep a model, or a part of one, for each task. The kept model's own ``known`` counts.
        """
        return ctx

    def end_pass(self, ctx: StageContext) -> None:
        """Runs after each pass (``ctx.pass_``); the model holds the pass's best weights."""

    def end_stage(self, ctx: StageContext) -> None:
        """Takes importances, exemplars, anchors; the model holds the stage's best weights."""

    def stage_costs(self, ctx: StageContext) -> dict[str, Any]:
        """Returns entries of the stage's costs that the strategy knows better than the model (``backbones`` kept)."""
        return {}

    def report(self, ctx: StageContext) -> dict[str, Any]:
        """Returns what is to be told of a stage beside the matrix; see ``ContinualModel.report``."""
        return {}

    def penalty(self, ctx: StageContext) -> torch.Tensor:
        """Returns the current value of what :meth:`add_gradients` differentiates (0 where it does nothing)."""
        return torch.zeros(())

    def parameters(self) -> Iterable[nn.Parameter]:
        """Returns its own trainable parameters."""
        return ()

    def grow(self, growth: Growth) -> None:
        """Grows its tensors to the next stage's vocabulary."""

    def state_dict(self) -> dict[str, Any]:
        """Returns everything a resumed run needs: tensors, arrays, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state back.

        Raises:
            KeyError: If a key is missing; the message names it.
        """

    def without_users(self, state: Mapping[str, Any], forgetting: Forgetting) -> Mapping[str, Any]:
        """Returns a saved state of this strategy without users who are to be forgotten.

        By default named tensors lose their rows, and memories with a column ``user`` or ``users`` their entries.
        """
        return forgetting.nest(state)  # type: ignore[no-any-return]

    def side_stores(self) -> dict[str, str]:
        """Returns durable stores outside the checkpoint (name to path); they are named in it, never rolled back."""
        return {}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in sorted(self.params.items()))
        return f"{self.name}({inner})"


def overrides(strategy: Strategy, hook: str) -> bool:
    """Tells whether a strategy implements a hook."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)


STEP_HOOKS = ("augment_batch", "loss_terms", "add_gradients", "mask_gradients", "after_step")


def require(state: Mapping[str, Any], *keys: str) -> None:
    """Raises a :class:`KeyError` that names the missing keys of a state."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise KeyError(f"state misses {', '.join(missing)}{nearest(missing[0], state)}")
