"""Several processes under torchrun give what one gives, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.model.loss import EmbLoss
from run_helpers import ROOT, arguments, configure, run, toy
from safetensors.torch import load_file
from several_processes import run_job

from recbole_cl import checkpoint, distributed
from recbole_cl.distributed import Group
from recbole_cl.errors import ConfigError
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.data_parallel import norms_of_part, pieces_of
from recbole_cl.training.runner import Runner

CLOSE = 1e-6
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0}
SMALL_EVALUATION = {"eval_batch_size": 7}  # uneven shares: the last batch is smaller, their number is odd
COMPOSED = {"strategy": ["EWC", "ERRandom"], "er_batch_size": 13, "ewc_samples": 100}
JOBS: dict[str, dict[str, Any]] = {
    "BPR": {"model": "BPR", "properties": SMALL_EVALUATION},
    "SASRec": {"model": "SASRec", "properties": {**NO_DROPOUT, **COMPOSED, "epochs": 1}},
    # RecBole's norms of embeddings are no means over rows: a large weight shows it.
    "LightGCN": {"model": "LightGCN", "properties": {"reg_weight": 0.1, "strategy": ["SI", "LwF"], "epochs": 1}},
    "DeepFM": {"model": "DeepFM", "properties": {**NO_DROPOUT, "epochs": 1}},
    "NFM": {"model": "NFM", "properties": {"epochs": 1}},  # BatchNorm, with dropout: the whole batch
    "Sampling": {"model": "Sampling", "properties": {"epochs": 1, **SMALL_EVALUATION}},
}
MORE: dict[str, dict[str, Any]] = {
    "SGL": {"model": "SGL", "properties": {"epochs": 1}},
    "Pop": {"model": "Pop", "properties": {}},
    "SimpleX": {"model": "SimpleX", "properties": {"dropout_prob": 0.0}},
    "GRU4Rec": {"model": "GRU4Rec", "properties": {**NO_DROPOUT, "train_positions": "last", "strategy": "MAS"}},
    "SASRecBPR": {"model": "SASRec", "properties": {**NO_DROPOUT, "loss_type": "BPR", "strategy": "LwF"}},
    "Imitation": {"model": "LightGCN", "properties": {"strategy": "PersonalizedImitation"}},
    # It keeps a memory and reads it batch after batch; the small batches would be shared.
    "ReLoop2": {"model": "NeuMF", "properties": {**NO_DROPOUT, "strategy": "ReLoop2", **SMALL_EVALUATION}},
    "SHAN": {"model": "SHAN", "properties": {"epochs": 1}},
    "Clipped": {"model": "BPR", "properties": {"clip_grad_norm": {"max_norm": 0.01}, "stage_optimizer": "carry"}},
    "Large": {"model": "BPR", "properties": {"train_batch_size": 1000, "strategy": ["OnlineEWC", "ERRandom"]}},
}


def torchrun(
    processes: int, folder: Path, log: PlantedDrift, jobs: list[dict[str, Any]]
) -> subprocess.CompletedProcess[str]:
    """Runs jobs in several processes."""
    folder.mkdir(exist_ok=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps({"log": [str(log.folder), log.name, log.n_stages], "jobs": jobs}))
    return subprocess.run(
        [*launcher(processes), str(ROOT / "tests" / "several_processes.py"), str(path)],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def launcher(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def placed(jobs: Mapping[str, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return [{**job, "folder": str(folder / name)} for name, job in jobs.items()]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def alone(log: PlantedDrift, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, job in JOBS.items():
        run_job(log, job, folder / name)
    return folder


RESUMED = {"model": "BPR", "properties": {**COMPOSED, "epochs": 3, "checkpoint_keep": 50}}
DIES = 5
REFUSED = {
    "Drifting": {"model": "Drifting", "properties": {}, "caught": True},
    "OwnTrainer": {"model": "OwnTrainer", "properties": {}, "caught": True},
    "RecVAE": {"model": "RecVAE", "properties": {}, "caught": True},
}


@pytest.fixture(scope="module")
def two(log: PlantedDrift, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The jobs in two processes, and at last one whose first process dies."""
    folder = tmp_path_factory.mktemp("two")
    jobs = placed(JOBS, folder) + placed(REFUSED, folder)
    done = torchrun(2, folder, log, [*jobs, *placed({"Dying": {**RESUMED, "dies": DIES}}, folder)])
    return folder, done


