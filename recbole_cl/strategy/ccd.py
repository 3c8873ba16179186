"""Teacher and student that learn from each other along the stream, and from the student's past."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.model.forget import Forgetting
from recbole_cl.registry import strategies
from recbole_cl.rng import torch_generator
from recbole_cl.strategy.base import Strategy, require
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.checks import check_number, check_strength
from recbole_cl.strategy.parts.outputs import Towers, check_layers, final, layers
from recbole_cl.strategy.parts.soft_labels import soft_label_loss, soft_labels_of_all
from recbole_cl.stream.vocabulary import Growth, fixed_axis, item_axis, user_axis

SIDES = ("users", "items")
PROXIES = ("stability", "plasticity")


@strategies.register()
class CCD(Strategy):
    """Trains a wide teacher beside the model; both replay soft labels of each other and of the model's past.

    Lee et al. 2024, "Continual collaborative distillation for recommender system" (KDD). The student is the run's
    model; only it is evaluated. Every epoch, for each user that the past knows, items are drawn from the best ``top``
    of each source that the user has not had, preferably those that the learner ranks lower (see
    :mod:`~recbole_cl.strategy.parts.soft_labels`), with the source's sigmoid(score) as label::

        student   L(theta) + lambda exp(-epoch / annealing) BCE(theta; stability, plasticity, teacher)
        teacher   BPR(phi) + lambda exp(-epoch / annealing) BCE(phi; stability, plasticity, student)
        proxies   S <- a_S S + (1 - a_S) theta_t,    P <- a_P P + (1 - a_P) theta_t    at the end of stage t, a_S > a_P

    Read were the abstract, summaries and the authors' code (Gyu-Seok0/CCD_KDD24: S_update.py, T_update.py, utils.py),
    not the paper's text. Kept from it: two moving averages of the student, draws by rank discrepancy, soft labels by
    BCE, annealing, and that the teacher learns from student and proxies. Simplified: teacher and student are trained in
    the same steps instead of in turns; one teacher with wider tables of the same architecture instead of an ensemble
    with autoencoders; the teacher's knowledge comes as soft labels instead of a list-wise loss; proxies average final
    vectors; ranks are told as shares of the catalogue. Left out: LWC-KD and PIW on the teacher, the set-up of new users
    and items from their neighbours (see the property ``new_rows``).

    lambda 0 is FineTune here, because the student goes on from its own weights; in the paper a stage begins with a
    student that is distilled anew, and no setting equals FineTune.
    """

    prefix = "ccd"
    defaults = {
        "lambda": 1.0, "teacher_size": 128, "stability": 0.9, "plasticity": 0.1, "top": 50, "samples": 5,
        "sharpness": 1.0, "annealing": 10.0,
    }  # fmt: skip
    neutral = {"lambda": 0.0}
    needs = frozenset({"gradient", "batch_rows", "pairwise"})

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.seed = 0
        self.teacher: dict[str, nn.Parameter] = {}
        self.proxies: dict[str, dict[str, torch.Tensor]] = {}
        self.soft_labels: dict[str, dict[str, torch.Tensor]] = {}
        self.drawn: list[Any] = []  # stage, pass and epoch of the soft labels

    def check(self, config: Any, model: nn.Module) -> None:
        check_layers(self.name, config, model)
        check_strength(self)
        for key, usual in (("teacher_size", 128), ("top", 50), ("samples", 5)):
            check_number(self, key, f"the default is {usual}", least=1)
        for key, share in zip(PROXIES, (0.9, 0.1), strict=True):
            check_number(self, key, f"it is the share of the old average, {share} by default", least=0, most=1)
        stability, plasticity = (self.params[key] for key in PROXIES)
        if not stability > plasticity:
            raise ConfigError(
                f"ccd_stability: {stability} must be more than ccd_plasticity, {plasticity}: the stability proxy is "
                f"the one that keeps more of the past; the defaults are 0.9 and 0.1"
            )
        check_number(self, "sharpness", "0 draws uniformly, the default is 1", least=0)
        check_number(self, "annealing", "the default is 10 epochs", above=0)

    def _rows(self, side: str, first: int, n: int) -> torch.Tensor:
        """Returns new rows of a teacher's table, ids from ``first`` to ``n - 1``."""
        size = int(self.params["teacher_size"])
        generator = torch_generator(self.seed, 0, f"{self.name}/{side}/{first}")
        return torch.randn(n - first, size, generator=generator) * math.sqrt(2 / (n + size))

    def prepare_model(self, ctx: StageContext) -> None:
        """Makes the teacher once; later users and items come by :meth:`grow`."""
        self.seed = ctx.config["seed"]
        if self.teacher:
            return
        self.check(ctx.config, ctx.model)  # the run checks later
        sizes = len(ctx.model.user_embedding.weight), len(ctx.model.item_embedding.weight)
        for side, n in zip(SIDES, sizes, strict=True):
            self.teacher[side] = nn.Parameter(self._rows(side, 0, n).to(ctx.device))

    def grow(self, growth: Growth) -> None:
        fixed = fixed_axis(int(self.params["teacher_size"]))
        growth_of_teacher = Growth(
            growth.n_users, growth.n_items, {"users": [user_axis(), fixed], "items": [item_axis(), fixed]}
        )
        for side, (before, after) in zip(SIDES, (growth.n_users, growth.n_items), strict=True):
            old = self.teacher[side].detach()
            fill = torch.cat([old, self._rows(side, before, after).to(old)])
            self.teacher[side] = nn.Parameter(growth_of_teacher.expand(side, old, fill))

    def learn(self, ctx: StageContext, student: Towers, teacher: Towers) -> None:
        """Draws this epoch's soft labels for both."""
        now = [ctx.index, ctx.pass_.name, ctx.epoch]
        if self.drawn == now:
            return
        kept = [self.proxies[name] for name in PROXIES]
        past: list[Towers] = [(p["users"].to(ctx.device), p["items"].to(ctx.device)) for p in kept]
        sizes = len(past[0][0]), len(past[0][1])
        so_far = ctx.stream.trained_targets(ctx.index, "so_far").position
        users, items = ctx.stream.table.user[so_far], ctx.stream.table.item[so_far]
        order = np.argsort(users, kind="stable")
        seen = torch.from_numpy(users[order]).to(ctx.device), torch.from_numpy(items[order]).to(ctx.device)
        drawing = int(self.params["top"]), int(self.params["samples"]), float(self.params["sharpness"])
        with torch.no_grad():
            for name, learner, other in (("student", student, teacher), ("teacher", teacher, student)):
                generator = ctx.generator(f"{self.name}/{name}")
                found = soft_labels_of_all([*past, other], learner, seen, sizes, drawing, generator)
                self.soft_labels[name] = {"items": found[0], "labels": found[1]}
        self.drawn = now

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        teacher = final(layers(ctx.model, (self.teacher["users"], self.teacher["items"])))
        negatives = batch[ctx.config["NEG_PREFIX"] + ctx.batcher.iid]
        vectors, difference = (
            teacher[0][batch[ctx.batcher.uid]],
            teacher[1][batch[ctx.batcher.iid]] - teacher[1][negatives],
        )
        teaching = -F.logsigmoid((vectors * difference).sum(-1)).mean()
        if not self.proxies:
            return {f"{self.name}/teacher": teaching}
        student = final(layers(ctx.model))
        self.learn(ctx, student, teacher)
        users = torch.unique(batch[ctx.batcher.uid])
        users = users[users < len(self.soft_labels["student"]["items"])]
        strength = float(self.params["lambda"]) * math.exp(-ctx.epoch / float(self.params["annealing"]))
        losses = {}
        for name, towers in (("student", student), ("teacher", teacher)):
            # A state that was put back lies on the CPU; what is in its place is not copied.
            drawn = self.soft_labels[name] = {
                key: value.to(ctx.device) for key, value in self.soft_labels[name].items()
            }
            items, labels = (drawn[key][users] for key in ("items", "labels"))
            losses[name] = strength * soft_label_loss(towers, users, items, labels)
        return {f"{self.name}/teacher": teaching + losses["teacher"], f"{self.name}/replay": losses["student"]}

    def end_stage(self, ctx: StageContext) -> None:
        with torch.no_grad():
            student = dict(zip(SIDES, final(layers(ctx.model)), strict=True))
        for name in PROXIES:
            kept, proxy = float(self.params[name]), self.proxies.setdefault(name, {})
            for side, now in student.items():
                new = now.detach().clone()
                if side in proxy:  # what is new in this stage has no average yet
                    old = proxy[side].to(new)
                    new[: len(old)] = kept * old + (1 - kept) * new[: len(old)]
                proxy[side] = new

    def parameters(self) -> list[nn.Parameter]:
        return list(self.teacher.values())

    def state_dict(self) -> dict[str, Any]:
        return {
            "teacher": {side: p.detach().clone() for side, p in self.teacher.items()},
            "proxies": {name: dict(proxy) for name, proxy in self.proxies.items()},
            "soft_labels": {name: dict(drawn) for name, drawn in self.soft_labels.items()},
            "drawn": list(self.drawn),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require(state, "teacher", "proxies", "soft_labels", "drawn")
        for side, value in state["teacher"].items():
            if side in self.teacher and self.teacher[side].shape == value.shape:
                self.teacher[side].data.copy_(value)  # in place: the optimiser holds the parameters
            else:
                self.teacher[side] = nn.Parameter(value.clone())
        self.proxies = {name: dict(proxy) for name, proxy in state["proxies"].items()}
        self.soft_labels = {name: dict(drawn) for name, drawn in state["soft_labels"].items()}
        self.drawn = list(state["drawn"])

    def without_users(self, state: Mapping[str, Any], forgetting: Forgetting) -> Mapping[str, Any]:
        kept = forgetting.nest({key: state[key] for key in ("teacher", "proxies")})
        return {**kept, "soft_labels": {}, "drawn": []}  # the next stage draws its own
