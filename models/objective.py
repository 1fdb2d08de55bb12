"""The objective, per row and in nats:   L(x, λ) = E_q[log p(x|z)] − Σ_ℓ KL(q_ℓ ‖ p_ℓ)   (Marino 2018, equation 2)

and what an inference model may read of it at the present λ: its gradient and the precision-weighted errors. Sums over
rows, means over samples; no statistic crosses a row, so a row's answer cannot depend on its neighbours.

Shapes: B rows, S samples, D latent size, X size of x, L levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.gaussian import DiagonalGaussian, Posterior
from models.generative.base import Conditional

Noise = tuple[Tensor, ...]
"""Standard normal ε, one (B, S, D) per level."""


@dataclass(frozen=True)
class ElboTerms:
    """elbo = log_likelihood − kl. `log_likelihood` is (B,), the mean over samples; `kl` is (B, L)."""

    log_likelihood: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """(B,), nats, larger is better."""
        return self.log_likelihood - self.kl.sum(-1)

    def annealed(self, kl_weight: float | Tensor) -> Tensor:
        """log_likelihood − weight · kl: the objective during KL annealing, (B,)."""
        return self.log_likelihood - kl_weight * self.kl.sum(-1)


@dataclass(frozen=True)
class Evidence:
    """What the objective says at λ: the gradient of +ELBO per level, and the errors if they were asked for.

    Attributes:
        grad: per level (∂L/∂μ, ∂L/∂log σ), each (B, D), of the row's own ELBO.
        error_x: ε_x = (x − μ_x)/σ_x², (B, X). `error_z`: per level ε_z = (z − μ_p)/σ_p², (B, D). None unless asked.
        terms: the objective at λ, by the same noise.
    """

    grad: Posterior
    error_x: Tensor | None
    error_z: tuple[Tensor, ...] | None
    terms: ElboTerms


def elbo(generative: Conditional, q: Posterior, x: Tensor, mask: Tensor, noise: Noise) -> ElboTerms:
    """The ELBO's two parts at λ = q, by reparameterised samples (equation 2; KL in closed form at every level)."""
    z = tuple(level.rsample(noise[i]) for i, level in enumerate(q))
    return ElboTerms(generative.expected_log_likelihood(q, z, x, mask), generative.kl(q, z))


def log_weights(generative: Conditional, q: Posterior, x: Tensor, mask: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """log p(x|z) and log p(x, z) − log q(z) of every sample, both (B, S): the mean of exp of the latter estimates p(x)."""
    z = tuple(level.rsample(noise[i]) for i, level in enumerate(q))
    log_likelihood = generative(z).log_prob(x, mask)
    log_q = torch.stack([level.log_prob(z[i]) for i, level in enumerate(q)]).sum(0)
    return log_likelihood, log_likelihood + generative.log_prior(z) - log_q


def importance_log_px(log_weight: Tensor) -> Tensor:
    """log p(x) ≈ log mean_s w_s over the last axis, in nats (Burda 2016): (B, S) -> (B,)."""
    return torch.logsumexp(log_weight, -1) - math.log(log_weight.shape[-1])


def evidence(
    generative: Conditional, q: Posterior, x: Tensor, mask: Tensor, noise: Noise, *, errors: bool = False, kl_weight: float | Tensor = 1.0
) -> Evidence:
    """∇λ L at λ = q, one gradient per row (that of the sum over rows), and the errors if wanted.

    The generative model's parameters get no gradient, and nothing is written to any `.grad`.
    """

    def objective(parameters: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        terms = elbo(generative, tuple(DiagonalGaussian(*pair) for pair in parameters), x, mask, noise)
        return terms.annealed(kl_weight).sum(), (terms.log_likelihood, terms.kl)

    parameters = tuple((level.mu, level.log_sigma) for level in q)
    grad, (log_likelihood, kl) = torch.func.grad(objective, has_aux=True)(parameters)
    error_x, error_z = prediction_errors(generative, q, x, mask, noise) if errors else (None, None)
    return Evidence(tuple(DiagonalGaussian(*pair) for pair in grad), error_x, error_z, ElboTerms(log_likelihood, kl))


def prediction_errors(generative: Conditional, q: Posterior, x: Tensor, mask: Tensor, noise: Noise) -> tuple[Tensor, tuple[Tensor, ...]]:
    """ε_x and ε_z, means over samples (Marino 2018, §4): forward passes only."""
    z = tuple(level.rsample(noise[i]) for i, level in enumerate(q))
    return generative(z).error(x, mask), generative.prior_errors(z)