@pytest.fixture(scope="module")
def three(
    log: PlantedDrift, two: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Some of the jobs in three processes, the dead run resumed by the command, and a loss that is NaN in one."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(two[0] / "Dying", folder / "Resumed")
    again = arguments(log, folder / "Resumed", resume=True, **RESUMED["properties"])
    jobs = placed({name: JOBS[name] for name in ("BPR", "SASRec", "LightGCN")}, folder)
    jobs += [
        {"folder": str(folder), "exchanges": True},
        {"folder": str(folder), "arguments": ["run", "--model=BPR", *again]},
        *placed({"Last": {"model": "Last", "properties": {}, "caught": True}}, folder),
        *placed({"Blind": {"model": "Blind", "properties": {}}}, folder),
    ]
    return folder, torchrun(3, folder, log, jobs)


def same_result(a: Path, b: Path) -> None:
    """Matrices and strata agree within 1e-6, losses within 1e-5.

    Sums taken in another order differ in the last bits, and steps of Adam carry that on; how far depends on how a
    processor rounds (kernels without AVX do not keep 1e-6 over nine epochs). Weights that agree so far may still order
    two items of almost the same score otherwise: one of the nine cells may tell another metric.
    """
    one, many = (json.loads((folder / "result.json").read_text()) for folder in (a, b))
    for key in ("matrix", "strata", "reference"):
        ours, theirs = np.array(numbers(one[key])), np.array(numbers(many[key]))
        apart = ~np.isclose(ours, theirs, rtol=0, atol=CLOSE, equal_nan=True)
        assert apart.mean() <= 1 / 9, (key, ours, theirs)
    assert len(numbers(one["matrix"])) >= 9
    curves = [[c["train_loss"] for c in result["curves"]] for result in (one, many)]
    assert curves[0] == pytest.approx(curves[1], abs=10 * CLOSE)
    terms = [{f"{i}/{k}": v for i, c in enumerate(r["curves"]) for k, v in c["terms"].items()} for r in (one, many)]
    assert terms[0] == pytest.approx(terms[1], rel=1e-2, abs=1e-12)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [float("nan") if value is None else float(value)]


def same_gradients(a: Path, b: Path, steps: int = 1) -> None:
    """The gradients of each stage's first steps agree; a stage's later ones are those of weights that Adam moved."""
    one, many = load_file(str(a / "seen.safetensors")), load_file(str(b / "seen.safetensors"))
    assert one.keys() == many.keys()
    first = [name for name in one if name.startswith("0/") and int(name.split("/")[1]) < steps]
    assert first, "nothing to compare"
    for name in first:
        assert float((one[name] - many[name]).abs().max()) <= CLOSE, name
    assert any(float(one[name].abs().max()) > 1e-4 for name in first), "gradients too small to tell"


# -- parts, in this process -------------------------------------------------------------------------------------------


def test_a_run_of_one_is_a_group_of_one() -> None:
    group = distributed.current()
    assert (group.rank, group.size, group.main) == (0, 1, True) and not distributed.launched()
    rows = np.arange(3)
    assert group.gather(rows) is rows and group.share(7) == slice(0, 7)
    with pytest.raises(ConfigError, match="mine"), group.together():
        raise ConfigError("mine")


def test_shares_cover_everything_once() -> None:
    for n, size in ((10, 3), (2, 3), (7, 7), (0, 2)):
        parts = [list(range(n))[Group(rank, size).share(n)] for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    pieces = pieces_of(10, 3, times=2)  # RecBole's layout: 5 positives, then 5 negatives
    assert pieces is not None and [p.tolist() for p in pieces] == [[0, 5], [1, 2, 6, 7], [3, 4, 8, 9]]
    assert sorted(torch.cat(pieces_of(11, 3, times=2) or []).tolist()) == list(range(11))
    assert pieces_of(2, 3) is None and pieces_of(4, 3, times=2) is None


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("require_pow", [False, True])
def test_norms_over_shares_add_up(p: int, require_pow: bool) -> None:
    """Against autograd of RecBole's own EmbLoss on the whole batch."""
    tables = [torch.randn(9, 4, requires_grad=True) for _ in range(2)]
    module = EmbLoss(norm=p)
    whole = module(*tables, require_pow=require_pow)
    expected = torch.autograd.grad(whole, tables)
    pieces = [slice(0, 2), slice(2, 9)]
    sums = torch.stack([sum(t[piece].detach().abs().pow(p).sum() for piece in pieces) for t in tables])  # type: ignore[arg-type]

    class Pair(Group):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.copy_(sums)

    parts = [norms_of_part(Pair(), module, *(t[piece] for t in tables), require_pow=require_pow) for piece in pieces]
    total = 2 / 9 * parts[0] + 7 / 9 * parts[1]
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(total, tables), expected, strict=True):
        torch.testing.assert_close(a, b)


# -- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(JOBS))
def test_two_processes_equal_one(alone: Path, two: tuple[Path, Any], name: str) -> None:
    assert (two[0] / name / "result.json").is_file(), two[1].stderr[-4000:]
    same_result(alone / name, two[0] / name)
    same_gradients(alone / name, two[0] / name)
    told = [w for w in json.loads((two[0] / name / "result.json").read_text())["warnings"] if "several processes" in w]
    assert bool(told) == (name == "NFM") and all("BatchNorm" in w for w in told)
    if name == "NFM":  # bit for bit, dropout and all
        a, b = (load_file(str(folder / name / "seen.safetensors")) for folder in (alone, two[0]))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["BPR", "SASRec", "LightGCN"])
