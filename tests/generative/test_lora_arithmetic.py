"""Sums of adapters against dense computations; InfLoRA's directions against what they must not touch."""

from __future__ import annotations

import torch

from recbole_cl.generative.lora import grow_span, leading_inputs, product, sum_of_directions


def factors(n: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(3, 7, generator=g, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64))
        for _ in range(n)
    ]


def test_directions_are_dense_sums() -> None:
    past = factors(3)
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    dense, weighted = torch.zeros(5, 7, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)
    for (a, b), weight in zip(past, weights, strict=True):
        for i in range(5):
            for j in range(7):
                entry = sum(b[i, k] / b.square().sum().sqrt() * a[k, j] / a.square().sum().sqrt() for k in range(3))
                dense[i, j] += entry
                weighted[i, j] += weight * entry
    assert torch.allclose(sum_of_directions(past), dense)
    assert torch.allclose(sum_of_directions(past, weights), weighted)
    assert torch.allclose(product(past[0]), past[0][1] @ past[0][0])


def test_an_adapter_that_was_never_trained_adds_nothing() -> None:
    ((a, b),) = factors(1)
    assert (sum_of_directions([(a, torch.zeros_like(b))]) == 0).all()


def test_inflora_does_not_touch_past_inputs() -> None:
    """Updates B_t A_t answer 0 on the span of past inputs, so their gradients are orthogonal to it."""
    g = torch.Generator().manual_seed(0)
    old = torch.randn(40, 4, generator=g, dtype=torch.float64) @ torch.randn(4, 16, generator=g, dtype=torch.float64)
    new = torch.randn(50, 16, generator=g, dtype=torch.float64)
    span = grow_span(None, old.T @ old, 0.9999)
    assert span.shape == (16, 4)
    assert torch.allclose(span.T @ span, torch.eye(4, dtype=torch.float64), atol=1e-10)
    a = leading_inputs(new.T @ new, 3, span)
    assert a.shape == (3, 16)
    assert (old @ a.T).abs().max() < 1e-8 * old.abs().max() * 10
    b = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    (new @ a.T @ b.T).square().sub(1).square().sum().backward()
    assert (old @ (torch.ones_like(b) @ a).T).abs().max() < 1e-6
    within = leading_inputs(new.T @ new, 3, span, inside=True)
    assert torch.allclose(within @ span @ span.T, within, atol=1e-8)


def test_a_span_grows_by_what_it_lacks() -> None:
    first = torch.diag(torch.tensor([5.0, 4.0, 0, 0, 0, 0], dtype=torch.float64))
    span = grow_span(None, first, 0.99)
    assert span.shape == (6, 2)
    assert grow_span(span, first, 0.99) is span
    second = torch.diag(torch.tensor([1.0, 1.0, 9.0, 0.01, 0, 0], dtype=torch.float64))
    grown = grow_span(span, second, 0.99)
    assert grown.shape == (6, 3) and torch.allclose(grown.T @ grown, torch.eye(3, dtype=torch.float64), atol=1e-12)
    energy = (grown.T @ second @ grown).trace() / second.trace()
    assert energy >= 0.99
