"""Tutorials and the notebook run from top to bottom; pages that scripts make are up to date."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_helpers import ROOT, script

from recbole_cl import cli
from recbole_cl.config.files import RECBOLE

DOCS = ROOT / "docs"


def run_page(page: Path, capsys: pytest.CaptureFixture[str], only: str = "") -> dict[str, list[str]]:
    """Runs the commands of a page in the current folder; returns what each printed. YAML is saved as the page says."""
    told: dict[str, list[str]] = {}
    text = page.read_text(encoding="utf-8")
    for before, kind, body in re.findall(r"([^\n]*)\n\n```(bash|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind == "yaml":
            named = re.search(r"Save this as `([\w.]+)`", before)
            assert named, f"{page.name}: where is this YAML saved?"
            Path(named[1]).write_text(body, encoding="utf-8")
            continue
        if only not in body:
            continue
        for line in body.splitlines():
            words = shlex.split(line)
            assert words[0] == "recbole-cl", line
            capsys.readouterr()
            code = cli.main(words[1:])
            out, err = capsys.readouterr()
            assert code == 0, f"{line}: {err}"
            told.setdefault(words[1], []).append(out)
    return told


def write_shop(folder: Path) -> None:
    """Writes a shop's export and the rows of a day: customers who go round the shelves of one of four corners."""
    rng = np.random.default_rng(0)
    place: dict[int, int] = {}
    for name, start, n, users in (("shop", "2024-05-01T12:00", 1500, 40), ("today", "2024-05-04T00:00", 200, 44)):
        lines = ["user,item,time"]
        for step in range(n):
            user = int(rng.integers(users))
            place[user] = (place.get(user, user) + 1) % 12 if rng.random() < 0.8 else int(rng.integers(12))
            time = np.datetime64(start, "s") + np.timedelta64(130 * step, "s")
            lines.append(f"u{user},i{(user % 4) * 12 + place[user]},{time}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_shop(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECBOLE_CL_DATA", raising=False)
    return tmp_path


def test_the_engineers_tutorial_runs(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run_page(DOCS / "tutorial_engineer.md", capsys)
    assert (shop / "shop.health.html").is_file() and "stages        2" in told["health"][0]
    assert [json.loads(line)["user"] for line in told["recommend"][0].splitlines()] == ["u1", "u2"]
    assert len(told["update"]) == 2 and "version" in told["rollback"][0]


@pytest.mark.slow
def test_the_readmes_shop_runs(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run_page(ROOT / "README.md", capsys, only="shop.csv")
    assert len(told["recommend"][0].splitlines()) == 2 and "version" in told["rollback"][0]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("optuna", "matplotlib")),
    reason="the extras [plots,tune] are missing",
)
def test_the_researchers_tutorial_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(RECBOLE / "dataset_example" / "ml-100k" / "ml-100k.inter", tmp_path)
    told = run_page(DOCS / "tutorial_researcher.md", capsys)
    assert (tmp_path / "ml-100k.html").is_file() and "ewc_lambda" in told["tune"][0]
    assert yaml.safe_load((tmp_path / "tuned" / "best.yaml").read_text(encoding="utf-8")) is not None
    assert "6 runs." in told["study"][0] and "FineTune (reference)" in told["study"][1]
    assert {"compare.md", "compare.tex", "compare.csv", "plane.svg"} <= {p.name for p in (tmp_path / "study").iterdir()}
    assert "peso_table2" in told["list"][0]


@pytest.mark.parametrize("notebook", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of its cells, in one space, as a kernel runs it; no outputs are kept in the repository."""
    monkeypatch.chdir(tmp_path)
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert found["nbformat"] == 4 and found["cells"][0]["cell_type"] == "markdown"
    space: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(found["cells"]):
        text = "".join(cell["source"])
        for link in re.findall(r"\]\(([^)#]+)", text) if cell["cell_type"] == "markdown" else ():
            assert link.startswith("http") or (notebook.parent / link).is_file(), link
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile(text, f"{notebook.name}, cell {number}", "exec"), space)
    assert (tmp_path / "notebook-runs" / "FineTune" / "report.html").is_file()


def test_pages_of_commands_are_up_to_date() -> None:
    pages = script("generate_commands")
    kept = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "commands").glob("*.md")}
    assert set(kept) == set(pages.names()), "run: python docs/generate_commands.py"
    for name, text in kept.items():
        assert text == pages.page(name), f"{name}: run: python docs/generate_commands.py"


def test_reference_is_up_to_date() -> None:
    made = script("generate_reference")
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert text == made.page(), "run: python docs/generate_reference.py > docs/reference.md"
    assert text.count("```") % 2 == 0 and ":class:" not in text and " at 0x" not in text
    parts = made.prose("Does.\n\nArgs:\n    a: First\n        and more.\n\nReturns:\n    A *b*.\n")
    assert [line for line in parts if line] == ["Does.", "**Args**", "- `a`: First", "  and more.", "**Returns**",
                                                "- A \\*b\\*."]  # fmt: skip


def test_the_citation_names_the_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["authors"] and found["license"] == "MIT"
    assert f'version = "{found["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