def test_three_processes_equal_one(alone: Path, three: tuple[Path, Any], name: str) -> None:
    assert (three[0] / name / "result.json").is_file(), three[1].stderr[-4000:]
    same_result(alone / name, three[0] / name)
    same_gradients(alone / name, three[0] / name)


def test_one_process_writes(two: tuple[Path, Any]) -> None:
    names = sorted(path.name for path in (two[0] / "BPR").iterdir())
    assert names == ["checkpoints", "records.csv", "report.html", "result.json", "seen.safetensors", "store"]
    assert two[1].stderr.count("stage 1/3 (") <= len(JOBS) + 4, "only the first process logs"


def test_a_process_that_dies_ends_all(two: tuple[Path, Any]) -> None:
    assert two[1].returncode != 0
    written = checkpoint.numbered(two[0] / "Dying" / "checkpoints")
    assert int(written[-1].name) == DIES and not (two[0] / "Dying" / "result.json").exists()


def test_resumed_by_three_processes_and_by_one(log: PlantedDrift, two: Any, three: Any, tmp_path: Path) -> None:
    whole = run(log, tmp_path / "whole", "BPR", **RESUMED["properties"])
    assert (three[0] / "Resumed" / "result.json").is_file(), three[1].stderr[-4000:]
    same_result(tmp_path / "whole", three[0] / "Resumed")
    shutil.copytree(two[0] / "Dying", tmp_path / "one")
    resumed = run(log, tmp_path / "one", "BPR", resume=True, **RESUMED["properties"])
    assert resumed[1]["curves"][0]["seconds"] != whole[1]["curves"][0]["seconds"], "it did not resume"
    same_result(tmp_path / "whole", tmp_path / "one")
    assert three[1].stdout.count("AF") <= 2, "the summary is printed by one process"


def test_what_cannot_be_shared_is_refused_in_all(two: tuple[Path, Any]) -> None:
    told = {name: json.loads((two[0] / name / "errors.json").read_text()) for name in REFUSED}
    for name, words in {
        "OwnTrainer": "OwnTrainer cannot be trained by several processes: it trains its stages by itself",
        "RecVAE": "RecVAE cannot be trained by several processes: RecBole's RecVAETrainer",
        "Drifting": "epoch 0: the weights of rank 1 differ from rank 0's",
    }.items():
        assert len(told[name]) == 2 and all(words in line for line in told[name]), told[name]


