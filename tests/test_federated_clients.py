"""Clients on batched arrays: steps against closed forms, the batch against a plain loop; uploads, a server's round."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recbole_cl.federated.aggregators.base import nearest, revive, separate
from recbole_cl.federated.aggregators.fed_k_means import DPFedKMeans
from recbole_cl.federated.aggregators.geometric_median import GeometricMedian, geometric_median
from recbole_cl.federated.client import (
    FIELDS,
    Behind,
    Examples,
    Prompts,
    Settings,
    client_step,
    composed,
    encode_upload,
    observe,
    recommendation_losses,
)
from recbole_cl.federated.engines.in_process import InProcess, Loop
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.privacy import Release
from recbole_cl.federated.prompts import (
    SharedParts,
    alignment,
    mixed,
    plasticity,
    roll,
    route,
    short_step,
    soft_threshold,
)
from recbole_cl.federated.server import Mechanism, bytes_of_round, server_round
from recbole_cl.federated.table import ClientTable
from recbole_cl.federated.uploads import Upload, accept
from recbole_cl.prompt.prefix import without

WIDTH, TOKENS, ITEMS = 16, 3, 30


# -- closed forms ---------------------------------------------------------------------------------------------------


def test_the_proximal_step_minimises_its_model() -> None:
    """On a grid: nothing is below the step in ``<g, x> + |x - p|^2 / (2 eta) + lambda |x|_1``."""
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for p, g in [(0.5, 1.0), (-0.2, 0.1), (0.001, -0.02), (1.0, -2.0), (0.0, 0.3)]:
        value = g * grid + (grid - p) ** 2 / (2 * 0.4) + 0.25 * grid.abs()
        step = short_step(torch.tensor([p], dtype=torch.float64), torch.tensor([g], dtype=torch.float64), 0.4, 0.25)
        assert float(step) == pytest.approx(float(grid[value.argmin()]), abs=1e-4)
    assert soft_threshold(torch.tensor([0.3, -0.3, 0.1]), 0.2).tolist() == pytest.approx([0.1, -0.1, 0.0])


def test_routing_by_hand() -> None:
    """The softmax over the two nearest of three prototypes, by cosine; the third has no weight."""
    prototypes = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    query = torch.tensor([[3.0, 4.0]])  # cosines 0.6, 0.8, -0.6
    chosen, weights = route(query, prototypes, 2, 0.1)
    assert chosen.tolist() == [[1, 0]]
    share = math.exp(8) / (math.exp(8) + math.exp(6))
    assert weights[0].tolist() == pytest.approx([share, 1 - share])
    prompts = torch.randn(3, TOKENS, WIDTH)
    torch.testing.assert_close(mixed(chosen, weights, prompts)[0], share * prompts[1] + (1 - share) * prompts[0])
    assert route(query, prototypes, 9, 0.1)[0].size(1) == 3, "M is at most K"


def test_alignment_by_hand() -> None:
    """Half the squared distance to the nearest, and the cross-entropy of telling it apart."""
    z, v = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(alignment(z, v, 0.0, 0.1)) == pytest.approx(0.5)
    sharp = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(-1 / 0.5)))
    assert float(alignment(z, v, 2.0, 0.5)) == pytest.approx(0.5 + 2 * sharp)


def test_drift_and_plasticity() -> None:
    """A first query is no drift; alpha grows with drift whatever a is."""
    zero = torch.zeros(1, 2)
    mean, drift = roll(zero, torch.tensor([[3.0, 4.0]]), torch.tensor([0]), 3.0)
    assert mean.tolist() == [[3.0, 4.0]] and drift.tolist() == [0.0]
    mean, drift = roll(zero, torch.tensor([[3.0, 4.0]]), torch.tensor([5]), 3.0)
    assert mean.tolist() == [[1.5, 2.0]] and drift.tolist() == pytest.approx([2.5])
    for slope in (-5.0, 0.0, 5.0):
        alpha = plasticity(torch.tensor([0.0, 1.0, 2.0]), torch.tensor(slope), torch.tensor(-1.0))
        assert (alpha.diff() > 0).all()


@pytest.mark.parametrize("kind", ["BCE", "BPR", "CE"])
def test_losses_by_hand(kind: str) -> None:
    """A mean over a client's targets, of the formulas of the paper; a client without targets has 0."""
    outputs, table = torch.randn(3, 4, WIDTH), torch.randn(ITEMS, WIDTH)
    targets = torch.tensor([[3, 0, 5, 0], [7, 0, 0, 0], [0, 0, 0, 0]])
    negatives = torch.randint(1, ITEMS, (3, 4, 2))
    examples = Examples(torch.tensor([0, 0, 1]), targets, targets, negatives, torch.zeros(3, WIDTH))
    losses = []
    for row, column in [(0, 0), (0, 2), (1, 0)]:
        hidden = outputs[row, column]
        plus = float(hidden @ table[targets[row, column]])
        minus = [float(hidden @ table[item]) for item in negatives[row, column]]
        if kind == "BCE":
            sigma = [1 / (1 + math.exp(-x)) for x in (plus, *minus)]
            losses.append(-math.log(sigma[0]) - sum(math.log(1 - s) for s in sigma[1:]))
        elif kind == "BPR":
            losses.append(-sum(math.log(1 / (1 + math.exp(m - plus))) for m in minus))
        else:
            losses.append(-math.log(math.exp(plus) / sum(math.exp(x) for x in (plus, *minus))))
    found = recommendation_losses(outputs[targets > 0], table, examples, kind)
    assert found.tolist() == pytest.approx([sum(losses) / 3, 0.0, 0.0], rel=1e-4)


