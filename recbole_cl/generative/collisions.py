"""Items whose codes a tokeniser gave twice: what becomes of them.

========= ===========================================================================================
`shared`  they share a leaf of the trie; the model cannot tell them apart
`nearest` items of the same text share a leaf, any other takes the nearest last code that is free
`digit`   items of the same text share a leaf, the others are counted by one more code
========= ===========================================================================================

Items are served in their order, and who came first keeps its codes. So the codes of items of earlier stages never
depend on items of later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from recbole_cl.errors import ConfigError

POLICIES = ("nearest", "shared", "digit")

Distances = Callable[[int], np.ndarray]
"""Distance of an item's vector to what each last code stands for, shape ``[size]``."""


def repair(
    codes: np.ndarray, sizes: tuple[int, ...], texts: Sequence[str | None], policy: str, distances: Distances
) -> tuple[np.ndarray, tuple[int, ...], int]:
    """Returns codes without needless collisions.

    Args:
        codes: Codes of the tokeniser, in the order of the items' first appearance, shape ``[n, levels]``.
        sizes: Codes that each level may have.
        texts: Text of each item; ``None`` is the same as no other.
        policy: One of :data:`POLICIES`.
        distances: Of an item to the last codes; asked where ``policy`` is ``nearest`` and the item collides.

    Returns:
        The codes, their sizes, and how many items found no free last code and share a leaf with another text.

    Raises:
        ConfigError: If the policy is unknown.
    """
    if policy not in POLICIES:
        raise ConfigError(f"property 'semantic_ids_collisions' is {policy!r}; it must be one of {', '.join(POLICIES)}")
    if policy == "shared" or not len(codes):
        return codes.copy(), sizes, 0
    return _digits(codes, sizes, texts) if policy == "digit" else _nearest(codes, sizes, texts, distances)


def _nearest(
    codes: np.ndarray, sizes: tuple[int, ...], texts: Sequence[str | None], distances: Distances
) -> tuple[np.ndarray, tuple[int, ...], int]:
    out, unresolved = codes.copy(), 0
    leaves: dict[tuple[int, ...], dict[int, str | None]] = {}  # prefix to the last codes taken and whose text they hold
    moved: dict[tuple[tuple[int, ...], str], int] = {}  # (prefix and code as given), text to the code that it took
    for row, (given, text) in enumerate(zip(codes.tolist(), texts, strict=True)):
        prefix, last = tuple(given[:-1]), given[-1]
        taken = leaves.setdefault(prefix, {})
        if last not in taken:
            taken[last] = text
            continue
        if text is not None and taken[last] == text:
            continue
        before = None if text is None else moved.get((tuple(given), text))
        if before is None:
            free = [code for code in range(sizes[-1]) if code not in taken]
            if not free:
                unresolved += 1
                continue
            far = distances(row)
            before = min(free, key=lambda code: (float(far[code]), code))
            taken[before] = text
            if text is not None:
                moved[tuple(given), text] = before
        out[row, -1] = before
    return out, sizes, unresolved


def _digits(
    codes: np.ndarray, sizes: tuple[int, ...], texts: Sequence[str | None]
) -> tuple[np.ndarray, tuple[int, ...], int]:
    digit = np.zeros(len(codes), dtype=np.int64)
    held: dict[tuple[int, ...], int] = {}
    digit_of: dict[tuple[tuple[int, ...], str], int] = {}
    for row, (given, text) in enumerate(zip(map(tuple, codes.tolist()), texts, strict=True)):
        same = None if text is None else digit_of.get((given, text))
        if same is None:
            same = held.get(given, 0)
            held[given] = same + 1
            if text is not None:
                digit_of[given, text] = same
        digit[row] = same
    most = int(digit.max()) + 1
    return np.c_[codes, digit], (*sizes, 1 << (most - 1).bit_length()), 0
