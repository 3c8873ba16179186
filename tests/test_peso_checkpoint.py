"""PESO around a Llama-family checkpoint: what is trained, stored, asked and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "contracts"))
sys.path.insert(0, str(Path(__file__).parent / "generative"))
from checkpoints import save_checkpoint, tokenizer
from conformance_helpers import FUSE, Job, Walk, assert_reported, assert_resumes, checkpoints, matrix, write_log

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.generative.beam import CodeTokens, sequence_scores
from recbole_cl.generative.decoder import TreeDecoder
from recbole_cl.generative.template import Template
from recbole_cl.model import llama_checkpoint, peso
from recbole_cl.model.small_llama import add_lora
from recbole_cl.model.token_rows import speed_up, trained_rows

SIZES = (4, 4, 4)
SETTINGS: dict[str, Any] = {
    "vocabulary": "global",
    "candidates": "all",
    "llm_prompt": "paper",
    "lora_rank": 2,
    "lora_targets": ["q_proj", "v_proj", "down_proj"],
    "base_epochs": 1,
    "epochs": 1,
    "beam_size": 6,
    "stage_lr_scale": 1.0,
    "strategy": "PESO",
    "peso_lambda": 5.0,
    "checkpoint_keep": 100,
    "fwt_reference": "untrained",
    "MAX_ITEM_LIST_LENGTH": 4,
    "n_stages": 2,
    "train_batch_size": 16,
    "checkpoint_steps": 1,
    "matrix_cells": "diagonal",
}


class PESO(peso.PESO):
    """The model, which counts its steps and keeps its lists."""

    lists: list[torch.Tensor] = []

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        FUSE.tick()
        return super().calculate_loss(interaction)

    def recommend(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().recommend(*args)
        self.lists.append(found[0])
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def job(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    log = write_log(tmp_path_factory.mktemp("log"), n_users=20, steps=300)
    codes = {f"i{k}": [f"<a_{k % 3}>", f"<b_{k // 3 % 4}>", f"<c_{k // 12}>"] for k in range(45)}
    (log.folder / "log" / "index.json").write_text(json.dumps(codes))
    return Job(PESO, log.folder, {**SETTINGS, "llm": str(folder)})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    PESO.lists.clear()
    return job.walk(tmp_path_factory.mktemp("whole"))


def rows_of(walk: Walk) -> Any:
    """Returns the test rows of the last stage."""
    runner = walk.runner
    ctx = runner.state.models.context(1, runner.model, runner.stream.view(1))
    return ctx.batcher.rows(ctx.stage.test, evaluation=True)


def words_of(model: Any, history: list[int], item: int) -> list[int]:
    """Returns a prompt of the paper and its answer as the checkpoint's own tokenizer reads them, the codes in it."""
    words = tokenizer()
    words.add_tokens([f"<{letter}_{code}>" for letter, size in zip("abc", model.ids.sizes, strict=True)
                      for code in range(size)])  # fmt: skip
    items = ["".join(f"<{letter}_{int(code)}>" for letter, code in zip("abc", model.codes[one], strict=True))
             for one in [*history, item]]  # fmt: skip
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\nBased on the items that the user has interacted with: {', '.join(items[:-1])}, can you "
        f"determine what item would be recommended to the user next?\n\n### Response:{items[-1]}"
    )
    return [words.bos_token_id, *words(text, add_special_tokens=False)["input_ids"]]


