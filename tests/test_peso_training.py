"""How PESO trains around a checkpoint: presets, memory for time, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "contracts"))
sys.path.insert(0, str(Path(__file__).parent / "generative"))
from checkpoints import save_checkpoint
from conformance_helpers import SMALL, Job, checkpoints, write_log

from recbole_cl import checkpoint
from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.model.peso import PESO

TINY: dict[str, Any] = {
    "base_epochs": 1, "adapter_epochs": 1, "epochs": 1, "n_stages": 2, "train_batch_size": 32, "lora_rank": 2,
    "fwt_reference": "untrained", "MAX_ITEM_LIST_LENGTH": 4, "matrix_cells": "diagonal", "show_progress": False,
    "vocabulary": "global", "candidates": "all", "checkpoint_keep": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = write_log(tmp_path_factory.mktemp("log"), n_users=20, steps=300)
    codes = {f"i{k}": [f"<a_{k % 3}>", f"<b_{k // 3 % 4}>", f"<c_{k // 12}>"] for k in range(45)}
    (log.folder / "log" / "index.json").write_text(json.dumps(codes))
    return log.folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("preset", "strategy", "prompt", "rate"),
    [("peso_paper", "PESO", "paper", 1e-3), ("peso_official_code", "SDLoRA", "code", 2e-4)],
)
def test_a_preset_trains(
    log: Path, llama: Path, tmp_path: Path, preset: str, strategy: str, prompt: str, rate: float
) -> None:
    from recbole_cl.training.runner import Runner

    given = {"data_path": str(log), "output_dir": str(tmp_path / "run"), "llm": str(llama), "strategy": strategy}
    small = {k: v for k, v in TINY.items() if k in ("base_epochs", "epochs", "n_stages", "MAX_ITEM_LIST_LENGTH")}
    same = {"show_progress": False, "load_col": SMALL["load_col"], "min_user_inter": 0}
    config = CLConfig("PESO", "log", [preset], {**given, **small, **same})
    assert config["llm_prompt"] == prompt and config["learning_rate"] == rate and config["llm_dtype"] == "bfloat16"
    result = Runner(config).run()
    assert np.isfinite([c["train_loss"] for c in result["curves"]]).all()
    if preset == "peso_official_code":
        assert config["valid_metric"].lower() == "nll" and config["learner"] == "adamw"


def test_a_file_of_the_same_name_is_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peso_paper").write_text("learning_rate: 0.5\n")
    assert CLConfig("BPR", "ml-100k", ["peso_paper"])["learning_rate"] == 0.5
    with pytest.raises(ConfigError, match="cannot read the config file 'peso_papers'"):
        CLConfig("BPR", "ml-100k", ["peso_papers"])


@pytest.mark.parametrize("embedded", [True, False])
def test_layers_computed_again_give_the_same_gradients(log: Path, llama: Path, tmp_path: Path, embedded: bool) -> None:
    walk = Job(PESO, log, TINY).walk(tmp_path, **({} if embedded else {"llm": str(llama), "llm_prompt": "paper"}))
    runner, calls, found = walk.runner, [], []
    ctx = runner.state.models.context(1, runner.model, runner.stream.view(1))
    rows = ctx.batcher.rows(ctx.stage.test)
    llm = runner.model.llm
    for _ in range(2):
        runner.model.train()
        calls.append(0)

        def count(*_: Any) -> None:
            calls[-1] += 1

        handle = llm.model.layers[0].mlp.register_forward_pre_hook(count)
        runner.model.zero_grad()
        torch.manual_seed(0)  # dropout is drawn again as it was
        runner.model.calculate_loss(rows).backward()
        handle.remove()
        found.append([p.grad.clone() for p in llm.parameters() if p.grad is not None])
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert calls[1] == 2 * calls[0] > 0 and len(found[0]) > 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    again = Job(PESO, log, {**TINY, "llm_gradient_checkpointing": True}).walk(
        tmp_path / "again", **({} if embedded else {"llm": str(llama), "llm_prompt": "paper"})
    )
    assert again.result["matrix"] == walk.result["matrix"]


def test_rows_of_the_embedded_llama_may_go_on(log: Path, tmp_path: Path) -> None:
    """With the paper's tokens at every stage its table moves, and all other weights of the base stay."""
    walk = Job(PESO, log, TINY).walk(tmp_path, llm_tokens="every")
    done = [s["model"]["tensors"] for s in map(checkpoint.read, checkpoints(walk)) if s["phase"] == "done"]
    moved = {name for name in done[0] if not torch.equal(done[0][name], done[1][name])}
    assert any("embed_tokens" in name for name in moved)
    assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in moved)


SCRIPT = """
import json, sys
from recbole_cl.quick_start import run_recbole_cl
for job in json.loads(open(sys.argv[1]).read()):
    run_recbole_cl(model="PESO", dataset="log", config_dict=job)
"""


def test_two_processes_train_what_one_does(log: Path, llama: Path, tmp_path: Path) -> None:
    """Under torchrun, over gloo: rows of words around a checkpoint, windows of codes in the embedded Llama."""
    kinds: dict[str, dict[str, Any]] = {
        "words": {"llm": str(llama), "llm_prompt": "paper"},
        "codes": {"llm_hidden": 16, "llm_intermediate": 32, "llm_layers": 1, "llm_heads": 2, "llm_kv_heads": 1},
    }
    results: dict[str, list[Any]] = {name: [] for name in kinds}
    (tmp_path / "job.py").write_text(SCRIPT)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        jobs = [
            {**SMALL, **TINY, "strategy": "PESO", "peso_lambda": 5.0, "lora_dropout": 0.0, "data_path": str(log),
             "output_dir": str(folder / name), **kind}
            for name, kind in kinds.items()
        ]  # fmt: skip
        folder.mkdir()
        (folder / "jobs.json").write_text(json.dumps(jobs))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [
            sys.executable,
            *(launch if processes > 1 else []),
            str(tmp_path / "job.py"),
            str(folder / "jobs.json"),
        ]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for name in kinds:
            told = json.loads((folder / name / "result.json").read_text())
            assert not any("no faster than alone" in warning for warning in told["warnings"])
            results[name].append(told)
    for one, two in results.values():
        losses = [[c["train_loss"] for c in told["curves"]] for told in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        cells = [np.array(told["matrix"]["nll"], dtype=float).ravel() for told in (one, two)]
        assert cells[0] == pytest.approx(cells[1], rel=1e-3, nan_ok=True)
