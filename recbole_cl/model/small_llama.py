"""The embedded Llama, and adapters in any Llama: transformers' and peft's own classes, made from a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.model.token_rows import trained_rows

ADAPTER = "default"
"""peft's name of the one adapter that is trained."""


def small_llama(config: Any, n_tokens: int, longest: int) -> Any:
    """Returns a new Llama with random weights, embeddings and head tied.

    Args:
        config: The properties ``llm_*`` are read.
        n_tokens: Tokens that it knows.
        longest: Tokens of a sequence at most.

    Raises:
        ConfigError: If the sizes do not fit each other.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # it takes seconds to import

    hidden, heads, kv_heads = config["llm_hidden"], config["llm_heads"], config["llm_kv_heads"]
    for key, whole, part in (("llm_heads", hidden, heads), ("llm_kv_heads", heads, kv_heads)):
        if part < 1 or whole % part:
            raise ConfigError(f"property {key!r} is {part}; it must divide {whole}")
    if (hidden // heads) % 2:
        raise ConfigError(
            f"property 'llm_heads' is {heads}: heads of {hidden // heads} numbers cannot be rotated; even"
        )
    settings = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=hidden,
        intermediate_size=config["llm_intermediate"],
        num_hidden_layers=config["llm_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(settings)


def add_lora(
    llm: Any, rank: int, alpha: Any, dropout: float, targets: Sequence[str], tokens: Sequence[int] = ()
) -> Any:
    """Puts peft's LoRA layers into a language model, in place; what it computes stays, B is zero.

    The adapter's numbers are float32, whatever the model's are.

    Args:
        llm: The model.
        rank: Rank r.
        alpha: What is added is scaled by ``alpha / rank``.
        dropout: Before A.
        targets: Last parts of the names of the layers that are adapted.
        tokens: Tokens whose rows are trained beside the layers, in the embedding and in the head.

    Raises:
        ConfigError: If a target matches no layer.
    """
    from peft import inject_adapter_in_model

    names = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    if tokens:
        names = [name for name in names if name != "lm_head"]  # its rows are trained already
    lost = [target for target in targets if not any(name.split(".")[-1] == target for name in names)]
    if lost or not targets:
        known = sorted({name.split(".")[-1] for name in names} - {"lm_head"})
        raise ConfigError(
            f"property 'lora_targets' is {list(targets)!r}, of which {lost or 'nothing'} matches no layer of the "
            f"language model; it has {', '.join(known)}"
        )
    inject_adapter_in_model(lora_config(llm, rank, alpha, dropout, targets, tokens), llm)
    for name, p in llm.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            p.data = p.data.float()
    return llm


def lora_config(
    llm: Any, rank: int, alpha: Any, dropout: float, targets: Sequence[str], tokens: Sequence[int] = ()
) -> Any:
    """Returns peft's configuration of the adapter; see :func:`add_lora`."""
    from peft import LoraConfig

    # modules_to_save would train whole tables, and untie those of a model whose head is its embedding.
    tables = ["embed_tokens"] if llm.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    rows = {table: list(tokens) for table in tables} if tokens else None
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM",
        trainable_token_indices=rows,
    )  # fmt: skip


def lora_layers(llm: Any) -> dict[str, Any]:
    """Returns peft's LoRA layers by the name of the layer that they adapt."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in llm.named_modules() if isinstance(module, LoraLayer)}


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns A ``[r, in]`` and B ``[out, r]`` of a LoRA layer's trained adapter."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def train_only(llm: Any, what: str, rows: bool = False) -> None:
    """Says what is trained: ``base`` (all but the adapter, which is switched off) or ``adapter``.

    Args:
        llm: A language model with LoRA layers.
        what: ``base`` or ``adapter``.
        rows: The adapter's passes train the rows of the codes' tokens, too: those beside a checkpoint's table, or the
            table of a model that knows little but codes.
    """
    adapter = what == "adapter"
    for layer in lora_layers(llm).values():
        layer.enable_adapters(adapter)
    own = trained_rows(llm) or list(llm.get_input_embeddings().parameters())
    moved = {id(p) for p in own} if rows else set()
    for name, p in llm.named_parameters():
        p.requires_grad_(("lora_" in name) == adapter or id(p) in moved)


def token_loss(hidden: torch.Tensor, head: nn.Module, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns the cross-entropy of each token, shape ``[n]``, for outputs of shape ``[n, d]``.

    Args:
        hidden: Outputs of the body.
        head: The head.
        tokens: What is right, shape ``[n]``.
        temperature: What logits are divided by.
    """
    logits = head(hidden).float()
    return nn.functional.cross_entropy(logits if temperature == 1 else logits / temperature, tokens, reduction="none")
