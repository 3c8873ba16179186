"""Variants of ProtoFed-SP: a prompt a target, the transport alignment, the barycentre, the paper's round as printed."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from test_federated_clients import RATES, World

from recbole_cl.federated.aggregators.as_printed import AsPrinted
from recbole_cl.federated.client import client_step, observe, recommendation_losses, routed
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.privacy import Release
from recbole_cl.federated.prompts import plasticity, wasserstein
from recbole_cl.federated.server import Mechanism, server_round

NEEDS = "POT, of the extra 'federated', is not installed"


def test_a_prompt_for_each_target() -> None:
    """Each target sees its own history behind a prompt that was routed by it: a loop over targets gives the step."""
    world = World()
    queries = lambda rows: world.table[rows].sum(1) / (rows > 0).sum(1, keepdim=True).clamp(min=1)  # noqa: E731
    examples = world.examples.by_target(queries)
    assert len(examples.targets) == int((world.examples.targets > 0).sum())
    assert ((examples.targets > 0).sum(1) == 1).all() and examples.row_query is not None
    prompts = observe(world.new(), examples.query, 5.0)
    prompts = replace(prompts, long=torch.randn_like(prompts.long), short=torch.randn_like(prompts.short))
    settings = replace(RATES, steps=1, alignment=False, sparsity=0.0)
    after, losses = client_step(world.outputs, world.table, world.shared, prompts, examples, settings)
    alpha = plasticity(prompts.drift, world.shared.slope, world.shared.offset)
    for client in range(3):
        long, short = (getattr(prompts, name)[client].clone().requires_grad_(True) for name in ("long", "short"))
        found = []
        for row in (world.examples.client == client).nonzero().flatten().tolist():
            for place in (world.examples.targets[row] > 0).nonzero().flatten().tolist():
                history = world.examples.sequence[row : row + 1, : place + 1]
                prompt = routed(world.shared, queries(history), settings) + long + alpha[client] * short
                only = torch.zeros(1, place + 1, dtype=torch.int64)
                only[0, place] = world.examples.targets[row, place]
                one = replace(
                    world.examples,
                    client=torch.tensor([0]),
                    sequence=history,
                    targets=only,
                    negatives=world.examples.negatives[row : row + 1, : place + 1],
                    query=queries(history),
                )
                found.append(recommendation_losses(world.outputs(history)(prompt, only > 0), world.table, one, "BCE"))
        if not found:
            continue
        loss = torch.stack(found).mean()
        torch.testing.assert_close(losses[client], loss.detach(), rtol=1e-5, atol=1e-6)
        loss.backward()
        torch.testing.assert_close(after.long[client], prompts.long[client] - 0.2 * long.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after.short[client], prompts.short[client] - 0.3 * short.grad, rtol=1e-4, atol=1e-6)
    some = examples.of(torch.tensor([2, 0]))
    assert some.row_query is not None
    torch.testing.assert_close(some.row_query, queries(some.sequence))


def test_the_transport_alignment() -> None:
    """The best of all pairings, where both have as many atoms; its gradient by differences; alone, plain distances."""
    pytest.importorskip("ot", reason=NEEDS)
    torch.manual_seed(3)
    atoms, prototypes = torch.randn(4, 3, 5).double(), torch.randn(3, 5).double()
    best = [
        min(sum(float((x[i] - prototypes[j]).square().sum()) for i, j in enumerate(order)) / 3 for order in
            permutations(range(3)))
        for x in atoms
    ]  # fmt: skip
    assert wasserstein(atoms, prototypes).tolist() == pytest.approx(best)
    held = atoms.clone().requires_grad_(True)
    wasserstein(held, prototypes).sum().backward()
    assert held.grad is not None
    for place in [(0, 1, 2), (3, 2, 4)]:
        shifted = []
        for step in (1e-6, -1e-6):
            moved = atoms.clone()
            moved[place] += step
            shifted.append(float(wasserstein(moved, prototypes).sum()))
        assert float(held.grad[place]) == pytest.approx((shifted[0] - shifted[1]) / 2e-6, rel=1e-4)
    one = wasserstein(atoms[:, :1], prototypes)
    torch.testing.assert_close(one, (atoms[:, :1] - prototypes).square().sum(-1).mean(1))


def test_the_transport_alignment_moves_long_prompts() -> None:
    """With it a client's step differs from the one without, by its weight times the gradient."""
    pytest.importorskip("ot", reason=NEEDS)
    world = World()
    start = observe(world.new(), world.examples.query, 5.0)
    start = replace(start, long=torch.randn_like(start.long))
    given = (world.outputs, world.table, world.shared, start, world.examples)
    settings = replace(RATES, steps=1, short=False)
    plain, _ = client_step(*given, replace(settings, alignment=False))
    moved, _ = client_step(*given, replace(settings, align_form="wasserstein"))
    held = start.long.clone().requires_grad_(True)
    wasserstein(world.shared.encode_tokens(held), world.shared.prototypes.detach()).sum().backward()
    torch.testing.assert_close(moved.long, plain.long - 0.2 * held.grad, rtol=1e-4, atol=1e-6)


