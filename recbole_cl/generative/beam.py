"""Beam search over the trie of items: nothing but items is ever found, and the lists are full where items are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recbole_cl.errors import ConfigError
from recbole_cl.generative.decoder import Decoder, TreeDecoder
from recbole_cl.generative.trie import Pairs, Trie, among

NORMALISERS = ("full", "level")


@dataclass(frozen=True)
class CodeTokens:
    """The tokens that stand for codes: those of a level lie side by side.

    Args:
        first: Token of code 0 of each level.
        sizes: Codes of each level.
        normaliser: What a code's probability is a share of: ``full`` (all tokens, as Hugging Face's ``generate``) or
            ``level`` (the codes of its level).
    """

    first: tuple[int, ...]
    sizes: tuple[int, ...]
    normaliser: str = "full"

    def __post_init__(self) -> None:
        if self.normaliser not in NORMALISERS:
            raise ConfigError(
                f"property 'beam_normaliser' is {self.normaliser!r}; it must be one of {', '.join(NORMALISERS)}"
            )

    def of(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the tokens of codes, shape ``[..., levels]``."""
        return codes + torch.tensor(self.first, device=codes.device)

    def log_total(self, level: int, logits: torch.Tensor) -> torch.Tensor:
        """Returns the logarithm of what a level's probabilities are shares of, shape ``[..., 1]``."""
        if self.normaliser == "level":
            logits = logits[..., self.first[level] : self.first[level] + self.sizes[level]]
        return torch.logsumexp(logits.float(), dim=-1, keepdim=True)


@dataclass(frozen=True)
class Beams:
    """The best sequences of codes of each row, best first.

    Args:
        codes: Shape ``[B, K, levels]``.
        leaves: The leaves of the trie that they are, shape ``[B, K]``.
        scores: Sums of log-probabilities, -inf for a beam that holds nothing, shape ``[B, K]``.
    """

    codes: torch.Tensor
    leaves: torch.Tensor
    scores: torch.Tensor


def beam_search(
    decoder: Decoder,
    tokens: CodeTokens,
    trie: Trie,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    width: int,
    excluded: Pairs | None = None,
) -> Beams:
    """Returns the best sequences of codes after each prompt.

    Args:
        decoder: The language model.
        tokens: Which tokens stand for codes.
        trie: The allowed items.
        prompts: Tokens, right-padded, shape ``[B, P]``.
        lengths: Tokens of each prompt, shape ``[B]``.
        width: Beams of a row.
        excluded: Rows and items that must not be found: a prefix all items of which are excluded is not followed.
    """
    device = prompts.device
    dead = trie.dead(excluded) if excluded is not None and len(excluded[0]) else None
    rows = torch.arange(len(prompts), device=device).view(-1, 1, 1)
    nodes = torch.zeros((len(prompts), 1), dtype=torch.int64, device=device)
    scores = torch.zeros((len(prompts), 1), device=device)
    codes = torch.empty((len(prompts), 1, 0), dtype=torch.int64, device=device)
    parents = nodes
    logits = decoder.start(prompts, lengths).unsqueeze(1)
    for level in range(trie.levels):
        if level:
            logits = decoder.step(codes[..., -1] + tokens.first[level - 1], parents)
        below, code, there = trie.children(level, nodes)
        gained = logits.gather(-1, code + tokens.first[level]).float() - tokens.log_total(level, logits)
        found = scores.unsqueeze(-1) + gained
        if dead is not None:
            there = there & ~among(rows * trie.width(level) + below, dead[level])
        found = found.masked_fill(~there, -torch.inf).flatten(1)
        scores, best = found.topk(min(width, found.size(1)), dim=1)
        parents = best // below.size(-1)
        nodes = below.flatten(1).gather(1, best)
        chosen = code.flatten(1).gather(1, best)
        before = codes.gather(1, parents.unsqueeze(-1).expand(-1, -1, level))
        codes = torch.cat([before, chosen.unsqueeze(-1)], dim=-1)
    return Beams(codes, nodes, scores)


def best_items(beams: Beams, trie: Trie, k: int, excluded: Pairs | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the items of beams, best first, and their scores, shape ``[B, k]`` each; 0 and -inf in an empty slot.

    Items of one leaf have the same score and follow each other in their own order.
    """
    none = (beams.leaves.new_empty(0), beams.leaves.new_empty(0))
    items, there = trie.leaf_items(beams.leaves, none if excluded is None else excluded)
    there = (there & torch.isfinite(beams.scores).unsqueeze(-1)).flatten(1)
    scores = beams.scores.unsqueeze(-1).expand_as(items).flatten(1)
    order = torch.argsort(~there, dim=1, stable=True)[:, :k]  # beams are in order already
    filled = there.gather(1, order)
    items = torch.where(filled, items.flatten(1).gather(1, order), 0)
    scores = torch.where(filled, scores.gather(1, order), -torch.inf)
    short = k - items.size(1)
    if short > 0:
        items = torch.nn.functional.pad(items, (0, short))
        scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
    return items, scores


def sequence_scores(
    decoder: TreeDecoder, tokens: CodeTokens, prompts: torch.Tensor, lengths: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Returns the log-probabilities of given sequences of codes after each prompt, by teacher forcing, ``[B, C]``.

    Args:
        decoder: The language model.
        tokens: Which tokens stand for codes.
        prompts: Tokens, right-padded, shape ``[B, P]``.
        lengths: Tokens of each prompt, shape ``[B]``.
        codes: Shape ``[B, C, levels]``; sequences of a row do not see each other.
    """
    first = decoder.start(prompts, lengths)
    asked = tokens.of(codes)
    total = first.gather(1, asked[..., 0]).float() - tokens.log_total(0, first)
    later = decoder.continuations(asked)
    for level in range(1, codes.size(-1)):
        logits = later[:, :, level - 1]
        gained = logits.gather(-1, asked[..., level : level + 1]).float() - tokens.log_total(level, logits)
        total = total + gained.squeeze(-1)
    return total


def in_parts(lengths: Sequence[int] | torch.Tensor, most: int) -> list[torch.Tensor]:
    """Parts rows by the length of their prompts, so that little is padded.

    Args:
        lengths: Tokens of each prompt, shape ``[B]``.
        most: Tokens, padding included, that a part holds.

    Returns:
        Rows of each part, similar lengths together.
    """
    sizes = torch.as_tensor(lengths).cpu()
    order = torch.argsort(sizes, descending=True, stable=True)
    parts, start = [], 0
    while start < len(order):
        step = max(1, most // max(int(sizes[order[start]]), 1))
        parts.append(order[start : start + step])
        start += step
    return parts
