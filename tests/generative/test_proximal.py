"""Proximal terms against float64, autograd and the propositions of the paper."""

from __future__ import annotations

import pytest
import torch

from recbole_cl.generative.proximal import Groups, l2, orthogonality, probabilities, rank_groups, softmax_kl

SHAPES = [[(8, 64), (64, 8)], [(8, 256), (64, 8)], [(8, 64), (32, 8)]]


def adapters(drift: float, dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    g = torch.Generator().manual_seed(3)
    before = [[torch.randn(shape, generator=g, dtype=dtype) * 0.1 for shape in group] for group in SHAPES]
    now = [[t + drift * torch.randn(t.shape, generator=g, dtype=dtype) for t in group] for group in before]
    return now, before


def exact(now: list, before: list) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns value and gradient of each group's KL, by logarithms in float64 and autograd."""
    values, gradients = [], []
    for mine, theirs in zip(now, before, strict=True):
        v = torch.cat([t.flatten() for t in mine]).double().requires_grad_()
        u = torch.cat([t.flatten() for t in theirs]).double()
        value = (v.softmax(0) * (v.log_softmax(0) - u.log_softmax(0))).sum()
        value.backward()
        values.append(value.detach())
        gradients.append(v.grad)
    return torch.stack(values), gradients


@pytest.mark.parametrize("drift", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 4.0])
def test_the_kl_is_that_of_float64(drift: float) -> None:
    now, before = adapters(drift)
    groups = Groups(before)
    u, v = groups.matrix(before), groups.matrix(now)
    found = softmax_kl(v, u, probabilities(u, groups.filled))
    values, gradients = exact(now, before)
    assert torch.allclose(found.value.double(), values, rtol=1e-4, atol=0)
    for row, size, gradient in zip(found.gradient, groups.sizes, gradients, strict=True):
        assert (row[:size].double() - gradient).norm() < 1e-4 * gradient.norm()
        assert (row[size:] == 0).all()
    plain = (v[0].log_softmax(0).exp() * (v[0].log_softmax(0) - u[0].log_softmax(0))).sum()
    if drift <= 1e-3:  # what the form is for
        assert abs(float(plain) / float(values[0]) - 1) > 0.05


def test_its_gradient_is_that_of_autograd() -> None:
    """The form itself, differentiated in float64."""
    now, before = adapters(0.3, torch.float64)
    groups = Groups(before)
    u = groups.matrix(before)
    v = groups.matrix(now).requires_grad_()
    found = softmax_kl(v, u, probabilities(u, groups.filled))
    found.value.sum().backward()
    assert torch.allclose(v.grad, found.gradient, rtol=1e-9, atol=1e-15)


def test_nothing_has_moved_nothing_pulls() -> None:
    _, before = adapters(0.0)
    groups = Groups(before)
    u = groups.matrix(before)
    found = softmax_kl(u, u, probabilities(u, groups.filled))
    assert (found.value == 0).all() and (found.gradient == 0).all()


def test_groups_come_back_as_they_were() -> None:
    now, _ = adapters(0.1)
    groups = Groups(now)
    for group, again in zip(now, groups.tensors(groups.matrix(now)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, again, strict=True))


