"""What the clients of a round do: their own prompts are trained on their own targets, and a short vector is sent.

A batch of clients is one set of arrays. Each row of a client is a window of its history; a client has one composed
prompt an update, so one causal pass trains all its targets. Losses are means over a client's targets, summed over
clients, so nothing that one client does depends on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from recbole_cl.federated.prompts import (
    SharedParts,
    alignment,
    mixed,
    plasticity,
    roll,
    route,
    short_step,
    stability,
    wasserstein,
)

LOSSES = ("BCE", "BPR", "CE")
PROMPT_PER = ("update", "target")
ALIGNMENTS = ("bregman", "wasserstein")

Behind = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``behind(prompts [W, Lp, d], wanted [W, L])``: the outputs at flagged positions, row by row, ``[n, d]``."""
Outputs = Callable[[torch.Tensor], Behind]
"""``outputs(sequence [W, L])``: the frozen backbone over histories, whatever stands before them."""


@dataclass(frozen=True)
class Settings:
    """How clients learn; names and defaults are those of the properties ``protofed_...``."""

    steps: int = 3
    short_rate: float = 1.0
    long_rate: float = 1.0
    sparsity: float = 1e-4
    most: int = 4
    temperature: float = 0.07
    align_temperature: float = 0.1
    align_sharpness: float = 0.5
    stability: float = 1.0
    stability_decay: float = 1.0
    window: float = 5.0
    loss: str = "BCE"
    prompt_per: str = "update"
    align_form: str = "bregman"
    alignment: bool = True
    short: bool = True
    long: bool = True


@dataclass(frozen=True)
class Examples:
    """What the clients of a batch train on.

    Args:
        client: The client of each row, from 0, rising, shape ``[W]``.
        sequence: Item ids, right-padded with 0, shape ``[W, L]``.
        targets: The item after each input, 0 where there is none, shape ``[W, L]``.
        negatives: Items for each target, shape ``[W, L, n]``.
        query: q of each client, shape ``[C, d]``.
        row_query: q of each row, shape ``[W, d]``, where each target has a prompt of its own (:meth:`by_target`).
    """

    client: torch.Tensor
    sequence: torch.Tensor
    targets: torch.Tensor
    negatives: torch.Tensor
    query: torch.Tensor
    row_query: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.query)

    def of(self, clients: torch.Tensor) -> Examples:
        """Returns some clients, in their order, as narrow as their rows allow."""
        counts = torch.bincount(self.client, minlength=len(self))
        first, taken = counts.cumsum(0) - counts, counts[clients]
        owner = torch.repeat_interleave(torch.arange(len(clients), device=clients.device), taken)
        inside = torch.arange(len(owner), device=clients.device) - (taken.cumsum(0) - taken)[owner]
        rows = first[clients][owner] + inside
        sequence = self.sequence[rows]
        width = max(int((sequence > 0).sum(1).max()), 1) if len(rows) else 1
        parts = (self.targets[rows, :width], self.negatives[rows, :width], self.query[clients])
        return Examples(owner, sequence[:, :width], *parts, None if self.row_query is None else self.row_query[rows])

    def by_target(self, queries: Callable[[torch.Tensor], torch.Tensor]) -> Examples:
        """Returns the same with a row for each target, which ends at it and has the query of its own history.

        Args:
            queries: Gives q of histories.
        """
        row, place = (self.targets > 0).nonzero(as_tuple=True)
        places = torch.arange(self.sequence.size(1), device=row.device)
        sequence = torch.where(places <= place.unsqueeze(1), self.sequence[row], 0)
        targets = torch.where(places == place.unsqueeze(1), self.targets[row], 0)
        return Examples(self.client[row], sequence, targets, self.negatives[row], self.query, queries(sequence))

    def lengths(self) -> torch.Tensor:
        """Returns the longest row of each client, int64 ``[C]``."""
        longest = (self.sequence > 0).sum(1)
        return longest.new_zeros(len(self)).scatter_reduce(0, self.client, longest, "amax")


