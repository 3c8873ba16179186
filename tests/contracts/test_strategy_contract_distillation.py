"""Contrastive, ContrastivePIW, PISA and CCD meet the contract of strategies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_cl.config import CLConfig
from recbole_cl.runner import Runner
from recbole_cl.strategy.base import StageContext
from recbole_cl.testing import PlantedDrift
from recbole_cl.testing.contract import SMALL, StrategyContract, assert_same, through_disk


class TowerContract(StrategyContract):
    backbones = ("BPR", "LightGCN")


class InPlace(TowerContract):
    """For strategies with parameters that the optimiser holds: a state goes back into the same tensors."""

    def test_state_in_the_middle_of_a_stage(
        self,
        backbone: str,
        run: Callable[..., Runner],
        known: Callable[..., Runner],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """As after a best epoch: the values come back, the tensors stay, and the rest of the run has the same bits."""
        whole, swapped = known(backbone, self.active()), []

        def swap(member: Any, ctx: StageContext, *rest: Any) -> Any:
            if ctx.index == 1 and ctx.step == 3:
                state, kept = through_disk(member.state_dict(), tmp_path), list(member.parameters())
                for p in kept:
                    p.data.fill_(7.0)
                fresh = self.cls(member.params).__dict__
                member.__dict__.update({k: v for k, v in fresh.items() if k.startswith("_")})  # what is not state
                member.load_state_dict(state)
                assert all(a is b for a, b in zip(kept, member.parameters(), strict=True))
                swapped.append(ctx.step)
            return original(member, ctx, *rest)

        original = self.cls.loss_terms
        monkeypatch.setattr(self.cls, "loss_terms", swap)
        again = run(backbone, self.active())
        assert swapped
        assert_same(whole.model.state_dict(), again.model.state_dict())
        assert_same(self._live(whole).state_dict(), self._live(again).state_dict())

    def test_its_parameters_are_trained(self, backbone: str, run: Callable[..., Runner], monkeypatch: Any) -> None:
        """Each of its own parameters moves."""
        kept: list[Any] = []
        first = lambda member, _: kept or kept.extend(p.detach().clone() for p in member.parameters())  # noqa: E731
        self._before(monkeypatch, "loss_terms", first)
        last = list(self._live(run(backbone, self.active(), eval_step=0)).parameters())
        assert len(kept) == len(last) > 0
        assert all(not bool((old == new[: len(old)]).all()) for old, new in zip(kept, last, strict=True))


class TestContrastive(TowerContract):
    strategy = "Contrastive"
    parameters = {"positives": 3, "negatives": 20}


class TestContrastivePIW(InPlace):
    strategy = "ContrastivePIW"


class TestPISA(TowerContract):
    strategy = "PISA"

    def test_an_interrupted_second_pass_goes_on_with_the_same_bits(
        self, backbone: str, toy: PlantedDrift, known: Callable[..., Runner], monkeypatch: Any, tmp_path: Path
    ) -> None:
        """The forward model and the weights come back where a run breaks off in the middle of the second pass."""

        def runner(resume: bool) -> Runner:
            given = {**SMALL, **toy.settings(), "strategy": self.active(), "output_dir": str(tmp_path / "run")}
            config = {**given, "checkpoint_steps": 2, "resume": resume}
            return Runner(CLConfig(model=backbone, dataset=toy.name, config_dict=config))

        def stop(member: Any, ctx: StageContext) -> None:
            if ctx.index == 1 and ctx.pass_.name == "train" and ctx.step == 5:
                assert member.forward is not None
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self._before(patch, "after_step", stop)
            runner(resume=False).run()
        again, whole = runner(resume=True), known(backbone, self.active())
        again.run()
        assert_same(whole.model.state_dict(), again.model.state_dict())
        assert_same(self._live(whole).state_dict(), self._live(again).state_dict())

    def test_the_second_pass_starts_where_the_stage_started(self, backbone: str, run: Any, monkeypatch: Any) -> None:
        """Both passes start from the same weights, and the forward model is another than the one that is handed on."""
        starts: dict[tuple[int, str], Any] = {}
        self._before_terms(monkeypatch, starts)
        runner = run(backbone, self.active())
        assert sorted(starts) == [(0, "train"), (1, "forward"), (1, "train"), (2, "forward"), (2, "train")]
        for stage in (1, 2):
            assert_same(starts[stage, "forward"], starts[stage, "train"])
        table = runner.model.state_dict()["user_embedding.weight"]
        assert self._live(runner).forward.shape == table.shape
        assert not bool((self._live(runner).forward == table).all())

    def _before_terms(self, monkeypatch: Any, starts: dict[tuple[int, str], Any]) -> None:
        original = self.cls.loss_terms

        def look(member: Any, ctx: StageContext, batch: Any) -> Any:
            if ctx.step == 0:
                starts[ctx.index, ctx.pass_.name] = {k: v.clone() for k, v in ctx.model.state_dict().items()}
            return original(member, ctx, batch)

        monkeypatch.setattr(self.cls, "loss_terms", look)


class TestCCD(InPlace):
    strategy = "CCD"
    parameters = {"teacher_size": 12, "top": 10, "samples": 3}

    def test_the_teacher_grows(self, backbone: str, known: Callable[..., Runner]) -> None:
        """The teacher and both proxies end with a row for every user and item, and the proxies differ."""
        runner = known(backbone, self.active())
        member: Any = self._live(runner)
        stage = runner.stream.stages[-1]
        for tables in (member.teacher, *member.proxies.values()):
            assert (len(tables["users"]), len(tables["items"])) == (stage.n_users, stage.n_items)
        assert not bool((member.proxies["stability"]["users"] == member.proxies["plasticity"]["users"]).all())
