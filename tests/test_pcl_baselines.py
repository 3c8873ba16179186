"""The baselines of PCL on a stream of tasks: the mathematics by itself, then each as a walk over a small stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from run_helpers import assert_same_ranking, but_for_a_near_tie
from scipy.optimize import minimize
from task_helpers import SETTINGS, write_task_log
from torch import nn
from torch.nn import functional as F

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.evaluator import Known
from recbole_cl.model.mixture import MixtureOfExperts, TaskMasks
from recbole_cl.model.state import owned_state
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.conure import CONURE, largest
from recbole_cl.strategy.mtl import MTL
from recbole_cl.strategy.parts.exemplars import join_rows
from recbole_cl.strategy.parts.mgda import gram_matrix, min_norm_weights
from recbole_cl.strategy.task_bounds import FineAll
from recbole_cl.strategy.teracon import TERACON, annealed
from recbole_cl.stream.batch import TARGETS, Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.task_loader import TaskLoader
from recbole_cl.testing.comparing import assert_same
from recbole_cl.testing.toy import write_planted_drift
from recbole_cl.training.passes import StagePass
from recbole_cl.training.runner import Runner
from recbole_cl.tree import clone_tree, tree_hash

# -- MGDA ---------------------------------------------------------------------------------------------------------


def quadratic_program(gram: np.ndarray) -> np.ndarray:
    """The same problem by sequential quadratic programming."""
    n = len(gram)
    found = minimize(
        lambda a: a @ gram @ a,
        np.full(n, 1 / n),
        jac=lambda a: 2 * gram @ a,
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones(n)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return np.asarray(found.x)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("width", [2, 5, 40])
def test_min_norm_point_is_that_of_a_quadratic_program(n: int, width: int) -> None:
    """The weights lie on the simplex, the norm is SLSQP's, and the combination improves every objective."""
    rng = np.random.default_rng(100 * n + width)
    for shift in (0.0, 0.5, 3.0):  # the origin inside the hull, near it, far from it
        gradients = rng.normal(size=(n, width)) * rng.uniform(0.1, 3, size=(n, 1)) + shift
        gram = gradients @ gradients.T
        weights = min_norm_weights(torch.from_numpy(gram)).numpy()
        assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)
        reference = quadratic_program(gram)
        scale = gram.diagonal().max()
        assert weights @ gram @ weights == pytest.approx(reference @ gram @ reference, abs=1e-8 * scale)
        assert (gram @ weights).min() >= weights @ gram @ weights - 1e-8 * scale  # the point's own optimality condition


def test_min_norm_point_by_hand() -> None:
    """Orthogonal gradients weigh by inverse squared norms; a dominated one gets nothing; equal ones share."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    gram = gram_matrix([[first], [second]])
    torch.testing.assert_close(min_norm_weights(gram), torch.tensor([0.8, 0.2], dtype=torch.float64))
    gram = gram_matrix([[first], [3 * first]])
    torch.testing.assert_close(min_norm_weights(gram), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert float(min_norm_weights(gram_matrix([[first], [first]])).sum()) == 1.0
    three = gram_matrix([[first, None], [second, None], [None, torch.tensor([4.0])]])
    inverse = torch.tensor([1.0, 1 / 4, 1 / 16], dtype=torch.float64)
    torch.testing.assert_close(min_norm_weights(three), inverse / inverse.sum(), atol=1e-9, rtol=0)


# -- mixture of experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_mixture_of_experts_is_its_sum(shape: tuple[int, ...]) -> None:
    """Every row and position equals tower(sum of gate * expert) of the task, written as loops."""
    torch.manual_seed(1)
    mixture = MixtureOfExperts(width=4, n_experts=3, n_tasks=2)
    for p in mixture.parameters():
        torch.nn.init.normal_(p)
    mixture.requires_grad_(False)
    hidden = torch.randn(shape)
    rows, got = hidden.view(5, -1, 4), [mixture(hidden, k).view(5, -1, 4) for k in range(2)]
    for k, b in itertools.product(range(2), range(5)):
        for position in range(rows.shape[1]):
            x = rows[b, position]
            gate = [math.exp(float(mixture.gates[k][e] @ x)) for e in range(3)]
            mixed = torch.zeros(4)
            for e in range(3):
                expert = (mixture.experts[e] @ x + mixture.expert_bias[e]).clamp(min=0)
                mixed = mixed + gate[e] / sum(gate) * expert
            expected = mixture.towers[k] @ mixed + mixture.tower_bias[k]
            torch.testing.assert_close(got[k][b, position], expected)


# -- TERACON's masks ----------------------------------------------------------------------------------------------


def test_task_masks_by_hand() -> None:
    """The first task's mask is its own; with a second, each is a linear map over both, one dimension at a time."""
    torch.manual_seed(2)
    masks, s = TaskMasks(n_tasks=3, n_layers=2, width=4), 1.7
    torch.testing.assert_close(masks(0, 1, s), torch.sigmoid(s * masks.embedding[0]))
    got = masks(1, 2, s).detach()
    for layer in range(2):
        for d in range(4):
            told = [math.tanh(s * masks.embedding[k, layer, d].item()) for k in (1, 0)]
            values = [told[0], told[1], 0.0, -told[1], 0.0]  # own, task 0, (task 2,) and the same negated
            out = sum(w * v for w, v in zip(masks.weight[1, layer].tolist(), values, strict=True))
            expected = 1 / (1 + math.exp(-s * (out + masks.bias[1, layer].item())))
            assert float(got[layer, d]) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(masks(1, 2, s).sum(), masks.embedding)
    assert gradient[:2].abs().sum(dim=(1, 2)).min() > 0 and not gradient[2].any(), "a later task had a say"


