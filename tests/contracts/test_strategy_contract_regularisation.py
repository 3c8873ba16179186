"""OnlineEWC, MAS, LwF and PersonalizedImitation meet the contract of strategies."""

from __future__ import annotations

from recbole_cl.testing.contract import StrategyContract


class TestOnlineEWC(StrategyContract):
    strategy = "OnlineEWC"
    strength = "lambda"
    drift_grid = (0.0, 1.0, 10.0, 100.0)
    data_importance = True
    grows = {"importance": "tables", "anchor": "tables"}


class TestMAS(StrategyContract):
    strategy = "MAS"
    strength = "lambda"
    drift_grid = (0.0, 0.1, 1.0, 10.0)
    data_importance = True
    grows = {"importance": "tables", "anchor": "tables"}


class TestLwF(StrategyContract):
    strategy = "LwF"


class TestPersonalizedImitation(StrategyContract):
    strategy = "PersonalizedImitation"
    backbones = ("BPR", "LightGCN")
