"""The objective against closed forms, plain autograd and a linear-Gaussian model whose log p(x) is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.catalogue import LatentModel
from models.gaussian import DiagonalGaussian, Posterior
from models.generative.vae import VAE
from models.likelihood import LIKELIHOODS
from models.objective import elbo, evidence, importance_log_px, log_weights

Draw = Callable[..., Tensor]
MakeModel = Callable[..., LatentModel]
B, S, D, X = 4, 6, 3, 12

EVERY_LIKELIHOOD = pytest.mark.parametrize("name", LIKELIHOODS)


def posterior(normal: Draw, rows: int = B, size: int = D) -> Posterior:
    return (DiagonalGaussian(normal(rows, size), 0.5 * normal(rows, size)),)


def observed(name: str, normal: Draw) -> Tensor:
    x = normal(B, X)
    return (x > 0).to(x.dtype) if name == "bernoulli" else x


def whitened(normal: Draw, rows: int, samples: int, size: int) -> Tensor:
    """Noise whose sample mean is exactly 0 and sample covariance exactly I, so that quadratics in z have exact means."""
    raw = normal(rows, samples, size)
    q, _ = torch.linalg.qr(raw - raw.mean(1, keepdim=True))
    return q * samples**0.5


@EVERY_LIKELIHOOD
def test_the_elbo_has_one_value_per_row_in_two_parts(name: str, normal: Draw, make: MakeModel) -> None:
    x, q = observed(name, normal), posterior(normal)
    terms = elbo(make(likelihood=name).generative, q, x, torch.ones_like(x), (normal(B, S, D),))
    assert terms.log_likelihood.shape == (B,)
    assert terms.kl.shape == (B, 1)
    assert_close(terms.elbo, terms.log_likelihood - terms.kl[:, 0])
    assert_close(terms.annealed(0.25), terms.log_likelihood - 0.25 * terms.kl[:, 0])


@EVERY_LIKELIHOOD
@pytest.mark.parametrize("kl_weight", [1.0, 0.25])
def test_the_gradient_is_that_of_plain_autograd(name: str, kl_weight: float, normal: Draw, make: MakeModel) -> None:
    generative, x, noise = make(likelihood=name).generative, observed(name, normal), (normal(B, S, D),)
    mask = (normal(B, X) > 0).to(x.dtype)
    mu, log_sigma = normal(B, D).requires_grad_(), (0.5 * normal(B, D)).requires_grad_()
    q = (DiagonalGaussian(mu, log_sigma),)
    expected = torch.autograd.grad(elbo(generative, q, x, mask, noise).annealed(kl_weight).sum(), (mu, log_sigma))
    seen = evidence(generative, (q[0].detach(),), x, mask, noise, kl_weight=kl_weight)
    assert_close((seen.grad[0].mu, seen.grad[0].log_sigma), expected)
    assert_close(seen.terms.elbo, elbo(generative, q, x, mask, noise).elbo.detach())


def closed_form(jacobian: Tensor, error_x: Tensor, q: DiagonalGaussian, z: Tensor) -> tuple[Tensor, Tensor]:
    """∇μ L = E[Jᵀ ε_x − ε_z] and ∇log σ L = E[(Jᵀ ε_x − ε_z) ⊙ (z − μ)] + 1 (Marino 2018, supplement A).

    J: (B, S, X, D), ε_x: (B, S, X), z: (B, S, D); ε_z = z for a standard normal prior.
    """
    pull = torch.einsum("bsxd,bsx->bsd", jacobian, error_x) - z
    return pull.mean(1), (pull * (z - q.mu[:, None])).mean(1) + 1


def test_the_gradient_of_a_bernoulli_vae_is_the_published_closed_form(normal: Draw, binary: Draw, make: MakeModel) -> None:
    generative, x, (q,) = make().generative, binary(B, X), posterior(normal)
    noise = whitened(normal, B, S, D)
    z = q.rsample(noise)

    def probability(z_one: Tensor) -> Tensor:
        return generative((z_one[None, None],)).mean[0, 0]

    jacobian = torch.func.vmap(torch.func.vmap(torch.func.jacrev(probability)))(z)
    p = generative((z,)).mean
    mu, log_sigma = closed_form(jacobian, (x[:, None] - p) / (p * (1 - p)), q, z)
    grad = evidence(generative, (q,), x, torch.ones_like(x), (noise,)).grad[0]
    exact = 1e-6 if x.dtype == torch.float64 else 1e-3
    assert_close((grad.mu, grad.log_sigma), (mu, log_sigma), atol=exact, rtol=exact)


def test_the_gradient_of_a_linear_gaussian_model_is_the_published_closed_form(normal: Draw, linear_gaussian: Any) -> None:
    (q,), x = posterior(normal, size=2), normal(B, 6)
    noise = whitened(normal, B, S, 2)
    z = q.rsample(noise)
    error = (x[:, None] - linear_gaussian.generative((z,)).mean) / linear_gaussian.sigma**2
    mu, log_sigma = closed_form(linear_gaussian.w.expand(B, S, 6, 2), error, q, z)
    seen = evidence(linear_gaussian.generative, (q,), x, torch.ones_like(x), (noise,), errors=True)
    exact = 1e-6 if x.dtype == torch.float64 else 1e-3
    assert_close((seen.grad[0].mu, seen.grad[0].log_sigma), (mu, log_sigma), atol=exact, rtol=exact)
    assert seen.error_x is not None
    assert seen.error_z is not None
    assert_close(seen.error_x, error.mean(1))
    assert_close(seen.error_z[0], z.mean(1))


@EVERY_LIKELIHOOD
def test_a_row_alone_equals_the_row_in_a_batch(name: str, normal: Draw, make: MakeModel) -> None:
    generative, x, (q,), noise = make(likelihood=name).generative, observed(name, normal), posterior(normal), normal(B, S, D)
    mask = (normal(B, X) > -0.5).to(x.dtype)
    together = evidence(generative, (q,), x, mask, (noise,), errors=True)
    weights = log_weights(generative, (q,), x, mask, (noise,))[1]
    for i in range(B):
        row = slice(i, i + 1)
        own = (DiagonalGaussian(q.mu[row], q.log_sigma[row]),)
        alone = evidence(generative, own, x[row], mask[row], (noise[row],), errors=True)
        assert_close(alone.grad[0].mu, together.grad[0].mu[row])
        assert_close(alone.grad[0].log_sigma, together.grad[0].log_sigma[row])
        assert_close(alone.error_x, together.error_x[row] if together.error_x is not None else None)
        assert_close(alone.terms.elbo, together.terms.elbo[row])
        assert_close(log_weights(generative, own, x[row], mask[row], (noise[row],))[1], weights[row])


@EVERY_LIKELIHOOD
def test_hidden_pixels_do_not_matter(name: str, normal: Draw, make: MakeModel) -> None:
    generative, x, q, noise = make(likelihood=name).generative, observed(name, normal), posterior(normal), (normal(B, S, D),)
    mask = (normal(B, X) > 0).to(x.dtype)
    changed = torch.where(mask == 1, x, 1 - x)
    a, b = (evidence(generative, q, rows, mask, noise, errors=True) for rows in (x, changed))
    assert torch.equal(a.grad[0].mu, b.grad[0].mu)
    assert torch.equal(a.grad[0].log_sigma, b.grad[0].log_sigma)
    assert torch.equal(a.terms.elbo, b.terms.elbo)
    assert a.error_x is not None
    assert b.error_x is not None
    assert torch.equal(a.error_x, b.error_x)


def test_with_nothing_observed_the_elbo_is_minus_the_kl(normal: Draw, binary: Draw, make: MakeModel) -> None:
    q, x = posterior(normal), binary(B, X)
    terms = elbo(make().generative, q, x, torch.zeros_like(x), (normal(B, S, D),))
    assert_close(terms.elbo, -q[0].kl_to_standard())


def test_evidence_leaves_no_gradient_on_the_model_and_no_graph(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x = make(), binary(B, X)
    seen = evidence(model.generative, posterior(normal), x, torch.ones_like(x), (normal(B, S, D),))
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        seen = evidence(model.generative, posterior(normal), x, torch.ones_like(x), (normal(B, S, D),))
    assert not seen.grad[0].mu.requires_grad
    assert not seen.terms.elbo.requires_grad


def test_the_exact_posterior_has_constant_importance_weights(
    normal: Draw, dtype: torch.dtype, device: torch.device, linear_gaussian: Any
) -> None:
    """With one latent variable q can be the exact posterior: then every weight, and the ELBO itself, is log p(x)."""
    exact = type(linear_gaussian)(dtype, device, latent=1)
    x = exact.sample(normal(B, 1), normal(B, 6))
    mu, covariance = exact.posterior(x)
    q = (DiagonalGaussian(mu, 0.5 * covariance.diagonal().log().expand(B, 1)),)
    _, weights = log_weights(exact.generative, q, x, torch.ones_like(x), (normal(B, 5, 1),))
    tolerance = {"atol": 1e-9, "rtol": 0} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-5}
    assert_close(weights, exact.log_px(x)[:, None].expand(B, 5), **tolerance)
    assert_close(importance_log_px(weights), exact.log_px(x), **tolerance)
    bound = elbo(exact.generative, q, x, torch.ones_like(x), (whitened(normal, B, S, 1),)).elbo
    assert_close(bound, exact.log_px(x), **tolerance)


def test_importance_weighting_converges_to_log_px_from_any_posterior(normal: Draw, linear_gaussian: Any) -> None:
    x = linear_gaussian.sample(normal(B, 2), normal(B, 6))
    mean, covariance = linear_gaussian.posterior(x)
    q = (DiagonalGaussian(mean + 0.1, 0.5 * covariance.diagonal().log().expand(B, 2) + 0.3),)
    exact, mask = linear_gaussian.log_px(x), torch.ones_like(x)
    errors = [
        float((importance_log_px(log_weights(linear_gaussian.generative, q, x, mask, (normal(B, s, 2),))[1]) - exact).abs().max())
        for s in (10, 50_000)
    ]
    assert errors[1] < 0.02
    assert errors[1] < errors[0]


def test_the_elbo_never_exceeds_log_px_and_is_exact_at_no_wrong_posterior(normal: Draw, linear_gaussian: Any) -> None:
    x = linear_gaussian.sample(normal(B, 2), normal(B, 6))
    for _ in range(20):
        q = posterior(normal, size=2)
        bound = elbo(linear_gaussian.generative, q, x, torch.ones_like(x), (whitened(normal, B, S, 2),)).elbo
        assert bool((bound < linear_gaussian.log_px(x)).all())


def test_the_gap_between_elbo_and_log_px_is_the_kl_to_the_true_posterior(normal: Draw, linear_gaussian: Any) -> None:
    x, (q,) = linear_gaussian.sample(normal(B, 2), normal(B, 6)), posterior(normal, size=2)
    mean, covariance = linear_gaussian.posterior(x)
    truth = torch.distributions.MultivariateNormal(mean, covariance)
    ours = torch.distributions.MultivariateNormal(q.mu, torch.diag_embed((2 * q.log_sigma).exp()))
    bound = elbo(linear_gaussian.generative, (q,), x, torch.ones_like(x), (whitened(normal, B, S, 2),)).elbo
    tolerance = {"atol": 1e-9, "rtol": 1e-9} if x.dtype == torch.float64 else {"atol": 1e-3, "rtol": 1e-4}
    assert_close(linear_gaussian.log_px(x) - bound, torch.distributions.kl_divergence(ours, truth), **tolerance)


def test_importance_log_px_of_one_sample_is_its_weight(normal: Draw) -> None:
    weight = normal(B, 1)
    assert_close(importance_log_px(weight), weight[:, 0])


def test_a_vae_without_hidden_layers_is_linear(normal: Draw, make: MakeModel) -> None:
    generative = make(likelihood="gaussian", hidden=()).generative
    assert isinstance(generative, VAE)
    a, b = normal(1, 1, D), normal(1, 1, D)
    zero = torch.zeros_like(a)
    mean = [generative((z,)).mean for z in (a, b, a + b, zero)]
    assert_close(mean[0] + mean[1], mean[2] + mean[3])
