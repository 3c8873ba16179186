"""The command: what it lists, what it refuses, with which exit code and how many lines."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recbole_cl import cli

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Puts the root logger back."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler.get_name() == cli._HANDLER]:
        root.removeHandler(handler)


def command(*args: str, cwd: Path, script: bool = False) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [str(ROOT / "run_recbole_cl.py")] if script else ["-m", "recbole_cl.cli"]
    return subprocess.run(
        [sys.executable, *program, *args], capture_output=True, text=True, env=env, cwd=cwd, check=False
    )


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("strategies", {"FineTune"}),
        ("schedulers", {"TimeSlices"}),
        ("models", {"SASRec", "BPR", "KGAT"}),
        ("datasets", {"ml-100k"}),
        ("metrics", {"NDCG", "AUC"}),
    ],
)
def test_list_prints_only_names(what: str, names: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert names <= set(lines)
    assert all(line and line == line.strip() and " " not in line for line in lines)
    assert lines == sorted(lines, key=str.lower)


BAD = [
    (["run", "--model=SASRek"], "unknown model 'SASRek'; did you mean 'SASRec'?"),
    (["run", "-m", "BPR", "--strategy=FineTun"], "unknown strategy 'FineTun'; did you mean 'FineTune'?"),
    (["run", "--scheduler=TimeSlice"], "unknown scheduler 'TimeSlice'; did you mean 'TimeSlices'?"),
    (["run", "--metrics=[NDCGG]"], "unknown metric 'NDCGG'"),
    (["run", "--n_stage=3"], "unknown property 'n_stage'; did you mean 'n_stages'?"),
    (["run", "--epochs=many"], "property 'epochs' is 'many'"),
    (["run", "--stage_ratios=[0.8, 0.1, -1]"], "property 'stage_ratios' is"),
    (["run", "--dataset=nowhere"], "dataset 'nowhere' was not found"),
    (["run", "-c", "missing.yaml"], "cannot read the config file 'missing.yaml'"),
    (["run", "--model=lightgbm"], "cannot be trained in stages"),
    (["run", "--state=loud"], "property 'state' is 'loud'"),
    (["run", "stray"], "'stray'"),
    (["run", "--seed", "3"], "'3'"),
    (["list", "models", "--x"], "'--x'"),
    (["list", "nonsense"], "invalid choice"),
    (["report", "nowhere"], "holds no result.json"),
    (["walk"], "invalid choice"),
    ([], "required"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_is_one_line_and_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECBOLE_CL_DATA", raising=False)
    assert cli.main(args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("recbole-cl: error: ")
    assert message in output.err
    assert list(tmp_path.iterdir()) == []


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = command("run", "--model=BPR", "--n_stage=3", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr == "recbole-cl: error: unknown property 'n_stage'; did you mean 'n_stages'?\n"
    done = command("--model=BPR", "--n_stage=3", cwd=tmp_path, script=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = command("list", "schedulers", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "TimeSlices" in done.stdout.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("recbole-cl ")
    assert cli.main(["run", "--help"]) == 0
    assert "--model" in capsys.readouterr().out


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--epochs=many", "--state=debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("recbole-cl: error: property 'epochs'")


@pytest.mark.parametrize(
    ("raised", "code", "hint"),
    [(RuntimeError("broke\nhere"), 1, "--state=debug"), (KeyboardInterrupt(), 130, "--resume=True")],
)
def test_other_ends(
    raised: BaseException, code: int, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(what: str) -> list[str]:
        raise raised

    monkeypatch.setattr(cli, "_names", fail)
    assert cli.main(["list", "models"]) == code
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


def test_a_reader_that_has_gone_away_is_no_error(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "recbole_cl.cli", "list", "metrics"],
            stdout=writer, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_logging_is_set_up_again_and_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        cli.setup_logging("WARNING")
    logging.getLogger("recbole_cl.x").info("hidden")
    logging.getLogger("recbole_cl.x").warning("shown")
    error = capsys.readouterr().err
    assert error.count("shown") == 1
    assert "hidden" not in error
    cli.setup_logging(None)
    assert logging.getLogger().level == logging.INFO
    assert list(tmp_path.iterdir()) == []
