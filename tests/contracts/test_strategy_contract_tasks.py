"""CONURE and TERACON meet the contract of strategies, on stages of time with growing tables as on tasks."""

from __future__ import annotations

from recbole_cl.testing.contract import StrategyContract


class TestCONURE(StrategyContract):
    strategy = "CONURE"
    backbones = ("SASRec",)
    grows = {"owner": "tables"}


class TestTERACON(StrategyContract):
    strategy = "TERACON"
    backbones = ("SoftMask",)
