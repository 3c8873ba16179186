"""Contrastive, ContrastivePIW, PISA and CCD meet the contract of strategies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_cl.config import CLConfig
from recbole_cl.strategy.context import StageContext
from recbole_cl.testing import PlantedDrift
from recbole_cl.testing.comparing import assert_same
from recbole_cl.testing.contract import SMALL, StrategyContract
from recbole_cl.training.runner import Runner


class TowerContract(StrategyContract):
    backbones = ("BPR", "LightGCN")


class TestContrastive(TowerContract):
    strategy = "Contrastive"
    parameters = {"positives": 3, "negatives": 20}


class TestContrastivePIW(TowerContract):
    strategy = "ContrastivePIW"


class TestPISA(TowerContract):
    strategy = "PISA"
    grows = {"forward": "users"}

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


class TestCCD(TowerContract):
    strategy = "CCD"
    parameters = {"teacher_size": 12, "top": 10, "samples": 3}
    grows = {
        f"{part}/{side}": side
        for part in ("teacher", "proxies/stability", "proxies/plasticity")
        for side in ("users", "items")
    }

    def test_the_teacher_grows(self, backbone: str, known: Callable[..., Runner]) -> None:
        """The teacher and both proxies end with a row for every user and item, and the proxies differ."""
        runner = known(backbone, self.active())
        member: Any = self._live(runner)
        stage = runner.stream.stages[-1]
        for tables in (member.teacher, *member.proxies.values()):
            assert (len(tables["users"]), len(tables["items"])) == (stage.n_users, stage.n_items)
        assert not bool((member.proxies["stability"]["users"] == member.proxies["plasticity"]["users"]).all())
