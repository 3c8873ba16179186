"""One process at a time in a folder: real processes, killed for real."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT, arguments, command, run, toy

from recbole_cl import checkpoint
from recbole_cl.errors import ConfigError
from recbole_cl.lock import NAME, Holder, hold
from recbole_cl.study.walk import run_cell

LONG = {"model": "BPR", "epochs": 5000, "eval_step": 0, "checkpoint_keep": 1}


def started(log: Any, folder: Path, **properties: Any) -> subprocess.Popen[bytes]:
    """A run in a process of its own, which has written a checkpoint and goes on for long."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_recbole_cl.py"), *arguments(log, folder, **{**LONG, **properties})],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait(lambda: bool(checkpoint.numbered(folder / "checkpoints")), process)
    return process


def wait(until: Any, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(30)


def holding(folder: Path, then: str = "print('held', flush=True); time.sleep(600)") -> subprocess.Popen[str]:
    """A process that holds the lock of a folder."""
    source = (
        "import os, sys, time\nfrom pathlib import Path\nfrom recbole_cl.lock import hold\n"
        f"with hold(Path(sys.argv[1]), 'a test'):\n    {then}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", source, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("held")
    return process


def test_a_second_run_update_and_rollback_in_a_folder_are_refused_and_a_dead_owner_is_none(tmp_path: Path) -> None:
    log, folder = toy(tmp_path), tmp_path / "run"
    first = started(log, folder)
    try:
        told = json.loads((folder / NAME).read_text())
        assert told["pid"] == first.pid and told["host"] == socket.gethostname() and told["what"] == "run"
        assert told["start"] == Holder.own("run").start or told["start"] is not None
        again = ["run", *arguments(log, folder, **LONG)]
        (tmp_path / "n.csv").write_text("user_id,item_id,timestamp\nu1,i1,9\n")
        others = {
            "run": again,
            "resume": [*again, "--resume=True"],
            "update": ["update", str(folder), "--new-data", str(tmp_path / "n.csv")],
            "rollback": ["rollback", str(folder)],
        }
        source = "import sys; from recbole_cl.cli import main; sys.exit(main(sys.argv[1:]))"
        how: dict[str, Any] = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
        how["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
        running = {
            name: subprocess.Popen([sys.executable, "-c", source, *rest], **how) for name, rest in others.items()
        }
        for name, process in running.items():
            last = process.communicate(timeout=120)[1].strip().splitlines()[-1]
            assert process.returncode == 2, (name, last)
            assert f"output_dir: {folder} is in use by 'run' (process {first.pid} on {socket.gethostname()}" in last
            assert "wait until it has ended, or give another output_dir" in last
        assert first.poll() is None and not list(folder.glob("earlier-*")), "nobody was disturbed"
    finally:
        ended(first)  # kill -9: it removes nothing
    assert (folder / NAME).is_file()
    second = started(log, folder, resume=True)
    try:
        wait(lambda: json.loads((folder / NAME).read_text() or "{}").get("pid") == second.pid, second)
        second.send_signal(signal.SIGINT)
        assert second.wait(60) == 130
        assert not (folder / NAME).exists(), "an interrupted run lets go"
    finally:
        ended(second)


def test_a_cell_of_a_study_that_another_process_runs_is_told(tmp_path: Path) -> None:
    process = holding(tmp_path / "cell")
    try:
        found = run_cell({}, str(tmp_path / "cell"), "digest", 1)
    finally:
        ended(process)  # type: ignore[arg-type]
    assert found["state"] == "failed" and f"is in use by 'a test' (process {process.pid} on " in found["told"]
    assert not (tmp_path / "cell" / "cell.json").exists(), "nothing was written into another's folder"


def test_a_cell_that_another_process_has_done_meanwhile_is_not_run_again(tmp_path: Path) -> None:
    own = tmp_path / "cell"
    own.mkdir()
    (own / "result.json").write_text("{}")
    (own / "cell.json").write_text(json.dumps({"digest": "d", "settings": {}, "done": True}))
    assert run_cell({}, str(own), "d", 1)["state"] == "done"
    assert (own / "result.json").read_text() == "{}" and json.loads((own / "cell.json").read_text())["done"]


def test_who_was_killed_holds_nothing_also_where_its_children_live_on(tmp_path: Path) -> None:
    """A lock is of the open file, which a forked child (a worker of a loader) has, too."""
    fork = "child = os.fork(); time.sleep(600) if not child else print('held', child, flush=True); time.sleep(600)"
    process = holding(tmp_path / "a", "print('held', flush=True); " + fork)
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    try:
        with pytest.raises(ConfigError, match=f"process {process.pid}"), hold(tmp_path / "a", "mine"):
            pass
        ended(process)  # type: ignore[arg-type]
        with hold(tmp_path / "a", "mine"):
            assert json.loads((tmp_path / "a" / NAME).read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_of_another_host_is_told_with_its_remedy(tmp_path: Path) -> None:
    mine = Holder.own("run")
    other = replace(mine, host="elsewhere.example", boot="0" * 36, since="2026-01-02T03:04:05+00:00")
    (tmp_path / NAME).write_text(json.dumps(asdict(other)))
    with pytest.raises(ConfigError) as told, hold(tmp_path, "mine"):
        pass
    assert f"'run' (process {mine.pid} on elsewhere.example, since 2026-01-02T03:04:05" in str(told.value)
    assert f"if it has ended, remove {tmp_path / NAME}" in str(told.value)
    (tmp_path / NAME).unlink()
    with hold(tmp_path, "mine"):
        pass
    # A container has a name of its own on the same machine: its locks are seen here, so this one is nobody's.
    (tmp_path / NAME).write_text(json.dumps(asdict(replace(mine, host="0a1b2c3d4e5f"))))
    with hold(tmp_path, "mine"):
        pass


def test_a_reused_pid_is_told_apart_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        mine = Holder.own("run")
        start = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        alive = replace(mine, pid=process.pid, start=start)
        (tmp_path / NAME).write_text(json.dumps(asdict(alive)))
        with pytest.raises(ConfigError, match=f"process {process.pid}"), hold(tmp_path, "mine"):
            pass
        (tmp_path / NAME).write_text(json.dumps(asdict(replace(alive, start=start - 1))))
        with hold(tmp_path, "mine"):
            pass
        (tmp_path / NAME).write_text(json.dumps(asdict(alive)))
    finally:
        ended(process)
    with hold(tmp_path, "mine"):
        pass


def test_threads_of_one_process_are_told_apart_and_a_call_inside_another_is_let_in(tmp_path: Path) -> None:
    found: list[str] = []

    def other() -> None:
        try:
            with hold(tmp_path, "second", nested=True):
                found.append("in")
        except ConfigError as error:
            found.append(str(error))

    with hold(tmp_path, "first"), hold(tmp_path / "." / "", "inner", nested=True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(ConfigError, match="this process"), hold(tmp_path, "again"):
            pass
        assert json.loads((tmp_path / NAME).read_text())["what"] == "first"
    assert "is in use by 'first'" in found[0] and "this process" in found[0]
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "nonsense", "deep"])
def test_what_lies_in_the_place_of_a_lock_is_neither_followed_nor_waited_for(tmp_path: Path, kind: str) -> None:
    path, outside = tmp_path / NAME, tmp_path / "outside"
    outside.write_text("precious")
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("{" if kind == "nonsense" else "[" * 100_000)
    begun = time.monotonic()
    if kind in ("nonsense", "deep"):
        with hold(tmp_path, "mine"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(ConfigError, match="is no plain file; remove it"), hold(tmp_path, "mine"):
            pass
    assert outside.read_text() == "precious" and time.monotonic() - begun < 5


def test_many_that_come_at_once_are_in_one_after_the_other(tmp_path: Path) -> None:
    """Eight processes take and let go of a lock all the time; two inside at once would find each other's file."""
    source = """
import os, sys, time
from pathlib import Path
from recbole_cl.errors import ConfigError
from recbole_cl.lock import hold
folder, until, entered = Path(sys.argv[1]), time.monotonic() + 3, 0
while time.monotonic() < until:
    try:
        with hold(folder, "try"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(0.001)
            os.unlink(folder / "inside")
            entered += 1
    except ConfigError:
        pass
print(entered)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    entered = [int(process.communicate(timeout=60)[0]) for process in running]
    assert [process.returncode for process in running] == [0] * 8
    assert sum(entered) > 20


def test_a_finished_run_leaves_no_lock(tmp_path: Path) -> None:
    log = toy(tmp_path)
    run(log, tmp_path / "run", "BPR", epochs=1)
    assert not (tmp_path / "run" / NAME).exists()
    done = command(*arguments(log, tmp_path / "run", model="BPR", epochs=1, n_stages="x"), cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "run" / NAME).exists()
