"""The contract that every model meets, as tests that a model joins with a few lines::

    from recbole_cl.testing.model_contract import ModelContract

    class TestMine(ModelContract):
        model = Mine                     # a class, or a name
        settings = {"mine_width": 8}

The tests share one walk of the model over a planted-drift stream of three growing stages
(:mod:`recbole_cl.testing.toy`), which takes seconds on one core.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_cl.errors import CheckpointError
from recbole_cl.evaluation.ranking import Way, choose_way, own_lists
from recbole_cl.model.contract import ContinualModel, contract, offers
from recbole_cl.model.state import load_owned_state, owned_state
from recbole_cl.results.reports import plain
from recbole_cl.rng import ModelRandomness
from recbole_cl.stream.loader import make_loader
from recbole_cl.testing.comparing import assert_same, through_disk
from recbole_cl.testing.model_runs import ModelRuns, all_scores, assert_close, rows_of
from recbole_cl.tree import answering, tree_hash

OWN_COSTS = ("stage", "seconds", "train_seconds", "eval_seconds", "scratch_seconds", "peak_memory_mb")
"""Costs that the runner measures; a model's own have other names."""


class ModelContract:
    """Tests of one model; subclass it, with a name that starts with ``Test``.

    Attributes:
        model: Its class, or its name.
        settings: Further properties of the runs.
        tolerance: Relative difference that two ways to the same scores may have; float32 sums in another order.
        moving: Let users change their interests in each stage; a model without sequences has then more to learn.
        why_not_trained: Why a trained model need not be better than an untrained one on this stream.
        why_not_carried: Why a stage does not begin with the answers that the stage before ended with.
        why_not_one_row: Why a batch of one row has no loss.
    """

    model: ClassVar[Any]
    settings: ClassVar[Mapping[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-4
    moving: ClassVar[bool] = False
    why_not_trained: ClassVar[str] = ""
    why_not_carried: ClassVar[str] = ""
    why_not_one_row: ClassVar[str] = ""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory: pytest.TempPathFactory) -> ModelRuns:
        """The runs that the tests share."""
        return self.runs_in(tmp_path_factory.mktemp("model"))

    @classmethod
    def runs_in(cls, folder: Path) -> ModelRuns:
        """Returns runs of the model in a folder."""
        return ModelRuns(cls.model, folder, cls.settings, cls.moving)

    # -- training and stages --------------------------------------------------------------------------------------

    def test_it_learns(self, runs: ModelRuns) -> None:
        """The loss falls, and right after a stage it is better on it than a model that was not trained."""
        if self.why_not_trained:
            pytest.skip(self.why_not_trained)
        runner = runs.whole
        losses = [point["train_loss"] for point in runner.journal.curves if point["stage"] == 0]
        if losses[0] is not None:  # a trainer of the model's own may tell none
            assert losses[-1] < losses[0], f"the loss of the first stage does not fall: {losses}"
        result = runner.journal.result(runner.folder)
        metric = result["primary_metric"]
        learnt = [row[stage] for stage, row in enumerate(result["matrix"][metric])][1:]
        untrained = [value for value in result["reference"][metric] if value is not None]
        assert np.mean(learnt) > np.mean(untrained), f"{metric} {learnt}, untrained {untrained}"

    def test_it_grows(self, runs: ModelRuns) -> None:
        """Each stage's model has rows for its users and items, and begins with the answers that the last one gave."""
        stages = runs.whole.stream.stages
        for stage in stages:
            found = runs.ended[stage.index]
            assert (found.n_users, found.n_items) == (stage.n_users, stage.n_items)
            assert not len(found.scores) or found.scores.size(1) == stage.n_items, "it does not score all known items"
        if self.why_not_carried:
            return
        for index, begun in runs.begun.items():
            before = runs.ended[index - 1]
            message = f"stage {index + 1} begins with other answers than stage {index} ended with"
            assert_close(before.scores, begun.scores[:, : before.n_items], self.tolerance, message)

    def test_an_interrupted_run_goes_on_with_the_same_bits(self, runs: ModelRuns) -> None:
        """A run that breaks off inside a stage ends, resumed, with the state and the results of one that did not."""
        whole, again = runs.whole, runs.interrupted()
        assert_same(owned_state(whole.model), owned_state(again.model))
        assert whole.journal.records.state_dict() == again.journal.records.state_dict(), "the results differ"
        assert whole.journal.reports == again.journal.reports, "the reports differ"

    def test_it_draws_from_the_runs_generators(self, runs: ModelRuns) -> None:
        """The global generators of torch, numpy and Python are after a run as they were before it."""
        assert runs.whole and not runs.drew, f"drew from the global generator of {', '.join(runs.drew)}"

    def test_its_state_round_trips(self, runs: ModelRuns, tmp_path: Path) -> None:
        """A new model with its state from the disk has the same state and gives the same answers, bit for bit."""
        ctx, other = runs.ctx, runs.fresh()
        state = through_disk(owned_state(ctx.model), tmp_path)
        load_owned_state(other.model, state)
        assert_same(owned_state(ctx.model), owned_state(other.model))
        if ctx.stage.task.kind == "next_item":
            targets = runs.ended[ctx.index].targets
            assert torch.equal(all_scores(ctx, targets), all_scores(other, targets)), "its answers need more than state"
        if state["tensors"] and not offers(ctx.model, "fit_state"):  # which completes what is not there
            lost = next(iter(state["tensors"]))
            rest = {name: tensor for name, tensor in state["tensors"].items() if name != lost}
            with pytest.raises(CheckpointError, match=lost):
                load_owned_state(runs.fresh().model, {**state, "tensors": rest})

    # -- answers --------------------------------------------------------------------------------------------------

    def test_evaluation_changes_nothing(self, runs: ModelRuns) -> None:
        """Evaluated twice it gives the same results, and its state, its mode and its parameters' flags stay."""
        runner, ctx = runs.whole, runs.ctx
        snapshot = lambda: (  # noqa: E731
            tree_hash(owned_state(ctx.model)),
            [module.training for module in ctx.model.modules()],
            [p.requires_grad for p in ctx.model.parameters()],
        )
        before = snapshot()
        outcomes = [
            runner.evaluator.evaluate(ctx, runner.known, stage, split).metrics
            for _ in range(2)
            for stage in runner.stream.stages
            for split in ("valid", "test")
            if len(stage.split(split))
        ]
        half = len(outcomes) // 2
        assert outcomes[:half] == outcomes[half:], "the second evaluation gave other results"
        assert snapshot() == before, "evaluation changed the model"

    def test_scores_are_numbers(self, runs: ModelRuns) -> None:
        """No score is NaN or +inf, and each row has an item with a score."""
        self._ranks(runs)
        scores = all_scores(runs.ctx, runs.ended[runs.ctx.index].targets)
        assert not torch.isnan(scores).any(), "a score is NaN"
        assert not torch.isposinf(scores).any(), "a score is infinite"
        assert torch.isfinite(scores).any(dim=1).all(), "a row has no item with a score"

    def test_all_ways_to_scores_agree(self, runs: ModelRuns) -> None:
        """Given candidates, outputs of many rows and shared prefixes give what scoring all items gives."""
        self._ranks(runs)
        ctx, targets = runs.ctx, runs.ended[runs.ctx.index].targets
        full = all_scores(ctx, targets)
        given = all_scores(ctx, targets, Way.GIVEN)
        given = torch.where(torch.isfinite(full), given, -torch.inf)  # a decoder may score more of those it is given
        assert_close(full, given, self.tolerance, "given candidates and all items")
        model = contract(ctx.model)
        if model.scores_by_queries():
            assert_close(full, all_scores(ctx, targets, Way.QUERIES), self.tolerance, "item_queries and all items")
        if model.shares_prefixes():
            assert_close(full, all_scores(ctx, targets, Way.PREFIXES), self.tolerance, "shared prefixes and one by one")

    def test_rows_do_not_depend_on_each_other(self, runs: ModelRuns) -> None:
        """A row alone has the scores that it has in a batch of histories of many lengths."""
        self._ranks(runs)
        ctx, stream = runs.ctx, runs.whole.stream
        tests = [stage.test[np.arange(min(4, len(stage.test)))] for stage in stream.stages]
        lengths = {int(n) for targets in tests for n in targets.hi - targets.lo}
        assert len(lengths) > 1, "all histories have one length"
        together = torch.cat([all_scores(ctx, targets) for targets in tests])
        alone = [all_scores(ctx, targets[np.array([row])]) for targets in tests for row in range(len(targets))]
        assert_close(together, torch.cat(alone), self.tolerance, "a row alone and in a batch")

    def test_lists_hold_what_is_allowed(self, runs: ModelRuns) -> None:
        """Lists that it makes itself hold allowed items only, none that is excluded, none twice, the best first."""
        ctx = runs.ctx
        if choose_way(ctx.model, candidates=False) is not Way.OWN:
            pytest.skip("it ranks by its scores")
        targets, n = runs.ended[ctx.index].targets, ctx.batcher.n_items
        allowed = torch.arange(n, device=ctx.device) % 2 == 1
        row = torch.arange(len(targets), device=ctx.device).repeat_interleave(3)
        item = torch.tensor([1, 3, 5], device=ctx.device).repeat(len(targets))
        with torch.no_grad(), answering(ctx.model), ModelRandomness(0).owned():
            batch = rows_of(ctx, targets)
            for k in (1, 5, n):
                own_lists(ctx.model, batch, k, allowed, (row, item))
            none = torch.zeros_like(allowed)
            items, _ = own_lists(ctx.model, batch, 3, none, (row[:0], item[:0]))
        assert not items.any(), "it recommends where nothing is allowed"

    def test_one_row_is_a_batch(self, runs: ModelRuns) -> None:
        """The last batch of an epoch may hold one row: its loss is finite and has a gradient."""
        if self.why_not_one_row:
            pytest.skip(self.why_not_one_row)
        ctx = runs.fresh()
        contract(ctx.model).begin_pass(ctx)
        ctx.loader = make_loader(ctx, ctx.stage.train[np.arange(1)], "one row")
        if contract(ctx.model).stage_trainer(ctx, 0.01) is not None:
            pytest.skip("it trains its stages by itself")
        ctx.model.train()
        with ModelRandomness(0).owned():
            losses = ctx.model.calculate_loss(next(iter(ctx.loader)).to(ctx.device))
        loss = torch.stack([part.sum() for part in (losses if isinstance(losses, tuple) else (losses,))]).sum()
        assert bool(torch.isfinite(loss)), f"the loss of one row is {float(loss.detach())}"
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in ctx.model.parameters() if p.grad is not None]
            assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients), "the gradient is not finite"

    # -- what it says of itself -----------------------------------------------------------------------------------

    def test_its_names_are_the_contracts(self, runs: ModelRuns) -> None:
        """What it offers takes what the contract gives; what it does not offer is neutral."""
        model = runs.ctx.model
        known = contract(model)
        for name, default in vars(ContinualModel).items():
            if name.startswith("_") or not inspect.isfunction(default):
                continue
            own = getattr(type(model), name, default)
            if own is default:
                assert not offers(model, name), f"offers() takes the default of {name} for its own"
                continue
            expected, taken = inspect.signature(default), inspect.signature(own)
            try:
                taken.bind(*expected.parameters)
            except TypeError as error:
                raise AssertionError(f"{name}{taken} does not take what {name}{expected} is given: {error}") from None
            assert offers(model, name) or own is getattr(AbstractRecommender, name, None), f"offers() misses its {name}"
            assert getattr(known, name) == getattr(model, name), f"contract() hides its {name}"
        undone = [name for name in ("load_owned_state",) if offers(model, "owned_state") and not offers(model, name)]
        assert not undone, f"it has owned_state, and no {undone[0]} to put it back"

    def test_what_it_tells_can_be_kept(self, runs: ModelRuns) -> None:
        """Its report has the shape that the page reads, its costs are JSON with names of their own."""
        model = contract(runs.ctx.model)
        report = plain("the model", model.report())
        json.dumps(report, allow_nan=False)
        costs = model.stage_costs()
        json.dumps(costs, allow_nan=False)
        assert not set(costs) & set(OWN_COSTS), "stage_costs has a name that the runner measures"
        for name, path in model.side_stores().items():
            assert isinstance(name, str) and isinstance(path, str), "side_stores maps names to paths, both text"

    @staticmethod
    def _ranks(runs: ModelRuns) -> None:
        if runs.ctx.stage.task.kind != "next_item":
            pytest.skip("it does not rank items")
