"""The code is as docs/architecture.md says: who imports whom, without a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recbole_cl"
PAGE = ROOT / "docs" / "architecture.md"
TOP = "recbole_cl"


def modules() -> dict[str, Path]:
    """Returns every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: Mapping[str, object]) -> set[str]:
    """Returns the modules of the package that a source imports, at the top or inside a function.

    What is imported for type checkers alone does not run, so it ties nothing together.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "the package names its modules in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
        todo += ast.iter_child_nodes(node)
    return found & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module to the modules that it imports."""
    known = modules()
    return {name: imports(path.read_text(encoding="utf-8"), known) - {name} for name, path in known.items()}


def room(module: str) -> str:
    """Returns the folder or file right below the package that a module lies in."""
    return [*module.split("."), TOP][1]


def table() -> dict[str, set[str]]:
    """Returns the page's table: room to the rooms that it may import."""
    rows = re.findall(r"^\| `recbole_cl/([\w.]+?)/?` \| [^|]* \| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE)
    names = {name: TOP if name == "__init__.py" else name.removesuffix(".py") for name, _ in rows}
    return {names[name]: set() if told == "nothing" else set(told.split(", ")) for name, told in rows}


def rooms_of(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns room to the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for name, imported in graph.items():
        found.setdefault(room(name), set()).update(room(other) for other in imported)
    return {name: others - {name} for name, others in found.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns the names that can be reached from themselves."""

    def reached(start: str) -> Iterator[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                yield name
                todo += graph[name]

    return sorted(name for name in graph if name in reached(name))


def test_no_file_imports_itself_by_a_detour(graph: dict[str, set[str]]) -> None:
    assert circle(graph) == []


def test_rooms_import_what_the_page_says(graph: dict[str, set[str]]) -> None:
    told, found = table(), rooms_of(graph)
    assert told.keys() == found.keys(), "the page tells every room, and no other"
    for name, others in found.items():
        assert others <= told[name], f"{name} imports {sorted(others - told[name])}, which the page does not allow"
        assert told[name] <= others, f"{name} does not import {sorted(told[name] - others)}, which the page names"


def test_rooms_run_down_only() -> None:
    assert circle(table()) == []


def test_the_reader_of_imports_reads_them_all() -> None:
    """The checks above are worth what this function finds."""
    known = dict.fromkeys(("recbole_cl", "recbole_cl.a", "recbole_cl.a.b", "recbole_cl.c"))
    source = """
from typing import TYPE_CHECKING
import recbole_cl.c
if TYPE_CHECKING:
    from recbole_cl.a.b import only_a_type
def later():
    from recbole_cl import a
"""
    assert imports(source, known) == {"recbole_cl.c", "recbole_cl.a"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_the_walks_name_what_is_there() -> None:
    """Each function that a row of the two walks names stands in the file that it names it in."""
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) > 20
    for row in rows:
        found = re.findall(r"`(recbole_cl/[\w/.]+\.py)`: ((?:`\w+`(?:, | or )?)+)", row)
        assert found, row
        for path, names in found:
            source = (ROOT / path).read_text(encoding="utf-8")
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"(?:def|class) {name}\b", source), f"{path} has no {name}"


def test_long_files_have_a_reason() -> None:
    """More than 400 lines of the package in one file are explained in its docstring."""
    long = {path: ast.get_docstring(ast.parse(text)) or "" for path, text in _texts() if len(text.splitlines()) > 400}
    without = [path.relative_to(ROOT).as_posix() for path, said in long.items() if "why this file is long" not in said]
    assert not without


def _texts() -> Iterator[tuple[Path, str]]:
    for path in modules().values():
        yield path, path.read_text(encoding="utf-8")