BARYCENTRE = {"steps": 1, "entropy": 0.0, "momentum": 1.0, "separation": 0.0}


def test_the_barycentre() -> None:
    """One atom is the mean; of several each gets an equal share of the users, where k-means gives none to a far one."""
    pytest.importorskip("ot", reason=NEEDS)
    from recbole_cl.federated.aggregators.barycentre import WassersteinBarycentre

    rng = np.random.default_rng(0)
    uploads = rng.normal(size=(12, 2)) * 0.2
    made = WassersteinBarycentre(BARYCENTRE)
    moved, counts, _ = made.round(uploads, np.array([[3.0, 3.0]]), 1.0, rng)
    np.testing.assert_allclose(moved[0], uploads.mean(0))
    assert counts == pytest.approx([12.0])
    atoms = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    moved, counts, _ = made.round(uploads, atoms, 1.0, rng)
    assert counts == pytest.approx([4.0, 4.0, 4.0])
    # Transport to far atoms takes the four that lie farthest along the way; brute force over all ways to share.
    least = min(
        (sum(((uploads[list(part)] - atom) ** 2).sum() for part, atom in zip(parts, atoms, strict=True)), parts)
        for parts in _shares(range(12), 4)
    )[1]
    np.testing.assert_allclose(moved, [uploads[list(part)].mean(0) for part in least])
    soft, _, _ = WassersteinBarycentre({**BARYCENTRE, "entropy": 0.01}).round(uploads, atoms, 1.0, rng)
    np.testing.assert_allclose(soft, moved, atol=0.15)


def _shares(everyone: range, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """Returns all ways to share twelve among three, four each."""
    from itertools import combinations

    found = []
    for first in combinations(everyone, size):
        left = [x for x in everyone if x not in first]
        found += [(first, second, tuple(x for x in left if x not in second)) for second in combinations(left, size)]
    return found


PRINTED = {"sigma": 0.0, "momentum": 0.5, "separation": 0.0, "prune": 0.3, "drift": 0.5}


def test_the_round_as_printed(tmp_path: Path) -> None:
    """Without noise by hand: means of who is nearest, momentum, and one that few use begins at an upload."""
    uploads = np.array([[0.1, 0.0], [0.3, 0.0], [0.0, 0.9], [4.0, 0.0]])  # the last is clipped to 1
    atoms = np.array([[0.2, 0.0], [0.0, 1.0], [1.0, 0.0]])
    aggregator = AsPrinted(PRINTED)
    assert aggregator.sends(np.array([0.4, 0.5])).tolist() == [False, True]
    moved, counts, revived = aggregator.round(uploads, atoms, 1.0, np.random.default_rng(0))
    assert counts.tolist() == [2.0, 1.0, 1.0] and revived == 2
    assert moved[0].tolist() == pytest.approx([0.2, 0.0])
    clipped = np.minimum(1.0, 1 / np.linalg.norm(uploads, axis=1))[:, None] * uploads
    assert all(np.isclose(moved[k], clipped).all(1).any() for k in (1, 2))
    noisy = AsPrinted({**PRINTED, "sigma": 5.0, "prune": 0.0}).round(uploads * 0, atoms, 1.0, np.random.default_rng(1))
    assert np.linalg.norm(noisy[0], axis=1).max() > 1.0, "the means have noise on top"
    ledger = Ledger(tmp_path / "ledger.jsonl", np.inf, 1e-5)
    draws = lambda name: np.random.default_rng(2)  # noqa: E731
    given = server_round(aggregator, uploads, atoms, Mechanism(Release(0.0), bits=0), ledger, "r", draws)
    again = server_round(aggregator, uploads, atoms, Mechanism(Release(0.0), bits=0), ledger, "r", draws)
    np.testing.assert_array_equal(given.prototypes, again.prototypes)
    assert ledger.spent() == np.inf and len(ledger.charges()) == 1


def test_the_literal_preset_tells_what_it_is_worth() -> None:
    """The accountant's figure for q .05, T 8, z .4 is 13.3, and none for what is printed."""
    pytest.importorskip("dp_accounting", reason="dp-accounting, of the extra 'federated', is not installed")
    told = AsPrinted({**PRINTED, "sigma": 0.4}).described(8, 0.05, 1e-5, 1.0)
    assert told["epsilon by the paper"] == "3.4 for sigma 0.4" and told["true epsilon"].startswith("infinite")
    assert told["if its noise came after the clip, on sums"].startswith("13.3 ")
