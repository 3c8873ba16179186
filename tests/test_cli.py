"""The command: what it lists, what it refuses, with which exit code and how many lines."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from recbole_cl import cli
from recbole_cl.commands import terminal
from recbole_cl.commands.base import Command
from recbole_cl.commands.list import KINDS, first_line
from recbole_cl.registry import commands
from recbole_cl.strategy.ewc import EWC

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Puts the root logger back."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler.get_name() == terminal.HANDLER]:
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
        ("studies", {"ader"}),
        ("encoders", {"minilm"}),
    ],
)
def test_list_prints_names_and_what_they_are(what: str, names: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line.partition("  ")[2].strip() for line in lines}
    assert names <= set(found) and len(found) == len(lines)
    assert all(line == line.rstrip() and not line.startswith(" ") and len(line) <= 130 for line in lines)
    assert list(found) == sorted(found, key=str.lower)
    assert all(found[name] for name in names - {"KGAT"}), "each has a line about it"
    assert not any("``" in text or ":class:" in text for text in found.values())


def test_descriptions_are_those_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    """The first sentence of the docstring, also of models that are not imported, or of the file of defaults."""
    told = {}
    for what in KINDS:
        assert cli.main(["list", what]) == 0
        told[what] = dict(re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert told["strategies"]["EWC"].startswith(EWC.__doc__.strip().splitlines()[0][:20])
    assert told["models"]["AFM"].startswith("AFM is a attention based FM model")
    assert told["studies"]["ader"] == "ADER's protocol on DIGINETICA: train on a week, test on the next."
    assert told["datasets"]["ml-100k"] == "MovieLens 100K inside RecBole's wheel."
    assert told["engines"]["in_process"].startswith("Runs so many clients at once")


def test_names_do_not_act_on_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape sequences and ends of lines in names are shown, on stdout, in the one line of an error, and in the log."""
    for name in ("red\x1b[31m", "two\nlines", "right\u202eleft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n")
    monkeypatch.setenv("RECBOLE_CL_DATA", str(tmp_path))
    assert cli.main(["list", "datasets"]) == 0
    assert {"red\\x1b[31m", "two\\nlines", "right\\u202eleft"} <= set(capsys.readouterr().out.split())
    assert cli.main(["run", "--dataset=no\x1b]0;title\x07\nsuch"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and "\x07" not in error
    assert cli.main(["run", "--\x1b[2J=1"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    terminal.setup_logging()
    logging.getLogger("recbole_cl.x").warning("item %s", "a\x1b[31m\nb")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("recbole_cl.x").exception("failed")
    told = capsys.readouterr().err
    assert "item a\\x1b[31m\\nb\n" in told and "Traceback (most recent call last):\n" in told


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
    (["run", "--seed", "x"], "property 'seed' is 'x'"),
    (["run", "--seed", "3", "stray"], "'stray'"),
    (["run", "-m", "BPR", "3"], "'3'"),
    (["run", "--strategy", "EWK"], "unknown strategy 'EWK'; did you mean 'EWC'?"),
    (["run", "--resume", "-m", "BPR", "--scratch", "--n_stages", "0"], "property 'n_stages' is 0"),
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
    assert "TimeSlices" in done.stdout.split()
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
    def fail() -> dict[str, str]:
        raise raised

    monkeypatch.setitem(KINDS, "models", fail)
    assert cli.main(["list", "models"]) == code
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


def test_a_command_says_how_it_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, options: object, properties: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recbole_cl.commands.study.Study.run", stop)
    assert cli.main(["study", "ader"]) == 130
    assert "run the same command to go on" in capsys.readouterr().err


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
        terminal.setup_logging("WARNING")
    logging.getLogger("recbole_cl.x").info("hidden")
    logging.getLogger("recbole_cl.x").warning("shown")
    error = capsys.readouterr().err
    assert error.count("shown") == 1
    assert "hidden" not in error
    terminal.setup_logging(None)
    assert logging.getLogger().level == logging.INFO
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the table of commands


class Greet(Command):
    """A command of a test."""

    summary = "say what was given"
    place = 3

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--loud", action="store_true")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        terminal.show(f"{options.loud} {properties}")


@pytest.fixture
def greet(monkeypatch: pytest.MonkeyPatch) -> type[Greet]:
    commands.names()
    for name in ("_members", "_names"):
        monkeypatch.setattr(commands, name, dict(getattr(commands, name)))
    commands._add("greet", Greet)
    return Greet


def test_a_command_is_one_class(
    greet: type[Greet], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed, it runs, and whether it takes properties is what it says."""
    assert cli.main(["--help"]) == 0
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed[:4] == ["run", "parity", "study", "greet"]
    assert {"list", "report", "import", "update", "recommend", "versions", "rollback", "profile"} <= set(listed)
    assert cli.main(["greet", "--loud"]) == 0
    assert capsys.readouterr().out == "True []\n"
    assert cli.main(["greet", "--epochs=3"]) == 2
    assert "cannot read the argument '--epochs=3'" in capsys.readouterr().err
    monkeypatch.setattr(greet, "takes_properties", True)
    assert cli.main(["greet", "--epochs=3", "--strategy", "EWC", "--loud", "--scale", "-0.5", "--flag"]) == 0
    assert capsys.readouterr().out == "True ['--epochs=3', '--strategy=EWC', '--scale=-0.5', '--flag']\n"


def test_a_former_name_goes_on_working(
    greet: type[Greet], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greet, "former_names", ("hail",))
    assert cli.main(["hail"]) == 0
    told = capsys.readouterr()
    assert told.out == "False []\n"
    assert told.err == "recbole-cl: 'hail' is now called 'greet'; the old name goes on working\n"
    assert cli.main(["compare", "--parity=x"]) == 2
    told = capsys.readouterr()
    assert told.err.splitlines()[0].startswith("recbole-cl: 'compare' is now called 'parity'")
    assert "property 'parity' is 'x'" in told.err.splitlines()[1]


def test_the_command_of_the_docstring_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, greet: type[Greet]
) -> None:
    code = textwrap.dedent(inspect.getdoc(Command).split("::", 1)[1].split("It says what")[0])
    names = {"commands": commands, "Command": Command, "show": terminal.show, "json": json, "Path": Path}
    exec(compile(code, "base.py", "exec"), names)
    (tmp_path / "result.json").write_text('{"stages": [{"n_users": 3}, {"n_users": 7}]}')
    assert cli.main(["users", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "7\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("One. Two.", "One."),
        ("One\n    and more. Two.\n\nThree.", "One and more."),
        (None, ""),
        (":class:`A` beside ``b``", "A beside b"),
        ("HR_ (a ratio) of user_id", "HR (a ratio) of user_id"),
        ("x" * 200, "x" * 97 + "..."),
    ],
)
def test_first_lines(text: str | None, line: str) -> None:
    assert first_line(text) == line


# ---------------------------------------------------------------------------------------------- where it is written


def test_a_terminal_without_the_letters(tmp_path: Path) -> None:
    """A name that stdout cannot show is escaped, after all the work."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    data = tmp_path / "caf\u00e9"
    data.mkdir()
    (data / "caf\u00e9.inter").write_text("user_id:token\titem_id:token\n")
    env["RECBOLE_CL_DATA"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "recbole_cl.cli", "list", "datasets"], capture_output=True, env=env, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf\\xe9\n" in done.stdout


@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [(">&-", 0, ""), ("2>&-", 0, ""), (">/dev/full", 2, "standard output cannot be written"), (">&- 2>&-", 0, "")],
)
def test_a_terminal_that_is_closed(ends: str, code: int, told: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = f'"{sys.executable}" -m recbole_cl.cli list metrics {ends}'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert told in done.stderr and done.stderr.count("\n") == bool(told)


@pytest.mark.parametrize("given", [{"RANK": "abc", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "two"}])
def test_an_environment_that_makes_no_sense(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    assert cli.main(["list", "metrics"]) == 2
    error = capsys.readouterr().err
    assert "the environment variable" in error and "must be a number" in error and error.count("\n") == 1


# -- modules of the current folder --------------------------------------------------------------------------------


def test_import_registers_what_a_module_of_the_current_folder_has(tmp_path: Path) -> None:
    """The module is imported before names are looked up, by any command."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            from recbole_cl.registry import strategies
            from recbole_cl.strategy.base import Strategy

            @strategies.register()
            class MineAlone(Strategy):
                "Does nothing, by a name of its own."
            """
        )
    )
    for words in (["--import=mine"], ["--import", "mine"]):
        told = command("list", "strategies", *words, cwd=tmp_path)
        assert told.returncode == 0, told.stderr
        assert re.search(r"^MineAlone +Does nothing", told.stdout, re.M)
    assert "MineAlone" not in command("list", "strategies", cwd=tmp_path).stdout
    told = command("run", "--import=mine", "--strategy=MineAlon", cwd=tmp_path)
    assert told.returncode == 2 and "did you mean 'MineAlone'" in told.stderr


def test_import_tells_what_is_not_there(tmp_path: Path) -> None:
    """A name that is no module is told in one line; what fails inside a module is the module's own error."""
    told = command("list", "strategies", "--import=nowhere", cwd=tmp_path)
    assert told.returncode == 2 and len(told.stderr.splitlines()) == 1
    assert "--import=nowhere: there is no module 'nowhere'" in told.stderr
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    told = command("list", "strategies", "--import=broken", cwd=tmp_path)
    assert told.returncode == 1 and "No module named 'nothing_of_this_name'" in told.stderr
