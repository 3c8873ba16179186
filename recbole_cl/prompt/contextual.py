"""Contextual prompts: what a task has in common with the others, from their descriptions."""

from __future__ import annotations

import torch
from torch import nn

from recbole_cl.errors import ConfigError


class ContextualPrompts(nn.Module):
    """One multi-head attention over the embeddings of the tasks' descriptions (Yang et al. 2025, eq. 2).

    ``W_Q``, ``W_K`` and ``W_V`` take the width of the sentence encoder and give ``d / heads`` numbers a head; ``W_O``
    maps the heads' d numbers to d.

    Args:
        texts: Frozen embeddings of the tasks' descriptions, shape ``[T, w]``.
        width: Width d of the item embeddings.
        heads: Number of heads.
        over_all: Attend over all tasks, as the paper is written, instead of those that have come so far.

    Raises:
        ConfigError: If the heads do not divide the width.
    """

    texts: torch.Tensor

    def __init__(self, texts: torch.Tensor, width: int, heads: int, over_all: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"pcl_heads: {heads} must divide the width of the item embeddings, {width}")
        self.heads, self.over_all = heads, over_all
        self.register_buffer("texts", texts)
        self.query = nn.Linear(texts.size(1), width, bias=False)
        self.key = nn.Linear(texts.size(1), width, bias=False)
        self.value = nn.Linear(texts.size(1), width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, task: int) -> torch.Tensor:
        """Returns p'_k of a task, shape ``[d]``.

        Args:
            task: Index k of the task; the attention sees the tasks 0 to k, or all of them.
        """
        seen = self.texts if self.over_all else self.texts[: task + 1]

        def split(x: torch.Tensor) -> torch.Tensor:  # [n, d] -> [heads, n, d / heads]
            return x.view(len(x), self.heads, -1).transpose(0, 1)

        query, key, value = (
            split(self.query(self.texts[task : task + 1])),
            split(self.key(seen)),
            split(self.value(seen)),
        )
        weight = (query @ key.transpose(1, 2) / key.size(-1) ** 0.5).softmax(dim=-1)
        mixed = (weight @ value).transpose(0, 1).reshape(1, -1)
        return self.output(mixed).squeeze(0)  # type: ignore[no-any-return]
