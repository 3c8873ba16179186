"""When each hook of a strategy runs, as the docstring of ``strategy/base.py`` says, in a whole run and on resume."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_same_walk, checkpoints, write_log
from recbole.model.general_recommender.bpr import BPR

from recbole_cl import checkpoint
from recbole_cl.model.contract import ContinualModel
from recbole_cl.model.state import owned_state
from recbole_cl.strategy import base
from recbole_cl.strategy.base import STEP_HOOKS, Strategy
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.stream.vocabulary import Growth
from recbole_cl.tree import tree_hash

EPOCHS = 2
PASSES = ("one", "two")


class Ticking(ContinualModel, BPR):
    """RecBole's BPR, whose hooks around a stage are written to the same list as the strategy's."""

    defaults = {"embedding_size": 8}

    def prepare_stage(self, ctx: StageContext) -> None:
        Witness.calls.append(("model.prepare_stage", ctx.index, "", 0))

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        Witness.calls.append(("model.plan_stage", ctx.index, "", 0))
        return passes

    def begin_pass(self, ctx: StageContext) -> None:
        Witness.calls.append(("model.begin_pass", ctx.index, ctx.pass_.name, ctx.step))

    def calculate_loss(self, interaction: Any) -> Any:
        FUSE.tick()
        return super().calculate_loss(interaction)


class Witness(Strategy):
    """Writes down each call of a hook: its name, the stage, the pass and the steps so far."""

    plans_passes = True
    calls: ClassVar[list[tuple[str, int, str, int]]] = []
    weights: ClassVar[list[tuple[int, str, str, int]]] = []

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        self.steps = 0

    def note(self, hook: str, ctx: StageContext, inside: bool = True) -> None:
        self.calls.append((hook, ctx.index, ctx.pass_.name if inside else "", ctx.step if inside else 0))

    def prepare_model(self, ctx: StageContext) -> None:
        self.note("prepare_model", ctx, inside=False)

    def grow(self, growth: Growth) -> None:
        self.calls.append(("grow", -1, "", 0))

    def begin_stage(self, ctx: StageContext) -> None:
        self.note("begin_stage", ctx, inside=False)

    def plan_stage(self, ctx: StageContext) -> list[Pass]:
        self.note("plan_stage", ctx, inside=False)
        return [Pass(PASSES[0]), Pass(PASSES[1], lr_scale=0.5)]

    def begin_pass(self, ctx: StageContext) -> None:
        self.note("begin_pass", ctx)
        self.weights.append((ctx.index, ctx.pass_.name, tree_hash(owned_state(ctx.model)), self.steps))

    def first_step(self, ctx: StageContext) -> None:
        self.note("first_step", ctx)

    def augment_batch(self, ctx: StageContext, batch: Any) -> Any:
        self.note("augment_batch", ctx)
        return batch

    def loss_terms(self, ctx: StageContext, batch: Any) -> dict[str, torch.Tensor]:
        self.note("loss_terms", ctx)
        return {}

    def add_gradients(self, ctx: StageContext) -> None:
        self.note("add_gradients", ctx)

    def mask_gradients(self, ctx: StageContext) -> None:
        self.note("mask_gradients", ctx)

    def after_step(self, ctx: StageContext) -> None:
        self.note("after_step", ctx)
        self.steps += 1

    def end_pass(self, ctx: StageContext) -> None:
        self.note("end_pass", ctx)

    def end_stage(self, ctx: StageContext) -> None:
        self.note("end_stage", ctx, inside=False)

    def serving(self, ctx: StageContext, stage: Any) -> StageContext:
        self.note("serving", ctx, inside=False)
        return ctx

    def adjust_scores(self, ctx: StageContext, batch: Any, scores: torch.Tensor) -> torch.Tensor:
        self.note("adjust_scores", ctx, inside=False)
        return scores

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls.append(("load_state_dict", -1, "", 0))
        self.steps = state["steps"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model under the strategy; nothing else makes models, so that each ``prepare_model`` is a stage's own."""
    log = write_log(tmp_path_factory.mktemp("log"))
    settings = {"strategy": "Witness", "matrix_cells": "diagonal", "epochs": EPOCHS, "checkpoint_keep": 100}
    return Job(Ticking, log.folder, settings, {"strategies": Witness})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Walk, list[tuple[str, int, str, int]]]:
    """The uninterrupted walk, and its calls."""
    Witness.calls.clear()
    walk = job.walk(tmp_path_factory.mktemp("whole"))
    return walk, list(Witness.calls)


