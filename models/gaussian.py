"""Diagonal Gaussians by (μ, log σ): posteriors q(z|x), priors p(z), and Gaussian outputs.

Shapes: B rows, S samples, D latent size. A posterior has μ of shape (B, D); its samples are (B, S, D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_SIGMA_LIMIT = 8.0
"""log σ of every learned Gaussian stays within ±8: σ between 3e-4 and 3e3, so σ² and 1/σ² are harmless in float32."""

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def bound_log_sigma(raw: Tensor) -> Tensor:
    """The one smooth bound on log σ: 8·tanh(raw/8). Slope 1 at zero, so small values pass unchanged."""
    return LOG_SIGMA_LIMIT * torch.tanh(raw / LOG_SIGMA_LIMIT)


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(μ, diag σ²). `mu` and `log_sigma` have the same shape, (..., D)."""

    mu: Tensor
    log_sigma: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε for standard normal ε of shape (B, S, D): reparameterised samples (B, S, D)."""
        return self.mu.unsqueeze(-2) + self.log_sigma.exp().unsqueeze(-2) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log density in nats of samples z (B, S, D), summed over D: (B, S)."""
        mu, log_sigma = self.mu.unsqueeze(-2), self.log_sigma.unsqueeze(-2)
        standard = (z - mu) * torch.exp(-log_sigma)
        return (-0.5 * standard.square() - log_sigma - HALF_LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (B,)."""
        return (self.log_sigma + HALF_LOG_2PI + 0.5).sum(-1)

    def kl(self, prior: DiagonalGaussian) -> Tensor:
        """KL(self ‖ prior) in nats, summed over D: (B,).

        With d = log σ_q − log σ_p it is Σ ½(e^{2d} − 1) − d + ½((μ_q − μ_p)/σ_p)²; expm1 keeps it exact near d = 0.
        """
        d = self.log_sigma - prior.log_sigma
        shift = (self.mu - prior.mu) * torch.exp(-prior.log_sigma)
        return (0.5 * torch.expm1(2 * d) - d + 0.5 * shift.square()).sum(-1)

    def kl_to_standard(self) -> Tensor:
        """KL(self ‖ N(0, I)) in nats, (B,)."""
        return (0.5 * torch.expm1(2 * self.log_sigma) - self.log_sigma + 0.5 * self.mu.square()).sum(-1)

    def detach(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.mu.detach(), self.log_sigma.detach())


Posterior = tuple[DiagonalGaussian, ...]
"""λ: one Gaussian per latent level, level 0 next to the data."""


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats, summed over the last axis."""
    return (-0.5 * z.square() - HALF_LOG_2PI).sum(-1)
