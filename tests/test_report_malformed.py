"""``recbole-cl report`` over a result.json that is not one: exit 2, and one line that names file and field."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_fixture import make_result
from run_helpers import ROOT, arguments, toy

from recbole_cl.cli import main
from recbole_cl.report.shape import SHAPE, check_result

REMEDY = "restore it from a copy, or run again"


def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["report", str(folder)])
    return code, capsys.readouterr().err.strip()


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no matrix": (lambda r: r.pop("matrix"), "it lacks 'matrix'"),
    "no stages": (lambda r: r.pop("stages"), "it lacks 'stages'"),
    "a list for the matrix": (lambda r: r.update(matrix=[1]), "matrix is a list; it must be an object"),
    "a list for a row": (lambda r: r["matrix"].update({"NDCG@10": {"0": 1}}), "matrix.NDCG@10 is a dict"),
    "a text in a cell": (lambda r: r["matrix"]["NDCG@10"][1].__setitem__(2, "x"), "matrix.NDCG@10[1][2] is 'x'"),
    "a ragged matrix": (lambda r: r["matrix"]["NDCG@10"][1].pop(), "matrix.NDCG@10[1] has 4 columns"),
    "stages missing": (lambda r: r["stages"].pop(), "matrix.NDCG@10 has 5 rows, but there are 4 stages"),
    "a stage is a text": (lambda r: r["stages"].__setitem__(0, "one"), "stages[0] is 'one'; it must be an object"),
    "stages are an object": (lambda r: r.update(stages={"a": 1}), "stages is a dict; it must be a list"),
    "a curve without its stage": (lambda r: r["curves"][3].pop("stage"), "curves[3] lacks 'stage'"),
    "a curve of a list": (lambda r: r["curves"][3].update(valid=[1]), "curves[3].valid is a list"),
    "curves of nothing": (lambda r: r.update(curves="none"), "curves is 'none'; it must be a list"),
    "a summary": (lambda r: r["summary"].update(AF=3), "summary.AF is 3; it must be an object"),
    "a formula": (lambda r: r["formulas"].update(AF=[1]), "formulas.AF is a list"),
    "costs": (lambda r: r["cost"].append({}), "cost has 6 entries, but there are 5 stages"),
    "a cost": (lambda r: r["cost"][0].update(seconds=[1]), "cost[0].seconds is a list"),
    "config": (lambda r: r.update(config=[["a", 1]]), "config is a list; it must be an object"),
    "versions": (lambda r: r.update(versions="2"), "versions is '2'"),
    "warnings": (lambda r: r.update(warnings={"a": 1}), "warnings is a dict; it must be a list"),
    "strata": (lambda r: r["strata"].update({"NDCG@10": [1]}), "strata.NDCG@10 is a list"),
    "reports": (lambda r: r.update(reports=[3]), "reports[0] is 3"),
    "a name": (lambda r: r.update(name=["a"]), "name is a list"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_field_that_is_something_else_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    result = json.loads(json.dumps(make_result()))
    check_result(result)
    change, words = WRONG[kind]
    change(result)
    (tmp_path / "result.json").write_text(json.dumps(result))
    code, line = told(tmp_path, capsys)
    assert code == 2 and "\n" not in line
    assert line.startswith(f"recbole-cl: error: {tmp_path / 'result.json'}: ") and words in line and REMEDY in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "content", ["", "{", '{"matrix": {"a": [[1', "[" * 100_000, "[1, 2]", "null", '"x"', "\xff\xfe", "{}", "{'a': 1}"]
)
def test_a_file_that_is_cut_short_or_no_result_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
    code, line = told(tmp_path, capsys)
    assert code == 2 and "\n" not in line and str(tmp_path / "result.json") in line and REMEDY in line


def test_a_matrix_of_one_row_and_many_columns_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = make_result(1)
    result["matrix"] = {"ndcg@10": [[0.1] * 5000]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    begun = time.monotonic()
    code, line = told(tmp_path, capsys)
    assert code == 2 and "matrix.ndcg@10[0] has 5000 columns, the matrix has 1 rows" in line
    assert time.monotonic() - begun < 20


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def test_whatever_stands_in_a_place_is_drawn_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """80 places of a result, each with something of another kind: a page or exit 2, never anything else."""
    whole = json.loads(json.dumps(make_result(3)))
    every, draw, codes = list(places(whole)), random.Random(5), []
    top = [(key,) for key in whole]
    for n in range(80):
        place = top[n % len(top)] if n < 30 else draw.choice(every)
        value = draw.choice([5, -1, 1e300, "x", [1], [[1]], {"a": 1}, {"a": [None]}, None, True, [], {}])
        result = copy.deepcopy(whole)
        inner: Any = result
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (tmp_path / "result.json").write_text(json.dumps(result))
        code, line = told(tmp_path, capsys)
        codes.append(code)
        assert code == 0 or (code == 2 and "\n" not in line and "result.json: " in line), (place, value, code, line)
        if code == 2:
            assert str(place[0]) in line or place[0] == "stages", (place, value, line)
    assert 10 < codes.count(2) < 79


def test_every_key_of_a_run_is_looked_at() -> None:
    assert set(make_result()) - set(SHAPE) <= {"scheduler"}


def limited(command: list[str], size: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command whose files may have so many bytes at most."""
    source = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "from recbole_cl.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", source, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_page_that_does_not_fit_on_the_disk_is_told_as_everything_else(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(make_result(2)))
    done = limited(["report", str(tmp_path)], 200_000, tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"output_dir: cannot write to {tmp_path}: File too large" in done.stderr and "ulimit -f" in done.stderr
    assert not (tmp_path / "report.html").exists()
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        log = toy(tmp_path)
        done = limited(["run", *arguments(log, small / "run", model="BPR", epochs=1)], 1 << 30, tmp_path)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"cannot write to {small / 'run'}" in last
        assert "the disk is full; free space and go on with --resume=True" in last
        assert (small / "run" / "result.json").is_file(), "it was the page that found no place"
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        done = limited(["run", *arguments(log, small / "run", model="BPR", epochs=1, resume=True)], 1 << 30, tmp_path)
        assert done.returncode == 0 and (small / "run" / "report.html").is_file(), done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)
