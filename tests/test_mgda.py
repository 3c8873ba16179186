"""The point of least norm where the gradients' sizes differ by orders of magnitude, against all supports."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from recbole_cl.strategy.parts.mgda import min_norm_weights


def least_norm(gram: np.ndarray) -> float:
    """Returns the least squared norm in the convex hull: of each support, the point that its equations lead to."""
    length, least = np.sqrt(gram.diagonal()), np.inf
    for size in range(1, len(gram) + 1):
        for support in map(list, itertools.combinations(range(len(gram)), size)):
            cosines = gram[np.ix_(support, support)] / np.outer(length[support], length[support])
            found = np.linalg.solve(cosines, 1 / length[support]) / length[support]
            weights = np.zeros(len(gram))
            weights[support] = found / found.sum()
            if (weights >= 0).all():
                least = min(least, weights @ gram @ weights)
    return float(least)


def badly_scaled(case: int) -> np.ndarray:
    """Returns the Gram matrix of 3 to 6 independent gradients of lengths between 1e-3 and 1e3, some of one bent."""
    rng = np.random.default_rng(case)
    n = int(rng.integers(3, 7))
    width = int(rng.integers(n, 40))
    gradients = rng.normal(size=(n, width)) * 10 ** rng.uniform(-3, 3, size=(n, 1))
    gradients += case % 2 * rng.normal(size=width) * 10 ** rng.uniform(-3, 3)
    return np.asarray(gradients @ gradients.T)


def test_badly_scaled_gradients() -> None:
    """Whatever the lengths, no support holds a point that is shorter; and the search takes few steps."""
    for case in range(200):
        gram = badly_scaled(case)
        few, weights = (min_norm_weights(torch.from_numpy(gram), steps).numpy() for steps in (20, 1000))
        assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)
        assert weights @ gram @ weights <= least_norm(gram) * (1 + 1e-9), case
        np.testing.assert_array_equal(few, weights)


def test_the_scale_of_all_gradients_does_not_matter() -> None:
    """The stopping rule knows no absolute size."""
    for case in range(20):
        gram = badly_scaled(case)
        weights = min_norm_weights(torch.from_numpy(gram))
        for scale in (2.0**-60, 2.0**60):  # powers of two leave the bits of the fractions as they are
            torch.testing.assert_close(min_norm_weights(torch.from_numpy(gram * scale)), weights, atol=0, rtol=1e-12)


def test_gradients_that_depend_on_each_other() -> None:
    """Equal gradients share, opposite ones cancel, one of zeros is the point; what is not finite stays so."""
    equal = torch.full((3, 3), 7.0)
    torch.testing.assert_close(min_norm_weights(equal), torch.full((3,), 1 / 3, dtype=torch.float64))
    gradients = torch.tensor([[1e3, 0.0], [-1e-3, 0.0], [1.0, 1.0], [1e3, 0.0]], dtype=torch.float64)
    gram = gradients @ gradients.T
    weights = min_norm_weights(gram)
    assert float((weights @ gradients).norm()) <= 1e-12
    assert (weights >= 0).all() and float(weights.sum()) == pytest.approx(1, abs=1e-12)
    gradients = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(min_norm_weights(gradients @ gradients.T), torch.tensor([0.0, 1.0, 0.0]).double())
    assert min_norm_weights(torch.full((3, 3), torch.nan)).isnan().all()
