"""Theorem C.2 and Proposition C.3 of the paper on the convex surrogate, and what Byzantine clients can do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_cl.federated.aggregators.fed_k_means import DPFedKMeans
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.privacy import Release
from recbole_cl.federated.prompts import soft_threshold
from recbole_cl.federated.server import Mechanism, server_round
from recbole_cl.federated.uploads import Upload, accept

ROUNDS, LONG, SHORT = 60, 3, 2


class Surrogate:
    """``F_t(w) = 1/2 sum_i a_i (w_i - b_ti)^2 + lambda_p |s|_1 + lambda_s / 2 |u - c_t|^2`` in the box ``|w_i| <= 1``.

    It is separable, so minima and proximal steps have closed forms; w is (u, s), the long and the short block.
    """

    def __init__(self, seed: int, speed: float) -> None:
        rng = np.random.default_rng(seed)
        self.a = torch.from_numpy(rng.uniform(0.3, 3.0, LONG + SHORT))
        self.b = torch.from_numpy(np.cumsum(speed * rng.normal(size=(ROUNDS, LONG + SHORT)), 0)).clamp(-1.5, 1.5)
        self.c = torch.from_numpy(np.cumsum(0.3 * speed * rng.normal(size=(ROUNDS, LONG)), 0)).clamp(-1, 1)
        self.sparsity, self.tether = rng.uniform(0.01, 0.3), rng.uniform(0.0, 2.0)

    diameter = 2 * math.sqrt(LONG + SHORT)

    def value(self, t: int, w: torch.Tensor) -> float:
        smooth = 0.5 * (self.a * (w - self.b[t]) ** 2).sum() + 0.5 * self.tether * ((w[:LONG] - self.c[t]) ** 2).sum()
        return float(smooth + self.sparsity * w[LONG:].abs().sum())

    def proximal(self, t: int, before: torch.Tensor, rate: float) -> torch.Tensor:
        """Returns the minimum of ``F_t(w) + |w - before|^2 / (2 rate)`` in the box (eq. 23), or of F_t (rate inf)."""
        curve, pull = self.a + 1 / rate, self.a * self.b[t] + before / rate
        curve[:LONG] += self.tether
        pull[:LONG] += self.tether * self.c[t]
        w = pull / curve
        w[LONG:] = soft_threshold(w[LONG:], self.sparsity / curve[LONG:])
        return w.clamp(-1, 1)

    def play(self, rate: float) -> list[torch.Tensor]:
        w, played = torch.full((LONG + SHORT,), 0.5, dtype=torch.float64), []
        for t in range(ROUNDS):
            w = self.proximal(t, w, rate)
            played.append(w)
        return played


def test_the_proximal_step_is_a_minimum() -> None:
    """Nothing on a fine grid of each coordinate is below it."""
    game, before = Surrogate(0, 0.3), torch.rand(LONG + SHORT, dtype=torch.float64)
    step = game.proximal(3, before, 0.7)
    for place in range(LONG + SHORT):
        for other in np.linspace(-1, 1, 2001):
            w = step.clone()
            w[place] = other
            assert game.value(3, step) + float(((step - before) ** 2).sum()) / 1.4 <= (
                game.value(3, w) + float(((w - before) ** 2).sum()) / 1.4 + 1e-12
            )


@pytest.mark.parametrize("speed", [0.0, 0.05, 0.5])
def test_theorem_c2(speed: float) -> None:
    """Dynamic regret is at most ``|u_1 - w_0|^2 / (2 eta) + D V_T / eta``, for minimisers and for any other path."""
    sharp = 0.0
    for seed in range(20):
        game = Surrogate(seed, speed)
        rng = np.random.default_rng(seed)
        best = [game.proximal(t, torch.zeros(LONG + SHORT, dtype=torch.float64), math.inf) for t in range(ROUNDS)]
        walk = [torch.from_numpy(w) for w in np.cumsum(0.1 * rng.normal(size=(ROUNDS, LONG + SHORT)), 0).clip(-1, 1)]
        for rate in (0.05, 0.5, 5.0):
            played = game.play(rate)
            for path in (best, walk, [best[-1]] * ROUNDS):
                regret = sum(game.value(t, played[t]) - game.value(t, path[t]) for t in range(ROUNDS))
                length = sum(float((path[t] - path[t - 1]).norm()) for t in range(1, ROUNDS))
                first = float((path[0] - 0.5).square().sum()) / (2 * rate)
                assert regret <= first + game.diameter / rate * length + 1e-9
                if first + length > 0:
                    sharp = max(sharp, regret / (first + game.diameter / rate * length))
    assert sharp > {0.0: 0.5, 0.05: 0.1, 0.5: 0.02}[speed], "the bound was never near"


def test_the_path_length_is_needed() -> None:
    """Without its second term the bound is broken by a path that moves: the check above can fail."""
    game = Surrogate(1, 0.5)
    best = [game.proximal(t, torch.zeros(LONG + SHORT, dtype=torch.float64), math.inf) for t in range(ROUNDS)]
    played = game.play(0.5)
    regret = sum(game.value(t, played[t]) - game.value(t, best[t]) for t in range(ROUNDS))
    assert regret > float((best[0] - 0.5).square().sum())


def test_proposition_c3() -> None:
    """The anchored optimum moves by at most kappa and alpha times the others; kappa is L / (L + lambda_s), below 1.

    The printed bound L / (mu + lambda_s) holds, but is above 1 for small lambda_s: it shows no contraction then.
    """
    rng = np.random.default_rng(0)
    loose = 0
    for _ in range(200):
        matrix = rng.normal(size=(6, 4)) * rng.uniform(0.2, 2.0, 4)
        h, tether = matrix.T @ matrix, rng.uniform(0.05, 5.0)
        values, vectors = np.linalg.eigh(h)
        low, high = values[0], values[-1]
        inverse = np.linalg.inv(h + tether * np.eye(4))
        kappa, alpha = np.linalg.norm(inverse @ h, 2), np.linalg.norm(tether * inverse, 2)
        assert kappa == pytest.approx(high / (high + tether)) and kappa < 1
        assert alpha == pytest.approx(tether / (low + tether)) and kappa <= high / (low + tether) + 1e-12
        loose += high / (low + tether) > 1
        b, c = rng.normal(size=(2, 6)), rng.normal(size=(2, 4))
        free = [np.linalg.lstsq(matrix, x, rcond=None)[0] for x in b]
        # The anchored optimum as a plain least squares with more rows: an independent way to the same.
        more = np.r_[matrix, math.sqrt(tether) * np.eye(4)]
        held = [
            np.linalg.lstsq(more, np.r_[x, math.sqrt(tether) * a], rcond=None)[0] for x, a in zip(b, c, strict=True)
        ]
        moved, unheld, anchor = (np.linalg.norm(x[1] - x[0]) for x in (held, free, c))
        assert moved <= kappa * unheld + alpha * anchor + 1e-9
        # Along the steepest direction, with an anchor that stays, it is an equality.
        way = vectors[:, -1]
        np.testing.assert_allclose(np.linalg.norm(inverse @ h @ way), kappa)
    assert loose > 20


# -- Byzantine clients ------------------------------------------------------------------------------------------------

KMEANS = {"momentum": 0.5, "floor": 1.0, "separation": 0.0, "prune": 0.0}


@pytest.mark.parametrize("attack", ["sign", "boost", "collude", "same"])
def test_a_fifth_of_byzantine_clients_moves_a_prototype_no_further(attack: str, tmp_path: Path) -> None:
    """At most ``n_bad R / n_k``, of which colluding ones come near; what is longer than R is refused as it comes in."""
    rng = np.random.default_rng(4)
    n, bad, radius = 50, 10, 1.0
    honest = rng.normal(size=(n, 4)) * 0.1 + np.array([0.9, 0, 0, 0])
    honest /= np.maximum(np.linalg.norm(honest, axis=1, keepdims=True), radius)
    mean = honest.mean(0)
    sent = honest.copy()
    if attack == "sign":
        sent[:bad] *= -1
    elif attack == "boost":
        sent[:bad] *= 1000
    else:
        sent[:bad] = -mean / np.linalg.norm(mean) if attack == "collude" else mean
    start = np.array([[0.5, 0.1, 0.0, 0.0]])

    def after(vectors: np.ndarray, name: str) -> np.ndarray:
        taken = accept([Upload(u, "r", v) for u, v in enumerate(vectors)], "r", range(n), 4, radius)
        assert taken.refused == ({"longer than the clip radius": bad} if name == "boost" else {})
        ledger = Ledger(tmp_path / f"{name}.jsonl", math.inf, 1e-5)
        draws = lambda which: np.random.default_rng(0)  # noqa: E731
        mechanism = Mechanism(Release(0.0), bits=0)
        return server_round(DPFedKMeans(KMEANS), taken.vectors, start, mechanism, ledger, "r", draws).prototypes[0]

    gap = float(np.linalg.norm(after(sent, attack) - after(honest, "honest")))
    assert gap <= bad * radius / n + 1e-12
    if attack == "collude":
        assert gap > 0.9 * bad * radius / n