@dataclass(frozen=True)
class Prompts:
    """What a client keeps, one row a client.

    Args:
        long: ``[C, Lp, d]``.
        short: ``[C, Lp, d]``.
        mean: Rolling mean of its queries, ``[C, d]``.
        drift: How far the last query has moved it, ``[C]``.
        usual: Rolling mean of that, ``[C]``; what lambda_s depends on.
        seen: Queries so far, int64 ``[C]``.
    """

    long: torch.Tensor
    short: torch.Tensor
    mean: torch.Tensor
    drift: torch.Tensor
    usual: torch.Tensor
    seen: torch.Tensor

    def __len__(self) -> int:
        return len(self.seen)

    @classmethod
    def new(cls, n: int, tokens: int, width: int, device: torch.device | str = "cpu") -> Prompts:
        """Returns what clients begin with: nothing of their own, so the prototypes alone speak."""
        zeros = torch.zeros(n, tokens, width, device=device)
        return cls(
            zeros,
            zeros.clone(),
            torch.zeros(n, width, device=device),
            torch.zeros(n, device=device),
            torch.zeros(n, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
        )

    def of(self, clients: torch.Tensor) -> Prompts:
        """Returns some clients, in their order."""
        return Prompts(*(getattr(self, name)[clients] for name in FIELDS))

    @classmethod
    def join(cls, parts: list[Prompts]) -> Prompts:
        """Returns all clients of some parts."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))


FIELDS = ("long", "short", "mean", "drift", "usual", "seen")


def observe(prompts: Prompts, query: torch.Tensor, window: float) -> Prompts:
    """Returns the clients with a query noted: its rolling mean, and the drift that it brings."""
    mean, drift = roll(prompts.mean, query, prompts.seen, window)
    weight = 2.0 / (window + 1.0)
    usual = torch.where(prompts.seen <= 1, drift, prompts.usual + weight * (drift - prompts.usual))
    return replace(prompts, mean=mean, drift=drift, usual=usual, seen=prompts.seen + 1)


def composed(
    shared: SharedParts,
    prompts: Prompts,
    query: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """Returns the composed prompts (eq. 1), shape ``[C, Lp, d]``."""
    return _own(shared, prompts, settings) + routed(shared, query, settings)


def routed(shared: SharedParts, query: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Returns the prototypes' part of the prompts, ``sum_k w_k c_k``, shape ``[C, Lp, d]``."""
    chosen, weights = route(shared.encode_query(query), shared.prototypes, settings.most, settings.temperature)
    return mixed(chosen, weights, shared.decode())


def _own(shared: SharedParts, prompts: Prompts, settings: Settings) -> torch.Tensor:
    alpha = plasticity(prompts.drift, shared.slope, shared.offset).view(-1, 1, 1)
    own = prompts.long if settings.long else torch.zeros_like(prompts.long)
    return own + alpha * prompts.short if settings.short else own


def recommendation_losses(hidden: torch.Tensor, table: torch.Tensor, examples: Examples, kind: str) -> torch.Tensor:
    """Returns the mean loss of each client's targets (eq. 12 or 13), shape ``[C]``; 0 for a client without any.

    Args:
        hidden: Outputs at the targets, row by row, shape ``[n, d]``.
        table: Embeddings of the items, shape ``[n_items, d]``.
        examples: The targets.
        kind: One of :data:`LOSSES`; ``CE`` is a softmax over the target and its negatives.
    """
    supervised = examples.targets > 0
    owner = examples.client.unsqueeze(1).expand_as(supervised)[supervised]
    positive = (hidden * table[examples.targets[supervised]]).sum(-1)
    negative = (table[examples.negatives[supervised]] @ hidden.unsqueeze(-1)).squeeze(-1)
    if kind == "BCE":
        losses = F.softplus(-positive) + F.softplus(negative).sum(-1)
    elif kind == "BPR":
        losses = F.softplus(negative - positive.unsqueeze(-1)).sum(-1)
    else:
        losses = torch.logsumexp(torch.cat([positive.unsqueeze(-1), negative], dim=-1), dim=-1) - positive
    counts = torch.bincount(owner, minlength=len(examples)).clamp(min=1)
    return torch.zeros_like(counts, dtype=losses.dtype).index_add(0, owner, losses) / counts


def client_step(
    outputs: Outputs,
    table: torch.Tensor,
    shared: SharedParts,
    prompts: Prompts,
    examples: Examples,
    settings: Settings,
) -> tuple[Prompts, torch.Tensor]:
    """Returns the clients after their local steps (Algorithm 1), and their mean losses, shape ``[C]``.

    Args:
        outputs: The frozen backbone behind prompts.
        table: Its item embeddings.
        shared: The frozen shared parts.
        prompts: The clients; their query has been noted (:func:`observe`).
        examples: Their targets.
        settings: How they learn.
    """
    with torch.no_grad():
        query = examples.query if examples.row_query is None else examples.row_query
        given = routed(shared, query, settings)
        alpha = plasticity(prompts.drift, shared.slope, shared.offset).view(-1, 1, 1)
        weight = stability(prompts.usual, settings.stability, settings.stability_decay)
        prototypes = shared.prototypes.detach()
    behind = outputs(examples.sequence)
    first = torch.zeros(len(prompts))
    for number in range(settings.steps):
        with torch.no_grad():
            prompt = _own(shared, prompts, settings)
            prompt = prompt + given if examples.row_query is None else prompt
        prompt.requires_grad_(True)
        of_rows = prompt[examples.client] if examples.row_query is None else prompt[examples.client] + given
        losses = recommendation_losses(behind(of_rows, examples.targets > 0), table, examples, settings.loss)
        (gradient,) = torch.autograd.grad(losses.sum(), prompt)
        if number == 0:
            first = losses.detach()
        long, short = prompts.long, prompts.short
        if settings.short:
            short = short_step(short, alpha * gradient, settings.short_rate, settings.sparsity)
        if settings.long:
            if settings.alignment:
                gradient = gradient + aligned_gradient(shared, prompts, alpha, prototypes, weight, settings)
            long = long - settings.long_rate * gradient
        prompts = replace(prompts, long=long, short=short)
    return prompts, first


def aligned_gradient(
    shared: SharedParts,
    prompts: Prompts,
    alpha: torch.Tensor,
    prototypes: torch.Tensor,
    weight: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """Returns the gradient of ``lambda_s(u) A`` on each long prompt, shape ``[C, Lp, d]``."""
    long = prompts.long.detach().requires_grad_(True)
    terms = alignment_of(shared, long, alpha * prompts.short, prototypes, settings)
    return torch.autograd.grad((weight * terms).sum(), long)[0]


def alignment_of(
    shared: SharedParts, long: torch.Tensor, short: torch.Tensor, prototypes: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Returns the alignment A of each client, shape ``[C]``: eq. 5 of phi(p_long), or eq. 6 of its tokens' measure.

    Args:
        shared: The shared parts.
        long: p_long, shape ``[C, Lp, d]``.
        short: alpha p_short, of the same shape.
        prototypes: v, shape ``[K, d']``.
        settings: Which one, and its numbers.
    """
    if settings.align_form == "wasserstein":
        return wasserstein(shared.encode_tokens(long + short), prototypes)
    return alignment(shared.encode_prompt(long), prototypes, settings.align_sharpness, settings.align_temperature)


@torch.no_grad()
def encode_upload(shared: SharedParts, prompts: Prompts, radius: float) -> torch.Tensor:
    """Returns what each client sends: its encoded long prompt, clipped, shape ``[C, d']``; not finite becomes zero."""
    z = shared.encode_prompt(prompts.long)
    z = torch.where(torch.isfinite(z).all(dim=1, keepdim=True), z, torch.zeros_like(z))
    return z * (radius / z.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
