"""What a generative model p(x, z) must answer. One file per model beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from models.gaussian import Posterior
from models.likelihood import Likelihood


class Conditional(Protocol):
    """What the objective and the refinement loop need of p(x, z): a static model, or one frame of a filter given its past."""

    @property
    def latent_sizes(self) -> tuple[int, ...]: ...

    def __call__(self, z: tuple[Tensor, ...]) -> Likelihood:
        """p(x|z) with one entry per row and sample."""
        ...

    def expected_log_likelihood(self, q: Posterior, z: tuple[Tensor, ...], x: Tensor, mask: Tensor) -> Tensor:
        """E_q[log p(x|z)] over observed entries, in nats: (B,). From the samples z unless a closed form is known."""
        ...

    def kl(self, q: Posterior, z: tuple[Tensor, ...]) -> Tensor: ...

    def log_prior(self, z: tuple[Tensor, ...]) -> Tensor: ...

    def prior_errors(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...

    def prior_parameters(self, like: Tensor) -> Posterior: ...


class Generative(nn.Module, ABC):
    """p(x|z) and p(z) over L latent levels, level 0 next to the data.

    Shapes: B rows, S samples, D latent size of a level, X size of x. Samples of a level are (B, S, D).
    """

    x_size: int
    latent_sizes: tuple[int, ...]

    @abstractmethod
    def forward(self, z: tuple[Tensor, ...]) -> Likelihood:
        """p(x|z) with one entry per row and sample."""

    def expected_log_likelihood(self, q: Posterior, z: tuple[Tensor, ...], x: Tensor, mask: Tensor) -> Tensor:
        """E_q[log p(x|z)] in nats, (B,): the mean over the samples z."""
        likelihood: Likelihood = self(z)
        return likelihood.log_prob(x, mask).mean(-1)

    @abstractmethod
    def kl(self, q: Posterior, z: tuple[Tensor, ...]) -> Tensor:
        """KL(q_ℓ ‖ p_ℓ) in nats per row and level, (B, L); priors that depend on levels above use their samples."""

    @abstractmethod
    def log_prior(self, z: tuple[Tensor, ...]) -> Tensor:
        """log p(z) in nats, summed over levels: (B, S)."""

    @abstractmethod
    def prior_errors(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """ε_z = (z − μ_p)/σ_p² per level, mean over samples: (B, D)."""

    @abstractmethod
    def prior_sample(self, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """z ~ p(z) from standard normal noise, per level (B, S, D)."""

    @abstractmethod
    def prior_parameters(self, like: Tensor) -> Posterior:
        """λ₀: the prior as a posterior with one entry per row of `like` (Marino 2018: inference starts at the prior)."""
