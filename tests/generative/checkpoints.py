"""A Llama-family checkpoint of a few thousand numbers with a real tokenizer, saved as one from the hub would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "The user has interacted with items in chronological order, can you predict what the user may expect next?",
]


def tokenizer() -> Any:
    """Returns a byte-level BPE of 300 tokens that was trained on two sentences, as Llama 3's is on more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    begin, end, pad = special
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end, pad_token=pad)


def save_checkpoint(folder: Path, tied: bool = True, rows: int | None = None, kind: str = "llama") -> Path:
    """Writes ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Args:
        folder: Where.
        tied: The head is the embedding.
        rows: Tokens that the model has rows for; default those of the tokenizer.
        kind: Type of the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        settings = AutoConfig.for_model(
            kind, vocab_size=rows or len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
            tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        llm = AutoModelForCausalLM.from_config(settings)
    for p in llm.parameters():  # opinions sharp enough that nothing is a tie
        if p.dim() == 2:
            p.data *= 6
    llm.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