def test_masks_harden_as_s_grows() -> None:
    """At 1/50 every dimension passes half; at 50 nearly every one is open or shut."""
    torch.manual_seed(3)
    masks = TaskMasks(n_tasks=2, n_layers=3, width=8)
    soft, hard = masks(0, 1, 1 / 50).detach(), masks(0, 1, 50.0).detach()
    assert (soft - 0.5).abs().max() < 0.011 and (hard > 0.99).float().mean() > 0.7


# -- CONURE's choice ----------------------------------------------------------------------------------------------


def test_largest_keeps_the_top_share_of_the_free_entries() -> None:
    """By hand: of the free entries the top share by magnitude, rounded up; entries with an owner are left out."""
    weight = torch.tensor([[0.5, -3.0, 0.1], [2.0, -0.2, 9.0]])
    free = torch.tensor([[True, True, True], [True, True, False]])
    kept = largest(weight, free, 0.3)  # 2 of 5
    assert kept.tolist() == [[False, True, False], [True, False, False]]
    assert largest(weight, free, 1.0).tolist() == free.tolist()
    assert not largest(weight, torch.zeros_like(free), 0.3).any()
    ties = largest(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool), 0.3)
    assert ties.sum() == 3


# -- walks --------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The walk broke off where it was told to."""


class Recorder(Runner):
    """A runner that notes, after each stage, what is answered for every stage so far."""

    told: list[list[torch.Tensor]]
    backbones: list[dict[str, torch.Tensor]]
    stop: tuple[int, str, int] | None = None

    def _evaluate_all(self, ctx: StageContext) -> None:
        super()._evaluate_all(ctx)
        row = []
        for stage in self.stream.stages[: ctx.index + 1]:
            served = self.strategy.serving(ctx, stage)
            served.model.eval()
            batch = served.batcher.rows(stage.test, stage=stage.index, evaluation=True)
            with torch.no_grad():
                if stage.task.kind == "classification":
                    row.append(served.model.predict_task(batch, stage.task))
                else:
                    row.append(served.model.full_sort_predict(batch))
        self.__dict__.setdefault("told", []).append(row)
        backbone = getattr(ctx.model, "backbone", None)
        self.__dict__.setdefault("backbones", []).append({} if backbone is None else clone_tree(backbone.state_dict()))

    def _save(self, ctx: StageContext, phase: str, *rest: Any) -> None:
        super()._save(ctx, phase, *rest)
        if phase == "train" and self.stop == (ctx.index, ctx.pass_.name, ctx.step):
            raise Stopped


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of four tasks: next item, next five-star item, genre of the next item, group of the user."""
    return write_task_log(tmp_path_factory.mktemp("log"), n_users=24)


Start = Callable[..., Recorder]


@pytest.fixture
def start(log: Path, tmp_path: Path) -> Start:
    """Makes the runner of a walk."""
    numbers = iter(range(100))

    def start(model: str, strategy: Any, saved: bool = False, **changed: Any) -> Recorder:
        given = {**SETTINGS, "data_path": str(log), "output_dir": str(tmp_path / f"run{next(numbers)}"), **changed}
        name = given.pop("dataset", "tasks-log")
        if given["scheduler"] != "TaskStream":
            given = {k: v for k, v in given.items() if not k.startswith("task")}
        config = CLConfig(model=model, dataset=name, config_dict={**given, "strategy": strategy})
        config["saved"] = saved
        return Recorder(config)

    return start


@pytest.fixture(scope="module")
def cache() -> dict[str, tuple[Recorder, dict[str, Any]]]:
    """Finished walks."""
    return {}


@pytest.fixture
def finished(start: Start, cache: dict[str, tuple[Recorder, dict[str, Any]]]) -> Callable[..., Any]:
    """Walks once for all tests that look at the end only; returns the runner and the result."""

    def finished(model: str, strategy: Any, **changed: Any) -> tuple[Recorder, dict[str, Any]]:
        key = repr((model, strategy, changed))
        if key not in cache:
            runner = start(model, strategy, **changed)
            cache[key] = runner, runner.run()
        return cache[key]

    return finished


DECAY = {"weight_decay": 0.01}
SILENT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
BIASES = {"multi_task_item_bias": True}


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("SingleTask", {}), ("FineAll", BIASES), ("CONURE", {**DECAY, **BIASES})],
)
def test_old_tasks_are_answered_for_ever_as_at_their_end(
    finished: Callable[..., Any], strategy: str, settings: dict[str, Any]
) -> None:
    """Every task's answers have, after all later tasks, the bits that they had right after its own."""
    runner, result = finished("MultiTask", strategy, **settings)
    assert [len(row) for row in runner.told] == [1, 2, 3, 4]
    for t, row in enumerate(runner.told):
        for s, answer in enumerate(row):
            assert torch.equal(answer, runner.told[s][s]), f"task {s + 1} drifted by the end of task {t + 1}"
    for s, column in enumerate(zip(*result["matrix"]["primary"], strict=True)):
        assert len(set(column[s:])) == 1
    kept = 1 if strategy == "CONURE" else 4
    assert [cost["backbones"] for cost in result["cost"]] == [min(kept, t + 1) for t in range(4)]


