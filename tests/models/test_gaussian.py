"""Diagonal Gaussians against torch.distributions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from models.gaussian import LOG_SIGMA_LIMIT, DiagonalGaussian, bound_log_sigma, standard_log_prob

Draw = Callable[..., Tensor]


def gaussian(normal: Draw, rows: int = 5, size: int = 4) -> DiagonalGaussian:
    return DiagonalGaussian(normal(rows, size), normal(rows, size))


def test_log_prob_is_that_of_torch(normal: Draw) -> None:
    q, z = gaussian(normal), 3 * normal(5, 7, 4)
    expected = Normal(q.mu[:, None], q.log_sigma.exp()[:, None]).log_prob(z).sum(-1)
    assert_close(q.log_prob(z), expected)


def test_entropy_is_that_of_torch(normal: Draw) -> None:
    q = gaussian(normal)
    assert_close(q.entropy(), Normal(q.mu, q.log_sigma.exp()).entropy().sum(-1))


def test_kl_is_that_of_torch(normal: Draw) -> None:
    q, p = gaussian(normal), gaussian(normal)
    expected = kl_divergence(Normal(q.mu, q.log_sigma.exp()), Normal(p.mu, p.log_sigma.exp())).sum(-1)
    assert_close(q.kl(p), expected)


def test_kl_to_the_standard_normal_is_kl_to_a_gaussian_of_zeros(normal: Draw) -> None:
    q = gaussian(normal)
    assert_close(q.kl_to_standard(), q.kl(DiagonalGaussian(torch.zeros_like(q.mu), torch.zeros_like(q.mu))))


def test_kl_is_zero_between_equal_gaussians(normal: Draw) -> None:
    q = gaussian(normal)
    assert torch.equal(q.kl(q), torch.zeros_like(q.mu[:, 0]))


def test_kl_between_nearly_equal_gaussians_does_not_cancel(normal: Draw) -> None:
    # for a small d the KL is d² to first order; exp(2d) − 1 − 2d would lose it to rounding
    d = 1e-6
    zero = torch.zeros_like(normal(1, 1))
    assert_close(DiagonalGaussian(zero, zero + d).kl(DiagonalGaussian(zero, zero)), zero[0] + d**2, rtol=0.1, atol=1e-13)


def test_samples_have_the_stated_mean_and_spread(normal: Draw) -> None:
    q = gaussian(normal, rows=2)
    z = q.rsample(normal(2, 40_000, 4))
    assert_close(z.mean(1), q.mu, atol=0.08, rtol=0)
    assert_close(z.std(1), q.log_sigma.exp(), atol=0, rtol=0.03)


def test_the_standard_normal_is_a_gaussian_of_zeros(normal: Draw) -> None:
    z = normal(5, 7, 4)
    assert_close(standard_log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_the_bound_on_log_sigma_is_smooth_and_kept(dtype: torch.dtype) -> None:
    raw = torch.linspace(-1000, 1000, 20_001, dtype=dtype, requires_grad=True)
    bounded = bound_log_sigma(raw)
    (slope,) = torch.autograd.grad(bounded.sum(), raw)
    assert bool((bounded.abs() <= LOG_SIGMA_LIMIT).all())
    assert bool((bounded.diff() >= 0).all())
    assert_close(slope[10_000], torch.ones_like(slope[0]))
    # neighbours 0.1 apart differ in slope by at most max|f″| · 0.1, so there is no kink
    assert float(slope.diff().abs().max()) < 0.1 * 0.1
    near = raw.detach()[9_995:10_006]
    assert_close(bound_log_sigma(near), near, atol=1e-3, rtol=0)


def test_detaching_leaves_the_values_and_drops_the_graph(normal: Draw) -> None:
    q = DiagonalGaussian(normal(2, 3).requires_grad_(), normal(2, 3).requires_grad_())
    detached = q.detach()
    assert torch.equal(detached.mu, q.mu)
    assert not detached.mu.requires_grad
    assert not detached.log_sigma.requires_grad