def test_histories_without_some_items() -> None:
    """Against a loop: what is left, and for each the last place before the next one that is left."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 9, size=200)
    sequence = rng.integers(1, 20, size=(200, 8)) * (np.arange(8) < lengths[:, None])
    dropped = np.isin(sequence, [3, 5, 7, 11, 13, 17, 19])
    left, after = (x.numpy() for x in without(torch.from_numpy(sequence), torch.from_numpy(dropped)))
    for row, length in enumerate(lengths):
        kept = [place for place in range(length) if not dropped[row, place]]
        assert left[row].tolist() == [sequence[row, place] for place in kept] + [0] * (8 - len(kept))
        ends = [following - 1 for following in [*kept[1:], length]] if kept else []
        assert after[row, : len(kept)].tolist() == ends


# -- the batch and the loop -----------------------------------------------------------------------------------------


class World:
    """A frozen stand-in of a backbone and ragged clients."""

    def __init__(self, n: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.table = torch.randn(ITEMS, WIDTH).to(dtype)
        self.table[0] = 0
        self.mix = torch.randn(WIDTH, WIDTH).to(dtype) / 4
        self.shared = SharedParts(WIDTH, TOKENS, 12, 5, 4, seed=1).to(dtype).requires_grad_(False)
        owner, rows = [], []
        for client in range(n):
            for _ in range(int(rng.integers(1, 4))):
                owner.append(client)
                rows.append(rng.integers(1, ITEMS, size=int(rng.integers(1, 9))))
        sequence = torch.zeros(len(rows), 8, dtype=torch.int64)
        for row, items in enumerate(rows):
            sequence[row, : len(items)] = torch.from_numpy(items)
        targets = torch.where(
            (sequence > 0) & (torch.rand(sequence.shape) < 0.6), torch.randint(1, ITEMS, sequence.shape), 0
        )
        negatives = torch.randint(1, ITEMS, (*sequence.shape, 2))
        query = torch.randn(n, WIDTH).to(dtype)
        self.examples = Examples(torch.tensor(owner), sequence, targets, negatives, query)

    def outputs(self, sequence: torch.Tensor) -> Behind:
        """A causal mean of what came before and of the prompt, through a nonlinearity, at flagged positions."""
        means = self.table[sequence].cumsum(1) / torch.arange(1, sequence.size(1) + 1).view(1, -1, 1)

        def behind(prompts: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return torch.tanh((means + prompts.mean(1, keepdim=True) * prompts[:, :1]) @ self.mix)[wanted]

        return behind

    def new(self) -> Prompts:
        found = Prompts.new(len(self.examples), TOKENS, WIDTH)
        return Prompts(
            **{name: getattr(found, name).to(self.table.dtype) if name != "seen" else found.seen for name in FIELDS}
        )


RATES = Settings(short_rate=0.3, long_rate=0.2, sparsity=0.01)


def test_a_batch_is_a_loop_over_clients() -> None:
    """Ten rounds of ragged clients: the same prompts within 1e-6, and the batch's bits again when it is run again."""
    world = World()
    engines = [InProcess({"clients": 256}), InProcess({"clients": 3}), Loop({}), InProcess({"clients": 256})]
    found = []
    for engine in engines:
        prompts = world.new()
        for number in range(10):
            examples = replace(world.examples, query=world.examples.query + 0.1 * number)
            prompts = observe(prompts, examples.query, 5.0)
            prompts, losses = engine.run(world.outputs, world.table, world.shared, prompts, examples, RATES)
        found.append((prompts, losses))
    assert found[0][0].long.norm() > 0.1 and found[0][0].short.norm() > 0.1, "nothing was learnt"
    for prompts, losses in found[1:3]:
        torch.testing.assert_close(losses, found[0][1], rtol=0, atol=1e-6)
        for name in FIELDS:
            torch.testing.assert_close(getattr(prompts, name), getattr(found[0][0], name), rtol=0, atol=1e-6)
    assert all(torch.equal(getattr(found[3][0], name), getattr(found[0][0], name)) for name in FIELDS)
    start = observe(world.new(), world.examples.query, 5.0)
    given = (world.outputs, world.table, world.shared)
    prompts, losses = engines[1].run(*given, start, world.examples, RATES)
    for client in range(len(start)):  # and each client has what its own step gives, whatever order it was taken in
        one = torch.tensor([client])
        alone, loss = client_step(*given, start.of(one), world.examples.of(one), RATES)
        torch.testing.assert_close(prompts.long[client], alone.long[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(losses[client], loss[0], rtol=0, atol=1e-6)


def test_a_step_follows_finite_differences() -> None:
    """In float64: the long step is minus the rate times the slope of L_rec + lambda_s A, the short one is proximal."""
    world = World(n=2, dtype=torch.float64)
    settings = replace(RATES, steps=1, sparsity=0.0, stability=0.7, stability_decay=0.5)
    prompts = observe(world.new(), world.examples.query, 5.0)
    prompts = replace(
        prompts,
        long=torch.randn(2, TOKENS, WIDTH, dtype=torch.float64),
        short=torch.randn(2, TOKENS, WIDTH, dtype=torch.float64),
        drift=torch.tensor([0.3, 1.0], dtype=torch.float64),
        usual=torch.tensor([0.2, 0.4], dtype=torch.float64),
    )

    def objective(prompts: Prompts, aligned: bool) -> torch.Tensor:
        given = composed(world.shared, prompts, world.examples.query, settings)
        outputs = world.outputs(world.examples.sequence)(given[world.examples.client], world.examples.targets > 0)
        loss = recommendation_losses(outputs, world.table, world.examples, "BCE")
        z = world.shared.encode_prompt(prompts.long)
        terms = alignment(z, world.shared.prototypes, settings.align_sharpness, settings.align_temperature)
        return loss + aligned * 0.7 * torch.exp(-0.5 * prompts.usual) * terms

    after, losses = client_step(world.outputs, world.table, world.shared, prompts, world.examples, settings)
    torch.testing.assert_close(losses, objective(prompts, False))
    for name, rate, aligned in (("long", 0.2, True), ("short", 0.3, False)):
        moved = (getattr(after, name) - getattr(prompts, name)) / -rate
        for client, token, place in [(0, 0, 0), (0, 2, 5), (1, 1, 3)]:
            shifted = []
            for step in (1e-6, -1e-6):
                values = getattr(prompts, name).clone()
                values[client, token, place] += step
                shifted.append(float(objective(replace(prompts, **{name: values}), aligned)[client].detach()))
            slope = (shifted[0] - shifted[1]) / 2e-6
            assert float(moved[client, token, place]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_ablations_leave_their_part_out() -> None:
    """Without short prompts they stay and do not speak; without long ones neither; alignment moves long ones only."""
    world = World()
    start = observe(world.new(), world.examples.query, 5.0)
    start = replace(start, long=torch.randn_like(start.long), short=torch.randn_like(start.short))

    def after(**changed: bool) -> Prompts:
        return client_step(world.outputs, world.table, world.shared, start, world.examples, replace(RATES, **changed))[
            0
        ]

    whole = after()
    no_short, no_long, free = after(short=False), after(long=False), after(alignment=False)
    assert torch.equal(no_short.short, start.short) and torch.equal(no_long.long, start.long)
    assert not torch.equal(no_short.long, whole.long) and not torch.equal(no_long.short, whole.short)
    assert not torch.equal(free.long, whole.long)
    quiet = composed(world.shared, start, world.examples.query, replace(RATES, short=False, long=False))
    alone = composed(world.shared, world.new(), world.examples.query, RATES)
    torch.testing.assert_close(quiet, alone)


def test_uploads_are_clipped_and_finite() -> None:
    """What is not finite becomes zero; nothing is longer than R."""
    world = World()
    prompts = replace(world.new(), long=torch.randn(7, TOKENS, WIDTH) * 5)
    prompts.long[2] = torch.nan
    sent = encode_upload(world.shared, prompts, 0.8)
    assert torch.isfinite(sent).all() and not sent[2].any() and sent[:2].norm(dim=1).max() <= 0.8 + 1e-6


def test_the_table_keeps_only_who_was_trained() -> None:
    """Rows in any order, new users in between; others have what everybody begins with."""
    table = ClientTable(TOKENS, WIDTH)
    first = replace(Prompts.new(2, TOKENS, WIDTH), long=torch.randn(2, TOKENS, WIDTH))
    table.put(torch.tensor([9, 4]), first)
    second = replace(
        Prompts.new(2, TOKENS, WIDTH), long=torch.randn(2, TOKENS, WIDTH), short=torch.ones(2, TOKENS, WIDTH)
    )
    table.put(torch.tensor([4, 30]), second)
    assert len(table) == 3
    found = table.get(torch.tensor([30, 7, 9, 4, 100]))
    expected = [second.long[1], torch.zeros(TOKENS, WIDTH), first.long[0], second.long[0], torch.zeros(TOKENS, WIDTH)]
    assert torch.equal(found.long, torch.stack(expected))
    again = ClientTable(TOKENS, WIDTH)
    again.load_state_dict(table.state_dict())
    assert torch.equal(again.get(torch.tensor([30, 9])).long, found.long[[0, 2]])
    again.put(torch.tensor([50]), first.of(torch.tensor([0])))
    assert len(table) == 3 and torch.equal(
        again.get(torch.tensor([50, 4])).long, torch.stack([first.long[0], second.long[0]])
    )
    again.end_slice()
    assert not again.get(torch.tensor([30])).short.any() and table.get(torch.tensor([30])).short.all()


# -- the server -----------------------------------------------------------------------------------------------------

GOOD = np.array([0.6, 0.0, 0.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("upload", "reason"),
    [
        (Upload(1, "r", np.array([np.nan, 0, 0])), "not finite"),
        (Upload(1, "r", np.array([np.inf, 0, 0])), "not finite"),
        (Upload(1, "r", np.array([3e38, 3e38, 3e38], dtype=np.float32)), "longer"),
        (Upload(1, "r", np.array([1e300, 1e300, 0.0])), "longer"),
        (Upload(1, "r", 10 * GOOD), "longer"),
        (Upload(1, "r", 0 * GOOD), "zero"),
        (Upload(1, "r", np.ones((1, 3))), "shape"),
        (Upload(1, "r", np.ones(2)), "shape"),
        (Upload(1, "r", np.array([1, 0, 0])), "floating"),
        (Upload(1, "r", [0.1, 0.2, 0.3]), "floating"),
        (Upload(1, "r", np.array(["a", "b", "c"])), "floating"),
        (Upload(1, "r", None), "floating"),
        (Upload(1, "q", GOOD), "another round"),
        (Upload(1, "s", GOOD), "another round"),
        (Upload(1, None, GOOD), "another round"),
        (Upload(7, "r", GOOD), "not asked"),
        (Upload("1", "r", GOOD), "no number"),
        (Upload(True, "r", GOOD), "no number"),
        (Upload(0, "r", GOOD), "second upload"),
    ],
)
def test_what_is_refused(upload: Upload, reason: str) -> None:
    """Each with its reason, counted; the round goes on with the others."""
    found = accept([Upload(0, "r", GOOD), upload, Upload(2, "r", -GOOD)], "r", {0, 1, 2}, 3, 1.0)
    assert found.clients.tolist() == [0, 2] and list(found.refused.values()) == [1]
    assert reason in next(iter(found.refused))
    np.testing.assert_array_equal(found.vectors, np.stack([GOOD, -GOOD]).astype(np.float64))


def test_a_round_without_uploads() -> None:
    """All drop out: the arrays are empty, and the server still releases noise."""
    found = accept([], "r", {1, 2}, 3, 1.0)
    assert found.vectors.shape == (0, 3) and not found.refused


KMEANS = {"momentum": 0.5, "floor": 1.0, "separation": 0.1, "prune": 0.1}


def one_round(tmp_path: Path, vectors: np.ndarray, prototypes: np.ndarray, noise: float = 0.0, **changed: Any) -> Any:
    mechanism = Mechanism(Release(noise), bits=0, **{k: v for k, v in changed.items() if k == "trust"})
    aggregator = DPFedKMeans({**KMEANS, **{k: v for k, v in changed.items() if k in KMEANS}})
    ledger = Ledger(tmp_path / "ledger.jsonl", np.inf, 1e-5)
    return server_round(
        aggregator,
        vectors,
        prototypes,
        mechanism,
        ledger,
        changed.get("name", "r"),
        lambda name: np.random.default_rng(0),
    )


def test_federated_k_means_by_hand(tmp_path: Path) -> None:
    """Without noise: half way to the mean of those who are nearest; a prototype without users stays."""
    vectors = np.array([[0.8, 0.0], [0.6, 0.2], [-0.5, 0.0]])
    prototypes = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    found = one_round(tmp_path, vectors, prototypes, prune=0.0)
    np.testing.assert_allclose(found.prototypes, [[0.85, 0.05], [-0.75, 0.0], [0.0, 5.0]], atol=1e-12)
    assert found.counts.tolist() == [2, 1, 0]


def test_rounds_of_k_means_find_the_groups(tmp_path: Path) -> None:
    """With little noise the prototypes settle at the means of two groups of users."""
    rng = np.random.default_rng(1)
    centres = np.array([[0.6, 0.3], [-0.4, -0.5]])
    vectors = np.repeat(centres, 500, axis=0) + 0.05 * rng.normal(size=(1000, 2))
    prototypes = np.array([[0.1, 0.0], [-0.1, 0.0]])
    for number in range(12):
        prototypes = one_round(tmp_path, vectors, prototypes, noise=0.5, name=f"r{number}").prototypes
    np.testing.assert_allclose(prototypes, centres, atol=0.02)


@pytest.mark.parametrize("boost", [1.0, -1.0, 1e6])
def test_byzantine_clients_move_a_prototype_no_further_than_their_share(boost: float, tmp_path: Path) -> None:
    """20 % of the uploads are turned around or blown up: at most n_bad R / n_k, and the change of the mean by those."""
    rng = np.random.default_rng(2)
    vectors = np.array([0.5, 0.0]) + 0.1 * rng.normal(size=(100, 2))
    bad = vectors.copy()
    bad[:20] = boost * np.array([0.0, 1.0])
    prototypes = np.array([[0.5, 0.0]])
    plain, turned = (
        one_round(tmp_path, each, prototypes, momentum=1.0, name=name).prototypes
        for name, each in (("a", vectors), ("b", bad))
    )
    moved = np.linalg.norm(turned - plain)
    assert moved <= (20 * 1.0 + np.linalg.norm(vectors[:20], axis=1).sum()) / 100 + 1e-9


def test_no_users_at_all_is_a_round(tmp_path: Path) -> None:
    """Everybody dropped out, and more prototypes than users: noise is released, and prototypes stay finite."""
    prototypes = np.eye(4)
    for n in (0, 1, 2):
        found = one_round(tmp_path, np.full((n, 4), 0.2), prototypes, noise=3.0, name=f"r{n}")
        assert np.isfinite(found.prototypes).all()
        assert np.linalg.norm(found.prototypes - prototypes) < 1e-9 or n == 0, "so few users moved prototypes"
    same = one_round(tmp_path, np.full((50, 4), 0.2), np.zeros((4, 4)), name="same").prototypes
    assert np.isfinite(same).all() and len(np.unique(same.round(6), axis=0)) == 4, "coincident ones stay in one place"


def test_local_noise_is_that_of_so_many_clients(tmp_path: Path) -> None:
    """The root of n times the noise of one, and told so."""
    n, noise = 400, 2.0
    vectors = np.tile([0.5, 0.0, 0.0], (n, 1))
    mechanism = Mechanism(Release(noise), trust="local", bits=0)
    sums = []
    for seed in range(200):
        ledger = Ledger(tmp_path / f"{seed}.jsonl", np.inf, 1e-5)
        found = server_round(
            DPFedKMeans(KMEANS), vectors, np.eye(3), mechanism, ledger, "r",
            lambda name, seed=seed: np.random.default_rng(seed),
        )  # fmt: skip
        sums.append(found.counts)
        assert found.noise == pytest.approx(noise * math.sqrt(2) * math.sqrt(n))
    spread = np.array(sums).std(axis=0)
    np.testing.assert_allclose(spread, noise * math.sqrt(2 * n), rtol=0.2)


def test_steps_find_the_geometric_median(tmp_path: Path) -> None:
    """Without noise they settle near Weiszfeld's; a fifth of the users far away moves it less than the mean."""
    rng = np.random.default_rng(4)
    vectors = np.r_[rng.normal(size=(80, 2)) * 0.1 + [0.4, 0.0], np.tile([-0.6, 0.7], (20, 1))]
    aggregator = GeometricMedian({"steps": 60, "rate": 0.05, "floor": 1.0, "separation": 0.0})
    ledger = Ledger(tmp_path / "ledger.jsonl", np.inf, 1e-5)
    given = (vectors, np.array([[0.0, 0.0]]), Mechanism(Release(0.0), bits=0), ledger, "r")
    found = server_round(aggregator, *given, lambda name: np.random.default_rng(0)).prototypes
    weiszfeld = geometric_median(vectors)
    assert np.linalg.norm(found[0] - weiszfeld) < 0.02
    sums = [np.linalg.norm(vectors - at, axis=1).sum() for at in (weiszfeld, weiszfeld + 0.01, weiszfeld - 0.01)]
    assert sums[0] == min(sums), "the reference is no minimum"
    assert np.linalg.norm(found[0] - [0.4, 0.0]) < np.linalg.norm(vectors.mean(0) - [0.4, 0.0]) / 3
    assert len(ledger.charges()) == 60, "each step is a release"
    far = aggregator.vectors(np.array([[1e9, 0.0], [0.0, 0.0]]), np.array([0, 0]), np.zeros((1, 2)), 1.0)
    np.testing.assert_allclose(far, [[1.0, 0.0], [0.0, 0.0]])


def test_prototypes_are_kept_apart_and_begun_anew() -> None:
    """Pairs end up a margin apart; one that nobody uses begins beside the busiest."""
    moved = separate(np.array([[0.0, 0.0], [0.05, 0.0], [3.0, 0.0]]), 0.2)
    np.testing.assert_allclose(moved, [[-0.075, 0.0], [0.125, 0.0], [3.0, 0.0]], atol=1e-9)
    prototypes = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found, n = revive(prototypes, np.array([50.0, 10.0, -1.0]), 0.0, 0.1, np.random.default_rng(0))
    assert n == 1 and np.linalg.norm(found[2] - prototypes[0]) == pytest.approx(0.1)
    assert np.array_equal(found[:2], prototypes[:2])
    assert revive(prototypes, np.full(3, -1.0), 0.0, 0.1, np.random.default_rng(0))[1] == 0


def test_nearest_is_brute_force() -> None:
    """Against all distances."""
    rng = np.random.default_rng(3)
    vectors, prototypes = rng.normal(size=(50, 4)), rng.normal(size=(6, 4))
    expected = [min(range(6), key=lambda k: float(((v - prototypes[k]) ** 2).sum())) for v in vectors]
    assert nearest(vectors, prototypes).tolist() == expected


def test_bytes_by_hand() -> None:
    """A central upload is a number and a vector; a local one a whole block in bytes; prototypes come in bytes."""
    assert bytes_of_round(8, 16, 1, "central", 8) == (4 + 64, 8 * 16 + 128)
    assert bytes_of_round(8, 16, 1, "central", 0) == (68, 4 * 128)
    assert bytes_of_round(8, 16, 2, "local", 8) == (2 * (8 * 17 + 8 * 17), 2 * 256)


def test_clients_that_lack_everything() -> None:
    """A client without targets keeps its prompts but for the alignment, and nothing is not finite."""
    world = World(n=3)
    targets = world.examples.targets.clone()
    targets[world.examples.client == 1] = 0
    examples = replace(world.examples, targets=targets)
    start = observe(world.new(), examples.query, 5.0)
    after, losses = client_step(
        world.outputs, world.table, world.shared, start, examples, replace(RATES, alignment=False)
    )
    assert losses[1] == 0 and not after.long[1].any() and not after.short[1].any()
    assert torch.isfinite(after.long).all() and after.long[0].any()
    assert F.relu(losses).shape == (3,)