@pytest.mark.parametrize("strategy", ["FineAll", "SingleTask", "CONURE"])
def test_old_stages_keep_their_row_where_tables_grow(
    strategy: str, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On stages of time, with users and items that come later, an old stage's numbers stay those of its own end."""
    drift = write_planted_drift(tmp_path_factory.mktemp("drift"))
    folder = drift.settings()
    runner = start("SASRec", strategy, dataset=drift.name, **folder)
    result = runner.run()
    stages = runner.stream.stages
    assert stages[0].n_items < stages[-1].n_items
    for s, column in enumerate(zip(*result["matrix"]["hit@5"], strict=True)):
        same = but_for_a_near_tie(column[s], len(stages[s].test))
        assert all(value == same for value in column[s:]), f"stage {s + 1}"
        assert column[s] > 0
    last = len(stages) - 1
    ctx = runner.state.models.context(last, runner.model, runner.stream.view(last))
    ctx.known = runner.known
    blank = Known.nothing(runner.stream.table)  # what a kept model knows is kept with it
    assert runner.evaluator.evaluate(ctx, blank, stages[0]).metrics["hit@5"] == result["matrix"]["hit@5"][last][0]
    if strategy != "FineAll":
        return
    plain = start("SASRec", "FineTune", dataset=drift.name, **folder).run()
    assert plain["matrix"]["hit@5"][0][0] != plain["matrix"]["hit@5"][-1][0]


def test_sinmo_drifts(finished: Callable[..., Any]) -> None:
    """One model through all tasks answers the first one otherwise after each later one."""
    runner, _ = finished("MultiTask", "FineTune")
    assert all(not torch.equal(runner.told[0][0], row[0]) for row in runner.told[1:])


def test_where_a_task_starts(start: Start, finished: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """FineAll starts each task at the end of the first one; SingleTask trains as Scratch does, and keeps it."""
    begun: list[str] = []
    original = FineAll.begin_stage

    def begin(member: FineAll, ctx: StageContext) -> None:
        original(member, ctx)
        begun.append(tree_hash(owned_state(ctx.model)["tensors"]))

    monkeypatch.setattr(FineAll, "begin_stage", begin)
    runner = start("MultiTask", "FineAll", epochs=1)
    runner.run()
    kept = runner.strategy.members[0].models  # type: ignore[attr-defined]
    ends = [tree_hash(kept[str(k)]["model"]["tensors"]) for k in range(4)]
    assert begun[1:] == [ends[0]] * 3 and len(set(ends)) == 4
    (single, _), (scratch, _) = finished("MultiTask", "SingleTask"), finished("MultiTask", "Scratch")
    for s in range(4):
        assert torch.equal(single.told[3][s], scratch.told[s][s]), "not a model of its own"
    assert not torch.equal(scratch.told[3][0], scratch.told[0][0])


@pytest.mark.parametrize(
    ("model", "strategy", "stop"),
    [
        ("MultiTask", "CONURE", (1, "retrain", 3)),
        ("MultiTask", "FineAll", (1, "train", 3)),
        ("MMOE", {"MTL": {"weights": "mgda"}}, (1, "all_tasks", 3)),
    ],
)
def test_a_walk_that_breaks_off_goes_on_with_the_same_bits(
    start: Start,
    finished: Callable[..., Any],
    model: str,
    strategy: Any,
    stop: tuple[int, str, int],
    tmp_path: Path,
) -> None:
    """Interrupted in the middle of an epoch of a task and resumed by another runner, it ends as it would have."""
    whole, result = finished(model, strategy, n_stages=2)
    folder = {"n_stages": 2, "output_dir": str(tmp_path / "broken"), "checkpoint_steps": 1, "saved": True}
    broken = start(model, strategy, **folder)
    broken.stop = stop
    with pytest.raises(Stopped):
        broken.run()
    again = start(model, strategy, resume=True, **folder)
    assert again.run()["matrix"] == result["matrix"]
    assert_same(whole.model.state_dict(), again.model.state_dict())
    assert_same(whole.strategy.state_dict(), again.strategy.state_dict())
    assert_same(whole.told[-1], again.told[-1])


# -- CONURE -------------------------------------------------------------------------------------------------------


def test_conure_divides_the_weights(finished: Callable[..., Any]) -> None:
    """Each task owns the share it is to keep of what was free; what nobody owns is 0."""
    runner, result = finished("MultiTask", "CONURE", **DECAY)
    [conure] = runner.strategy.members
    assert isinstance(conure, CONURE)
    matrices = conure._matrices(runner.model)
    assert matrices and all("embedding" not in name and "heads" not in name for name in matrices)
    assert sum("dense" in name or "query" in name for name in matrices) >= 4
    for name in matrices:
        free = conure.owner[name].numel()
        for task in range(1, 5):
            mine = int((conure.owner[name] == task).sum())
            assert mine == math.ceil(0.3 * free), f"{name}: task {task}"
            free -= mine
    fixed = set(conure.owner) - set(matrices)
    assert "backbone.item_embedding.weight" in fixed
    assert all((conure.owner[name] == 1).all() for name in fixed)
    parameters = dict(runner.model.named_parameters())
    for name in matrices:
        assert not parameters[name].detach()[conure.owner[name] == 0].any()
    trained = [cost["trainable_parameters"] for cost in result["cost"]]
    assert trained == sorted(trained, reverse=True) and trained[0] > trained[1]


def test_conure_keeps_bytes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a task owns at its end is, entry by entry, in the model at the end of the stream; the rest was trained."""
    ends: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    original = CONURE.end_stage

    def end(member: CONURE, ctx: StageContext) -> None:
        original(member, ctx)
        values = {name: p.detach().clone() for name, p in ctx.parameters().items() if name in member.owner}
        ends.append((values, dict(member.owner)))

    monkeypatch.setattr(CONURE, "end_stage", end)
    start("MultiTask", "CONURE", n_stages=3, **DECAY).run()
    last = ends[-1][0]
    for task, (values, owner) in enumerate(ends):
        for name, value in values.items():
            held = owner[name] > 0
            assert torch.equal(value[held], last[name][held]), f"{name}: task {task + 1} lost its entries"
    assert any(not torch.equal(ends[0][0][name], value) for name, value in last.items())


def fake_stage(weight: nn.Parameter, index: int, pass_: str) -> Any:
    """A context that holds one matrix."""
    holder = nn.Module()
    holder.layer = nn.Linear(*weight.shape[::-1], bias=False)
    holder.layer.weight = weight
    named = lambda: {"layer.weight": weight}  # noqa: E731
    return SimpleNamespace(model=holder, index=index, pass_=Pass(pass_), device=torch.device("cpu"), parameters=named)


def test_conure_gradient_is_that_of_its_formula() -> None:
    """Masking the gradient equals differentiating stop_grad(w M) + w (1 - M); weight decay is undone where M is 1."""
    torch.manual_seed(4)
    weight, x = nn.Parameter(torch.randn(3, 4)), torch.randn(5, 4)
    taken = torch.rand(3, 4) < 0.5
    conure = CONURE({"keep": 0.4, "retrain_epochs": None})
    conure.owner = {"layer.weight": taken.to(torch.uint8)}  # of the first task
    ctx = fake_stage(weight, 1, "train")
    mask = taken.float()
    free = weight.detach().clone().requires_grad_(True)
    (x @ ((free * mask).detach() + free * (1 - mask)).T).square().sum().backward()
    conure.augment_batch(ctx, Interaction({"x": x}))
    (x @ weight.T).square().sum().backward()
    conure.mask_gradients(ctx)
    assert torch.equal(weight.grad, free.grad)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(0.9).sub_(0.1 * weight.grad)  # a step with decay
    conure.after_step(ctx)
    assert torch.equal(weight.detach()[taken], before[taken])
    assert (weight.detach()[~taken] != before[~taken]).all()
    # Pruning, by hand: two fifths of the free entries, by magnitude; the others are 0 and come back in the next task.
    values, count = weight.detach().clone(), math.ceil(0.4 * int((~taken).sum()))
    order = sorted(torch.nonzero(~taken).tolist(), key=lambda at: -abs(float(values[tuple(at)])))
    conure.end_pass(ctx)
    for place, at in enumerate(order):
        assert int(conure.owner["layer.weight"][tuple(at)]) == (2 if place < count else 0)
        assert float(weight[tuple(at)]) == (float(values[tuple(at)]) if place < count else 0.0)
    retrain = fake_stage(weight, 1, "retrain")
    weight.grad = torch.ones_like(weight)
    conure.mask_gradients(retrain)
    assert torch.equal(weight.grad > 0, conure.owner["layer.weight"] == 2)
    conure.begin_stage(fake_stage(weight, 2, "train"))
    assert torch.equal(weight.detach(), values)


# -- TERACON ------------------------------------------------------------------------------------------------------


def test_retention_by_hand(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The term is alpha times the weighted mean squared gaps of old logits, with a gradient; rho follows the masks."""
    original, seen = TERACON.loss_terms, []

    def look(member: TERACON, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        if ctx.index != 2 or ctx.step != 1:
            return original(member, ctx, batch)
        shares = list(member.rhos)
        generator = np.random.default_rng()
        generator.bit_generator.state = ctx.generator("TERACON/users").bit_generator.state
        terms = original(member, ctx, batch)
        teacher, s = ctx.previous_model, ctx.model.train_scale
        assert teacher is not None and not teacher.training and s > 1 / 50
        expected = 0.0
        with torch.no_grad(), teacher.answering_at(s):
            for task in range(2):
                rows = generator.permutation(len(batch))[: max(int(len(batch) * shares[task]), 1)]
                users = Interaction({k: v[torch.from_numpy(rows)] for k, v in batch.interaction.items()})
                users.interaction["_task"] = torch.full((len(rows),), task)
                gap = ctx.model.full_sort_predict(users) - teacher.full_sort_predict(users)
                expected += shares[task] / sum(shares) * float(gap.square().mean())
            mine = ctx.model.task_masks(2)
            for task in range(2):
                cosines = F.cosine_similarity(teacher.task_masks(task), mine, dim=1).double().numpy()
                assert member.rhos[task] == pytest.approx(1 - (1 / (1 + np.exp(-6 * cosines))).mean(), abs=1e-6)
        [term] = terms.values()
        assert float(term) == pytest.approx(0.7 * expected, rel=1e-5) and float(term) > 0
        gradient = dict(zip(ctx.parameters(), torch.autograd.grad(
            term, list(ctx.parameters().values()), retain_graph=True, allow_unused=True), strict=True))  # fmt: skip
        for name in ("masks.embedding", "backbone.item_embedding.weight", "heads.1.last.weight"):
            assert gradient[name] is not None and gradient[name].abs().sum() > 0, name
        seen.append(shares)
        return terms

    monkeypatch.setattr(TERACON, "loss_terms", look)
    runner = start("SoftMask", "TERACON", train_batch_size=32, n_stages=3, **SILENT)
    result = runner.run()
    assert len(seen) == 1 and all(0 < share < 0.9 for share in seen[0])
    logged = [point["terms"].get("TERACON/retention", 0.0) for point in result["curves"]]
    assert [value > 0 for value in logged] == [point["stage"] > 0 for point in result["curves"]]


def test_masks_are_annealed_within_each_epoch(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """s rises from 1/50 to 50 in each epoch, answers are given at 50, and the embeddings stay within 6."""
    scales: list[tuple[int, int, float]] = []
    original = TERACON.after_step

    def note(member: TERACON, ctx: StageContext) -> None:
        scales.append((ctx.index, ctx.epoch, ctx.model.train_scale))
        ctx.model.masks.embedding.data += 10.0
        original(member, ctx)

    monkeypatch.setattr(TERACON, "after_step", note)
    runner = start("SoftMask", "TERACON", n_stages=2)
    runner.run()
    for epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        rising = [s for t, e, s in scales if (t, e) == epoch]
        assert rising[0] == 1 / 50 and rising[-1] == pytest.approx(50.0) and rising == sorted(rising)
    assert runner.model.masks.embedding.abs().max() <= 6.0  # type: ignore[union-attr]
    assert runner.model.eval().answer_scale == 50.0 and annealed(50.0, 0, 1) == 50.0


def test_soft_masks_act_and_leave_no_graph(start: Start) -> None:
    """A mask of zeros cuts both halves of a layer off; after a pass no module holds a mask."""
    runner = start("SoftMask", "TERACON", n_stages=1, epochs=1)
    runner.run()
    model: Any = runner.model.eval()
    batch = runner.state.models.context(0, model, runner.stream.view(0)).batcher.rows(runner.stream.stages[0].test)
    with torch.no_grad():
        open_, shut = [], []
        for value, kept in ((20.0, open_), (-20.0, shut)):
            model.masks.embedding.fill_(value)
            kept.append(model.represent(batch, 0))
        assert not torch.equal(open_[0], shut[0])
        plain = model.backbone.forward(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN])
        torch.testing.assert_close(open_[0], plain, atol=1e-5, rtol=1e-5)
        hidden = model.backbone._embed(batch[model.ITEM_SEQ])
        for layer in model.backbone.trm_encoder.layer:  # what is left of a layer: its normalisations
            hidden = layer.feed_forward.LayerNorm(layer.multi_head_attention.LayerNorm(hidden))
        last = hidden[torch.arange(len(batch)), batch[model.ITEM_SEQ_LEN] - 1]
        torch.testing.assert_close(shut[0], last, atol=1e-5, rtol=1e-5)
    assert all(half.output_mask is None for half in model._halves())


# -- all tasks at once --------------------------------------------------------------------------------------------


class Numbers:
    """A loader of numbers, with the state of one."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size, self.round, self.skip, self.at = name, size, 0, 0, None

    n_targets = property(lambda self: 10 * self.size)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[str]:
        first, self.skip = self.skip, 0
        try:
            for number in range(first, self.size):
                self.at = number
                yield f"{self.name}{self.round}.{number}"
            self.round += 1
        finally:
            self.at = None

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round, "done": self.skip if self.at is None else self.at + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.round, self.skip, self.at = state["round"], state["done"], None


def test_task_loader_goes_round() -> None:
    """A step has a batch of each task; shorter tasks go round; a loader that is put back yields the same rest."""

    def steps(loader: TaskLoader) -> Iterator[tuple[Any, ...]]:
        for batch in loader:
            yield (*loader.others.values(), batch)

    def make() -> TaskLoader:
        return TaskLoader({0: Numbers("a", 5), 2: Numbers("b", 3), 3: Numbers("c", 1)})

    loader = make()
    assert len(loader) == 5 and loader.n_targets == 150
    whole = list(steps(loader))
    assert [step[0] for step in whole] == [f"a0.{k}" for k in range(5)]
    assert [step[1] for step in whole] == ["b0.0", "b0.1", "b0.2", "b1.0", "b1.1"]
    assert [step[2] for step in whole] == [f"c{k}.0" for k in range(5)]
    assert list(loader.others) == [0, 2]
    for stop in range(1, 5):
        loader = make()
        running = steps(loader)
        for _ in range(stop):
            next(running)
        again = make()
        again.load_state_dict(loader.state_dict())
        assert list(steps(again)) == whole[stop:]


def test_an_epoch_on_all_tasks_sees_each_target_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short tasks are spread over the steps of the longest, whether their targets come in windows or in rows."""
    steps: list[dict[int, int]] = []
    original = MTL.loss_terms

    def keep(member: MTL, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        if ctx.index == 3:
            batches = {**ctx.loader.others, ctx.index: batch}
            steps.append({k: int((b[TARGETS] > 0).sum()) if TARGETS in b else len(b) for k, b in batches.items()})
        return original(member, ctx, batch)

    monkeypatch.setattr(MTL, "loss_terms", keep)
    runner = start("MultiTask", "MTL", epochs=1, train_batch_size=24, task_train_per_user=3)
    runner.run()
    targets = [len(stage.train) for stage in runner.stream.stages[:4]]
    assert runner.stream.stages[3].task.kind == "classification" and targets[0] > 2 * max(targets[1:])
    assert len(steps) == -(-targets[0] // 24)
    for task, n in enumerate(targets):
        sizes = [step[task] for step in steps]
        spread = -(-n // len(steps))
        assert n <= sum(sizes) <= n + 3 * spread + 8, f"task {task}: {sum(sizes)} of {n}"
        assert max(sizes) <= spread + 8, f"task {task}: {sizes}"  # a batch of windows may be a window too large


@pytest.mark.parametrize(("model", "weights"), [("MultiTask", "equal"), ("MultiTask", "mgda"), ("MMOE", "mgda")])
def test_a_step_on_all_tasks_by_hand(start: Start, model: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's gradient is the sum of the tasks', or the min-norm combination where tasks share a parameter."""
    batches: list[Interaction] = []
    checked: list[int] = []
    original = MTL.loss_terms

    def keep(member: MTL, ctx: StageContext, batch: Interaction) -> dict[str, torch.Tensor]:
        batches[:] = [*ctx.loader.others.values(), batch]
        return original(member, ctx, batch)

    def check(member: MTL, ctx: StageContext) -> None:
        if ctx.index != 2 or ctx.step:
            return
        assert [int(batch["_task"].unique()) for batch in batches] == [0, 1, 2]
        named = ctx.parameters()
        gradients = []
        for batch in batches:
            found = torch.autograd.grad(ctx.model.calculate_loss(batch), list(named.values()), allow_unused=True)
            zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(found, named.values(), strict=True)]
            gradients.append(zeros)
        users = [sum(bool(g[i].any()) for g in gradients) for i in range(len(named))]
        flat = np.stack([
            np.concatenate([g[i].double().flatten().numpy() for i in range(len(named)) if users[i] > 1])
            for g in gradients
        ])  # fmt: skip
        share = quadratic_program(flat @ flat.T) if weights == "mgda" else np.ones(3)
        if weights == "mgda":
            assert np.abs(share - 1 / 3).max() > 0.02, "the weights are those of a plain mean"
        for i, (name, p) in enumerate(named.items()):
            scale = share if users[i] > 1 else np.ones(3)
            expected = sum(float(w) * g[i] for w, g in zip(scale, gradients, strict=True))
            got = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
        assert any(count == 1 for count in users) and any(count == 3 for count in users)
        own = [
            count for name, count in zip(named, users, strict=True) if name.startswith(("mixture.gate", "mixture.tow"))
        ]
        assert len(own) == (9 if model == "MMOE" else 0) and set(own) <= {0, 1}, (
            "each task's gate and tower are its own"
        )
        checked.append(ctx.step)

    monkeypatch.setattr(MTL, "loss_terms", keep)
    monkeypatch.setattr(MTL, "mask_gradients", check)
    runner = start(model, {"MTL": {"weights": weights}}, n_stages=3, epochs=1, **SILENT)
    result = runner.run()
    assert checked == [0]
    assert [cost["objectives"] for cost in result["cost"]] == [1, 2, 3]
    for stage in runner.stream.stages:  # a start from fresh weights forgets what was known; every task's targets count
        assert runner.known.items[runner.stream.table.item[stage.train.position]].all()


def test_the_first_task_is_the_same_for_all(finished: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the backbone alone, whatever prompts, heads, experts or orders are drawn beside it.

    Windows are of several lengths, and each model leaves out the same padding, so dropout draws alike, too.
    """
    monkeypatch.setattr("recbole_cl.model.all_positions.PASS_OVERHEAD", {True: 0, False: 0})  # a pass for each length
    settings = {"hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2, "MAX_ITEM_LIST_LENGTH": 20}
    told, weights = {}, {}
    for model, strategy in (
        ("PCL", "FineTune"),
        ("MultiTask", "FineTune"),
        ("MultiTask", "FineAll"),
        ("MMOE", "FineTune"),
    ):
        runner, _ = finished(model, strategy, **settings)
        told[model, strategy], weights[model, strategy] = runner.told[0][0], runner.backbones[0]
    answers, trained = told["PCL", "FineTune"], weights["PCL", "FineTune"]
    for key in (("MultiTask", "FineTune"), ("MultiTask", "FineAll")):
        assert weights[key].keys() == trained.keys()
        for name, value in weights[key].items():
            assert torch.equal(value, trained[name]), (key, name)
        # PCL answers a batch at once, the others part its rows by length: kernels need not round alike for both shapes.
        torch.testing.assert_close(told[key], answers, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(told["MMOE", "FineTune"], answers, atol=1e-3), "experts stand before the first task, too"


@pytest.mark.parametrize(("model", "weights"), [("MultiTask", "mgda"), ("MMOE", "equal")])
def test_all_tasks_at_once_are_trained_once_for_a_last_row(start: Start, model: str, weights: str) -> None:
    """From fresh weights the last task's model depends on no task before: trained once, it has the same bits."""
    strategy = {"MTL": {"weights": weights}}
    every, once = start(model, strategy, n_stages=3), start(model, strategy, n_stages=3, matrix_cells="last_row")
    whole, last = every.run(), once.run()
    assert last["matrix"]["primary"] == [[None] * 3, [None] * 3, whole["matrix"]["primary"][2]]
    assert {curve["stage"] for curve in last["curves"]} == {2}
    for (name, a), (_, b) in zip(every.model.state_dict().items(), once.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    kept = start(model, {"MTL": {"start": "previous"}}, n_stages=3, matrix_cells="last_row").run()
    assert {curve["stage"] for curve in kept["curves"]} == {0, 1, 2}, "a start from the previous weights needs them"


def test_the_best_epoch_is_that_of_all_tasks(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage on all tasks keeps the epoch with the best mean score of the tasks on validation targets."""
    runner = start("MultiTask", "MTL", epochs=4, n_stages=3)
    means: list[tuple[int, float]] = []
    original = StagePass.mean_score

    def note(stage_pass: StagePass, own: float) -> float:
        means.append((stage_pass.ctx.index, original(stage_pass, own)))
        return means[-1][1]

    monkeypatch.setattr(StagePass, "mean_score", note)
    result = runner.run()
    mine = [value for index, value in means if index == 2]
    best = max(point["epoch"] for point in result["curves"] if point["stage"] == 2 and point["best"])
    assert best == max(i for i, value in enumerate(mine) if value == max(mine))


def test_the_mean_over_tasks_is_geometric(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth more counts the same in each task, whatever the size of its metric; zero is not minus infinity."""
    runner = start("MultiTask", "MTL", epochs=1, n_stages=3)
    runner.run()
    values = {0: 0.04, 1: 0.0}
    ctx: Any = SimpleNamespace(index=2, stage=runner.stream.stages[2])
    every: Any = SimpleNamespace(run=runner.state, ctx=ctx)

    def evaluate(ctx: Any, known: Any, stage: Any, part: str) -> Any:
        assert part == "valid"
        return SimpleNamespace(metrics={runner.journal.primary(stage): values[stage.index]})

    monkeypatch.setattr(runner.evaluator, "evaluate", evaluate)
    assert StagePass.mean_score(every, 0.3) == pytest.approx((0.04 * 1e-4 * 0.3) ** (1 / 3))
    values[1] = 0.05
    assert StagePass.mean_score(every, 0.3) == pytest.approx((0.04 * 0.05 * 0.3) ** (1 / 3))


# -- the model with heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "loss"), [("MultiTask", "BPR"), ("MMOE", "CE"), ("SoftMask", "CE")])
def test_windows_train_what_rows_train(start: Start, model: str, loss: str) -> None:
    """The loss over a window's positions is the mean of the losses of its targets as rows: items, classes of items.

    Windows of two tasks together weigh each by its targets.
    """
    biases = {f"{prefix}_item_bias": True for prefix in ("multi_task", "mmoe", "soft_mask")}
    settings = {**SILENT, **biases, "loss_type": loss, "MAX_ITEM_LIST_LENGTH": 20}
    runner = start(model, "FineTune", n_stages=3, epochs=1, **settings)
    runner.run()
    trained: Any = runner.model
    assert bool(trained.heads.item_bias(1).any())
    for p in trained.heads.parameters():
        nn.init.normal_(p, std=0.3)
    ctx = runner.state.models.context(2, trained, runner.stream.view(2))
    told: list[tuple[Interaction, int, float]] = []
    for index in (0, 1, 2):
        mine = SimpleNamespace(**{**ctx.__dict__, "index": index, "stage": runner.stream.stages[index]})
        loader = make_loader(mine, mine.stage.train, "test")
        windows = loader.make(np.arange(loader.size))
        assert "_targets" in windows and windows["_task"].unique().tolist() == [index]
        rows = ctx.batcher.rows(mine.stage.train)
        assert ("_labels" in windows) == (index == 2)
        if loss == "BPR" and index < 2:  # the windows' negatives, for the same targets
            drawn = windows["neg__targets"]
            flat = {
                (int(u), int(n)): int(drawn[b, n - 1])
                for b, u in enumerate(windows["user_id"])
                for n in range(1, drawn.shape[1] + 1)
                if windows["_targets"][b, n - 1] > 0
            }
            keys = zip(rows["user_id"].tolist(), rows["item_length"].tolist(), strict=True)
            rows.interaction["neg_item_id"] = torch.tensor([flat[key] for key in keys])
        trained.train()
        one = trained.calculate_loss(windows)
        parts = [trained.task_loss(rows, index)]
        torch.testing.assert_close(one, parts[0], atol=1e-5, rtol=1e-5)
        other = trained.heads[(index + 1) % 3]
        kept = [p.detach().clone() for p in other.parameters()]
        for p in other.parameters():
            p.data.add_(1.0)
        assert torch.equal(trained.calculate_loss(windows), one), "another task's head had a say"
        for p, value in zip(other.parameters(), kept, strict=True):
            p.data.copy_(value)
        told.append((windows, int((windows["_targets"] > 0).sum()), float(one.detach())))
    (first, n, a), (second, m, b) = told[:2]
    assert abs(n - m) > 10 and abs((a * n + b * m) / (n + m) - (a + b) / 2) > 1e-4, "equal weights would look alike"
    both = float(trained.calculate_loss(join_rows(first, second)).detach())
    assert both == pytest.approx((a * n + b * m) / (n + m), rel=1e-5)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_classes_of_what_comes_next_train_on_windows(start: Start, positions: str) -> None:
    """If asked to; the class of a user belongs to no place in a history and is a row always."""
    runner = start("MultiTask", "FineTune", task_class_positions=positions, **SILENT)
    runner.begin(build_stream(runner.config))
    kinds = {}
    for stage in runner.stream.stages:
        model = SimpleNamespace(trains_all_positions=True)
        view = runner.stream.view(stage.index)
        batcher = Batcher(runner.config, runner.stream, view, stage.n_users, stage.n_items)
        ctx = StageContext(runner.config, runner.stream, stage.index, model, view, batcher, torch.device("cpu"))  # type: ignore[arg-type]
        loader = make_loader(ctx, stage.train, "test")
        assert loader.n_targets == len(stage.train)
        kinds[stage.name] = TARGETS in loader.make(np.arange(loader.size))
    assert list(kinds.values()) == [True, True, positions == "all", False]


@pytest.mark.parametrize("biases", [{}, BIASES])
def test_queries_score_as_the_model_does(
    start: Start, monkeypatch: pytest.MonkeyPatch, biases: dict[str, bool]
) -> None:
    """Few rows at a time, outputs first; whoever gives scores another meaning is asked for them."""
    runner = start("MultiTask", "FineTune", n_stages=2, epochs=1, **biases)
    runner.run()
    model: Any = runner.model
    ctx = runner.state.models.context(1, model, runner.stream.view(1))
    known = Known.everything(runner.stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
    monkeypatch.setattr("recbole_cl.evaluation.ranking.SCORES_IN_CACHE", 5 * ctx.batcher.n_items)
    sizes: list[int] = []
    score = type(model).score_queries
    monkeypatch.setattr(type(model), "score_queries", lambda self, q: sizes.append(len(q)) or score(self, q))
    stage = runner.stream.stages[1]
    found = runner.evaluator.evaluate(ctx, known, stage)
    assert max(sizes) <= 5 and sum(sizes) == len(stage.test)
    whole = type(model).full_sort_predict
    for sign in (1, -1):
        changed = lambda self, batch, sign=sign: sign * whole(self, batch)  # noqa: E731
        monkeypatch.setattr(type(model), "full_sort_predict", changed)
        assert not model.scores_by_queries()
        sizes.clear()
        other = runner.evaluator.evaluate(ctx, known, stage)
        assert sizes == [len(stage.test)]
        if sign == 1:
            rows = ctx.batcher.rows(stage.test, stage=1, evaluation=True)
            assert_same_ranking(other, found, whole(model, rows).detach())
        else:
            assert (other.recommended != found.recommended).mean() > 0.5 and other.metrics != found.metrics


def test_a_recurrent_backbone_serves_too(start: Start) -> None:
    """CONURE prunes a GRU's matrices; its answers to old tasks stay."""
    runner = start("MultiTask", "CONURE", multi_task_backbone="GRU4Rec", n_stages=2, epochs=1)
    runner.run()
    assert torch.equal(runner.told[0][0], runner.told[1][0])
    assert any("gru_layers.weight_hh" in name for name in runner.strategy.members[0].left)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "strategy", "settings", "told"),
    [
        ("MultiTask", {"MTL": {"weights": "mgd"}}, {}, "mtl_weights: 'mgd' is none of equal, mgda"),
        ("MultiTask", {"MTL": {"start": "warm"}}, {}, "mtl_start: 'warm' is none of fresh, previous"),
        ("MultiTask", {"CONURE": {"keep": 0.0}}, {}, "conure_keep: 0.0 is no share"),
        ("MultiTask", "TERACON", {}, "TERACON cannot serve the model MultiTask: it needs task_masks"),
        ("SoftMask", {"TERACON": {"alpha": -1.0}}, {}, "teracon_alpha: -1.0 must be at least 0"),
        ("SoftMask", "TERACON", {"soft_mask_backbone": "GRU4Rec"}, "GRU4Rec has no transformer layers to mask"),
        ("SoftMask", "TERACON", {"soft_mask_scale": 0.0}, "'soft_mask_scale' is 0.0; it must be a number above 0"),
        ("MMOE", "MTL", {"mmoe_experts": 0}, "'mmoe_experts' is 0; it must be an integer of at least 1"),
        ("MultiTask", "[FineAll,SingleTask]", {}, "FineAll and SingleTask are both a bound"),
    ],
)
def test_what_makes_no_sense_is_refused(
    start: Start, model: str, strategy: Any, settings: dict[str, Any], told: str
) -> None:
    """The message names property and value before anything is trained."""
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
        start(model, ["FineAll", "SingleTask"] if strategy == "[FineAll,SingleTask]" else strategy, **settings).run()