def told() -> list[str]:
    """Returns the hooks in the order in which the docstring lists them."""
    block = str(base.__doc__).split("When each runs::")[1].split("On resume")[0]
    words = [w for w in re.findall(r"[a-z_]+", block) if w in vars(Strategy) and w != "parameters"]
    return list(dict.fromkeys(words))


def steps_of(walk: Walk, stage: int) -> int:
    """Returns the steps of an epoch."""
    return -(-len(walk.runner.stream.stages[stage].train) // 64)


def batches(stage: int, name: str, first: int, last: int) -> list[tuple[str, int, str, int]]:
    """Returns the calls of the steps from ``first`` up to ``last``."""
    before = ("augment_batch", "loss_terms", "add_gradients", "mask_gradients")
    return [
        call
        for step in range(first, last)
        for call in [*((hook, stage, name, step) for hook in before), ("after_step", stage, name, step + 1)]
    ]


def a_pass(stage: int, name: str, steps: int) -> list[tuple[str, int, str, int]]:
    """Returns the calls of a whole pass."""
    begun = [(hook, stage, name, 0) for hook in ("model.begin_pass", "begin_pass", "first_step")]
    return [*begun, *batches(stage, name, 0, steps), ("end_pass", stage, name, steps)]


def a_stage(stage: int, steps: int) -> list[tuple[str, int, str, int]]:
    """Returns the calls of a whole stage."""
    grown = [("grow", -1, "", 0)] if stage else []
    outside = lambda *hooks: [(hook, stage, "", 0) for hook in hooks]  # noqa: E731
    return [
        *outside("prepare_model"),
        *grown,
        *outside("model.prepare_stage", "begin_stage", "plan_stage", "model.plan_stage"),
        *itertools.chain.from_iterable(a_pass(stage, name, steps) for name in PASSES),
        *outside("end_stage"),
    ]


def trained(calls: list[tuple[str, int, str, int]]) -> list[tuple[str, int, str, int]]:
    """Returns the calls without those of evaluation, and the states that the best epoch and evaluations put back."""
    return [call for call in calls if call[0] not in ("serving", "adjust_scores", "load_state_dict")]


def test_the_docstring_names_every_hook() -> None:
    """Its list has all hooks that have to do with time, the step hooks among them."""
    untimed = {"check", "report", "stage_costs", "penalty", "state_dict", "load_state_dict", "side_stores"}
    named = {n for n, v in vars(Strategy).items() if callable(v) and not n.startswith("_")} - untimed - {"parameters"}
    assert set(told()) == named
    assert set(STEP_HOOKS) <= named


def test_a_whole_run_calls_them_in_this_order(whole: tuple[Walk, list[tuple[str, int, str, int]]]) -> None:
    """Call by call: two passes a stage, each begun once, each step with its five hooks."""
    walk, calls = whole
    expected = [call for stage in range(3) for call in a_stage(stage, EPOCHS * steps_of(walk, stage))]
    assert trained(calls) == expected
    # The first time that a hook runs in the second stage, the ones that the docstring lists before it have run there.
    start = calls.index(("prepare_model", 1, "", 0))
    own = [hook for hook, *_ in calls[start : calls.index(("prepare_model", 2, "", 0))] if hook in told()]
    first = list(dict.fromkeys(own))
    # Also asked by validations, in the middle of a pass; and by nobody here.
    answered = {"serving", "adjust_scores", "without_users"}
    assert [h for h in first if h not in answered] == [h for h in told() if h not in answered]
    assert first.index("serving") < first.index("adjust_scores")
    assert own[-1] == "adjust_scores" and own[::-1].index("end_stage") > 0


@pytest.mark.parametrize(("number", "epoch"), [(0, 0), (1, 0), (1, 1)])
def test_resumed_inside_a_pass(
    number: int, epoch: int, job: Job, whole: tuple[Walk, list[tuple[str, int, str, int]]], tmp_path: Path
) -> None:
    """What runs once is not run again; begin_pass sees the weights and the state of the checkpoint."""
    walk, _ = whole
    steps = steps_of(walk, 1)
    done = len(PASSES) * EPOCHS * steps_of(walk, 0) + number * EPOCHS * steps + epoch * steps
    state = job.killed(tmp_path, done + 4)
    progress = state["progress"]
    assert (state["stage"], progress["number"], progress["epoch"]) == (1, number, epoch)
    assert progress["step"] % steps, "the checkpoint was meant to lie inside an epoch"
    Witness.calls.clear()
    Witness.weights.clear()
    again = job.walk(tmp_path, resume=True)
    calls, name = list(Witness.calls), PASSES[number]
    outside = lambda *hooks: [(hook, 1, "", 0) for hook in hooks]  # noqa: E731
    put_back = ("load_state_dict", -1, "", 0)
    begun = [(hook, 1, name, progress["step"]) for hook in ("model.begin_pass", "begin_pass")]
    head = [
        *outside("prepare_model"),
        put_back,
        *outside("model.prepare_stage", "plan_stage", "model.plan_stage"),
        put_back,
        *begun,
        *batches(1, name, progress["step"], progress["step"] + 1),
    ]
    assert calls[: len(head)] == head
    rest = [
        *batches(1, name, progress["step"], EPOCHS * steps),
        ("end_pass", 1, name, EPOCHS * steps),
        *itertools.chain.from_iterable(a_pass(1, later, EPOCHS * steps) for later in PASSES[number + 1 :]),
        *outside("end_stage"),
        *a_stage(2, EPOCHS * steps_of(walk, 2)),
    ]
    assert trained(calls)[5 + 1 :] == rest
    stage, pass_name, weights, own = Witness.weights[0]
    assert (stage, pass_name) == (1, name)
    assert weights == tree_hash(state["model"]), "begin_pass saw other weights than the checkpoint's"
    assert weights != tree_hash(state["stage_start"]["model"])
    assert own == state["strategy"]["Witness"]["steps"] > 0
    assert_same_walk(walk, again)


def test_resumed_between_two_passes(
    job: Job, whole: tuple[Walk, list[tuple[str, int, str, int]]], tmp_path: Path
) -> None:
    """Killed before the first checkpoint of the second pass, that pass begins as if for the first time."""
    walk, _ = whole
    steps = EPOCHS * steps_of(walk, 1)
    state = job.killed(tmp_path, len(PASSES) * EPOCHS * steps_of(walk, 0) + steps + 1)
    assert (state["progress"]["number"], state["progress"]["epoch"]) == (0, EPOCHS)
    Witness.calls.clear()
    again = job.walk(tmp_path, resume=True)
    calls = trained(list(Witness.calls))
    begun = [(hook, 1, PASSES[0], steps) for hook in ("model.begin_pass", "begin_pass", "end_pass")]
    at = calls.index(begun[0])
    assert calls[at : at + 3] == begun
    assert calls[at + 3 : at + 3 + len(a_pass(1, PASSES[1], steps))] == a_pass(1, PASSES[1], steps)
    assert_same_walk(walk, again)


def test_checkpoints_lie_between_steps(whole: tuple[Walk, list[tuple[str, int, str, int]]]) -> None:
    """The kills above hit what they mean to: there are checkpoints inside the second pass."""
    states = [checkpoint.read(path) for path in checkpoints(whole[0])]
    assert {s["progress"]["number"] for s in states if s["phase"] == "train"} == {0, 1}
