"""The language model of a generative recommender with its adapter: embedded, or around a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recbole_cl.errors import ConfigError
from recbole_cl.generative.index import SemanticIds
from recbole_cl.generative.template import Template
from recbole_cl.model.llama_checkpoint import (
    add_codes,
    checkpoint_folder,
    checkpoint_hash,
    load_checkpoint,
    template_of,
)
from recbole_cl.model.small_llama import add_lora, small_llama
from recbole_cl.model.token_rows import speed_up

PAD, START, SPECIAL = 0, 1, 4
"""Of the embedded Llama: padding, the token before a history, and how many tokens stand before the codes."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Language:
    """A language model that writes codes.

    Attributes:
        llm: The model with its adapter.
        first: The token of code 0 of each level.
        template: What stands around a history.
        end: The token that ends an answer.
        base: ``source`` and ``sha256`` of the checkpoint that the adapter is for; ``None`` where all weights are ours.
        tokenizer: The checkpoint's tokenizer with the codes in it, if there is one.
    """

    llm: Any
    first: tuple[int, ...]
    template: Template
    end: int
    base: dict[str, str] | None = None
    tokenizer: Any = None


def language(config: Any, ids: SemanticIds, items: int) -> Language:
    """Makes the language model that a run asks for.

    Args:
        config: The properties ``llm*`` and ``lora_*`` are read.
        ids: The codes.
        items: Items of a history at most.

    Raises:
        ConfigError: If a property makes no sense, or the checkpoint does not fit.
    """
    made = _embedded(config, ids, items) if config["llm"] is None else _checkpoint(config, ids, items)
    if config["llm_gradient_checkpointing"]:
        made.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def _lora(config: Any) -> tuple[int, float, float, list[str]]:
    return config["lora_rank"], config["lora_alpha"], config["lora_dropout"], list(config["lora_targets"])


def _embedded(config: Any, ids: SemanticIds, items: int) -> Language:
    for key, neutral in (("llm_prompt", "codes"), ("llm_dtype", "float32")):
        if config[key] != neutral:
            raise ConfigError(
                f"property {key!r} is {config[key]!r}, but the embedded Llama knows codes alone and is trained from "
                f"nothing in float32; name a checkpoint (llm), or leave it out"
            )
    starts = SPECIAL + np.cumsum([0, *ids.sizes])
    llm = small_llama(config, int(starts[-1]), 1 + ids.levels * (items + 1))
    add_lora(llm, *_lora(config))
    return Language(llm, tuple(starts[:-1].tolist()), Template((START,), pad=PAD), 2)


def _checkpoint(config: Any, ids: SemanticIds, items: int) -> Language:
    name = str(config["llm"])
    if config["llm_dtype"] not in DTYPES:
        raise ConfigError(f"property 'llm_dtype' is {config['llm_dtype']!r}; it must be one of {', '.join(DTYPES)}")
    folder = checkpoint_folder(name, config["llm_revision"])
    llm, tokenizer = load_checkpoint(folder, name, DTYPES[config["llm_dtype"]])
    first = add_codes(llm, tokenizer, ids.sizes, name)
    template = template_of(str(config["llm_prompt"]), tokenizer, first)
    longest = template.longest(items, ids.levels) + ids.levels + 1
    room = min(int(llm.config.max_position_embeddings), getattr(llm.config, "sliding_window", None) or 1 << 30)
    if longest > room:
        raise ConfigError(
            f"property 'llm' is {name!r}, which reads {room} tokens; a prompt of {items} items and its answer are "
            f"{longest}; make MAX_ITEM_LIST_LENGTH smaller"
        )
    add_lora(llm, *_lora(config), tokens=range(first[0], first[0] + sum(ids.sizes)))
    speed_up(llm)
    end = template.pad if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    base = {"source": name, "sha256": checkpoint_hash(folder)}
    return Language(llm, first, template, int(end), base, tokenizer)
