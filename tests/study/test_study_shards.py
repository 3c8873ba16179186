"""Several processes on one study: claims by files, dead owners, real kills, a limit of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_helpers import SMALL, toy

from recbole_cl import cli
from recbole_cl.study import claims, read_plan, walk
from recbole_cl.study.table import rows
from recbole_cl.study.walk import state
from recbole_cl.testing.toy import PlantedDrift

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("planted"))


def study(folder: Path, log: PlantedDrift, **changed: Any) -> Path:
    settings = {**log.settings(), **SMALL, "epochs": 1, "data_path": str(log.settings()["data_path"])}
    preset = {
        "datasets": [log.name], "schedulers": [settings["scheduler"]], "models": ["BPR"], "strategies": ["FineTune"],
        "seeds": [1, 2], "settings": settings, **changed,
    }  # fmt: skip
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump({"presets": {"laptop": preset}}), encoding="utf-8")
    return path


# -- claims -------------------------------------------------------------------------------------------------------


def other(own: Path, code: str = "time.sleep(600)") -> subprocess.Popen[str]:
    """A process that claims a folder, says so, and goes on."""
    script = (
        f"import sys, time; from pathlib import Path; from recbole_cl.study.claims import claim\n"
        f"found = claim(Path(sys.argv[1])); print(found is not None, flush=True); {code}"
    )
    words = [sys.executable, "-c", script, str(own)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_a_cell_has_one_owner_until_it_dies(tmp_path: Path) -> None:
    with other(tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        assert claims.claim(tmp_path) is None and claims.held(tmp_path)
        process.kill()
        process.wait()
    assert not claims.held(tmp_path)
    taken = claims.claim(tmp_path)
    assert taken is not None and taken.path.name == "claim-2" and claims.claim(tmp_path) is None
    taken.release()
    assert not claims.held(tmp_path)
    again = claims.claim(tmp_path)
    assert again is not None and again.path.name == "claim-3"
    again.release(done=True)
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_want_a_cell_one_gets_it(tmp_path: Path) -> None:
    for round_ in range(20):
        own, found, gate = tmp_path / str(round_), [], threading.Barrier(8)

        def want(own: Path = own, found: list[Any] = found, gate: threading.Barrier = gate) -> None:
            gate.wait()
            found.append(claims.claim(own))

        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        got = [one for one in found if one is not None]
        assert len(got) == 1
        got[0].release()


def test_a_machine_that_went_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim of another machine holds while it is touched; an owner that was taken for dead notices and ends."""
    monkeypatch.setattr(claims, "BEAT", 0.05)
    ended = threading.Event()
    mine = claims.claim(tmp_path, ended.set)
    assert mine is not None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(claims.socket, "gethostname", lambda: "another")
        assert claims.claim(tmp_path) is None
        time.sleep(0.3)
        elsewhere.setattr(claims, "STALE", 0.5)
        assert claims.claim(tmp_path) is None, "it is touched"
        monkeypatch.setattr(claims, "BEAT", 2.0)  # the machine of the owner is silent from here on
        time.sleep(0.8)
        theirs = claims.claim(tmp_path)
        assert theirs is not None and theirs.path.name == "claim-2"
        assert ended.wait(5)
        theirs.release()


