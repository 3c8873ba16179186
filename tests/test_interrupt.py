"""Ctrl-C while the command still imports: exit 130 and one line, whatever it hits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import ROOT

from recbole_cl import cli
from recbole_cl.commands.run import Run


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads from /proc how far a process has come")
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_python", "scipy/sparse/_sparsetools"])
def test_an_interruption_of_the_imports_is_one_line(tmp_path: Path, library: str) -> None:
    """The signal comes when a library of C code has just been mapped: in the middle of the import of its package."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_recbole_cl.py"), "--dataset=nothing", "--output_dir=run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (130, "", "recbole-cl: interrupted; nothing was done yet\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "words", "expected"),
    [
        ("import recbole_cl", [], "default_int_handler"),
        ("import recbole_cl.cli", [], "_end"),  # -c and the command in it
        ("import recbole_cl; import sys", ["recbole-cl"], "default_int_handler"),
        ("import sys; sys.argv[0] = '/usr/bin/recbole-cl'; import recbole_cl", [], "_end"),
        ("import sys; sys.argv[0] = 'run_recbole_cl.py'; import recbole_cl", [], "_end"),
        ("import signal; signal.signal(2, signal.SIG_IGN); import recbole_cl.cli", [], "SIG_IGN"),  # nohup
    ],
)
def test_only_the_command_takes_the_signal(start: str, words: list[str], expected: str) -> None:
    source = (
        f"{start}\nimport signal\nprint(getattr(signal.getsignal(2), '__name__', None) or signal.getsignal(2).name)"
    )
    done = subprocess.run([sys.executable, "-c", source, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == expected, done.stderr


def test_an_interruption_that_a_library_has_turned_into_its_own_error_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recbole_cl import interrupt

    def swallowed(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("numpy.core.multiarray failed to import") from None

    monkeypatch.setattr(Run, "run", swallowed)
    monkeypatch.setattr(interrupt, "_seen", [])
    before = signal.signal(signal.SIGINT, interrupt._end)  # as the program has it
    try:
        assert cli.main(["run"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted; run the same command with --resume=True" in capsys.readouterr().err
