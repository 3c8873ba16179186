"""Several strategies as one; the trainer and the runner speak to it alone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.model.capabilities import capabilities
from recbole_cl.strategy.base import STEP_HOOKS, Strategy, overrides
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.stream.stage import Stage
from recbole_cl.stream.vocabulary import Growth

PARTS = "way of training parts only"
"""Kind of the strategies that freeze all but a part of their own: two would each freeze the other's."""


def _told(value: Any) -> str:
    """Returns what a value is, in words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__} ({value!r:.40})"


@contextlib.contextmanager
def told_by(strategy: Strategy, hook: str) -> Iterator[None]:
    """A context in which a strategy's hook computes with tensors of its own, which may lack the rows of who is new.

    Raises:
        ConfigError: If shapes do not go together and the strategy has no ``grow``.
    """
    try:
        yield
    except RuntimeError as error:
        if overrides(strategy, "grow") or not re.search(r"size of tensor|shape", str(error)):
            raise
        raise ConfigError(
            f"strategy: {strategy.name}.{hook}: {error} A tensor that it keeps of a parameter needs rows for new users "
            f"and items, and it has no grow(growth); give it one, as docs/write_a_strategy.md does: state[name] = "
            f"growth.expand(name, state[name])"
        ) from error


class Composite:
    """Several strategies as one, in canonical (priority, name) order: any listing gives the same bits.

    Args:
        members: The strategies.

    Raises:
        ConfigError: If two members are of a kind that excludes itself, or the same strategy is listed twice.
    """

    def __init__(self, members: Iterable[Strategy]) -> None:
        self.members = sorted(members, key=lambda s: (s.priority, s.name))
        names = [s.name for s in self.members]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"strategy: {name} is listed twice")
        for kind in ("bound", "replay", PARTS):
            same = [s.name for s in self.members if s.kind == kind]
            if len(same) > 1:
                raise ConfigError(f"strategy: {' and '.join(same)} are both a {kind}; keep one of them")
        self._one_plan([s.name for s in self.members if s.plans_passes])
        self.planner: str | None = None

    @staticmethod
    def _one_plan(names: list[str]) -> None:
        if len(names) > 1:
            raise ConfigError(f"strategy: {' and '.join(names)} both plan a stage's passes; keep one")

    def hooked(self, *hooks: str) -> list[Strategy]:
        """Returns the members that implement one of the hooks."""
        return [s for s in self.members if any(overrides(s, hook) for hook in hooks)]

    @property
    def steps(self) -> bool:
        """True where a member takes part in optimiser steps."""
        return bool(self.hooked(*STEP_HOOKS))

    @property
    def wants_data_gradients(self) -> bool:
        """True where a member needs the data gradient apart."""
        return any(s.wants_data_gradients for s in self.members)

    def check(self, config: Any, model: nn.Module) -> None:
        """Checks every member against the model's capabilities.

        Raises:
            ConfigError: Naming the strategy, the model and what is missing.
        """
        have = capabilities(model)
        for s in self.members:
            missing = sorted(s.needs - have)
            if missing:
                raise ConfigError(
                    f"strategy: {s.name} cannot serve the model {config['model']}: it needs {', '.join(missing)}, "
                    f"the model offers {', '.join(sorted(have)) or 'none of the optional capabilities'}"
                )
            s.check(config, model)

    def prepare_model(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.prepare_model(ctx)

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        """Returns the one plan that a member gives (``planner`` is its name), or one default pass.

        Raises:
            ConfigError: If two members give a plan, of which one did not say so (``plans_passes``).
        """
        plans = [(s.name, plan) for s in self.members if (plan := s.plan_stage(ctx)) is not None]
        self._one_plan([name for name, _ in plans])
        self.planner = plans[0][0] if plans else None
        return plans[0][1] if plans else [Pass()]

    def companions_state(self, ctx: StageContext) -> dict[str, Any]:
        """Returns what an auxiliary pass may not change: the states of who did not plan it, and of their generators."""
        own = f"{self.planner}/"
        return {
            "strategies": {s.name: s.state_dict() for s in self.members if s.name != self.planner},
            "generators": {name: value for name, value in ctx.state_dict().items() if not name.startswith(own)},
        }

    def load_companions_state(self, ctx: StageContext, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`companions_state` returned; generators that came since are forgotten."""
        for s in self.members:
            if s.name != self.planner:
                s.load_state_dict(state["strategies"][s.name])
        ctx.forget_generators(f"{self.planner}/")
        ctx.load_state_dict(state["generators"])

    def adjust_scores(self, ctx: StageContext, batch: Interaction, scores: torch.Tensor) -> torch.Tensor:
        """Passes the scores through every member."""
        for s in self.members:
            scores = s.adjust_scores(ctx, batch, scores)
        return scores

    def serving(self, ctx: StageContext, stage: Stage) -> StageContext:
        """Returns the context that the first member with one of its own gives, or ``ctx``."""
        for s in self.members:
            served = s.serving(ctx, stage)
            if served is not ctx:
                return served
        return ctx

    def begin_stage(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.begin_stage(ctx)

    def first_step(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.first_step(ctx)

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        """Returns every member's terms by name.

        Raises:
            ConfigError: If what a member returns is no dict of scalar tensors.
        """
        found: dict[str, torch.Tensor] = {}
        for s in self.members:
            with told_by(s, "loss_terms"):
                terms: Any = s.loss_terms(ctx, batch)
            if not isinstance(terms, Mapping):
                raise ConfigError(
                    f"strategy: {s.name}.loss_terms returned {_told(terms)}; it must return a dict of names to scalar "
                    f"tensors, {{}} for none"
                )
            for name, term in terms.items():
                if not isinstance(term, torch.Tensor) or term.numel() != 1:
                    raise ConfigError(
                        f"strategy: {s.name}.loss_terms returned {_told(term)} as {name!r}; it must be a tensor of one "
                        f"number, with the graph of what it is computed of, such as weight * drift.square().sum() "
                        f"(torch.zeros(()) for nothing)"
                    )
            found.update(terms)
        return found

    def begin_pass(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.begin_pass(ctx)

    def end_pass(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.end_pass(ctx)

    def end_stage(self, ctx: StageContext) -> None:
        """Runs every member's hook."""
        for s in self.members:
            s.end_stage(ctx)

    def stage_costs(self, ctx: StageContext) -> dict[str, Any]:
        """Returns the members' entries."""
        return {name: value for s in self.members for name, value in s.stage_costs(ctx).items()}

    def reports(self, ctx: StageContext) -> dict[str, dict[str, Any]]:
        """Returns what each member tells beside the matrix, by its name."""
        return {s.name: s.report(ctx) for s in self.members}

    def grow(self, growth: Growth) -> None:
        """Grows every member."""
        for s in self.members:
            s.grow(growth)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the members' own trainable parameters."""
        return [p for s in self.members for p in s.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """Returns every member's state by name."""
        return {s.name: s.state_dict() for s in self.members}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the members' states back.

        Raises:
            KeyError: If a member's state is missing.
        """
        for s in self.members:
            if s.name not in state:
                raise KeyError(f"the state of the strategy {s.name} is missing")
            s.load_state_dict(state[s.name])

    def side_stores(self) -> dict[str, str]:
        """Returns the members' durable stores."""
        return {name: path for s in self.members for name, path in s.side_stores().items()}
