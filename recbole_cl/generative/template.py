"""A history as the tokens of a prompt: what stands before the items, between them and behind.

::

    head  | a3 b1 c7 d2 | between | a5 b0 c7 d9 |  tail    answer: a1 b4 c0 d6

Where nothing stands between and behind, a history is the codes alone, and one pass over it answers for all its items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Template:
    """The tokens around a history's items.

    Args:
        head: Tokens before the first item.
        between: Tokens between two items.
        tail: Tokens behind the last item.
        pad: Token behind a prompt that is shorter than others.
    """

    head: tuple[int, ...]
    between: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    pad: int = 0

    @property
    def codes_only(self) -> bool:
        """Whether one pass over a history answers for all its items."""
        return not self.between and not self.tail

    def longest(self, items: int, levels: int) -> int:
        """Returns the tokens of a prompt of so many items."""
        return len(self.head) + items * levels + max(items - 1, 0) * len(self.between) + len(self.tail)

    def write(self, spelt: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns prompts, right-padded, shape ``[B, P]``, and their lengths, shape ``[B]``.

        Args:
            spelt: Tokens of the items, shape ``[B, L, levels]``.
            number: Items of each history, shape ``[B]``; those behind are not read.
        """
        size, most, levels = spelt.shape
        device, step = spelt.device, levels + len(self.between)
        between = torch.tensor(self.between, dtype=torch.int64, device=device).expand(size, most, -1)
        items = torch.cat([spelt, between], dim=-1).flatten(1)
        # Behind the last item stands the tail in place of a separator.
        end = len(self.head) + (number * step - len(self.between)).clamp_(min=0)
        head = torch.tensor(self.head, dtype=torch.int64, device=device).expand(size, -1)
        room = torch.full((size, len(self.tail)), self.pad, dtype=torch.int64, device=device)
        prompts = torch.cat([head, items, room], dim=1)
        at = torch.arange(prompts.size(1), device=device)
        prompts = prompts.masked_fill(at >= end.unsqueeze(1), self.pad)
        tail = torch.tensor(self.tail, dtype=torch.int64, device=device).expand(size, -1)
        prompts = prompts.scatter(1, end.unsqueeze(1) + torch.arange(len(self.tail), device=device), tail)
        lengths = end + len(self.tail)
        return prompts[:, : int(lengths.max()) if size else 0], lengths
