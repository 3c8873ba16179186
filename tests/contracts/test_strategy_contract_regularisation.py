"""OnlineEWC, MAS, LwF and PersonalizedImitation meet the contract of strategies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_cl.config import CLConfig
from recbole_cl.runner import Runner
from recbole_cl.strategy.base import StageContext
from recbole_cl.testing.contract import SMALL, StrategyContract, assert_same, through_disk
from recbole_cl.testing.toy import PlantedDrift


class Contract(StrategyContract):
    """The contract, and a run that breaks off in the middle of an epoch."""

    def test_an_interrupted_run_goes_on_with_the_same_bits(
        self, backbone: str, toy: PlantedDrift, known: Callable[..., Runner], monkeypatch: Any, tmp_path: Path
    ) -> None:
        """State, generators, own parameters and their moments come back in another runner."""

        def runner(resume: bool) -> Runner:
            given = {**SMALL, **toy.settings(), "strategy": self.active(), "output_dir": str(tmp_path / "run")}
            given |= {"checkpoint_steps": 2, "resume": resume}
            config = CLConfig(model=backbone, dataset=toy.name, config_dict=given)
            config["saved"] = True  # without it no checkpoint is written and "resume" starts over
            return Runner(config)

        def stop(member: Any, ctx: StageContext) -> None:
            if ctx.index == 1 and ctx.step == 5:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(self.cls, "after_step", stop)
            runner(resume=False).run()
        assert list((tmp_path / "run" / "checkpoints").glob("0*")), "there must be something to resume from"
        again, whole = runner(resume=True), known(backbone, self.active())
        again.run()
        assert_same(whole.model.state_dict(), again.model.state_dict())
        assert_same(self._live(whole).state_dict(), self._live(again).state_dict())


class TestOnlineEWC(Contract):
    strategy = "OnlineEWC"
    strength = "lambda"
    drift_grid = (0.0, 1.0, 10.0, 100.0)
    data_importance = True


class TestMAS(Contract):
    strategy = "MAS"
    strength = "lambda"
    drift_grid = (0.0, 0.1, 1.0, 10.0)
    data_importance = True


class TestLwF(Contract):
    strategy = "LwF"


class TestPersonalizedImitation(Contract):
    strategy = "PersonalizedImitation"
    backbones = ("BPR", "LightGCN")

    def test_state_in_the_middle_of_a_stage(
        self,
        backbone: str,
        run: Callable[..., Runner],
        known: Callable[..., Runner],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """The optimiser holds its parameters, so a state goes back into the same tensors, as after a best epoch."""
        whole, swapped = known(backbone, self.active()), []

        def swap(member: Any, ctx: StageContext, *rest: Any) -> Any:
            if ctx.index == 1 and ctx.step == 3:
                state = through_disk(member.state_dict(), tmp_path)
                for p in member.parameters():
                    p.data.fill_(7.0)
                member.load_state_dict(state)
                swapped.append(ctx.step)
            return original(member, ctx, *rest)

        original = self.cls.loss_terms
        monkeypatch.setattr(self.cls, "loss_terms", swap)
        again = run(backbone, self.active())
        assert swapped
        assert_same(whole.model.state_dict(), again.model.state_dict())
        assert_same(self._live(whole).state_dict(), self._live(again).state_dict())

    def test_its_parameters_are_trained(self, backbone: str, run: Callable[..., Runner], monkeypatch: Any) -> None:
        """Centres, maps and the network of the weights move in a later stage."""
        kept: list[dict[str, Any]] = []
        self._before(monkeypatch, "loss_terms", lambda member, _: kept.append(member.state_dict()))
        last = self._live(run(backbone, self.active(), eval_step=0)).state_dict()
        still = [name for name, value in kept[0].items() if bool((value == last[name]).all())]
        assert not still
