"""LwF on all positions: the fused divergence, outputs shared with the data loss, what is kept of the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from run_helpers import bare_context, configure

from recbole_cl.model import fused
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts import teacher as parts
from recbole_cl.strategy.parts.exemplars import join_rows
from recbole_cl.stream.batch import TARGETS
from recbole_cl.stream.loader import make_loader
from recbole_cl.testing import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

SMALL = {"hidden_size": 8, "inner_size": 16, "n_layers": 1, "n_heads": 2, "MAX_ITEM_LIST_LENGTH": 10}


@pytest.mark.parametrize("n", [1, 127, 300])
def test_distillation_is_the_divergence(n: int) -> None:
    draw = torch.Generator().manual_seed(0)
    new, old = torch.randn(n, 5, generator=draw).requires_grad_(), torch.randn(n, 3, generator=draw)
    table, before = torch.randn(40, 5, generator=draw).requires_grad_(), torch.randn(40, 3, generator=draw)

    def plain() -> torch.Tensor:
        logs = [torch.log_softmax(z / 1.5, -1) for z in (old @ before.T, new @ table.T)]
        return 1.5**2 * (logs[0].exp() * (logs[0] - logs[1])).sum() / n

    def ours() -> torch.Tensor:
        return fused.distillation(new, table, old, before, 1.5)

    assert "Distillation" in type(ours().grad_fn).__name__
    torch.testing.assert_close(ours(), plain())
    with torch.no_grad():
        torch.testing.assert_close(ours(), plain())
    for a, b in zip(*(torch.autograd.grad(3 * f(), (new, table)) for f in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    second = []
    for f in (ours, plain):
        first = torch.autograd.grad(f(), (new, table), create_graph=True)
        second.append(torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), (new, table)))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def context(toy: PlantedDrift) -> Callable[..., StageContext]:
    return lambda **more: bare_context(toy, "SASRec", 1, **{**SMALL, **more})


def batch_of(ctx: StageContext, every: int = 1) -> Interaction:
    found: Interaction = ctx.loader.make(np.arange(ctx.loader.size)[::every])
    return found


def distil(ctx: StageContext, batch: Interaction, strategy: Any = None) -> torch.Tensor:
    strategy = strategy or strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0})
    term: torch.Tensor = strategy.loss_terms(ctx, batch)["LwF/distillation"]
    return term


def counted(rows: list[int], found: torch.Tensor) -> torch.Tensor:
    """Notes how many rows were run."""
    rows.append(len(found))
    return found


PAIRS = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}


@pytest.mark.parametrize("settings", [{}, PAIRS], ids=["softmax", "pairs"])
def test_one_pass_with_dropout_serves_the_loss_and_the_term(context: Any, settings: dict[str, Any]) -> None:
    """The term is of the very outputs of the data loss: no pass of the new model, nothing drawn, one graph for both."""
    ctx = context(hidden_dropout_prob=0.5, **settings)
    ctx.model.train()
    batch, _ = batch_of(ctx), ctx.previous_model  # made here: the fixture seeds the global generator
    loss = ctx.model.calculate_loss(batch)
    outputs = batch.outputs.detach().requires_grad_()
    passes: list[int] = []
    state, encode = torch.get_rng_state(), type(ctx.model).encode
    ctx.model.encode = lambda *a: counted(passes, encode(ctx.model, *a))
    term = distil(ctx, batch)
    assert not passes and torch.equal(state, torch.get_rng_state()) and "LwF/dropout" not in ctx.state_dict()
    del ctx.model.encode

    graph, batch.outputs = batch.outputs, outputs
    torch.testing.assert_close(distil(ctx, batch), term)
    slope = torch.autograd.grad(distil(ctx, batch), outputs)[0]
    assert slope.abs().sum() > 0
    inner = [p for name, p in ctx.model.named_parameters() if "trm_encoder" in name]
    for a, b in zip(
        torch.autograd.grad(loss + term, inner, retain_graph=True),
        zip(
            torch.autograd.grad(loss, inner, retain_graph=True),
            torch.autograd.grad(graph, inner, slope, retain_graph=True),
            strict=True,
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b[0] + b[1])

    ctx.model.eval()
    again = batch_of(ctx)
    assert "outputs" not in vars(again)
    alone = distil(ctx, again)  # a loss of shares, or of another model: the outputs are made here
    ctx.model.calculate_loss(again)
    torch.testing.assert_close(distil(ctx, again), alone)


def test_what_is_kept_of_the_teacher_is_what_it_says(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context()
    ctx.model.eval()
    asked: list[int] = []
    encode = type(ctx.model).encode
    old = ctx.previous_model
    old.encode = lambda sequence: counted(asked, encode(old, sequence))
    strategy = strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0})
    batch = batch_of(ctx, 3)

    def reference(batch: Interaction) -> torch.Tensor:
        """Nothing kept, one history after the other."""
        new, before = [], []
        n = old.n_items
        for sequence, targets in zip(batch["item_id_list"], batch[TARGETS], strict=True):
            for end in range(1, len(sequence) + 1):
                known = sequence[:end][(sequence[:end] > 0) & (sequence[:end] < n)]
                if targets[end - 1] > 0 and len(known):
                    new.append(encode(ctx.model, sequence[None, :end])[0, -1] @ ctx.model.item_embedding.weight[1:n].T)
                    before.append(encode(old, known[None])[0, -1] @ old.item_embedding.weight[1:n].T)
        return fused.divergence(torch.stack(new), torch.stack(before), 2.0)

    with torch.no_grad():
        torch.testing.assert_close(distil(ctx, batch, strategy), reference(batch), rtol=1e-4, atol=1e-6)
        assert sum(asked) == len(ctx.loader.units)  # every window once
        asked.clear()
        torch.testing.assert_close(
            distil(ctx, batch_of(ctx, 2), strategy), reference(batch_of(ctx, 2)), rtol=1e-4, atol=1e-6
        )
        assert not asked
        mixed = batch_of(ctx, 3)
        others = batch_of(ctx, 5)
        others.interaction["item_id_list"] = others["item_id_list"].roll(1, 0) * (others["item_id_list"] > 0)
        mixed = join_rows(mixed, others)
        torch.testing.assert_close(distil(ctx, mixed, strategy), reference(mixed), rtol=1e-4, atol=1e-6)
        assert 0 < sum(asked) <= len(others)  # only what is not kept
        kept = strategy._known
        ctx.loader = make_loader(ctx, ctx.stage.train, "later")
        distil(ctx, batch, strategy)
        assert strategy._known is not kept  # a new pass
        monkeypatch.setattr(parts, "OUTPUTS_KEPT", 1)
        monkeypatch.setattr(parts, "INPUTS_AT_ONCE", 20)
        few = strategies.get("LwF")({"lambda": 1.0, "temperature": 2.0})
        torch.testing.assert_close(distil(ctx, batch, few), reference(batch), rtol=1e-4, atol=1e-6)
        assert 0 < len(few._known._outputs.starts) < len(ctx.loader.units)


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_the_teacher_is_the_model_of_the_stage_before(toy: PlantedDrift, tmp_path: Path, model: str) -> None:
    """Its weights have the bits that the model had when that stage ended: in every pass, and after a resumption."""
    ends: dict[int, dict[str, torch.Tensor]] = {}
    seen: list[int] = []

    class Watching(Strategy):
        neutral = {}

        def loss_terms(self, ctx: StageContext, batch: Any) -> dict[str, torch.Tensor]:
            teacher = ctx.previous_model
            assert (teacher is None) == (ctx.index == 0)
            if teacher is not None:
                told = dict(teacher.named_parameters())
                assert told.keys() == ends[ctx.index - 1].keys() and not teacher.training
                for name, value in ends[ctx.index - 1].items():
                    assert torch.equal(told[name], value) and not told[name].requires_grad, name
                seen.append(ctx.index)
            if self.breaks and ctx.index == 1 and ctx.step == 3:
                raise KeyboardInterrupt
            return {}

        def end_stage(self, ctx: StageContext) -> None:
            ends[ctx.index] = {name: p.detach().clone() for name, p in ctx.model.named_parameters()}

    def runner(folder: str, breaks: bool, resume: bool = False) -> Runner:
        settings = {"checkpoint_steps": 1, "resume": resume, "epochs": 2}
        made = Runner(configure(toy, tmp_path / folder, model, strategy="LwF", **settings))
        watching = Watching()
        watching.breaks = breaks  # type: ignore[attr-defined]
        made.strategy.members.append(watching)
        return made

    with pytest.raises(KeyboardInterrupt):
        runner("run", True).run()
    assert set(seen) == {1}
    runner("run", False, resume=True).run()
    assert set(seen) == {1, 2}
    assert any(not torch.equal(ends[1][name][: len(value)], value) for name, value in ends[0].items()), "nothing moved"
