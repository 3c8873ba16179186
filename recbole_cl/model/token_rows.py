"""Rows of a vocabulary that are trained while all others stay: peft's, without its copy of the whole table.

peft's ``trainable_token_indices`` keeps the trained rows beside the table, and writes them into a copy of it at every
call: at 129k tokens that is most of a small model's step. The rows of codes lie side by side, so here they are looked
up and multiplied apart, with the same values. Names, states and the exported files stay peft's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def trained_rows(llm: Any) -> list[nn.Parameter]:
    """Returns the trained rows of a language model, each once, shape ``[n, d]``."""
    found = {id(p): p for name, p in llm.named_parameters() if "trainable_tokens_delta" in name}
    return list(found.values())


def speed_up(llm: Any, adapter: str = "default") -> None:
    """Lets the embedding and the head with trained rows compute without a copy of their tables.

    Args:
        llm: A language model with peft's trainable tokens, whose indices follow each other.
        adapter: peft's name of the adapter.

    Raises:
        ValueError: If the indices do not follow each other.
    """
    from peft.utils.other import TrainableTokensWrapper

    for module in llm.modules():
        if not isinstance(module, TrainableTokensWrapper):
            continue
        indices = list(module.token_adapter.token_indices[adapter])
        if indices != list(range(indices[0], indices[0] + len(indices))):
            raise ValueError("trained rows of a vocabulary must follow each other")
        inner: Any = _embed if isinstance(module.token_adapter.base_layer, nn.Embedding) else _head
        # Instance attributes: the classes stay as they are for everybody else, and nothing is added to the state.
        layer: Any = module
        layer.forward = _Part(inner, module.token_adapter, adapter, indices[0], len(indices))


class _Part:
    """A forward function that can be copied with its module's."""

    def __init__(self, inner: Any, layer: Any, adapter: str, first: int, number: int) -> None:
        self.inner, self.layer, self.adapter, self.first, self.number = inner, layer, adapter, first, number

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self.layer.trainable_tokens_delta[self.adapter]
        if self.layer.disable_adapters:
            rows = self.layer.base_layer.weight[self.first : self.first + self.number]
        found: torch.Tensor = self.inner(inputs, self.layer.base_layer, rows, self.first)
        return found


def _embed(tokens: torch.Tensor, table: nn.Embedding, rows: torch.Tensor, first: int) -> torch.Tensor:
    """Returns the rows of tokens, shape ``[..., d]``."""
    weight = table.weight
    place = tokens - first
    mine = (place >= 0) & (place < len(rows))
    found = nn.functional.embedding(tokens.masked_fill(mine, 0), weight)
    trained = nn.functional.embedding(place.masked_fill(~mine, 0), rows.to(weight.dtype))
    return torch.where(mine.unsqueeze(-1), trained, found)


def _head(hidden: torch.Tensor, head: nn.Linear, rows: torch.Tensor, first: int) -> torch.Tensor:
    """Returns the logits of all tokens, shape ``[..., V]``."""
    last = first + len(rows)
    parts = [hidden @ head.weight[:first].T, hidden @ rows.to(head.weight.dtype).T, hidden @ head.weight[last:].T]
    return torch.cat(parts, dim=-1)
