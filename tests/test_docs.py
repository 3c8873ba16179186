"""README and docs tell the truth: their code runs, their links, names, paths and commands exist."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from run_helpers import script

from recbole_cl import cli, registry, schema
from recbole_cl.commands.list import KINDS
from recbole_cl.config import CLConfig, list_models, parse_value, read_properties
from recbole_cl.config.keys import library_keys
from recbole_cl.registry import Registry, models, schedulers, strategies
from recbole_cl.results.matrix import SUMMARIES
from recbole_cl.stream.build import build_stream
from recbole_cl.study import list_studies, read_plan
from recbole_cl.testing.contract import SMALL
from recbole_cl.testing.model_contract import ModelContract
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FORBIDDEN = ("/tmp", "/work", "/shared", "/home/", "/root", "/opt/", "localhost", "pypi.", "simple/", "--index-url")


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def everywhere(language: str) -> list[Any]:
    return [
        pytest.param(page, body, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, body in enumerate(blocks(page, language))
    ]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


# -- figures ------------------------------------------------------------------------------------------------------


def test_pages_show_the_figures_that_the_benchmarks_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import figures

    shown = {name for page in PAGES for block in figures._BLOCK.findall(page.read_text()) for name in block[1].split()}
    assert shown and set(figures.read()) <= shown | {f"{name}.cuda" for name in shown}
    for page in PAGES:
        assert figures.filled(page.read_text()) == page.read_text(), f"run tests/benchmarks/figures.py for {page.name}"


# -- code ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is forgotten afterwards."""
    for members in (strategies, schedulers, models):
        members.names()
        for name in ("_members", "_names"):
            monkeypatch.setattr(members, name, dict(getattr(members, name)))


def run(toy: PlantedDrift, folder: Path, strategy: Any, model: str = "BPR") -> Runner:
    given = {**SMALL, **toy.settings(), "strategy": strategy, "output_dir": str(folder), "epochs": 1}
    runner = Runner(CLConfig(model=model, dataset=toy.name, config_dict=given))
    runner.run()
    return runner


