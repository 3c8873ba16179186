"""Adapter, PromptTuning and DualLoRA meet the contract of strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recbole_cl.model.adapters import part_names
from recbole_cl.strategy.context import StageContext
from recbole_cl.testing.contract import StrategyContract
from recbole_cl.training.runner import Runner


class PartsContract(StrategyContract):
    """They have more parameters than FineTune's model, and act by what moves rather than by a term of the loss."""

    backbones = ("SASRec",)
    grows = {"frozen": "tables"}

    def test_it_acts_after_drift(
        self, backbone: str, run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the last stage every tensor of the newest parts moves, and so do new rows; nothing else does."""
        before: dict[str, torch.Tensor] = {}
        trained: list[str] = []
        original = self.cls.begin_stage

        def begun(member: Any, ctx: StageContext) -> None:
            original(member, ctx)
            if ctx.index == len(ctx.stream) - 1:
                before.update({name: p.detach().clone() for name, p in ctx.model.named_parameters()})
                trained.extend(ctx.parameters())

        monkeypatch.setattr(self.cls, "begin_stage", begun)
        active = run(backbone, self.active(), eval_step=0)
        after = dict(active.model.named_parameters())
        parts = part_names(active.model)
        moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
        assert parts and moved == set(trained) and moved & set(parts) == set(parts) & set(trained)
        stages = active.stream.stages
        old = stages[0].n_items
        table, was = after["item_embedding.weight"], before["item_embedding.weight"]
        assert torch.equal(table[:old], was[:old])
        assert not (table[old : stages[-1].n_items] == was[old:]).all(dim=1).any(), "a new item's row stayed random"


class TestAdapter(PartsContract):
    strategy = "Adapter"
    parameters = {"per_stage": True}


class TestPromptTuning(PartsContract):
    strategy = "PromptTuning"


class TestDualLoRA(PartsContract):
    strategy = "DualLoRA"
    settings = {"epochs": 1}
