"""One contract over every likelihood, and each against something known."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal
from torch.testing import assert_close

from models.likelihood import LIKELIHOODS, Bernoulli, Gaussian, Likelihood, QuantisedGaussian

Draw = Callable[..., Tensor]
B, S, X = 4, 3, 6

EVERY = pytest.mark.parametrize("name", LIKELIHOODS)


def likelihood(name: str, normal: Draw, rows: int = B, samples: int = S) -> Likelihood:
    kind = LIKELIHOODS[name]
    return kind.from_heads({head: normal(rows, samples, X) for head in kind.HEADS})


def observed(name: str, normal: Draw) -> Tensor:
    x = normal(B, X)
    return (x > 0).to(x.dtype) if name == "bernoulli" else x


@EVERY
def test_every_likelihood_gives_the_stated_shapes(name: str, normal: Draw) -> None:
    p, x = likelihood(name, normal), observed(name, normal)
    mask = torch.ones_like(x)
    assert p.log_prob(x, mask).shape == (B, S)
    assert p.mean.shape == (B, S, X)
    assert p.error(x, mask).shape == (B, X)
    assert p.sample(normal(B, S, X)).shape == (B, S, X)
    assert all(value.shape == (B, S, X) for value in p.parameters.values())
    assert {value.dtype for value in (p.log_prob(x, mask), p.mean, p.error(x, mask), p.sample(normal(B, S, X)))} == {x.dtype}


@EVERY
def test_every_likelihood_is_rebuilt_from_its_parameters(name: str, normal: Draw) -> None:
    p, x = likelihood(name, normal), observed(name, normal)
    again = type(p)(**p.parameters)
    assert torch.equal(again.log_prob(x, torch.ones_like(x)), p.log_prob(x, torch.ones_like(x)))


@EVERY
def test_every_likelihood_sums_over_observed_entries_only(name: str, normal: Draw) -> None:
    p, x = likelihood(name, normal), observed(name, normal)
    mask = torch.ones_like(x)
    mask[:, ::2] = 0
    one_by_one = [p.log_prob(x, torch.nn.functional.one_hot(torch.tensor(i), X).to(x).expand(B, X)) for i in range(1, X, 2)]
    assert_close(p.log_prob(x, mask), torch.stack(one_by_one).sum(0))
    other = torch.where(mask == 0, 7 * torch.ones_like(x), x)
    assert torch.equal(p.log_prob(other, mask), p.log_prob(x, mask))
    assert torch.equal(p.error(other, mask), p.error(x, mask))
    assert torch.equal(p.error(x, mask)[:, ::2], torch.zeros(B, X // 2, dtype=x.dtype))
    assert torch.equal(p.log_prob(x, torch.zeros_like(x)), torch.zeros(B, S, dtype=x.dtype))


@EVERY
def test_samples_of_every_likelihood_have_its_mean(name: str, normal: Draw) -> None:
    p = likelihood(name, normal, rows=1, samples=1)
    samples = torch.cat([p.sample(normal(1, 1, X)) for _ in range(4000)])
    spread = samples.std(0)
    assert_close(samples.mean(0), p.mean[0], atol=float(5 * spread.max() / 4000**0.5), rtol=0)


@EVERY
def test_the_mean_maximises_the_likelihood_and_has_no_error(name: str, normal: Draw) -> None:
    p = likelihood(name, normal, samples=1)
    mean, mask = p.mean[:, 0], torch.ones(B, X, dtype=normal(1).dtype)
    if name != "bernoulli":
        assert bool((p.log_prob(mean, mask) > p.log_prob(mean + 0.1, mask)).all())
    # a Bernoulli's logits are bounded in `error`, so its zero is only approximate
    assert_close(p.error(mean, mask), torch.zeros_like(mean), atol=0.25 if name == "bernoulli" else 1e-12, rtol=0)


@EVERY
def test_the_gradient_of_every_likelihood_is_that_of_finite_differences(name: str, normal: Draw) -> None:
    kind, x = LIKELIHOODS[name], observed(name, normal).double()
    heads = [normal(B, S, X).double().requires_grad_() for _ in kind.HEADS]
    mask = torch.ones_like(x)
    assert torch.autograd.gradcheck(lambda *raw: kind.from_heads(dict(zip(kind.HEADS, raw, strict=True))).log_prob(x, mask), heads)


def test_bernoulli_log_prob_is_that_of_torch(normal: Draw, binary: Draw) -> None:
    logits, x = 5 * normal(B, S, X), binary(B, X)
    expected = TorchBernoulli(logits=logits).log_prob(x[:, None].expand_as(logits)).sum(-1)
    assert_close(Bernoulli(logits).log_prob(x, torch.ones_like(x)), expected)


def test_a_sure_bernoulli_stays_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[[1e4, -1e4]]], dtype=dtype, requires_grad=True)
    value = Bernoulli(logits).log_prob(torch.tensor([[0.0, 1.0]], dtype=dtype), torch.ones(1, 2, dtype=dtype))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert_close(value, torch.tensor([[-2e4]], dtype=dtype))
    assert_close(gradient, torch.tensor([[[-1.0, 1.0]]], dtype=dtype))


def test_grey_values_count_as_cross_entropy(normal: Draw) -> None:
    logits, x = normal(B, S, X), torch.sigmoid(normal(B, X))
    p = torch.sigmoid(logits)
    expected = (x[:, None] * p.log() + (1 - x[:, None]) * (1 - p).log()).sum(-1)
    assert_close(Bernoulli(logits).log_prob(x, torch.ones_like(x)), expected)


def test_bernoulli_error_is_the_precision_weighted_one_for_moderate_logits(normal: Draw, binary: Draw) -> None:
    logits, x = 0.3 * normal(B, 1, X), binary(B, X)
    p = torch.sigmoid(logits[:, 0])
    assert_close(Bernoulli(logits).error(x, torch.ones_like(x)), (x - p) / (p * (1 - p)), rtol=0.02, atol=0.01)


def test_gaussian_log_prob_and_error_are_those_of_torch(normal: Draw) -> None:
    p, x = Gaussian(normal(B, S, X), normal(B, S, X)), normal(B, X)
    reference = Normal(p.mu, p.log_sigma.exp())
    assert_close(p.log_prob(x, torch.ones_like(x)), reference.log_prob(x[:, None]).sum(-1))
    assert_close(p.error(x, torch.ones_like(x)), ((x[:, None] - p.mu) / reference.variance).mean(1))


def test_the_error_of_a_gaussian_is_the_gradient_of_its_mean(normal: Draw) -> None:
    mu, x = normal(B, 1, X).requires_grad_(), normal(B, X)
    p = Gaussian(mu, normal(B, 1, X))
    (gradient,) = torch.autograd.grad(p.log_prob(x, torch.ones_like(x)).sum(), mu)
    assert_close(p.error(x, torch.ones_like(x)), gradient[:, 0])


def exact_log_mass(m: float, u: float) -> tuple[float, float]:
    """log[Φ(m + u/2) − Φ(m − u/2)] and its derivative by m, with 60 digits."""
    with mpmath.workdps(60):
        a, b = mpmath.mpf(abs(m)) - mpmath.mpf(u) / 2, mpmath.mpf(abs(m)) + mpmath.mpf(u) / 2
        mass = (mpmath.erfc(a / mpmath.sqrt(2)) - mpmath.erfc(b / mpmath.sqrt(2))) / 2
        slope = (mpmath.npdf(b) - mpmath.npdf(a)) / mass
        return float(mpmath.log(mass)), float(slope if m >= 0 else -slope)


@pytest.mark.parametrize("u", [1e-5, 1e-3, 0.05, 0.2, 0.2499, 0.2501, 0.5, 2.0, 11.0])
@pytest.mark.parametrize("m", [0.0, 0.3, -1.0, 3.0, -7.0, 20.0, 60.0])
def test_quantised_gaussian_is_exact_into_the_far_tails(m: float, u: float, dtype: torch.dtype) -> None:
    """Where CDF(b) − CDF(a) is 0 in any floating type, and on both sides of the switch at u = ¼.

    The first version was 0.005 nats off at u = 0.2499 in the tails: it replaced exp(−t²/2) by its plain mean.
    """
    mu = torch.zeros(1, 1, 1, dtype=dtype, requires_grad=True)
    p = QuantisedGaussian(mu, torch.zeros_like(mu), width=u)
    value = p.log_prob(torch.tensor([[m]], dtype=dtype), torch.ones(1, 1, dtype=dtype))
    (gradient,) = torch.autograd.grad(value.sum(), mu)
    log_mass, slope = exact_log_mass(m, u)
    # u⁴/1,000 is what the narrow branch promises
    exact = {"atol": 4e-6, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-5}
    assert_close(value.detach(), torch.full_like(value, log_mass), **exact)
    assert_close(gradient, torch.full_like(gradient, -slope), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sigma_in_widths", [0.05, 0.5, 3.9, 4.1, 30.0])
def test_quantised_gaussian_sums_to_one_over_all_bins(sigma_in_widths: float, dtype: torch.dtype) -> None:
    width, sigma = 1 / 255, sigma_in_widths / 255
    reach = int(12 * sigma_in_widths) + 3
    bins = torch.arange(-reach, reach + 1, dtype=dtype) * width
    mu = torch.full((len(bins), 1, 1), 0.3 * width, dtype=dtype)
    p = QuantisedGaussian(mu, torch.full_like(mu, sigma).log(), width=width)
    mass = p.log_prob(bins[:, None], torch.ones(len(bins), 1, dtype=dtype)).exp().sum()
    assert abs(float(mass) - 1) < 1e-5


def test_a_fine_quantised_gaussian_is_the_density_times_the_width(normal: Draw) -> None:
    mu, log_sigma, x = normal(B, S, X), normal(B, S, X), normal(B, X)
    mask = torch.ones_like(x)
    density = Gaussian(mu, log_sigma).log_prob(x, mask)
    mass = QuantisedGaussian(mu, log_sigma, width=1e-4).log_prob(x, mask)
    assert_close(mass - X * torch.log(torch.tensor(1e-4, dtype=x.dtype)), density, atol=1e-4, rtol=1e-5)
