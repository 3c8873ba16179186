"""Every model of RecBole goes the way that docs/models.md says (slow), and the page names every model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from run_helpers import script

from recbole_cl.config import list_recbole_models
from recbole_cl.errors import ConfigError, DataError, RecBoleCLError
from recbole_cl.study.walk import run_cell

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
FOUND = re.findall(r"^\| (\w+) \| ((?:works|no)(?: \| \w+)*) \|$", PAGE, re.MULTILINE)
ROWS = {name: cells.split(" | ") for name, cells in FOUND}


def test_the_page_names_every_model_and_every_reason() -> None:
    assert list(ROWS) == list_recbole_models()
    for name, cells in ROWS.items():
        assert len(cells) == 3
        assert ("no" not in cells) or f"- **{name}** (" in PAGE, name
    assert "does nothing" not in PAGE and "holes" not in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("model", list(ROWS))
def test_the_model_goes_as_the_page_says(model: str, tmp_path: Path) -> None:
    made = script("generate_models")
    failures, cells = {}, made.cells([model])
    for cell in cells:
        found = run_cell(dict(cell.settings), str(tmp_path / cell.folder), cell.digest, 1)
        if found["state"] == "failed":
            failures[cell.folder] = found["told"]
            assert found["error"] in {kind.__name__ for kind in (ConfigError, DataError, RecBoleCLError)}, found["told"]
    plain = tmp_path / cells[0].folder
    verdicts = [made.verdict(cell, tmp_path, plain, failures) for cell in cells]
    assert ["works" if v == "works" else "no" for v in verdicts] == ROWS[model], verdicts
