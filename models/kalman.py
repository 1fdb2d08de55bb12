"""The exact Kalman filter (Kalman 1960), as an oracle over whole sequences.

    z_t = A z_{t−1} + w,  w ~ N(0, Q);      x_t = C z_t + v,  v ~ N(0, R);      z_0 ~ N(m_0, V_0)

    predict   m⁻ = A m,  P = A V Aᵀ + Q
    correct   K = P Cᵀ (C P Cᵀ + R)⁻¹,   m = m⁻ + K (x − C m⁻),   V = (I − K C) P (I − K C)ᵀ + K R Kᵀ

The last form stays symmetric and positive (Joseph). Shapes: B rows, T frames, D latent size, X size of x. Any precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearSystem:
    """A (D, D), C (X, D), Q (D, D), R (X, X), and the belief about z_0: m_0 (D,), V_0 (D, D)."""

    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    mean: Tensor
    covariance: Tensor

    def simulate(self, rows: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences drawn from the system: z (B, T, D) and x (B, T, X)."""

        def normal(covariance: Tensor) -> Tensor:
            noise = torch.randn(rows, len(covariance), generator=generator, dtype=covariance.dtype)
            return noise @ torch.linalg.cholesky(covariance).mT

        z = self.mean + normal(self.covariance)
        latents, observations = [], []
        for _ in range(frames):
            z = z @ self.A.mT + normal(self.Q)
            latents.append(z)
            observations.append(z @ self.C.mT + normal(self.R))
        return torch.stack(latents, 1), torch.stack(observations, 1)


@dataclass(frozen=True)
class Filtered:
    """What the filter knows after each frame, and before it (`predicted_`).

    Attributes:
        log_likelihood: log p(x_t | x_<t) over observed entries, in nats, (B, T): their sum is log p(x).
        mean, predicted_mean: (B, T, D). covariance, predicted_covariance: (B, T, D, D).
    """

    log_likelihood: Tensor
    mean: Tensor
    covariance: Tensor
    predicted_mean: Tensor
    predicted_covariance: Tensor


def kalman_filter(system: LinearSystem, x: Tensor, mask: Tensor) -> Filtered:
    """Filters x (B, T, X); an entry with mask 0 is missing."""
    mean, covariance = system.mean.expand(len(x), -1), system.covariance.expand(len(x), -1, -1)
    frames = []
    for x_t, mask_t in zip(x.unbind(1), mask.unbind(1), strict=True):
        predicted_mean, predicted = mean @ system.A.mT, system.A @ covariance @ system.A.mT + system.Q
        log_likelihood, mean, covariance = correct(system, predicted_mean, predicted, x_t, mask_t)
        frames.append((log_likelihood, mean, covariance, predicted_mean, predicted))
    return Filtered(*(torch.stack(parts, 1) for parts in zip(*frames, strict=True)))


def correct(system: LinearSystem, mean: Tensor, covariance: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One frame x (B, X) against the prediction N(mean, covariance): log p(x_t | x_<t), and the belief after it."""
    # a missing entry becomes an observation of nothing: a row of C that is zero, noise of its own, no surprise
    observed = torch.diag_embed(mask)
    C = observed @ system.C
    R = observed @ system.R @ observed + torch.diag_embed(1 - mask)
    residual = ((x - mean @ system.C.mT) * mask).unsqueeze(-1)
    factor = torch.linalg.cholesky(C @ covariance @ C.mT + R)
    gain = torch.cholesky_solve(C @ covariance, factor).mT
    white = torch.linalg.solve_triangular(factor, residual, upper=False).squeeze(-1)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_likelihood = -0.5 * (white.square().sum(-1) + log_det + mask.sum(-1) * math.log(2 * math.pi))
    left = torch.eye(len(system.A), dtype=x.dtype, device=x.device) - gain @ C
    return log_likelihood, mean + (gain @ residual).squeeze(-1), left @ covariance @ left.mT + gain @ R @ gain.mT
