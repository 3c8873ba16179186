"""A small language model with sharp opinions, and items with random codes, for the tests of decoding."""

from __future__ import annotations

from typing import Any

import torch

from recbole_cl.generative.beam import CodeTokens
from recbole_cl.generative.trie import Trie

SIZES = (16, 16, 16, 16)
TOKENS = CodeTokens((4, 20, 36, 52), SIZES)


def small_llm(seed: int = 0) -> Any:
    """Returns a Llama of two layers over 68 tokens, in eval mode, its weights enlarged so that nothing is a tie."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=68, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        llm = LlamaForCausalLM(config).eval().requires_grad_(False)
        for p in llm.parameters():
            if p.dim() > 1:
                p.mul_(6)
    return llm


def items(n: int, seed: int = 0, most: tuple[int, ...] = (4, 5, 6, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes ``[n, 4]`` and the flags of four fifths of the items; item 0 is never allowed."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, size, (n,), generator=g) for size in most], dim=1)
    allowed = torch.rand(n, generator=g) < 0.8
    allowed[0] = False
    return codes, allowed


def prompts(rows: int, longest: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns right-padded prompts of different lengths."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (rows,), generator=g)
    tokens = torch.randint(4, 68, (rows, longest), generator=g)
    tokens[:, 0] = 1
    return tokens.masked_fill(torch.arange(longest) >= lengths.unsqueeze(1), 0), lengths


def trie_of(codes: torch.Tensor, allowed: torch.Tensor) -> Trie:
    """Returns their trie."""
    return Trie(codes, allowed, SIZES)
