"""The linear-Gaussian model as a filter whose state is the belief (m, V) about z_{t−1} (models/kalman.py has the oracle):

    z_t = A z_{t−1} + w,  w ~ N(0, Q),      x_t = C z_t + v,  v ~ N(0, R), R diagonal

so a frame's prior is N(A m, P), P = A V Aᵀ + Q, and the best q has the Kalman filter's mean. Its variance is the Kalman
filter's for D = 1, where the belief after a frame is q itself. A diagonal q cannot be for D > 1 (its best variance is
1/diag(P⁻¹ + CᵀR⁻¹C)), so there V follows the Riccati recursion and only the mean comes from λ. The expectation of the
log-likelihood is taken in closed form: no noise reaches the ELBO.

Everything is written in products and sums, so that it exports. Shapes: B rows, S samples, D
latent size, X size of x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import LinearGaussianArchitecture
from models.gaussian import HALF_LOG_2PI, DiagonalGaussian
from models.generative.filter import FilterGenerative, FilterState, Prediction
from models.kalman import LinearSystem
from models.likelihood import Gaussian, Likelihood


class LinearGaussian(FilterGenerative):
    """State: m (B, D) and V (B, D·D). Q and V_0 by their lower-triangular factors, R by log σ per entry."""

    def __init__(self, architecture: LinearGaussianArchitecture):
        super().__init__(architecture.x_size, architecture.latent)
        size, latent = architecture.x_size, architecture.latent
        self.A = nn.Parameter(0.9 * torch.eye(latent))
        self.C = nn.Parameter(torch.eye(size, latent) + 0.1)
        self.process = nn.Parameter(0.5 * torch.eye(latent))
        self.log_sigma = nn.Parameter(torch.full((size,), -0.5))
        self.first_mean = nn.Parameter(torch.zeros(1, latent))
        self.first = nn.Parameter(torch.eye(latent))
        self.summary_size = latent + latent**2

    @staticmethod
    def of(system: LinearSystem) -> LinearGaussian:
        """The model of a known system, in its precision.

        Raises:
            ValueError: R is not diagonal.
        """
        if not torch.equal(system.R, torch.diag(system.R.diagonal())):
            raise ValueError("R: must be diagonal, since p(x|z) is a diagonal Gaussian")
        model = LinearGaussian(LinearGaussianArchitecture(*system.C.shape)).to(system.A.dtype)
        with torch.no_grad():
            model.A.copy_(system.A)
            model.C.copy_(system.C)
            model.process.copy_(torch.linalg.cholesky(system.Q))
            model.log_sigma.copy_(0.5 * system.R.diagonal().log())
            model.first_mean.copy_(system.mean)
            model.first.copy_(torch.linalg.cholesky(system.covariance))
        return model

    def system(self) -> LinearSystem:
        """The same system, for the exact filter."""
        process, first = self.process.tril(), self.first.tril()
        R = torch.diag(torch.exp(2 * self.log_sigma))
        return LinearSystem(self.A, self.C, process @ process.mT, R, self.first_mean[0], first @ first.mT)

    def begin(self) -> FilterState:
        first = self.first.tril()
        return {"m": self.first_mean, "V": (first @ first.mT).reshape(1, -1)}

    def context(self, state: FilterState) -> dict[str, Tensor]:
        process = self.process.tril()
        P = self.A @ self._square(state["V"]) @ self.A.mT + process @ process.mT
        return {"m": state["m"] @ self.A.mT, "P": P.flatten(1)}

    def prior(self, state: FilterState, context: dict[str, Tensor]) -> DiagonalGaussian:
        """The marginals of N(A m, P); `prior_kl` and `log_prior` know the whole of it."""
        return DiagonalGaussian(context["m"], 0.5 * self._square(context["P"]).diagonal(dim1=-2, dim2=-1).log())

    def emission(self, context: dict[str, Tensor], z: Tensor) -> Likelihood:
        mu = z @ self.C.mT
        return Gaussian(mu, self.log_sigma + torch.zeros_like(mu))

    def transition(self, context: dict[str, Tensor], x: Tensor, mask: Tensor, q: DiagonalGaussian, z: Tensor) -> FilterState:
        if self.latent_sizes[0] == 1:
            return {"m": q.mu, "V": torch.exp(2 * q.log_sigma)}
        return {"m": q.mu, "V": self.corrected(self._square(context["P"]), mask)[0].flatten(1)}

    def corrected(self, P: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The belief's covariance after a frame of which entries were seen, and its inverse, P⁻¹ + Σ c cᵀ / r: (B, D, D) each."""
        weight = mask * torch.exp(-2 * self.log_sigma)
        information = inverse_and_log_det(P)[0] + (self.C.mT * weight.unsqueeze(1)) @ self.C
        return inverse_and_log_det(information)[0], information

    def summary(self, context: dict[str, Tensor]) -> Tensor:
        """All that is known before the frame: m and P."""
        return torch.cat([context["m"], context["P"]], -1)

    def prior_kl(self, prediction: Prediction, q: DiagonalGaussian) -> Tensor:
        if self.latent_sizes[0] == 1:
            return q.kl(prediction.prior)
        # ½ [tr(P⁻¹ S) + dᵀ P⁻¹ d − D + log det P − log det S] with S = diag σ_q², d = μ_q − m
        precision, log_det = inverse_and_log_det(self._square(prediction.context["P"]))
        d = (q.mu - prediction.prior.mu).unsqueeze(-1)
        trace = (precision.diagonal(dim1=-2, dim2=-1) * torch.exp(2 * q.log_sigma) - 1).sum(-1)
        return 0.5 * (trace + (d.mT @ precision @ d).flatten(1).sum(-1) + log_det) - q.log_sigma.sum(-1)

    def log_prior(self, prediction: Prediction, z: Tensor) -> Tensor:
        precision, log_det = inverse_and_log_det(self._square(prediction.context["P"]))
        d = z - prediction.prior.mu.unsqueeze(1)
        return -0.5 * (((d @ precision) * d).sum(-1) + log_det.unsqueeze(1)) - self.latent_sizes[0] * HALF_LOG_2PI

    def prior_error(self, prediction: Prediction, z: Tensor) -> Tensor:
        precision, _ = inverse_and_log_det(self._square(prediction.context["P"]))
        return ((z - prediction.prior.mu.unsqueeze(1)) @ precision).mean(1)

    def expected_log_likelihood(self, prediction: Prediction, q: DiagonalGaussian, z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        # E_q[log N(x; C z, R)] = log N(x; C μ, R) − ½ Σ_i (C² σ²)_i / r_i
        spread = (torch.exp(2 * q.log_sigma) @ self.C.mT.square()) * torch.exp(-2 * self.log_sigma)
        at_mean = self.emission(prediction.context, q.mu.unsqueeze(1)).log_prob(x, mask)
        return at_mean.squeeze(1) - 0.5 * (spread * mask).sum(-1)

    def _square(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1, self.latent_sizes[0], self.latent_sizes[0])


def inverse_and_log_det(P: Tensor) -> tuple[Tensor, Tensor]:
    """P⁻¹ (B, D, D) and log det P (B,) of small symmetric positive matrices by Gauss–Jordan: they need no pivoting."""
    size = P.shape[-1]
    unit = torch.eye(size, dtype=P.dtype, device=P.device)
    tableau = torch.cat([P, unit.expand_as(P)], -1)
    pivots = []
    for i in range(size):
        pivots.append(tableau[:, i, i])
        row = tableau[:, i : i + 1] / tableau[:, i : i + 1, i : i + 1]
        tableau = tableau - (tableau[:, :, i : i + 1] - unit[i].unsqueeze(-1)) * row
    return tableau[:, :, size:], torch.stack(pivots, -1).log().sum(-1)