def test_a_number_of_a_process_that_was_used_again(tmp_path: Path) -> None:
    with other(tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        note = json.loads((tmp_path / "claim-1").read_text(encoding="utf-8"))
        assert claims._lives(note) and not claims._lives({**note, "started": "17"})
        process.kill()


def test_turns() -> None:
    assert claims.in_turn(7, (1, 3)) == [0, 3, 6, 1, 4, 2, 5] and claims.in_turn(7, (3, 3)) == [2, 5, 0, 3, 6, 1, 4]
    assert sorted(claims.in_turn(11, (2, 4))) == list(range(11))
    for wrong in ("0/2", "3/2", "1", "a/b", ""):
        assert cli.main(["study", "strategies", f"--shard={wrong}", "--output_dir=nowhere"]) == 2
    assert cli.main(["study", "strategies", "--max-hours=0", "--output_dir=nowhere"]) == 2


# -- studies ------------------------------------------------------------------------------------------------------


def command(path: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "recbole_cl.cli", "study", str(path), "--output_dir", str(out), *more]


def killed(words: list[str], when: Path, tmp_path: Path) -> None:
    """Starts a study and kills it, with all that it started, once a checkpoint lies in a folder."""
    with subprocess.Popen(
        words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    ) as process:
        until = time.monotonic() + 240
        while not list(when.glob("0*")) and time.monotonic() < until:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_twice_and_sharded_it_equals_one_that_was_left_alone(tmp_path: Path, log: PlantedDrift) -> None:
    """Two models, three strategies, two seeds; SIGKILL twice; then two shards, one of which is killed, too."""
    methods = ["FineTune", {"EWC weak": {"strategy": "EWC", "ewc_lambda": 0.5}}, "ERRandom"]
    settings = {**log.settings(), **SMALL, "epochs": 2, "data_path": str(log.settings()["data_path"])}
    path = study(tmp_path, log, models=["BPR", "SASRec"], strategies=methods, settings=settings)
    plan = read_plan(path, "laptop")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for number in (1, 4):
        killed(command(path, cut), cut / plan.cells[number].folder / "checkpoints", tmp_path)
    assert [state(cell, cut) for cell in plan.cells[:4]] == ["done"] * 4
    killed(command(path, cut, "--shard=1/2"), cut / plan.cells[6].folder / "checkpoints", tmp_path)
    both = [subprocess.Popen(command(path, cut, f"--shard={i}/2"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
                             stdout=subprocess.DEVNULL) for i in (1, 2)]  # fmt: skip
    told = [process.communicate(timeout=500)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert all("done in" in text for text in told), "both had something to do"
    assert walk(plan, whole) == []
    assert all(state(cell, cut) == "done" for cell in plan.cells)
    one, two = (rows(plan, folder) for folder in (whole, cut))
    numbers = [name for name in one if ":" in name]
    assert len(numbers) > 10 and one[numbers].equals(two[numbers])
    assert "12 runs." in (cut / "table.md").read_text(encoding="utf-8")
    assert not list(cut.rglob("claim-*")) and not list(cut.rglob("checkpoints"))


def test_two_shards_run_each_cell_once(tmp_path: Path, log: PlantedDrift) -> None:
    """A dead owner's cell is taken over by whoever comes; a living one's is left alone."""
    path = study(tmp_path, log, seeds=[1, 2, 3])
    plan, out = read_plan(path, "laptop"), tmp_path / "out"
    with other(out / plan.cells[0].folder) as living, other(out / plan.cells[1].folder) as dead:
        assert all(process.stdout is not None and process.stdout.readline() == "True\n" for process in (living, dead))
        dead.kill()
        dead.wait()
        assert walk(plan, out, shard=(1, 2)) == []
        assert [state(cell, out) for cell in plan.cells] == ["open", "done", "done"]
        living.kill()
    silent = {"host": "another", "boot": None, "pid": 1, "start": None, "since": "long ago", "what": "a run of a study"}
    (out / plan.cells[0].folder / ".lock").write_text(json.dumps(silent), encoding="utf-8")
    assert walk(plan, out, shard=(2, 2)) == []
    assert [state(cell, out) for cell in plan.cells] == ["done"] * 3 and not list(out.rglob("claim-*"))


def test_time_is_up_and_the_table_is_there(tmp_path: Path, log: PlantedDrift) -> None:
    """A limit of time and SIGTERM both leave the table of what is done, and the rest goes on later."""
    path, out = study(tmp_path, log, seeds=[1, 2, 3, 4]), tmp_path / "out"
    plan = read_plan(path, "laptop")
    with subprocess.Popen(
        command(path, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as run:
        until = time.monotonic() + 240
        while state(plan.cells[0], out) != "done" and time.monotonic() < until:
            time.sleep(0.01)
        run.terminate()
        run.communicate(timeout=120)
    assert run.returncode == 130
    left = sum(state(cell, out) == "open" for cell in plan.cells)
    assert left > 0 and f"{4 - left} runs, {left} not run yet" in (out / "table.md").read_text(encoding="utf-8")
    short = subprocess.run(
        command(path, tmp_path / "short", "--max-hours=0.0005"), env=ENVIRONMENT, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert short.returncode == 0 and "0 runs, 4 not run yet" in short.stdout and "time is up" in short.stderr
