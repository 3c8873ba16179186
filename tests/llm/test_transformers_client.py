"""The client over a folder of transformers: a tiny real model, made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from recbole_cl.errors import ConfigError
from recbole_cl.llm.cache import AnswerCache
from recbole_cl.llm.cascade import Cascade, Limits
from recbole_cl.llm.clients.base import Request
from recbole_cl.llm.clients.offline import Offline
from recbole_cl.llm.clients.transformers_folder import Transformers
from recbole_cl.llm.prompts import read_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 16 numbers over a few words."""
    path = tmp_path_factory.mktemp("tiny")
    words = ["[UNK]", "[EOS]", "mostly", "often", "rock", "pop", "jazz", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=len(words), bos_token_id=1, eos_token_id=1, **shape)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_a_tiny_model_answers(folder: Path, tmp_path: Path) -> None:
    """The same question, the same answer; the global random state is left alone; long prompts are cut to the window."""
    client = Transformers({"folder": str(folder), "max_tokens": 6, "device": "cpu"})
    client.check()
    state = torch.get_rng_state()
    first = client.ask(Request("summary", "mostly rock often pop"))
    assert first == client.ask(Request("summary", "mostly rock often pop"))
    assert first.prompt_tokens == 4 and 0 < first.answer_tokens <= 6
    assert client.ask(Request("summary", "rock " * 500)).prompt_tokens == 26
    assert torch.equal(torch.get_rng_state(), state)
    cache = AnswerCache(tmp_path / "c.sqlite")
    work = Cascade("transformers", client, Offline({"clauses": 8, "min_count": 2}), cache, Limits(2, 1, 0.0))
    prompt = read_prompt("summary", "v1")
    data = {"behaviours": [{"tags": ["rock"]}]}
    asked = work.named(prompt, [Request("summary", f"{word} .", data) for word in ("rock", "pop", "jazz")])
    kept = work.wave(prompt, asked)
    assert len(kept) == 3 and all(answer.text for answer in kept) and work.spent.calls >= 3
    assert (
        client.identity()["folder"] != Transformers({**client.parameters, "folder": str(tmp_path)}).identity()["folder"]
    )


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    for given in (None, str(tmp_path)):
        with pytest.raises(ConfigError, match="transformers_folder"):
            Transformers({"folder": given, "max_tokens": 6, "device": "cpu"}).check()
