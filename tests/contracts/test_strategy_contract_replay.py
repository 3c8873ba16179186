"""ERFreq, ADER, INFER, ReLoop and ReLoop2 meet the contract of strategies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from recbole_cl.testing.contract import StrategyContract
from recbole_cl.training.runner import Runner


class TestERFreq(StrategyContract):
    strategy = "ERFreq"
    parameters = {"memory_size": 60, "batch_size": 16, "weighting": "adaptive"}


class TestADER(StrategyContract):
    strategy = "ADER"
    parameters = {"memory_size": 60, "lambda": 2.0}
    backbones = ("SASRec",)


class TestINFER(StrategyContract):
    strategy = "INFER"
    parameters = {"memory_size": 60, "batch_size": 16, "samples": 60, "reference": 20}
    backbones = ("BPR",)
    settings = {"epochs": 1}


class TestReLoop(StrategyContract):
    strategy = "ReLoop"
    parameters = {"alpha": 0.5}
    backbones = ("NeuMF",)
    settings = {"mlp_hidden_size": [8], "mf_embedding_size": 4, "mlp_embedding_size": 4, "epochs": 1}


class TestReLoop2(StrategyContract):
    strategy = "ReLoop2"
    parameters = {"bits": 6, "arrays": 4}
    backbones = ("SASRec",)
    settings = {"epochs": 1}

    def test_it_acts_after_drift(
        self, backbone: str, run: Callable[..., Runner], known: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It trains nothing: the weights are FineTune's, the results are not; with lambda 0 the results are, too."""
        plain, active = known(backbone, "FineTune"), known(backbone, self.active())
        for one, two in zip(plain.model.parameters(), active.model.parameters(), strict=True):
            assert torch.equal(one, two)
        assert plain.records != active.records
        neutral = run(backbone, self.active(**{"lambda": 0.0}))
        assert plain.records == neutral.records