def test_nan_on_one_rank_ends_all(three: tuple[Path, Any]) -> None:
    told = json.loads((three[0] / "Last" / "errors.json").read_text())
    where = "rank 2, stage 1, pass 'train', epoch 0, batch 4: the term 'data' is nan"
    assert told[2].startswith(f"TrainingError: {where}")
    assert all(line.startswith(f"ProcessError: rank 2 failed: {where}") for line in told[:2])


def test_an_error_that_nobody_waits_for_ends_all(three: tuple[Path, Any]) -> None:
    """NaN scores in one process, at the end of the last job: the others learn why, and torchrun fails."""
    assert three[1].returncode != 0
    assert "rank 2 failed: stage 1: the model's scores on stage 1 (valid) contain NaN" in three[1].stderr


def test_exchanges(three: tuple[Path, Any]) -> None:
    rows = np.concatenate([np.random.default_rng(rank).random((3 * rank, 2)) for rank in range(3)])
    for rank in range(3):
        told = json.loads((three[0] / f"exchanges-{rank}.json").read_text())
        np.testing.assert_array_equal(told["rows"], rows)
        assert told["ids"] == [2**60 + 1, 2**60 + 2, 2**60 + 2] and told["texts"] == ["", "é", "éé"]
        assert told["sum"] == [6.0] and told["any"] == [True, False]
        assert told["together"] == (
            "ConfigError: field: wrong; remedy" if rank == 1 else "ProcessError: rank 1 failed: field: wrong; remedy"
        )
        assert told["statistics"] == [0.0, 0.0] and "the weights of rank 1, 2 differ from rank 0's" in told["weights"]
        assert "the model's state of rank 1, 2 differ" in told["statistics_on_cpu"]


# -- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_more_models_and_strategies(log: PlantedDrift, tmp_path: Path, processes: int) -> None:
    done = torchrun(processes, tmp_path / "many", log, placed(MORE, tmp_path / "many"))
    assert done.returncode == 0, done.stderr[-4000:]
    for name, job in MORE.items():
        run_job(log, job, tmp_path / "alone" / name)
        same_result(tmp_path / "alone" / name, tmp_path / "many" / name)
        if name != "Pop":
            same_gradients(tmp_path / "alone" / name, tmp_path / "many" / name)


@pytest.mark.slow
def test_the_script_under_torchrun(log: PlantedDrift, tmp_path: Path) -> None:
    """As the documentation has it: one summary, one result, equal to one process's."""
    whole = run(log, tmp_path / "one", "BPR", strategy="EWC")
    given = arguments(log, tmp_path / "two", strategy="EWC")
    for command in ([str(ROOT / "run_recbole_cl.py")], ["-m", "recbole_cl.cli", "run"]):
        done = subprocess.run(
            [*launcher(2), *command, "--model=BPR", *given], cwd=tmp_path, env=environment(), capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count(whole[1]["name"]) == 1
        same_result(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_all(log: PlantedDrift, tmp_path: Path) -> None:
    began = time.monotonic()
    done = torchrun(2, tmp_path / "x", log, placed({"Failing": {"model": "Failing", "properties": {}}}, tmp_path / "x"))
    assert done.returncode != 0 and "no such user" in done.stderr and time.monotonic() - began < 120


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all(log: PlantedDrift, tmp_path: Path, victim: int) -> None:
    """SIGKILL in the middle of an epoch; one process goes on from the checkpoint."""
    given = {"epochs": 40, "stopping_step": 50, "checkpoint_steps": 3, "n_stages": None, "strategy": "SI"}
    process = subprocess.Popen(
        [*launcher(2), str(ROOT / "run_recbole_cl.py"), "--model=BPR", *arguments(log, tmp_path / "run", **given)],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(checkpoint.numbered(tmp_path / "run" / "checkpoints")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {_variable(int(pid), "RANK"): int(pid) for pid in children}
    os.kill(ranks[str(victim)], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0 and "exitcode  : -9" in told
    assert not (tmp_path / "run" / "result.json").exists()
    Runner(configure(log, tmp_path / "run", "BPR", resume=True, **given)).run()
    Runner(configure(log, tmp_path / "whole", "BPR", **given)).run()
    same_result(tmp_path / "whole", tmp_path / "run")


def _variable(pid: int, name: str) -> str | None:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs).get(name)
