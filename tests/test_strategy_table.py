"""The table of strategies and models says what runs tell."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from run_helpers import script

from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "strategy_table.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made() -> ModuleType:
    return script("generate_strategy_table")


def test_the_page_names_every_strategy_and_every_reason(made: ModuleType) -> None:
    names = [n for n in strategies.names() if strategies.get(n).__module__.startswith("recbole_cl.")]
    tables = [re.findall(r"^\| `(\w+)` \| (.+) \|$", part, re.MULTILINE) for part in PAGE.split("## Training parts")]
    assert [len(rows[0][1].split(" | ")) for rows in tables] == [len(made.BACKBONES), len(made.PARTS)]
    for rows in tables:
        assert [name for name, _ in rows] == names, (
            "run: python docs/generate_strategy_table.py > docs/strategy_table.md"
        )
    cells = {cell for rows in tables for _, row in rows for cell in row.split(" | ")}
    numbers = {int(number) for number in re.findall(r"refused \((\d+)\)", " ".join(cells))}
    assert "works" in cells and cells == {"works", *(f"refused ({n})" for n in numbers)}
    assert numbers == {int(n) for n in re.findall(r"^(\d+)\. \S", PAGE, re.MULTILINE)}


def test_a_cell_is_refused_fails_or_does_nothing_where_it_does(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy that breaks, or leaves everything as FineTune has it, is no "works"."""

    class Idle(Strategy):
        def loss_terms(self, ctx: Any, batch: Any) -> dict[str, torch.Tensor]:
            return {"idle": torch.zeros(())}

    class Breaks(Idle):
        def end_stage(self, ctx: Any) -> None:
            raise KeyError("something")

    strategies.names()
    for attribute in ("_members", "_names"):
        monkeypatch.setattr(strategies, attribute, dict(getattr(strategies, attribute)))
    for cls in (Idle, Breaks):
        strategies.register()(cls)
    table = made.Table(tmp_path)
    assert [table.cell(name, "BPR") for name in ("FineTune", "Idle", "Breaks", "EWC")] == [
        "works", "does nothing", "fails", "works",
    ]  # fmt: skip
    assert table.cell("Adapter", "BPR") == table.cell("Adapter", "LightGCN") == "refused (1)"
    assert next(iter(table.reasons)).startswith("it has no dense layer")
    assert [line.split(",")[0] for line in table.failures] == ["Idle on BPR", "Breaks on BPR"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_page_is_what_runs_tell(made: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    page = made.page()
    sys.stdout.flush()
    capsys.readouterr()
    assert page == PAGE, "run: python docs/generate_strategy_table.py > docs/strategy_table.md"
