"""Kill, resume, compare bits; refuse what cannot be believed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import ROOT, arguments, command, configure, run, toy

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError, OutputError
from recbole_cl.training.runner import Runner


def kill_and_resume(log: Any, folder: Path, after: int, **properties: Any) -> int:
    """Starts a run and kills it with SIGKILL once it has written checkpoint ``after``; returns the kills that hit."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_recbole_cl.py"), *arguments(log, folder, **properties)],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        written = checkpoint.numbered(folder / "checkpoints")
        if written and int(written[-1].name) >= after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait(60)
    return int(process.returncode == -signal.SIGKILL)


CASES = {
    "finetune": {"--model": "SASRec", "strategy": "FineTune", "stage_optimizer": "carry"},
    "steps": {"--model": "BPR", "strategy": "FineTune", "checkpoint_steps": 2},
    "composed": {"--model": "SASRec", "strategy": ["EWC", "SI", "ERRandom"], "checkpoint_steps": 3},
    "fresh": {"--model": "LightGCN", "strategy": "FullRetrain"},
}


@pytest.mark.parametrize("case", list(CASES))
def test_killed_and_resumed_run_gives_the_same_bits(tmp_path: Path, case: str) -> None:
    log = toy(tmp_path)
    settings = {k: v for k, v in CASES[case].items() if not k.startswith("--")}
    settings |= {"model": CASES[case]["--model"], "epochs": 4}
    whole = run(log, tmp_path / "whole", settings["model"], **{k: v for k, v in settings.items() if k != "model"})
    hits = kill_and_resume(log, tmp_path / "killed", after=3, **settings)
    hits += kill_and_resume(log, tmp_path / "killed", after=9, resume=True, **settings)
    assert hits == 2, "both processes must have been killed in the middle"
    done = command(*arguments(log, tmp_path / "killed", resume=True, **settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    for key in ("matrix", "strata", "reference", "disparity", "steps_to_95"):
        assert result[key] == json.loads(json.dumps(whole[1][key])), key
    timeless = [[{k: v for k, v in c.items() if k != "seconds"} for c in r["curves"]] for r in (result, whole[1])]
    assert timeless[0] == json.loads(json.dumps(timeless[1]))
    state, _, _ = checkpoint.newest(tmp_path / "killed" / "checkpoints")
    assert state is not None
    for name, tensor in whole[0].model.state_dict().items():
        assert torch.equal(state["model"]["tensors"][name], tensor), name


def test_a_truncated_or_foreign_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path) -> None:
    log = toy(tmp_path)
    whole = run(log, tmp_path / "run", "BPR")[1]
    folder = tmp_path / "run" / "checkpoints"
    last = checkpoint.numbered(folder)[-1]
    tensors = last / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    resumed = run(log, tmp_path / "run", "BPR", resume=True)[1]
    assert resumed["matrix"] == whole["matrix"]
    assert any(last.name in w and "truncated" in w for w in resumed["warnings"])
    for path in checkpoint.numbered(folder):
        (path / "manifest.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(CheckpointError, match="not written by RecBole-CL"):
        run(log, tmp_path / "run", "BPR", resume=True)


def test_resume_with_changed_config_or_data_is_refused(tmp_path: Path) -> None:
    log = toy(tmp_path)
    run(log, tmp_path / "run", "BPR")
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01, is 0\.02"):
        run(log, tmp_path / "run", "BPR", resume=True, learning_rate=0.02)
    run(log, tmp_path / "run", "BPR", resume=True, checkpoint_keep=5)  # a listed change is allowed
    path = tmp_path / log.name / f"{log.name}.inter"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(CheckpointError, match="the log of interactions has changed"):
        run(log, tmp_path / "run", "BPR", resume=True)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    log = toy(tmp_path)
    plain = run(log, tmp_path / "a", "BPR", epochs=1)[1]
    resumed = run(log, tmp_path / "b", "BPR", epochs=1, resume=True)[1]
    assert plain["matrix"] == resumed["matrix"]


def test_a_missing_key_of_a_state_is_named(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": {"c": 1.5, "d": [1, None, "x", float("inf")]}}
    checkpoint.save(tmp_path, 1, state, 2)
    back = checkpoint.read(tmp_path / "00000001")
    assert torch.equal(back["a"], state["a"]) and back["b"] == state["b"]
    with pytest.raises(TypeError, match="b/c is a set"):
        checkpoint.save(tmp_path, 2, {"b": {"c": {1}}}, 2)
    assert [p.name for p in checkpoint.numbered(tmp_path)] == ["00000001"]


def test_tied_tensors_are_stored_once_and_nothing_is_pickled(tmp_path: Path) -> None:
    shared = torch.randn(1000, 16)
    checkpoint.save(tmp_path, 1, {"a": shared, "b": shared}, 2)
    size = (tmp_path / "00000001" / "tensors.safetensors").stat().st_size
    assert shared.numel() * 4 <= size < shared.numel() * 5
    back = checkpoint.read(tmp_path / "00000001")
    assert torch.equal(back["a"], shared) and torch.equal(back["b"], shared)
    assert sorted(p.name for p in (tmp_path / "00000001").iterdir()) == [
        "manifest.json", "state.json", "tensors.safetensors",
    ]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="mounts a small file system")
def test_a_full_disk_is_told_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    log = toy(tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(OutputError, match="the disk is full; free space and go on with --resume=True"):
            run(log, small / "run", "BPR", embedding_size=64, checkpoint_keep=50)
        left = checkpoint.numbered(small / "run" / "checkpoints")
        assert left and checkpoint.read(left[-1])["stage"] >= 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    log = toy(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"output_dir: cannot write to .*file"):
        Runner(configure(log, tmp_path / "file" / "run", "BPR")).run()
    done = command(*arguments(log, tmp_path / "file" / "run"), "--model=BPR", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "output_dir" in done.stderr.splitlines()[-1]


def test_other_errors_of_the_system_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(OutputError, match="read-only; choose another output_dir"):
        checkpoint.save(tmp_path, 1, {"a": torch.ones(1)}, 2)


def test_patience_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that broke off after two epochs without improvement waits for the rest of stopping_step, and no longer."""
    from recbole_cl.training import passes

    log, original = toy(tmp_path), passes.early_stopping
    settings = {"epochs": 20, "stopping_step": 4, "train_batch_size": 1000}

    def worse(value: float, best: float, waited: int, *rest: Any) -> Any:
        """The first epoch is the best one."""
        return original(1.0 if best < 0 else 0.5, best, waited, *rest)

    def epochs(runner: Runner) -> list[int]:
        return [point["epoch"] for point in runner.journal.curves if point["stage"] == 0]

    monkeypatch.setattr(passes, "early_stopping", worse)
    whole = run(log, tmp_path / "whole", "BPR", **settings)[0]
    assert len(epochs(whole)) == 6, "one that is best, four to wait for, one too many"
    train, broken = passes.StagePass._epoch, configure(log, tmp_path / "broken", "BPR", **settings)

    def stop(self: Any, targets: Any) -> None:
        if self.progress.epoch == 3:
            assert self.progress.waited == 2
            raise KeyboardInterrupt
        train(self, targets)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes.StagePass, "_epoch", stop)
        Runner(broken).run()
    again = run(log, tmp_path / "broken", "BPR", resume=True, **settings)[0]
    assert epochs(again) == epochs(whole)
