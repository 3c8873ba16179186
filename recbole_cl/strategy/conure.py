"""CONURE: each task trains, prunes and freezes its share of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import contract
from recbole_cl.model.state import owned_state
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.stream.stage import Stage
from recbole_cl.stream.vocabulary import Growth
from recbole_cl.tree import clone_tree


@strategies.register()
class CONURE(Strategy):
    """Gives every task a part of each weight matrix, for ever; what is left over is free for the next one.

    Yuan, Zhang, Karatzoglou, Jose, Kong and Li 2021, "One person, one model, one world: learning continual user
    representation without forgetting", section 3. With M the entries that earlier tasks own, a task sees::

        w' = stop_grad(w * M) + w * (1 - M)

    It trains the free entries (pass ``train``), keeps the share ``keep`` of them with the largest ``|w|`` and sets the
    others to 0, trains the kept ones again (pass ``retrain``), and owns them from then on. Task s answers with the
    entries of the tasks up to s, so it answers for ever as it did at its own end.

    As in the authors' code (fajieyuan/SIGIR2021_Conure) only matrices are pruned, each by itself; embedding tables and
    biases are learnt in the first task and fixed (rows of items that come later train in the stage that brings them);
    normalisation layers are each task's own; and free entries go on, in the next task, from the values that pruning
    took from them. Tables of embeddings are told by their module, :class:`torch.nn.Embedding`.
    """

    prefix = "conure"
    plans_passes = True
    defaults = {"keep": 0.3, "retrain_epochs": None}
    why_not_neutral = "pruning has no strength that could be zero: with keep = 1 the first task takes every weight"
    needs = frozenset({"gradient"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.owner: dict[str, torch.Tensor] = {}  # 0: free; k + 1: of stage k
        self.left: dict[str, torch.Tensor] = {}  # values before pruning
        self.own: dict[str, dict[str, Any]] = {}  # by stage: its normalisation and heads, and what it knew
        self._held: dict[str, torch.Tensor] = {}  # entries that a pass must not move; taken anew in each: no state
        self._pass: tuple[int, str] | None = None

    def check(self, config: Any, model: nn.Module) -> None:
        if not 0 < self.params["keep"] <= 1:
            raise ConfigError(f"conure_keep: {self.params['keep']!r} is no share; make it above 0 and at most 1")
        epochs = self.params["retrain_epochs"]
        if epochs is not None and epochs < 0:
            raise ConfigError(f"conure_retrain_epochs: {epochs!r} must be at least 0, or ~ for epochs")
        if contract(model).builds_on_stages:
            raise ConfigError(
                f"strategy: CONURE cannot serve the model {config['model']}, which itself freezes what earlier tasks "
                f"trained, so no weights are free for a later one; use FineTune, or CONURE with the model MultiTask"
            )
        if not self._matrices(model):
            raise ConfigError(f"strategy: CONURE cannot serve {config['model']}, which has embeddings and no matrix")

    # -- which parameter is what ----------------------------------------------------------------------------------

    def _owned_by_tasks(self, model: nn.Module) -> set[str]:
        """Parameters of which each task has its own: normalisation layers, heads of tasks."""
        names = set(task_parameter_names(model))
        for path, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                names |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        return names

    def _matrices(self, model: nn.Module) -> list[str]:
        """Names of the parameters that are pruned."""
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        apart = self._owned_by_tasks(model)
        return [n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in tables and n not in apart]

    def _trainable(self, ctx: StageContext, name: str) -> torch.Tensor:
        """Entries that the running pass may move."""
        mine = ctx.index + 1 if ctx.pass_.name == "retrain" else 0
        return self.owner[name].to(ctx.device) == mine

    # -- a stage --------------------------------------------------------------------------------------------------

    def begin_stage(self, ctx: StageContext) -> None:
        apart = self._owned_by_tasks(ctx.model)
        for name, p in ctx.parameters().items():
            if name in apart:
                continue
            if name not in self.owner:
                self.owner[name] = torch.zeros(p.shape, dtype=torch.uint8)
            if name in self.left:
                free = self.owner[name].to(p.device) == 0
                p.data.copy_(torch.where(free, self.left[name].to(p.device), p.data))

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        return [Pass("train"), Pass("retrain", epochs=self.params["retrain_epochs"])]

    def augment_batch(self, ctx: StageContext, batch: Interaction) -> Interaction:
        if self._pass != (ctx.index, ctx.pass_.name):
            self._pass = ctx.index, ctx.pass_.name
            named = ctx.parameters()
            self._held = {name: named[name].detach().clone() for name in self.owner}
        return batch

    def mask_gradients(self, ctx: StageContext) -> None:
        for name, p in ctx.parameters().items():
            if name in self.owner and p.grad is not None:
                p.grad.mul_(self._trainable(ctx, name))

    def after_step(self, ctx: StageContext) -> None:
        """Puts back what weight decay moved: an optimiser may step without a gradient."""
        for name, p in ctx.parameters().items():
            if name in self.owner:
                p.data.copy_(torch.where(self._trainable(ctx, name), p.data, self._held[name]))

    def end_pass(self, ctx: StageContext) -> None:
        if ctx.pass_.name != "train":
            return
        matrices, keep = set(self._matrices(ctx.model)), float(self.params["keep"])
        self.left = {}
        for name, p in ctx.parameters().items():
            if name not in self.owner:
                continue
            free = self.owner[name] == 0
            if name in matrices:
                self.left[name] = p.detach().to("cpu", copy=True)
                kept = largest(self.left[name], free, keep)
                p.data.mul_((kept | ~free).to(p.device))
            else:
                kept = free
            self.owner[name] = torch.where(kept, ctx.index + 1, self.owner[name]).to(torch.uint8)

    def end_stage(self, ctx: StageContext) -> None:
        apart = self._owned_by_tasks(ctx.model)
        tensors = {name: p for name, p in ctx.parameters().items() if name in apart}
        self.own[str(ctx.index)] = clone_tree({"tensors": tensors, "known": ctx.known.state_dict()})

    def stage_costs(self, ctx: StageContext) -> dict[str, Any]:
        """Tells apart what the task owns: its entries, the byte each that says so, its normalisation and its heads."""
        mine, own = ctx.index + 1, self.own[str(ctx.index)]["tensors"].values()
        entries = sum(int((owner == mine).sum()) for owner in self.owner.values())
        free = sum(int((self.owner[name] == 0).sum()) for name in self._matrices(ctx.model))
        size = sum(t.numel() * t.element_size() for t in own)
        held = sum(int(((owner > 0) & (owner < mine)).sum()) for owner in self.owner.values())
        trained = sum(p.numel() for p in ctx.parameters().values()) - held
        return {"bytes_per_task": 5 * entries + size, "trainable_parameters": trained, "free_weights": free}

    def serving(self, ctx: StageContext, stage: Stage) -> StageContext:
        mine = self.own.get(str(stage.index))
        if mine is None or stage.index >= ctx.index:
            return ctx
        state = clone_tree(owned_state(ctx.model))
        for name in self._matrices(ctx.model):
            owner = self.owner[name]
            state["tensors"][name] *= (owner > 0) & (owner <= stage.index + 1)
        state["tensors"] |= mine["tensors"]
        return ctx.with_model(ctx.index, state, mine["known"])

    # -- state ----------------------------------------------------------------------------------------------------

    def grow(self, growth: Growth) -> None:
        self.owner = {name: growth.expand(name, value) for name, value in self.owner.items()}
        self.left = {name: growth.expand(name, value) for name, value in self.left.items()}
        for mine in self.own.values():
            mine["tensors"] = {name: growth.expand(name, value) for name, value in mine["tensors"].items()}

    def state_dict(self) -> dict[str, Any]:
        return {"owner": dict(self.owner), "left": dict(self.left), "own": dict(self.own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "owner", "left", "own")
        self.owner, self.left, self.own = dict(state["owner"]), dict(state["left"]), dict(state["own"])


def largest(weight: torch.Tensor, free: torch.Tensor, keep: float) -> torch.Tensor:
    """Returns a flag for the share ``keep`` of the free entries with the largest magnitude, rounded up.

    Args:
        weight: A matrix.
        free: Flags of its free entries, of the same shape.
        keep: Share in (0, 1].
    """
    flat = torch.where(free, weight.abs(), -1.0).flatten()
    count = min(math.ceil(keep * int(free.sum())), int(free.sum()))
    flags = torch.zeros(flat.shape, dtype=torch.bool)
    flags[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    return flags.view(weight.shape)


def task_parameter_names(model: nn.Module) -> list[str]:
    """Returns the names of the parameters that single tasks own: those below the model's attribute ``heads``."""
    return [name for name, _ in model.named_parameters() if name.startswith("heads.")]