def test_proposition_3_and_corollary_4() -> None:
    """Near u the KL is half the p-weighted variance of the drift; what is left vanishes faster than its square."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(1, 40, generator=g, dtype=torch.float64)
    step = torch.randn(1, 40, generator=g, dtype=torch.float64)
    filled = torch.ones(1, 40, dtype=torch.bool)
    p = probabilities(u, filled)
    h = torch.diag(p[0]) - torch.outer(p[0], p[0])
    assert torch.allclose(h @ torch.ones(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64), atol=1e-15)
    rests = []
    for scale in (1e-1, 1e-2, 1e-3):
        d = scale * step
        quadratic = 0.5 * (d[0] @ h @ d[0])
        mean = (p * d).sum()
        assert torch.allclose(quadratic, 0.5 * (p * (d - mean).square()).sum(), rtol=1e-10)
        value = softmax_kl(u + d, u, p).value[0]
        rests.append(float((value - quadratic).abs() / d.square().sum()))
    assert rests[1] < 0.2 * rests[0] and rests[2] < 0.2 * rests[1]


@pytest.mark.parametrize("weight", [0.5, 5.0])
def test_proposition_1(weight: float) -> None:
    """The optimum lies between both, direction by direction of the pencil (S, H), where H has a direction at all."""
    g = torch.Generator().manual_seed(1)
    n = 12
    root = torch.randn(n, n, generator=g, dtype=torch.float64)
    s = root @ root.T  # positive definite, so on ker H, too
    p = torch.randn(n, generator=g, dtype=torch.float64).softmax(0)
    h = torch.diag(p) - torch.outer(p, p)
    best, before = torch.randn(2, n, generator=g, dtype=torch.float64)
    v = torch.linalg.solve(s + weight * h, s @ best + weight * h @ before)
    chol = torch.linalg.cholesky(s)
    inverse = torch.linalg.inv(chol)
    mu, vectors = torch.linalg.eigh(inverse @ h @ inverse.T)  # h q = mu s q, so s q = h q / mu
    checked = 0
    for k in range(n):
        q = inverse.T @ vectors[:, k]
        if mu[k] < 1e-10:  # H 1 = 0: softmax does not know a shift, and the printed eigenpairs do not exist there
            assert abs(float(q @ h @ v)) < 1e-9
            continue
        rho = 1 / mu[k]
        assert torch.allclose(s @ q, rho * (h @ q), rtol=1e-6, atol=1e-8)
        expected = rho / (rho + weight) * (q @ h @ best) + weight / (rho + weight) * (q @ h @ before)
        assert torch.allclose(q @ h @ v, expected, rtol=1e-6, atol=1e-9)
        checked += 1
    assert checked == n - 1


def test_corollary_2() -> None:
    """With H = I the weights are s^2 / (s^2 + lambda)."""
    g = torch.Generator().manual_seed(2)
    root = torch.randn(9, 5, generator=g, dtype=torch.float64)
    s = root @ root.T  # of rank 5: along the rest nothing moves
    best, before = torch.randn(2, 9, generator=g, dtype=torch.float64)
    v = torch.linalg.solve(s + 2.0 * torch.eye(9, dtype=torch.float64), s @ best + 2.0 * before)
    values, vectors = torch.linalg.eigh(s)
    for value, q in zip(values, vectors.T, strict=True):
        share = value / (value + 2.0)
        assert torch.allclose(q @ v, share * (q @ best) + (1 - share) * (q @ before), atol=1e-9)
        if value < 1e-9:
            assert torch.allclose(q @ v, q @ before, atol=1e-9)


@pytest.mark.parametrize("squared", [True, False])
def test_l2(squared: bool) -> None:
    now, before = adapters(0.2, torch.float64)
    groups = Groups(before)
    v = groups.matrix(now).requires_grad_()
    found = l2(v, groups.matrix(before), squared)
    found.value.sum().backward()
    assert torch.allclose(v.grad, found.gradient)
    dense = [
        sum(float((a - b).square().sum()) for a, b in zip(x, y, strict=True)) for x, y in zip(now, before, strict=True)
    ]
    want = torch.tensor(dense, dtype=torch.float64)
    assert torch.allclose(found.value, 0.5 * want if squared else want.sqrt())


def test_orthogonality_and_rank_groups_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.0, 1.0]])
    c, d = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # A C^T = [[2, 3], [0, 1]], B^T D = [[3, 1], [1, 3]]
    assert float(orthogonality(a, b, c, d)) == 14.0 + 20.0
    groups = rank_groups(a, b)
    assert [t.tolist() for t in groups[1]] == [[0.0, 1.0], [0.0, 2.0, 1.0]]


def test_proposition_3_over_modules() -> None:
    """Of modules of different sizes: lambda times half of the sum of p-weighted variances, and nothing across them."""
    weight = 5.0
    now, before = adapters(1.0, torch.float64)
    groups = Groups(before)
    u, step = groups.matrix(before), groups.matrix(now) - groups.matrix(before)
    p = probabilities(u, groups.filled)
    rests = []
    for scale in (1e-1, 1e-2, 1e-3):
        value = weight * softmax_kl(u + scale * step, u, p).value.sum()
        quadratic = torch.zeros((), dtype=torch.float64)
        for row, size in enumerate(groups.sizes):  # of each module alone, by its dense H
            q, d = p[row, :size], scale * step[row, :size]
            quadratic = quadratic + d @ (q * d) - (q @ d) ** 2
        rests.append(float((value - weight / 2 * quadratic).abs() / (scale * step).square().sum()))
    assert rests[1] < 0.2 * rests[0] and rests[2] < 0.2 * rests[1]
    shifted = u + 0.7 * torch.arange(1.0, 4.0, dtype=torch.float64).unsqueeze(1) * groups.filled
    assert (softmax_kl(shifted, u, p).value.abs() < 1e-14).all(), "a shift of a whole module costs nothing"


def test_proposition_5() -> None:
    """At u itself value and gradient are 0, and the Hessian is diag(p) - p p^T."""
    g = torch.Generator().manual_seed(4)
    u = torch.randn(14, generator=g, dtype=torch.float64)
    p = u.softmax(0)

    def divergence(d: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(u + d, 0) * (torch.log_softmax(u + d, 0) - torch.log_softmax(u, 0))).sum()

    zero = torch.zeros_like(u)
    assert abs(float(divergence(zero))) < 1e-15
    assert torch.autograd.functional.jacobian(divergence, zero).abs().max() < 1e-15
    hessian = torch.autograd.functional.hessian(divergence, zero)
    assert torch.allclose(hessian, torch.diag(p) - torch.outer(p, p), atol=1e-14)
    # The same of the form that is trained: its gradient's derivative at u.
    filled = torch.ones(1, 14, dtype=torch.bool)
    ours = torch.autograd.functional.jacobian(
        lambda d: softmax_kl((u + d)[None], u[None], probabilities(u[None], filled)).gradient[0], zero
    )
    assert torch.allclose(ours, hessian, atol=1e-12)


def test_proposition_1_with_the_softmax_metric_of_modules() -> None:
    """H of two modules has a kernel of two shifts; S of low rank is positive on it, and the optimum is unique.

    The pencil's finite pairs are those of H's quotient: with P the projection that S makes orthogonal to ker H, the
    directions q of ``S q = rho H q`` with rho finite number rank(H), and H-coordinates are interpolated along each.
    """
    g = torch.Generator().manual_seed(7)
    blocks = []
    for n in (5, 8):
        p = torch.randn(n, generator=g, dtype=torch.float64).softmax(0)
        blocks.append(torch.diag(p) - torch.outer(p, p))
    h = torch.block_diag(*blocks)
    kernel = torch.block_diag(*(torch.ones(n, 1, dtype=torch.float64) for n in (5, 8)))
    root = torch.randn(13, 6, generator=g, dtype=torch.float64)
    s, weight = root @ root.T, 2.0
    assert torch.linalg.matrix_rank(s) == 6 and torch.linalg.eigvalsh(kernel.T @ s @ kernel).min() > 1e-3
    assert torch.linalg.eigvalsh(s + weight * h).min() > 1e-6  # assumption 5
    best, before = torch.randn(2, 13, generator=g, dtype=torch.float64)
    v = torch.linalg.solve(s + weight * h, s @ best + weight * h @ before)
    # Away from the kernel in S's sense: q^T S k = 0 for all k of it, without which S q = rho H q has no solution.
    away = torch.eye(13, dtype=torch.float64) - kernel @ torch.linalg.solve(kernel.T @ s @ kernel, kernel.T @ s)
    values, basis = torch.linalg.eigh(away @ away.T)
    basis = basis[:, values > 1e-10]
    assert basis.shape[1] == torch.linalg.matrix_rank(h) == 11
    lower = torch.linalg.cholesky(basis.T @ h @ basis)
    inverse = torch.linalg.inv(lower)
    rho, q = torch.linalg.eigh(inverse @ (basis.T @ s @ basis) @ inverse.T)
    q = basis @ inverse.T @ q
    assert torch.allclose(q.T @ h @ q, torch.eye(11, dtype=torch.float64), atol=1e-9)
    kept = 0
    for k in range(11):
        assert torch.allclose(s @ q[:, k], rho[k] * (h @ q[:, k]), atol=1e-8)
        share = rho[k] / (rho[k] + weight)
        expected = share * (q[:, k] @ h @ best) + (1 - share) * (q[:, k] @ h @ before)
        assert torch.allclose(q[:, k] @ h @ v, expected, atol=1e-8)
        kept += int(rho[k] < 1e-9)
    assert kept > 0, "where the data say nothing, the adapter before stays"
