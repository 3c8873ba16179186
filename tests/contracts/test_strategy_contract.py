"""EWC, SI and ERRandom meet the contract of strategies."""

from recbole_cl.testing.contract import StrategyContract


class TestEWC(StrategyContract):
    strategy = "EWC"
    strength = "lambda"
    drift_grid = (0.0, 1.0, 10.0, 100.0)
    data_importance = True
    grows = {"importance": "tables", "anchor": "tables"}


class TestSI(StrategyContract):
    strategy = "SI"
    parameters = {"c": 1.0}
    strength = "c"
    drift_grid = (0.0, 1.0, 10.0, 100.0)
    companion = "EWC"
    grows = {part: "tables" for part in ("path", "start", "importance", "anchor")}


class TestERRandom(StrategyContract):  # its rows hold ids, which stay: nothing grows
    strategy = "ERRandom"
    parameters = {"memory_size": 60, "batch_size": 16}
