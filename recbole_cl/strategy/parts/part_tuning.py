"""Training only small parts of a model: ``trainable: prompt|adapter|lora`` under any strategy.

A part of strategies, not a registered strategy. :class:`PartTuning` holds everything that is not the part;
``Adapter``, ``PromptTuning`` and ``DualLoRA`` build on it, and :class:`Trainable` is what the property ``trainable``
puts beside the strategies that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from recbole_cl.errors import ConfigError
from recbole_cl.model.adapters import add_adapters, add_lora, add_prompts, part_names, require_places
from recbole_cl.model.contract import contract
from recbole_cl.registry import strategies
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.composite import PARTS
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.stream.vocabulary import Growth


class PartTuning(Strategy):
    """Trains the whole model first, and from stage ``trainable_from`` on only its parts and the rows of who is new.

    Three phases of a parameter entry::

        stage < trainable_from     base: trained        parts: held at their start
        stage = trainable_from     base: frozen         parts: trained
        a row that came since      trained, for a frozen random row would stay one

    The parts are in the model from the first stage on, so names never change, and importances of the base stage are
    taken in the coordinates that will be trained. They start as nothing (LoRA's B = 0, an adapter's up = 0), or are
    switched off (prompts), so the base stage has the bits that it has without them. What they are initialised with
    comes from a generator of their own.

    Frozen entries keep their bytes whatever the optimiser does (moments carried over, weight decay): their gradient is
    set to zero before clipping, and their values are put back after the step. A table with new rows therefore counts
    as trained; its old rows do not (``model.masked_entries`` for the report). Running averages of BatchNorm are no
    parameters, and go on.
    """

    kind = PARTS
    priority = 0  # before all others: they find the parts, and see steps after frozen entries were put back
    needs = frozenset({"gradient"})
    why_not_neutral: ClassVar[str] = "a frozen base is another model to train than a free one, whatever the part's size"

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.frozen: dict[str, torch.Tensor] = {}  # bool, the base's shape, grown: True is frozen
        self._before: dict[str, torch.Tensor] = {}  # lives from mask_gradients to after_step: no state
        self._masks: dict[str, torch.Tensor] | None = None  # follows from the above and the stage: no state

    # -- for subclasses -------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises a :class:`ConfigError` where a parameter makes no sense."""

    def attach(self, ctx: StageContext) -> None:
        """Puts the parts into ``ctx.model`` (deterministic in the stage); draws from a random state of its own."""
        raise NotImplementedError

    def trained_parts(self, ctx: StageContext, names: list[str]) -> list[str]:
        """Returns which of the parts' parameters this pass trains; ``ctx.pass_`` is a default one outside passes."""
        return names

    @property
    def who(self) -> str:
        """Its name in messages."""
        return f"strategy: {self.name}"

    # -- hooks ----------------------------------------------------------------------------------------------------

    @staticmethod
    def adapts(ctx: StageContext) -> bool:
        """Tells whether the stage trains parts only."""
        return ctx.index >= int(ctx.config["trainable_from"])

    def prepare_model(self, ctx: StageContext) -> None:
        self.validate()  # ``check`` runs when the parts are there already
        model = ctx.model
        made = {id(p) for p in model.parameters() if p.requires_grad}
        with ModelRandomness(derive(ctx.config["seed"], ctx.index, f"parts/{self.name}")).owned():
            self.attach(ctx)
        if not hasattr(model, "own_trainable"):  # a model that lives on from stage to stage has frozen some since
            model.own_trainable = frozenset(name for name, p in model.named_parameters() if id(p) in made)
        self._choose(ctx, {})  # masks of this stage's shapes are not known yet; a pass begins by settling

    def check(self, config: Any, model: Any) -> None:
        for name, params in config.strategy_specs():
            cls = strategies.get(name)
            if cls(params).begins_anew:
                raise ConfigError(_nothing_to_adapt(self, f"the strategy {name}"))
            if not issubclass(cls, PartTuning) and cls.mask_gradients is not Strategy.mask_gradients:
                raise ConfigError(
                    f"{self.who} cannot be combined with the strategy {name}, which decides itself what of the whole "
                    f"model moves; keep one of them"
                )

    def plan_stage(self, ctx: StageContext) -> list[Pass] | None:
        start = int(ctx.config["trainable_from"])
        if start >= len(ctx.stream):
            raise ConfigError(
                f"property 'trainable_from' is {start}, but the stream has {len(ctx.stream)} stages: {self.who} would "
                f"never train its parts; make it at most {max(len(ctx.stream) - 1, 1)}, or have more stages"
            )
        return None

    def begin_stage(self, ctx: StageContext) -> None:
        self.settle(ctx)

    def begin_pass(self, ctx: StageContext) -> None:
        self.settle(ctx)  # a pass over another graph trains another instance of the model

    def settle(self, ctx: StageContext) -> None:
        """Says which parameters of the model in training are trained, and which of their entries are not.

        Not for other models that are prepared meanwhile (a teacher is one of the stage before).

        Raises:
            RuntimeError: If a mask has not grown with its table.
        """
        masks = {}
        if self.adapts(ctx):
            masks = {name: mask.to(ctx.device) for name, mask in self.frozen.items()}
        self._masks = self._choose(ctx, masks)
        ctx.model.masked_entries = sum(int(mask.sum()) for mask in self._masks.values())

    def _choose(self, ctx: StageContext, frozen: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sets ``requires_grad`` of every parameter; returns the masks of those that are trained in part."""
        parts, adapts = part_names(ctx.model), self.adapts(ctx)
        wanted = self.trained_parts(ctx, parts)
        masks = {}
        for name, p in ctx.model.named_parameters():
            mask = frozen.get(name)
            if name in parts:
                p.requires_grad_(name in wanted)
                if not adapts:
                    masks[name] = torch.ones_like(p, dtype=torch.bool)
                continue
            if mask is not None and mask.shape != p.shape:
                raise RuntimeError(f"{self.who}: the mask of {name!r} has {mask.shape}, the model {p.shape}")
            p.requires_grad_(name in ctx.model.own_trainable and (mask is None or not bool(mask.all())))
            if mask is not None and mask.any():
                masks[name] = mask
        return {name: mask for name, mask in masks.items() if ctx.model.get_parameter(name).requires_grad}

    def mask_gradients(self, ctx: StageContext) -> None:
        if self._masks is None:  # made anew in the middle of a pass
            self.settle(ctx)
        for name, mask in (self._masks or {}).items():
            p = ctx.model.get_parameter(name)
            if mask.all():  # no gradient rather than zeros: clipping and optimiser do without it, as without parts
                p.grad = None
                continue
            if p.grad is not None:
                p.grad.masked_fill_(mask, 0.0)
            self._before[name] = p.detach()[mask]

    def after_step(self, ctx: StageContext) -> None:
        with torch.no_grad():
            for name, values in self._before.items():
                ctx.model.get_parameter(name)[(self._masks or {})[name]] = values
        self._before = {}

    def end_stage(self, ctx: StageContext) -> None:
        self.settle(replace(ctx, pass_=Pass()))
        if not self.adapts(ctx):
            parts = set(part_names(ctx.model))
            own = {name: p for name, p in ctx.model.named_parameters() if name not in parts}
            self.frozen = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in own.items()}

    def grow(self, growth: Growth) -> None:
        self.frozen = {name: growth.expand(name, mask) for name, mask in self.frozen.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": dict(self.frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "frozen")
        self.frozen = {name: mask.bool() for name, mask in state["frozen"].items()}


class Trainable(PartTuning):
    """The property ``trainable``: any strategy, but only prompts, adapters or LoRA move after the base stage.

    Args:
        parameters: ``kind`` (``prompt``, ``adapter`` or ``lora``) and ``size`` (tokens, bottleneck or rank); of LoRA
            ``alpha`` and ``dropout``.
    """

    @property
    def who(self) -> str:
        return f"trainable: {self.params['kind']}"

    def attach(self, ctx: StageContext) -> None:
        if self.params["kind"] == "lora":
            attach_lora(ctx, self.who, self.params, rank=int(self.params["size"]))
        else:
            attach(ctx, self.params["kind"], int(self.params["size"]), self.who)


def attach_lora(
    ctx: StageContext, who: str, params: Mapping[str, Any], rank: int, names: Sequence[str] = ("lora",)
) -> None:
    """Puts low-rank updates into ``ctx.model``.

    Args:
        ctx: The stage; updates hide no inputs from themselves before stage ``trainable_from``, for then they are held
            and the base must draw what it draws without them.
        who: Who asks, for the message.
        params: ``alpha`` (``None`` for the rank) and ``dropout``.
        rank: Rank of each update.
        names: Names of the updates.

    Raises:
        ConfigError: If the model has no place for them.
    """
    dropout = float(params["dropout"]) if PartTuning.adapts(ctx) else 0.0
    add_lora(ctx.model, require_places(ctx.model, "lora", who), rank, names, params["alpha"], dropout)


def attach(ctx: StageContext, kind: str, size: int, who: str, count: int = 1) -> None:
    """Puts parts of a kind into ``ctx.model``.

    Args:
        ctx: The stage; prompts are switched on from stage ``trainable_from`` on.
        kind: ``prompt`` or ``adapter``.
        size: Tokens, or size of the bottleneck.
        who: Who asks, for the message.
        count: Adapters behind each layer.

    Raises:
        ConfigError: If the model has no place for them.
    """
    names = require_places(ctx.model, kind, who)
    if kind == "prompt":
        add_prompts(ctx.model, names, size, active=PartTuning.adapts(ctx))
    else:
        add_adapters(ctx.model, names, size, count)


def with_trainable(config: Any, members: Iterable[Strategy]) -> list[Strategy]:
    """Returns the strategies, and what the property ``trainable`` asks for beside them.

    Raises:
        ConfigError: If a strategy already decides what is trained.
    """
    found, kind = list(members), config["trainable"]
    if kind == "all":
        return found
    taken = [s.name for s in found if s.kind == PARTS]
    if taken:
        raise ConfigError(
            f"property 'trainable' is {kind!r}, but the strategy {taken[0]} trains its own parts only; set trainable "
            f"to 'all', or leave that strategy out"
        )
    params = {"kind": kind, "size": config["trainable_size"]}
    for name, neutral in (("alpha", None), ("dropout", 0.0)):
        params[name] = config[f"trainable_{name}"]
        if kind != "lora" and params[name] != neutral:
            raise ConfigError(
                f"property 'trainable_{name}' is {params[name]!r}, but trainable: {kind} has none; it belongs to "
                f"trainable: lora"
            )
    return [*found, Trainable(params)]


def refuse_new_beginnings(ctx: StageContext, members: Iterable[Strategy], plan: Iterable[Pass]) -> None:
    """Raises a :class:`ConfigError` where parts or prompts are to be trained in a base that a plan makes anew.

    Strategies that say so (``begins_anew``) have been refused before anything was trained.
    """
    anew = [pass_.name for pass_ in plan if pass_.init == "fresh"]
    if anew and ctx.index and contract(ctx.model).builds_on_stages:
        raise ConfigError(
            f"the pass {anew[0]!r} starts stage {ctx.index + 1} from new weights, but the model {ctx.config['model']} "
            f"builds on what it learnt in the stages before; use a strategy that goes on, such as FineTune"
        )
    for pass_ in plan:
        for member in members:
            if pass_.init == "fresh" and isinstance(member, PartTuning):
                raise ConfigError(_nothing_to_adapt(member, f"the pass {pass_.name!r} of another strategy"))


def _nothing_to_adapt(member: PartTuning, who: str) -> str:
    return (
        f"{member.who} adapts a base that was trained before, but {who} starts from new weights: there would be "
        f"nothing to adapt; use Joint or FineTune, or train the whole model"
    )
