"""The contract that every strategy meets, as tests that a strategy joins with a few lines::

    from recbole_cl.testing.contract import StrategyContract

    class TestEWC(StrategyContract):
        strategy = "EWC"
        strength = "lambda"
        drift_grid = (0.0, 1.0, 10.0)
        grows = {"importance": "tables", "anchor": "tables"}

Each test walks a planted-drift stream of three growing stages (:mod:`recbole_cl.testing.toy`) with a small model.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from recbole_cl.config import CLConfig
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import STEP_HOOKS, Strategy
from recbole_cl.strategy.context import StageContext
from recbole_cl.testing.comparing import assert_same, effects, leaves, through_disk
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

SMALL = {
    "embedding_size": 8,
    "hidden_size": 8,
    "inner_size": 16,
    "n_layers": 1,
    "n_heads": 2,
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 64,
    "learning_rate": 0.01,
    "epochs": 2,
    "metrics": ["Hit"],
    "valid_metric": "Hit@5",
    "topk": [5],
    "show_progress": False,
    "checkpoint_keep": 1,
}
"""Settings of the contract's runs: seconds on one core."""


class StrategyContract:
    """Tests of one strategy; subclass it, with a name that starts with ``Test``.

    Attributes:
        strategy: Registered name.
        parameters: Own parameters under which it is active, besides its defaults.
        backbones: Models it is tested with.
        strength: Parameter that scales an anchored penalty; with :attr:`drift_grid`.
        drift_grid: Strengths from 0 on over which the importance-weighted drift falls; empty where there is no anchor.
        data_importance: True where ``end_stage`` takes importances from data, which the batch size must not change.
        grows: What of its state grows with the users and items, by its path in the state: ``tables`` for tensors by
            parameter name, of all the model's tables of users and items among them; ``users`` or ``items`` for one
            tensor with a row for each. Empty where nothing does.
        companion: Strategy that it is composed with.
        settings: Further properties of the runs.
    """

    strategy: ClassVar[str]
    parameters: ClassVar[Mapping[str, Any]] = {}
    backbones: ClassVar[tuple[str, ...]] = ("SASRec", "BPR")
    strength: ClassVar[str | None] = None
    drift_grid: ClassVar[tuple[float, ...]] = ()
    data_importance: ClassVar[bool] = False
    grows: ClassVar[Mapping[str, str]] = {}
    companion: ClassVar[str] = "SI"
    settings: ClassVar[Mapping[str, Any]] = {}

    # -- tools ----------------------------------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs each test with each backbone."""
        if "backbone" in metafunc.fixturenames:
            metafunc.parametrize("backbone", self.backbones)

    @pytest.fixture(scope="class")
    def toy(self, tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
        """The stream."""
        return write_planted_drift(tmp_path_factory.mktemp("planted"))

    @pytest.fixture(scope="class")
    def finished(self) -> dict[str, Runner]:
        """Runs that tests share."""
        return {}

    @pytest.fixture
    def known(self, run: Callable[..., Runner], finished: dict[str, Runner]) -> Callable[..., Runner]:
        """Runs a model under strategies once for all tests; not for tests that patch the strategy's hooks."""

        def known(backbone: str, strategy: Any) -> Runner:
            key = json.dumps([backbone, strategy])
            if key not in finished:
                finished[key] = run(backbone, strategy)
            return finished[key]

        return known

    @pytest.fixture
    def run(self, toy: PlantedDrift, tmp_path: Path) -> Callable[..., Runner]:
        """Runs a model under strategies and returns the runner."""
        numbers = iter(range(1000))

        def run(backbone: str, strategy: Any, **settings: Any) -> Runner:
            given = {**SMALL, **toy.settings(), **self.settings, **settings}
            given |= {"strategy": strategy, "output_dir": str(tmp_path / f"run{next(numbers)}")}
            config = CLConfig(model=backbone, dataset=toy.name, config_dict=given)
            config["saved"] = False
            runner = Runner(config)
            runner.run()
            return runner

        return run

    @property
    def cls(self) -> type[Strategy]:
        """The strategy's class."""
        found: type[Strategy] = strategies.get(self.strategy)
        return found

    def active(self, **changed: Any) -> dict[str, Any]:
        """Returns the property ``strategy`` with the active parameters."""
        return {self.strategy: {**self.parameters, **changed}}

    def _before(self, patch: pytest.MonkeyPatch, hook: str, look: Callable[[Any, StageContext], None]) -> None:
        """Calls ``look`` before a hook of the strategy (of the instances of its own class)."""
        original = getattr(self.cls, hook)

        def wrapped(member: Strategy, ctx: StageContext, *rest: Any) -> Any:
            look(member, ctx)
            return original(member, ctx, *rest)

        patch.setattr(self.cls, hook, wrapped)

    def _live(self, runner: Runner) -> Strategy:
        return next(s for s in runner.strategy.members if s.name == self.cls.__name__)

    # -- tests ----------------------------------------------------------------------------------------------------

    def test_neutral_is_finetune(
        self, backbone: str, run: Callable[..., Runner], known: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With neutral parameters its hooks run, and every parameter has the bits that FineTune gives it."""
        if self.cls.neutral is None:
            assert self.cls.why_not_neutral, "declare neutral parameters, or say in why_not_neutral why there are none"
            pytest.skip(self.cls.why_not_neutral)
        calls: dict[str, int] = {}
        hooks = [hook for hook in (*STEP_HOOKS, "end_stage") if getattr(self.cls, hook) is not getattr(Strategy, hook)]
        for hook in hooks:
            calls[hook] = 0
            self._before(monkeypatch, hook, lambda *_, hook=hook: calls.__setitem__(hook, calls[hook] + 1))
        neutral = run(backbone, self.active(**self.cls.neutral))
        assert all(calls.values()), f"hooks that never ran: {[hook for hook in hooks if not calls[hook]]}"
        assert "end_stage" not in calls or calls["end_stage"] == len(neutral.stream)
        plain = known(backbone, "FineTune")
        assert_same(plain.model.state_dict(), neutral.model.state_dict())

    def test_it_acts_after_drift(
        self, backbone: str, run: Callable[..., Runner], known: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On drifted data its term is positive with a gradient in the parameters, or the batch has more rows."""
        found: list[str] = []

        def look(member: Strategy, ctx: StageContext) -> None:
            if ctx.index == len(ctx.stream) - 1:
                found.extend(effects(member, ctx))

        self._before(monkeypatch, "end_stage", look)
        active = run(backbone, self.active())
        assert found, "no hook changes gradients, loss or batch in the last stage"
        plain = known(backbone, "FineTune")
        same = [torch.equal(a, b) for a, b in zip(active.model.parameters(), plain.model.parameters(), strict=True)]
        assert not all(same), "the final parameters are those of FineTune"

    def test_drift_falls_with_strength(
        self, backbone: str, run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Importance-weighted drift from the anchor falls from each strength of the grid to the next."""
        strength = self.strength
        if not self.drift_grid or strength is None:
            pytest.skip("no anchored penalty")
        drifts: list[float] = []

        def look(member: Strategy, ctx: StageContext) -> None:
            if ctx.index == 1:
                kept, member.params[strength] = member.params[strength], 1.0
                drifts.append(float(member.penalty(ctx)))
                member.params[strength] = kept

        self._before(monkeypatch, "end_stage", look)
        for value in self.drift_grid:
            run(backbone, self.active(**{strength: value}), eval_step=0)
        assert drifts[-1] > 0
        pairs = itertools.pairwise(drifts)
        assert all(a > b for a, b in pairs), f"drift {drifts} over strengths {self.drift_grid}"

    def test_growth(self, backbone: str, known: Callable[..., Runner]) -> None:
        """Over a growing stream its tensors end with the shapes of the model's parameters; all that it declares do."""
        runner = known(backbone, self.active())
        stages = runner.stream.stages
        assert stages[-1].n_users > stages[0].n_users and stages[-1].n_items > stages[0].n_items
        rows = {"users": stages[-1].n_users, "items": stages[-1].n_items}
        shapes = {name: p.shape for name, p in runner.model.named_parameters()}
        tables = {name for name, shape in shapes.items() if shape and shape[0] in rows.values()}
        assert tables, "the model has no table of users or items"
        found: dict[str, int] = {}
        for path, name, value in leaves(self._live(runner).state_dict()):
            if not torch.is_tensor(value):
                continue
            part = path.strip("/")
            if name in shapes:
                assert value.shape == shapes[name], f"{path} has {tuple(value.shape)}, the model {tuple(shapes[name])}"
                part = part.removesuffix(f"/{name}")
                if name in tables:
                    found[part] = found.get(part, 0) + 1
            elif self.grows.get(part) in rows:
                assert len(value) == rows[self.grows[part]], f"{path} has {len(value)} rows, not one for each"
                found[part] = 1
        declared = {part: len(tables) if kind == "tables" else 1 for part, kind in self.grows.items()}
        assert found == declared, f"the state has growing tensors {found}, {type(self).__name__}.grows says {declared}"

    def test_state_survives_a_checkpoint(
        self, backbone: str, run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """After every stage its state is loaded exactly as it was saved, and a missing key is named."""
        original, stages = self.cls.end_stage, []

        def check(member: Strategy, ctx: StageContext) -> None:
            original(member, ctx)
            stages.append(ctx.index)
            state, again = member.state_dict(), self.cls(member.params)
            again.load_state_dict(through_disk(state, tmp_path))
            assert_same(state, again.state_dict())
            for key in state:
                with pytest.raises(KeyError, match=key):
                    self.cls(member.params).load_state_dict({k: v for k, v in state.items() if k != key})

        monkeypatch.setattr(self.cls, "end_stage", check)
        run(backbone, self.active())
        assert stages == [0, 1, 2]

    def test_state_in_the_middle_of_a_stage(
        self,
        backbone: str,
        run: Callable[..., Runner],
        known: Callable[..., Runner],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """A strategy made anew from its state between two steps goes on with the same bits."""
        whole = known(backbone, self.active())
        swapped: list[int] = []
        original = self.cls.after_step

        def swap(member: Strategy, ctx: StageContext) -> None:
            original(member, ctx)
            if ctx.index == 1 and ctx.step == 3:
                state = through_disk(member.state_dict(), tmp_path)
                if own := list(member.parameters()):  # the optimiser holds them: a state goes back into these tensors
                    for p in own:
                        p.data.fill_(7.0)
                    fresh = self.cls(member.params).__dict__
                    member.__dict__.update({k: v for k, v in fresh.items() if k.startswith("_")})  # what is not state
                    member.load_state_dict(state)
                    assert all(a is b for a, b in zip(own, member.parameters(), strict=True))
                else:
                    again = self.cls(member.params)
                    again.load_state_dict(state)
                    member.__dict__.clear()
                    member.__dict__.update(again.__dict__)
                swapped.append(ctx.step)

        monkeypatch.setattr(self.cls, "after_step", swap)
        again = run(backbone, self.active())
        assert swapped, "the stage has fewer than three steps"
        assert_same(whole.model.state_dict(), again.model.state_dict())
        assert_same(self._live(whole).state_dict(), self._live(again).state_dict())

    def test_its_own_parameters_are_trained(
        self, backbone: str, run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each of its own trainable parameters moves after the first stage."""
        kept: list[torch.Tensor] = []

        def look(member: Strategy, ctx: StageContext) -> None:
            if not ctx.index:
                kept.clear()
                kept.extend(p.detach().clone() for p in member.parameters())

        self._before(monkeypatch, "end_stage", look)
        last = list(self._live(run(backbone, self.active(), eval_step=0)).parameters())
        if not last:
            pytest.skip("no trainable parameters of its own")
        assert len(kept) == len(last)
        assert all(not bool((old == new[: len(old)]).all()) for old, new in zip(kept, last, strict=True))

    def test_an_interrupted_run_goes_on_with_the_same_bits(
        self,
        backbone: str,
        toy: PlantedDrift,
        known: Callable[..., Runner],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """A run that breaks off in the middle of an epoch ends, resumed by another runner, with the same bits."""

        def runner(resume: bool) -> Runner:
            given = {**SMALL, **toy.settings(), **self.settings, "strategy": self.active()}
            given |= {"output_dir": str(tmp_path / "run"), "checkpoint_steps": 2, "resume": resume}
            return Runner(CLConfig(model=backbone, dataset=toy.name, config_dict=given))

        def stop(member: Strategy, ctx: StageContext) -> None:
            if ctx.index == 1 and ctx.step == 5:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self._before(patch, "after_step", stop)
            runner(resume=False).run()
        assert list((tmp_path / "run" / "checkpoints").glob("0*")), "there must be something to resume from"
        again, whole = runner(resume=True), known(backbone, self.active())
        again.run()
        assert_same(whole.model.state_dict(), again.model.state_dict())
        assert_same(self._live(whole).state_dict(), self._live(again).state_dict())

    def test_listing_order_does_not_matter(self, backbone: str, run: Callable[..., Runner]) -> None:
        """Composed with another strategy, either listing gives the same bits."""
        mine = self.active()
        one, two = run(backbone, [mine, self.companion]), run(backbone, [self.companion, mine])
        assert_same(one.model.state_dict(), two.model.state_dict())
        assert_same(one.strategy.state_dict(), two.strategy.state_dict())

    def test_importance_does_not_depend_on_the_batch_size(
        self, backbone: str, run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Importances taken from data at the end of a stage are the same for every batch size."""
        if not self.data_importance:
            pytest.skip("its importances do not come from data at the end of a stage")
        states: list[Any] = []

        def look(member: Strategy, ctx: StageContext) -> None:
            if ctx.index or states:
                return
            kept = ctx.config["train_batch_size"]
            for size in (4, kept, 4096):
                ctx.config["train_batch_size"] = size
                other = self.cls(member.params)
                other.load_state_dict(copy.deepcopy(member.state_dict()))
                states.append(None)
                other.end_stage(replace(ctx, _generators={}))
                states[-1] = other.state_dict()
            ctx.config["train_batch_size"] = kept

        self._before(monkeypatch, "end_stage", look)
        run(backbone, self.active(), epochs=1)
        assert len(states) == 3
        assert_same(states[0], states[1])
        assert_same(states[0], states[2])
