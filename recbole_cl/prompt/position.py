"""Position-wise prompts: where they are put, and how they get into a model whose file is not touched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError


def place_prompts(prompts: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Returns what is added to each position: the prompts, aligned to the end of each sequence.

    Yang et al. 2025, eq. 1: the last item gets the last prompt, the one before it the one before. RecBole pads on the
    right, so the last item stands at ``length - 1``::

        items        i1 i2 i3 i4  0  0        length 4, t = 3
        added         0 p1 p2 p3  0  0

    Args:
        prompts: The last t prompts, shape ``[t, d]``.
        lengths: Items of each sequence, shape ``[B]``; one that is shorter than t gets the last prompts only.
        width: Padded length L.

    Returns:
        Shape ``[B, L, d]``, 0 where no prompt is put.
    """
    t = len(prompts)
    from_end = lengths.unsqueeze(1) - 1 - torch.arange(width, device=lengths.device)
    inside = (from_end >= 0) & (from_end < t)
    rows = torch.where(inside, t - 1 - from_end, 0)
    return F.embedding(rows, prompts) * inside.unsqueeze(-1).to(prompts.dtype)


class PromptedEmbedding(nn.Embedding):
    """A table of items that can add something to one given batch of sequences, and is the plain table otherwise.

    It takes the place of a model's ``item_embedding``, sharing its weight under the same name. A model looks up its
    sequence and, maybe, its target items in the same table: only the sequence is added to.

    Args:
        table: The embedding to take the place of.
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(
            table.num_embeddings, table.embedding_dim, padding_idx=table.padding_idx, _weight=table.weight.detach()
        )
        self.weight = table.weight  # the very parameter: whatever is tied to it stays tied
        self._sequence: torch.Tensor | None = None
        self._added: torch.Tensor | None = None
        self._found: torch.Tensor | None = None
        self._used = False

    @contextlib.contextmanager
    def adding(
        self, sequence: torch.Tensor, added: torch.Tensor | None, found: torch.Tensor | None = None
    ) -> Iterator[None]:
        """A context in which looking ``sequence`` up gives its embeddings plus ``added``.

        Args:
            sequence: Item ids, shape ``[B, L]``. A model may look up less of the padding, ``sequence[:, :l]``.
            added: Shape ``[B, L, d]``; ``None`` adds nothing.
            found: The sequence's embeddings, where they were looked up before, shape ``[B, L, d]``.

        Raises:
            ConfigError: At the end, if the sequence was never looked up: the model cannot be prompted so.
        """
        self._sequence, self._added, self._found, self._used = sequence, added, found, False
        try:
            yield
        finally:
            self._sequence = self._added = self._found = None
        if not self._used:
            raise ConfigError(
                "pcl_backbone: the model does not look its sequence of items up in item_embedding as it is given, so "
                "no prompt can be added; use SASRec, GRU4Rec, NARM, STAMP or another model that does"
            )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns embeddings of ids of any shape."""
        sequence, added = self._sequence, self._added
        same = sequence is not None and ids.dim() == 2 and ids.data_ptr() == sequence.data_ptr()
        if sequence is None or not same or len(ids) != len(sequence):
            return super().forward(ids)
        self._used = True
        width = ids.size(1)
        plain = super().forward(ids) if self._found is None else self._found[:, :width]
        return plain if added is None else plain + added[:, :width]
