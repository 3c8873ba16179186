"""A causal language model as a beam search asks it: prompts once, then a few tokens at a time.

:class:`TreeDecoder` keeps the rows of the prompts' cache as they are. The beams of a row are queries side by side, each
of which sees the prompt, its own ancestors and itself; nothing is copied when beams change places::

    keys      prompt p1 p2 p3 | level 0: x y z | level 1: u v w
    query u   sees   *  *  *        . * .             * . .        u continues y

:class:`CopyingDecoder` copies the cache for each beam and reorders it, as Hugging Face's ``generate`` does: for
attention that takes no mask of four dimensions.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Decoder(Protocol):
    """What a beam search asks of a language model."""

    def start(self, prompts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Returns the logits after each prompt, shape ``[B, V]``.

        Args:
            prompts: Tokens, right-padded, shape ``[B, P]``.
            lengths: Tokens of each prompt, at least one, shape ``[B]``.
        """

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Returns the logits after one more token of each beam, shape ``[B, K, V]``.

        Args:
            tokens: The beams' new tokens, shape ``[B, K]``.
            parents: Which beam of the step before each continues, shape ``[B, K]``; not read at the first step.
        """


class TreeDecoder:
    """Beams as a tree over one cache; see the module.

    Args:
        llm: A causal language model of transformers with a body ``model`` and a head ``lm_head``.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def start(self, prompts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.start`."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.llm.config)
        self._lengths = lengths
        self._prompt = torch.arange(prompts.size(1), device=prompts.device) < lengths.unsqueeze(1)
        self._ancestors: list[torch.Tensor] = []  # of each beam, the beam of every step so far, the last its own
        self._widths: list[int] = []  # beams of every step: a trie may branch late
        # Padding stands behind a prompt: causal attention alone keeps it out of sight.
        hidden = self.llm.model(input_ids=prompts, past_key_values=self._cache, use_cache=True).last_hidden_state
        self._dtype = hidden.dtype
        rows = torch.arange(len(prompts), device=prompts.device)
        logits: torch.Tensor = self.llm.lm_head(hidden[rows, lengths - 1])
        return logits

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.step`."""
        size, width = tokens.shape
        beams = torch.arange(width, device=tokens.device).expand(size, width)
        self._ancestors = [*(before.gather(1, parents) for before in self._ancestors), beams]
        self._widths.append(width)
        steps = zip(self._ancestors, self._widths, strict=True)
        tree = [before.unsqueeze(-1) == torch.arange(wide, device=tokens.device) for before, wide in steps]
        seen = torch.cat([self._prompt.unsqueeze(1).expand(-1, width, -1), *tree], dim=-1)
        at = (self._lengths + len(self._ancestors) - 1).unsqueeze(1).expand(size, width)
        return self.ask(tokens, seen, at)

    def ask(self, tokens: torch.Tensor, seen: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Returns the logits after tokens that join the cache, shape ``[B, Q, V]``.

        Args:
            tokens: Shape ``[B, Q]``.
            seen: Which keys each sees: those in the cache, then the tokens themselves, shape ``[B, Q, keys]``.
            at: Position of each in its sequence, shape ``[B, Q]``.
        """
        dtype = self._dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        hidden = self.llm.model(
            input_ids=tokens,
            attention_mask=mask.unsqueeze(1),
            position_ids=at,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        logits: torch.Tensor = self.llm.lm_head(hidden)
        return logits

    def continuations(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits before each but the first token of continuations of the prompts, ``[B, C, S - 1, V]``.

        Args:
            tokens: Several continuations of each prompt, shape ``[B, C, S]``. They do not see each other.
        """
        size, number, steps = tokens.shape
        inner = steps - 1
        if not inner:
            return tokens.new_empty((size, number, 0, 1), dtype=torch.float32)
        index = torch.arange(number * inner, device=tokens.device)
        own = (index.unsqueeze(1) // inner == index // inner) & (index.unsqueeze(1) >= index)
        prompt = self._prompt.unsqueeze(1).expand(-1, len(index), -1)
        seen = torch.cat([prompt, own.expand(size, -1, -1)], dim=-1)
        at = self._lengths.unsqueeze(1) + index % inner
        return self.ask(tokens[:, :, :-1].reshape(size, -1), seen, at).view(size, number, inner, -1)


class CopyingDecoder:
    """Beams as rows of a cache of their own; see the module.

    Args:
        llm: A causal language model of transformers with a body ``model`` and a head ``lm_head``.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def start(self, prompts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.start`."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.llm.config)
        self._lengths, self._steps, self._width = lengths, 0, 1
        self._seen = (torch.arange(prompts.size(1), device=prompts.device) < lengths.unsqueeze(1)).long()
        hidden = self.llm.model(input_ids=prompts, past_key_values=self._cache, use_cache=True).last_hidden_state
        rows = torch.arange(len(prompts), device=prompts.device)
        logits: torch.Tensor = self.llm.lm_head(hidden[rows, lengths - 1])
        return logits

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.step`."""
        size, width = tokens.shape
        if self._steps == 0:
            self._cache.batch_repeat_interleave(width)
            self._seen = self._seen.repeat_interleave(width, dim=0)
        else:
            rows = torch.arange(size, device=tokens.device).unsqueeze(1) * self._width
            chosen: Any = (rows + parents).flatten()
            self._cache.reorder_cache(chosen)
            self._seen = self._seen[chosen]  # as long as they were, one for each beam that there is now
        self._seen = torch.cat([self._seen, torch.ones_like(self._seen[:, :1])], dim=1)
        at = (self._lengths + self._steps).repeat_interleave(width).unsqueeze(1)
        hidden = self.llm.model(
            input_ids=tokens.reshape(-1, 1),
            attention_mask=self._seen,
            position_ids=at,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._steps, self._width = self._steps + 1, width
        logits: torch.Tensor = self.llm.lm_head(hidden)
        return logits.view(size, width, -1)
