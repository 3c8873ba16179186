"""Adapters as peft loads them: the same logits without this package, and their size at the 1B shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "contracts"))
sys.path.insert(0, str(Path(__file__).parent / "generative"))
from checkpoints import save_checkpoint
from conformance_helpers import Job, write_log

import recbole_cl
from recbole_cl.cli import main
from recbole_cl.errors import ConfigError
from recbole_cl.model.small_llama import add_lora
from recbole_cl.serve.adapter import export_adapter

SETTINGS: dict[str, Any] = {
    "model": "PESO",
    "vocabulary": "global",
    "candidates": "all",
    "lora_rank": 2,
    "lora_alpha": 3,
    "lora_targets": ["q_proj", "down_proj"],
    "base_epochs": 1,
    "adapter_epochs": 1,
    "epochs": 1,
    "stage_lr_scale": 1.0,
    "learning_rate": 0.05,
    "fwt_reference": "untrained",
    "MAX_ITEM_LIST_LENGTH": 4,
    "matrix_cells": "last_row",
}
SMALL = {"llm_hidden": 16, "llm_intermediate": 32, "llm_layers": 1, "llm_heads": 2, "llm_kv_heads": 1}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = write_log(tmp_path_factory.mktemp("log"), n_users=20, steps=300)
    codes = {f"i{k}": [f"<a_{k % 3}>", f"<b_{k // 3 % 4}>", f"<c_{k // 12}>"] for k in range(45)}
    (log.folder / "log" / "index.json").write_text(json.dumps(codes))
    return log.folder


def trained(log: Path, folder: Path, **changed: Any) -> Any:
    """Returns a saved run, loaded."""
    from recbole_cl.model.peso import PESO

    Job(PESO, log, {k: v for k, v in SETTINGS.items() if k != "model"}).walk(folder, **changed)
    return recbole_cl.load(folder / "run")


def logits(llm: Any, first: int) -> torch.Tensor:
    with torch.no_grad():
        return llm(input_ids=torch.tensor([[0, first, first + 5, first + 11, first + 2]])).logits


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_for_a_checkpoint(log: Path, tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture) -> None:
    """By peft and transformers alone: the checkpoint, room for the codes, the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = save_checkpoint(tmp_path / "llama", tied)
    run = trained(log, tmp_path, llm=str(llama), strategy="SingleLoRA", n_stages=2)
    assert main(["export-adapter", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "adapter of rank 2, rows of 12 tokens" in capsys.readouterr().out
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(llama)
    base.resize_token_embeddings(len(words), mean_resizing=False)
    theirs = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    first = words.convert_tokens_to_ids("<a_0>")
    ours = logits(run.model.llm, first)
    assert torch.allclose(ours, logits(theirs, first), atol=1e-4)
    with theirs.disable_adapter():
        assert not torch.allclose(ours, logits(theirs, first), atol=1e-2)


@pytest.mark.parametrize(
    ("strategy", "more", "rank"),
    [
        ("PESO", {}, 2),
        ("SumLoRA", {"sum_lora_scaled": True}, 6),
        ("SDLoRA", {"sd_lora_adapters": "latest", "sd_lora_inherit": True}, 4),
        ("SDLoRA", {"sd_lora_shared": True, "sd_lora_current": True, "sd_lora_init": 0.8}, 6),
        ("InfLoRA", {}, 6),
    ],
)
def test_an_adapter_of_the_embedded_llama(log: Path, tmp_path: Path, strategy: str, more: Any, rank: int) -> None:
    """Also where a strategy adds past adapters: one adapter of peft is the whole sum."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained(log, tmp_path, strategy=strategy, n_stages=3, **SMALL, **more)
    told = export_adapter(run, tmp_path / "out")
    assert told["rank"] == rank and told["tokens"] == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    first = run.model.tokens.first[0]
    ours = logits(run.model.llm, first)
    assert torch.allclose(ours, logits(theirs, first), atol=1e-5)
    with theirs.disable_adapter():
        assert not torch.allclose(ours, logits(theirs, first), atol=1e-3)


def test_other_models_have_none(log: Path, tmp_path: Path) -> None:
    from recbole_cl.model.sasrec import SASRec

    given = {"loss_type": "CE", "n_stages": 2, "epochs": 1, "hidden_size": 8, "inner_size": 8, "n_heads": 1}
    Job(SASRec, log, given).walk(tmp_path)
    with pytest.raises(ConfigError, match="SASRec has no adapter of a language model"):
        export_adapter(recbole_cl.load(tmp_path / "run"), tmp_path / "out")


def test_its_size_at_the_1b_shape() -> None:
    """Llama-3.2 1B's shape without its numbers: LoRA of rank 8 on all seven layers, the rows of 1,024 codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256 + 1024, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            )
        )  # fmt: skip
        base = sum(p.numel() for p in llm.parameters()) * 2  # bfloat16
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        add_lora(llm, 8, 16, 0.05, targets, tokens=range(128256, 128256 + 1024))
    own = {id(p): p.numel() for n, p in llm.named_parameters() if "lora_" in n or "trainable_tokens_delta" in n}
    assert 7.6e6 < sum(own.values()) < 7.8e6
    assert base == pytest.approx(2.48e9, rel=0.01)
    share = 4 * sum(own.values()) / base
    assert 0.0120 < share < 0.0130