@pytest.mark.usefixtures("lent")
def test_the_strategy_of_the_page_acts(toy: PlantedDrift, tmp_path: Path) -> None:
    code = next(body for body in blocks(DOCS / "write_a_strategy.md", "python") if "@strategies.register" in body)
    inside = code[code.index("class ") :]
    assert len([line for line in inside.splitlines() if line.strip()]) <= 32, "the page says thirty lines"
    exec(compile(code, "write_a_strategy.md", "exec"), {"__name__": "write_a_strategy"})
    plain = run(toy, tmp_path / "plain", "FineTune")
    neutral = run(toy, tmp_path / "neutral", {"L2Anchor": {"lambda": 0.0}})
    held = run(toy, tmp_path / "held", {"L2Anchor": {"lambda": 5.0}})
    weights = [list(runner.model.parameters()) for runner in (plain, neutral, held)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    logged = [point["terms"].get("L2Anchor/penalty", 0.0) for point in held.journal.curves]
    assert logged[0] == 0.0 and logged[-1] > 0.0
    state = held.strategy.state_dict()["L2Anchor"]
    shapes = {name: p.shape for name, p in held.model.named_parameters()}
    assert {name: value.shape for name, value in state["anchor"].items()} == shapes


@pytest.mark.usefixtures("lent")
def test_the_scheduler_of_the_page_cuts(toy: PlantedDrift) -> None:
    code = next(body for body in blocks(DOCS / "write_a_scheduler.md", "python") if "@schedulers.register" in body)
    exec(compile(code, "write_a_scheduler.md", "exec"), {"__name__": "write_a_scheduler"})
    given = {**SMALL, **toy.settings(), "scheduler": "Months", "boundaries": None}
    stream = build_stream(CLConfig(model="BPR", dataset=toy.name, config_dict=given))
    assert [stage.name for stage in stream.stages] == ["1970-01"]  # three times eleven days and a half, from 1 January


@pytest.mark.usefixtures("lent")
def test_the_model_of_the_page_meets_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "write_a_model.md"
    code, _, joined = (body for body in blocks(page, "python"))
    inside = [line for line in code[code.index("    def __init__") :].splitlines() if line.strip()]
    assert len(inside) <= 44, "small enough to be read at once"
    space: dict[str, Any] = {"__name__": "write_a_model"}
    monkeypatch.setitem(sys.modules, "write_a_model", ModuleType("write_a_model"))
    exec(compile(code, page.name, "exec"), space)
    monkeypatch.setitem(sys.modules, "my_package", ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.pop_text", ModuleType("my_package.pop_text"))
    exec(compile(joined, page.name, "exec"), space)
    contract = space["TestPopText"]
    runs = contract.runs_in(tmp_path)
    for name in [name for name in vars(ModelContract) if name.startswith("test_")]:
        more = [tmp_path / "state"] if name == "test_its_state_round_trips" else []
        with contextlib.suppress(pytest.skip.Exception):
            getattr(contract(), name)(runs, *more)
    # Counts by hand: half of what they were, and the stage's own.
    stages, model = runs.whole.stream.stages, runs.whole.model
    by_hand = np.zeros(model.n_items)
    for stage in stages:
        by_hand = by_hand / 2 + np.bincount(stage.train.label, minlength=model.n_items)
    assert np.array_equal(model.count, by_hand)
    told = [entry["numbers"]["items"] for entry in runs.whole.journal.reports]
    assert told == [stage.n_items - 1 for stage in stages]
    anew = runs.runner("anew", strategy="FullRetrain")
    anew.run()
    assert np.array_equal(anew.model.count, by_hand), "new weights are prepared as the old ones were"


def test_the_summary_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(body for body in blocks(DOCS / "results.md", "python") if "summarise" in body)
    exec(compile(code, "results.md", "exec"), {})
    assert capsys.readouterr().out.startswith("0.0")


@pytest.mark.parametrize(("page", "code"), everywhere("python"))
def test_python_compiles_and_imports_what_exists(page: Path, code: str) -> None:
    compile(code, str(page), "exec")
    for module, names in re.findall(r"^from (recbole_cl[\w.]*) import ([\w, ]+)$", code, re.MULTILINE):
        imported = importlib.import_module(module)
        assert all(hasattr(imported, name.strip()) for name in names.split(","))


@pytest.mark.parametrize(("page", "text"), everywhere("yaml"))
def test_yaml_is_valid(page: Path, text: str) -> None:
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize(("page", "text"), everywhere("toml"))
def test_toml_names_a_group_that_is_read(page: Path, text: str) -> None:
    groups = {r.group for r in vars(registry).values() if isinstance(r, Registry)}
    assert set(tomllib.loads(text).get("project", {}).get("entry-points", {})) <= groups


# -- commands and properties --------------------------------------------------------------------------------------


def known_properties() -> set[str]:
    files = (ROOT / "properties").rglob("*.yaml")
    return set(library_keys()).union(*(read_properties(file) for file in files))


def commands() -> Iterator[tuple[Path, list[str]]]:
    for page in PAGES:
        for body in blocks(page, "bash"):
            for line in body.splitlines():
                for part in line.split("&&"):
                    if part.strip() and not part.strip().startswith("#"):
                        yield page, shlex.split(part)


def test_commands_name_what_exists() -> None:
    known, seen = known_properties(), 0
    for page, words in commands():
        told = f"{page.name}: {' '.join(words)}"
        if words[0].endswith(("recbole-cl", "python")) and (
            "run_recbole_cl.py" in words or words[1] in ("run", "semantic-ids")
        ):
            seen += 1
            imports = any(word.startswith("--import=") for word in words)  # a page's own model or strategy
            for word in words[2:]:
                key, equals, value = word.removeprefix("--").partition("=")
                assert word.startswith("--") and equals, told
                assert key in known or key == "import", f"{told}: {key}"
                if key == "scheduler":
                    assert value in schedulers, told
                if key == "model":
                    assert imports or value in list_models(), told
                if key == "strategy":
                    assert all(name in strategies for name in re.findall(r"\w+", value)), told
        elif words[:2] == ["recbole-cl", "study"]:
            options, rest = cli._parsers(cli._table())[0].parse_known_args(words[1:])
            assert not rest, told
            folder = options.only_table and options.name not in list_studies()  # of runs that a page made before
            assert folder or options.name.endswith(".yaml") or read_plan(options.name, options.preset).cells, told
        elif words[:2] == ["recbole-cl", "tune"]:
            _, rest = cli._parsers(cli._table())[0].parse_known_args(words[1:])
            assert {word.removeprefix("--").partition("=")[0] for word in rest} <= known, told
        elif words[:1] == ["recbole-cl"] and words[1] in (
            "import",
            "health",
            "update",
            "recommend",
            "export",
            "export-adapter",
            "versions",
            "rollback",
        ):
            table = cli._table()  # tests/serve/test_serve_page.py runs them
            _, rest = cli._parsers(table)[0].parse_known_args(words[1:])
            assert table[words[1]].takes_properties or not rest, told
        elif words[:2] == ["recbole-cl", "profile"]:
            options = {word.removeprefix("--").partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert options <= {"dry-run", "show-prompt", "dataset", "batch-out", "batch-in", "check"} | known, told
        elif words[0] == "recbole-cl":
            assert words[1] in ("list", "report") and (words[1] == "report" or words[2] in KINDS), told
        for word in words:
            if re.fullmatch(r"[\w./-]+\.(py|txt)", word):
                assert (ROOT / word).is_file(), f"{told}: {word} is missing"
    assert seen >= 5


def test_readme_has_the_two_set_up_lines() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    venv = "python -m venv .venv && .venv/bin/pip install -c constraints.txt "
    run_line = venv + (". && .venv/bin/python run_recbole_cl.py --model=SASRec --dataset=ml-100k --strategy=FineTune")
    assert run_line in lines
    assert venv + '".[test]" && .venv/bin/python -m pytest -n 2 --dist loadscope' in lines
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    told = [page for page in PAGES if page.name != "reference.md"]  # shapes of arrays look alike: `[n]`
    named = {name for page in told for name in re.findall(r"`\[([a-z]+)\]`", page.read_text(encoding="utf-8"))}
    assert named <= extras.keys()


TABLE = re.compile(r"^\| property \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if TABLE.search(page.read_text(encoding="utf-8"))])
def test_tables_of_properties_name_properties_and_defaults(page: Path) -> None:
    overall = read_properties(ROOT / "properties" / "overall.yaml")
    for body in TABLE.findall(page.read_text(encoding="utf-8")):
        for row in body.splitlines():
            names, defaults = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[1:3])
            assert names and set(names) <= known_properties(), row
            if page.name == "README.md":
                assert set(names) <= overall.keys(), row
                for name, default in zip(names, defaults or [None] * len(names), strict=True):
                    assert (None if default is None else yaml.safe_load(default)) == overall[name], row


def test_words_in_code_that_look_like_properties_are() -> None:
    """``word: value`` or ``--word=value`` in running text names a property and, where it has choices, one of them."""
    known = known_properties()
    for page in PAGES:
        for key, value in re.findall(r"`(?:--)?([A-Za-z_]+)(?:: |=)([^`]*)`", prose(page)):
            assert key in known or key in ("args", "mode"), f"{page.name}: {key}: {value}"
            rule = schema.SCHEMA.get(key)
            if rule is not None and rule.choices:
                assert parse_value(value) in (*rule.choices, True, False), f"{page.name}: {key}: {value}"


def test_properties_page_is_up_to_date() -> None:
    page = (DOCS / "properties.md").read_text(encoding="utf-8")
    assert page == script("generate_properties").page(), "run: python docs/generate_properties.py > docs/properties.md"
    overall = read_properties(ROOT / "properties" / "overall.yaml")
    assert all(f"| `{key}` |" in page for key in overall)


def test_components_and_summaries_are_told() -> None:
    text = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
    for name in strategies.names():
        assert f"`{name}`" in text["README"] and f"`{name}`" in text["strategies"], name
        assert strategies.get(name).kind == "bound" or name in text, f"docs/strategies/{name}.md is missing"
        assert f"`{name}`" in text["reproducibility"], name
    for name in schedulers.names():
        assert f"`{name}`" in text["README"] and f"### {name}\n" in text["streams"], name
    assert all(f"| `{name}` |" in text["results"] for name in SUMMARIES)


# -- links and paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link}"
        assert DOCS not in page.parents or DOCS in target.parents, f"{page.name}: {link} is outside the site"
        if part:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), f"{page.name}: {link}"


def test_nav_names_every_page() -> None:
    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(child)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(leaves(nav)) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_in_the_repository_exist(page: Path) -> None:
    pattern = r"`((?:recbole_cl|tests|properties|docs)/[\w./-]*)`"
    for path in re.findall(pattern, page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "mkdocs.yml"], ids=lambda page: page.stem)
def test_no_machine_paths(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [word for word in FORBIDDEN if word in text]