def by_hand(model: Any, history: list[int], item: int) -> float:
    """Returns the negative log-likelihood of an item after a prompt of words, one row in one pass."""
    tokens = words_of(model, history, item)
    with torch.no_grad():
        logits = model.llm(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return -float(sum(logits[place - 1, tokens[place]] for place in range(len(tokens) - 3, len(tokens))))


# -- a run --------------------------------------------------------------------------------------------------------


def test_a_killed_run_has_the_same_bits(job: Job, whole: Walk, tmp_path: Path) -> None:
    assert_reported(whole)
    for step, stage in ((3, 0), (whole.ticks - 1, 1)):
        path = tmp_path / str(step)
        path.mkdir()
        assert_resumes(job, path, whole, step, stage)


def test_a_checkpoint_holds_the_adapter_and_the_rows_of_codes_alone(whole: Walk, folder: Path) -> None:
    states = [checkpoint.read(path) for path in checkpoints(whole)]
    names = set(states[-1]["model"]["tensors"])
    lora = {name for name in names if "lora_" in name}
    rows = {name for name in names if "trainable_tokens_delta" in name}
    assert names == lora | rows and lora and rows
    assert {states[-1]["model"]["tensors"][name].shape for name in rows} == {(sum(whole.runner.model.ids.sizes), 16)}
    assert states[-1]["model"]["bases"]["llm"]["source"] == str(folder)
    done = [s["model"]["tensors"] for s in states if s["phase"] == "done"]
    first = states[0]["model"]["tensors"]
    row = next(iter(rows))
    assert not torch.equal(first[row], done[0][row]), "the base stage trains the rows"
    assert torch.equal(done[0][row], done[1][row]), "and later stages leave them"
    assert any(not torch.equal(done[0][name], done[1][name]) for name in lora)


def test_its_weights_stay_those_of_the_folder(whole: Walk, folder: Path) -> None:
    from safetensors.torch import load_file

    theirs = load_file(folder / "model.safetensors")
    llm = whole.runner.model.llm
    ours = {name.replace("token_adapter.base_layer.", "").replace("base_layer.", ""): t for name, t in
            llm.state_dict().items()}  # fmt: skip
    for name, tensor in theirs.items():
        assert torch.equal(ours[name][: len(tensor)], tensor), name


def test_lists_hold_items_only_and_the_nll_is_that_of_single_prompts(whole: Walk) -> None:
    lists = torch.cat([items.flatten() for items in PESO.lists])
    assert len(lists) and (lists > 0).all()
    runner, model = whole.runner, whole.runner.model.eval()
    table, test = runner.stream.table, runner.stream.stages[1].test
    values = [
        by_hand(model, table.item[table.seq[max(lo, hi - 4) : hi]].tolist(), int(label))
        for lo, hi, label in zip(test.lo, test.hi, test.label, strict=True)
    ]
    assert matrix(whole, "nll")[1, 1] == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_the_loss_is_that_of_single_prompts(whole: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = whole.runner.model.eval(), rows_of(whole)
    assert not model.trains_all_positions
    lengths = rows[model.ITEM_SEQ_LEN].tolist()
    assert len(set(lengths)) > 1
    hand = [
        by_hand(model, history[:n], int(item)) / 3
        for history, n, item in zip(rows[model.ITEM_SEQ].tolist(), lengths, rows[model.ITEM_ID], strict=True)
    ]
    with torch.no_grad():
        assert model.per_sample_loss(rows).tolist() == pytest.approx(hand, abs=1e-4)
        monkeypatch.setitem(model.config.final_config_dict, "loss_end", True)
        monkeypatch.setitem(model.config.final_config_dict, "loss_temperature", 0.8)
        tokens = [words_of(model, h[:n], int(i)) for h, n, i in zip(rows[model.ITEM_SEQ].tolist(), lengths,
                                                                    rows[model.ITEM_ID], strict=True)]  # fmt: skip
        hand = []
        for row in tokens:
            logits = model.llm(input_ids=torch.tensor([row])).logits[0] / 0.8
            hand.append(float(nn.functional.cross_entropy(logits[-4:], torch.tensor([*row[-3:], 1]))))
        assert model.per_sample_loss(rows).tolist() == pytest.approx(hand, abs=1e-4)


def test_lists_are_brute_force_where_the_beam_is_wide(whole: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = whole.runner.model.eval(), rows_of(whole)
    allowed = torch.ones(model.n_items, dtype=torch.bool)
    allowed[0] = False
    none = (torch.empty(0, dtype=torch.int64),) * 2
    every = model.scores(rows, torch.arange(model.n_items).expand(len(rows), -1)).masked_fill(~allowed, -torch.inf)
    for tree in (True, False):
        monkeypatch.setitem(model.config.final_config_dict, "beam_tree", tree)
        monkeypatch.setitem(model.config.final_config_dict, "beam_size", 50)
        items, scores = model.recommend(rows, 5, allowed, none)
        assert torch.allclose(every.topk(5, dim=1).values, scores, atol=1e-4, rtol=0)
        assert torch.allclose(every.gather(1, items), scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("prompt", "tokens"), [("codes", "every"), ("code.v1", "base")])
def test_other_prompts(job: Job, tmp_path: Path, prompt: str, tokens: str) -> None:
    walk = job.walk(tmp_path, llm_prompt=prompt, llm_tokens=tokens, llm_dtype="bfloat16")
    model = walk.runner.model
    assert model.trains_all_positions == (prompt == "codes")
    assert {p.dtype for p in model.llm.parameters() if p.requires_grad} == {torch.float32}
    assert model.llm.model.layers[0].self_attn.k_proj.weight.dtype == torch.bfloat16
    done = [s["model"]["tensors"] for s in map(checkpoint.read, checkpoints(walk)) if s["phase"] == "done"]
    row = next(name for name in done[0] if "trainable_tokens_delta" in name)
    assert torch.equal(done[0][row], done[1][row]) == (tokens == "base")


def test_another_checkpoint_is_not_the_one_it_was_trained_on(job: Job, whole: Walk, tmp_path: Path) -> None:
    job.killed(tmp_path, whole.ticks - 1)
    other = save_checkpoint(tmp_path / "other", rows=400)
    kept = Path(str(job.settings["llm"]))
    kept.rename(tmp_path / "kept")
    other.rename(kept)
    try:
        with pytest.raises(CheckpointError, match=r"of property 'llm' has changed since the checkpoint"):
            job.walk(tmp_path, resume=True)
    finally:
        kept.rename(other)
        (tmp_path / "kept").rename(kept)


# -- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", llama_checkpoint.FAMILY)
def test_every_type_of_the_family_is_decoded_as_a_tree(kind: str, tmp_path: Path) -> None:
    """Continuations side by side over one cache, beside a pass for each, as the type has masks and positions."""
    save_checkpoint(tmp_path, rows=310, kind=kind)  # tokenizers of some types bring a token more
    llm, words = llama_checkpoint.load_checkpoint(tmp_path, kind, torch.float32)
    first = llama_checkpoint.add_codes(llm, words, SIZES, kind)
    prompts = torch.tensor([[0, first[0] + 1, 5, first[2], first[1]], [0, 8, first[0], 2, 2]])
    codes = torch.tensor([[[0, 1, 2], [0, 3, 1]], [[2, 2, 2], [1, 0, 3]]])
    tokens = CodeTokens(first, SIZES)
    with torch.no_grad():
        found = sequence_scores(TreeDecoder(llm.eval()), tokens, prompts, torch.tensor([5, 3]), codes)
        for row, n in enumerate((5, 3)):
            for k in range(2):
                answer = tokens.of(codes[row, k])
                logits = llm(input_ids=torch.cat([prompts[row, :n], answer])[None]).logits[0].log_softmax(-1)
                single = logits[n - 1 : n + 2].gather(1, answer[:, None]).sum()
                assert float(found[row, k]) == pytest.approx(float(single), abs=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_compute_what_pefts_do(tied: bool, tmp_path: Path) -> None:
    """Outputs and gradients, beside peft's own copy of the table."""
    save_checkpoint(tmp_path, tied)
    found = []
    for fast in (False, True):
        torch.manual_seed(0)
        llm, words = llama_checkpoint.load_checkpoint(tmp_path, "x", torch.float32)
        llama_checkpoint.add_codes(llm, words, SIZES, "x")
        add_lora(llm, 2, 4, 0.0, ["q_proj"], tokens=range(300, 312))
        for p in llm.parameters():
            if p.shape == (312, 16):
                p.data[300:] = 0  # nothing reads the table's own rows of codes
        g = torch.Generator().manual_seed(1)
        for p in trained_rows(llm):
            p.data = torch.randn(p.shape, generator=g)
        if fast:
            speed_up(llm)
        logits = llm(input_ids=torch.tensor([[0, 301, 5, 311, 300]])).logits
        logits.square().sum().backward()
        found.append((logits.detach(), [p.grad for p in trained_rows(llm)]))
    (one, grads), (other, fast_grads) = found
    assert len(grads) == (1 if tied else 2)
    assert torch.allclose(one, other, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(grads, fast_grads, strict=True))


def test_a_template_writes_ragged_histories() -> None:
    spelt = torch.arange(1, 13).view(2, 3, 2)
    prompts, lengths = Template((90, 91), (80,), (70, 71), 0).write(spelt, torch.tensor([3, 1]))
    assert prompts.tolist() == [[90, 91, 1, 2, 80, 3, 4, 80, 5, 6, 70, 71], [90, 91, 7, 8, 70, 71] + [0] * 6]
    assert lengths.tolist() == [12, 6]
    prompts, lengths = Template((90,), (80,), (70,), 0).write(spelt, torch.tensor([0, 2]))
    assert prompts.tolist() == [[90, 70, 0, 0, 0, 0, 0], [90, 7, 8, 80, 9, 10, 70]] and lengths.tolist() == [2, 7]


def test_words_are_data(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("A\x1b[2J\u202eB {items}\nC\x00\n")
    assert llama_checkpoint.read_words(str(file)) == "A[2JB {items}\nC"
    for text, told in (("no place", "must hold"), ("{items} {items}", "must hold"), ("{items}" + "x" * 4000, "4007")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=told):
            llama_checkpoint.read_words(str(file))


def test_a_name_on_the_hub_is_found_in_its_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched once is found without a network; what was not is refused with a remedy."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "models--someone--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / ("0" * 40)).symlink_to(folder)
    found = llama_checkpoint.checkpoint_folder("someone/tiny", None)
    llm, _ = llama_checkpoint.load_checkpoint(found, "someone/tiny", torch.float32)
    assert llm.config.hidden_size == 16
    for name in ("someone/other", "no name at all/x/y"):
        with pytest.raises(ConfigError, match=r"is no folder here, and the model hub does not give it \(.*'hf auth"):
            llama_checkpoint.checkpoint_folder(name, None)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_targets": ["queries"]}, "of which .'queries'. matches no layer .* q_proj"),
        ({"lora_targets": ["lm_head"]}, "of which .'lm_head'. matches no layer"),
        ({"llm_prompt": "poem"}, "it is none of codes, code, paper, and no file"),
        ({"llm_dtype": "float16"}, "must be one of float32, bfloat16"),
        ({"llm_tokens": "never"}, "must be 'base' or 'every'"),
        ({"loss_temperature": 0.0}, "must be above 0"),
        ({"llm_prompt": "codes", "loss_end": True}, "the next item stands where the end would"),
        ({"MAX_ITEM_LIST_LENGTH": 200}, "which reads 512 tokens; a prompt of 200 items"),
        ({"llm": None}, "'llm_prompt' is 'paper', but the embedded Llama knows codes alone"),
    ],
)
def test_what_makes_no_sense_is_refused(job: Job, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job.walk(tmp_path, **changed)


def test_a_checkpoint_of_another_vocabulary_is_refused(job: Job, tmp_path: Path) -> None:
    """Of another one than its tokenizer's, and of other codes than the index's."""
    with pytest.raises(ConfigError, match=r"another vocabulary than its tokenizer's: .* 300 tokens, .* rows for 280"):
        job.walk(tmp_path, llm=str(save_checkpoint(tmp_path / "few", rows=280)))
    folder = save_checkpoint(tmp_path / "codes", rows=320)
    words = tokenizer()
    words.add_tokens(["<a_0>", "<a_1>"])
    words.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"another vocabulary: it knows 2 of the 12 codes .* <a_2> not"):
        job.walk(tmp_path, llm=str(folder))


def test_codes_that_a_checkpoint_knows_keep_their_rows(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, rows=320)
    words = tokenizer()
    words.add_tokens([f"<{letter}_{code}>" for letter in "abc" for code in range(4)])
    words.save_pretrained(tmp_path)
    llm, words = llama_checkpoint.load_checkpoint(tmp_path, "x", torch.float32)
    before = llm.get_input_embeddings().weight.clone()
    assert llama_checkpoint.add_codes(llm, words, SIZES, "x") == (300, 304, 308)
    assert torch.equal(llm.get_input_embeddings().weight, before)
    with pytest.raises(ConfigError, match="do not follow each other"):
        llama_checkpoint.add_codes(llm, words, (2, 4, 4), "x")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder without config\.json"):
        llama_checkpoint.checkpoint_folder(str(tmp_path), None)
    other = tmp_path / "gpt"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r"of the type 'gpt2'; PESO takes those of the Llama family"):
        llama_checkpoint.load_checkpoint(other, "gpt", torch.float32)
    pickled = save_checkpoint(tmp_path / "pickled")
    weights = pickled / "model.safetensors"
    weights.rename(pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        llama_checkpoint.load_checkpoint(pickled, "pickled", torch.float32)
