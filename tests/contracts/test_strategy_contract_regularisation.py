"""OnlineEWC, MAS, LwF and PersonalizedImitation meet the contract of strategies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_cl.runner import Runner
from recbole_cl.strategy.base import StageContext
from recbole_cl.testing.contract import StrategyContract, assert_same, through_disk


class TestOnlineEWC(StrategyContract):
    strategy = "OnlineEWC"
    strength = "lambda"
    drift_grid = (0.0, 1.0, 10.0, 100.0)
    data_importance = True


class TestMAS(StrategyContract):
    strategy = "MAS"
    strength = "lambda"
    drift_grid = (0.0, 0.1, 1.0, 10.0)
    data_importance = True


class TestLwF(StrategyContract):
    strategy = "LwF"


class TestPersonalizedImitation(StrategyContract):
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
