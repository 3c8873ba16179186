"""The trie of the allowed items' codes, level by level in compressed rows.

::

    items   7: a0 b1 c0    9: a0 b1 c2    4: a0 b3 c1    2: a5 b0 c0

    level 0    nodes a0 a5             children of the root      ptr [0 2]
    level 1    nodes b1 b3 | b0        children of a0 and a5     ptr [0 2 3]
    level 2    nodes c0 c2 | c1 | c0   leaves                    ptr [0 2 3 4]

Nodes of a level are numbered in the order of their codes, so the children of a node are neighbours. Items with the same
codes share a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recbole_cl.errors import DataError

Pairs = tuple[torch.Tensor, torch.Tensor]
"""Rows and items, shape ``[E]`` each."""


class Trie:
    """Which codes may follow which.

    Args:
        codes: Codes of each item, shape ``[n_items, levels]``; only those of allowed items are read.
        allowed: Flag of each item, shape ``[n_items]``.
        sizes: Codes that each level may have.

    Attributes:
        items: The allowed items, sorted by their codes, shape ``[n]``.
        counts: Items below each node, a tensor a level.
        degrees: Most children of a node, a number a level, the root's first.

    Raises:
        DataError: If no item is allowed.
    """

    def __init__(self, codes: torch.Tensor, allowed: torch.Tensor, sizes: Sequence[int]) -> None:
        chosen = allowed.nonzero().squeeze(1)
        if not len(chosen):
            raise DataError(
                "candidates: no item may be recommended, so there is nothing to decode; with candidates: trained the "
                "model must have trained on something, and an item needs codes"
            )
        key = _keys(codes[chosen], sizes)
        key, order = torch.sort(key, stable=True)  # the same codes: items in their own order
        self.items = chosen[order]
        self.sizes = tuple(sizes)
        self._number = torch.full((len(allowed),), -1, dtype=torch.int64, device=codes.device)
        self._number[self.items] = torch.arange(len(self.items), device=codes.device)
        self.counts: list[torch.Tensor] = []
        self.degrees: list[int] = []
        self._ptr: list[torch.Tensor] = []
        self._code: list[torch.Tensor] = []
        self._of_item: list[torch.Tensor] = []
        above = torch.zeros(1, dtype=torch.int64, device=codes.device)  # keys of the level before: the root
        below = 1
        for size in self.sizes:
            below *= size
        for size in self.sizes:
            below //= size
            nodes, of_item, counts = torch.unique_consecutive(key // below, return_inverse=True, return_counts=True)
            ptr = torch.searchsorted(nodes // size, torch.cat([above, above[-1:] + 1]))
            ptr[-1] = len(nodes)
            self._ptr.append(ptr)
            self._code.append(nodes % size)
            self._of_item.append(of_item)
            self.counts.append(counts)
            self.degrees.append(int(ptr.diff().max()))
            above = nodes
        self._leaf_ptr = torch.cat([torch.zeros_like(self.counts[-1][:1]), self.counts[-1].cumsum(0)])

    @property
    def levels(self) -> int:
        """Codes an item."""
        return len(self.sizes)

    def width(self, level: int) -> int:
        """Returns the number of nodes of a level."""
        return len(self._code[level])

    def children(self, level: int, parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the nodes of a level below given ones of the level before.

        Args:
            level: From 0; parents of level 0 are the root, node 0.
            parents: Nodes of level ``level - 1``, shape ``[B, K]``.

        Returns:
            Nodes, their codes, and flags of those that are there, shape ``[B, K, D]`` each, ``D`` the most of any node.
        """
        ptr = self._ptr[level]
        first, last = ptr[parents], ptr[parents + 1]
        at = first.unsqueeze(-1) + torch.arange(self.degrees[level], device=parents.device)
        there = at < last.unsqueeze(-1)
        nodes = at.clamp_(max=self.width(level) - 1)
        return nodes, self._code[level][nodes], there

    def dead(self, excluded: Pairs) -> list[torch.Tensor]:
        """Returns, for each level, the nodes that hold nothing for a row: all items below them are excluded.

        Args:
            excluded: Rows and items; items that are not allowed anyway do not matter.

        Returns:
            Sorted keys ``row * width(level) + node``, a tensor a level, all empty where nothing is excluded.
        """
        row, item = excluded
        place = self._number[item]
        row, place = row[place >= 0], place[place >= 0]
        pair = torch.unique(row * len(self.items) + place)  # each pair counts once
        row, place = pair // len(self.items), pair % len(self.items)
        found = []
        for level in range(self.levels):
            node = self._of_item[level][place]
            key, counts = torch.unique(row * self.width(level) + node, return_counts=True)
            found.append(key[counts == self.counts[level][key % self.width(level)]])
        return found

    def leaf_items(self, leaves: torch.Tensor, excluded: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the items of leaves.

        Args:
            leaves: Nodes of the last level, shape ``[B, K]``.
            excluded: Rows and items that are left out.

        Returns:
            Items and flags of those that are there, shape ``[B, K, M]``, ``M`` the most items of a leaf.
        """
        first, last = self._leaf_ptr[leaves], self._leaf_ptr[leaves + 1]
        at = first.unsqueeze(-1) + torch.arange(int(self.counts[-1].max()), device=leaves.device)
        there = at < last.unsqueeze(-1)
        place = at.clamp_(max=len(self.items) - 1)
        row, item = excluded
        if len(row):
            number = self._number[item]
            keys = torch.unique((row * len(self.items) + number)[number >= 0])
            rows = torch.arange(len(leaves), device=leaves.device).view(-1, 1, 1)
            there &= ~among(rows * len(self.items) + place, keys)
        return self.items[place], there


def among(values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns which values are among sorted keys."""
    if not len(keys):
        return torch.zeros_like(values, dtype=torch.bool)
    at = torch.searchsorted(keys, values).clamp_(max=len(keys) - 1)
    return keys[at] == values


def _keys(codes: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Returns one number for each row of codes, ordered as the rows are."""
    most = 1
    for size in sizes:
        most *= size
    if most >= 1 << 62:
        raise DataError(f"semantic_ids: {len(sizes)} levels of {list(sizes)} codes are more than a trie can number")
    key = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for level, size in enumerate(sizes):
        key = key * size + codes[:, level]
    return key
