"""What a sequence model must answer, frame by frame (Marino, Cvitkovic & Yue 2018, section 3):

    p(x_≤T, z_≤T) = Π_t p(z_t | state_{t−1}) p(x_t | z_t, state_{t−1}),      state_t = transition(state_{t−1}, x_t, z_t)

Given its past, a frame is a static latent-variable model: `Frame` has the contract of one (`Conditional`), so the
objective, the refinement loop and every inference model work on it unchanged. State is a value: named arrays of one row
per sequence, passed in and returned.

Shapes: B rows, S samples, D latent size, X size of x, T frames. Everything in nats; x as it comes (PCM in −1…1, notes 0/1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.gaussian import DiagonalGaussian, Posterior
from models.likelihood import Likelihood

FilterState = dict[str, Tensor]
"""What a filter remembers, by name, each (B, n)."""


@dataclass(frozen=True)
class Prediction:
    """One frame before it is seen: p(z_t | past), (B, D), and what emission and transition need of the past, each (B, n)."""

    prior: DiagonalGaussian
    context: dict[str, Tensor]


class FilterGenerative(nn.Module, ABC):
    """p(z_t | past), p(x_t | z_t, past) and the transition, with one latent level.

    The mean and standard deviation of the training frames live here, as parameters that no optimiser moves, so that
    whoever calls (a program too) hands over x as it comes.
    """

    summary_size: int

    def __init__(self, x_size: int, latent: int):
        super().__init__()
        self.x_size = x_size
        self.latent_sizes = (latent,)
        self.x_mean = nn.Parameter(torch.zeros(x_size), requires_grad=False)
        self.x_std = nn.Parameter(torch.ones(x_size), requires_grad=False)

    @abstractmethod
    def begin(self) -> FilterState:
        """The state before the first frame, one row: each (1, n)."""

    @abstractmethod
    def context(self, state: FilterState) -> dict[str, Tensor]:
        """What emission and transition need of the past, each (B, n)."""

    @abstractmethod
    def prior(self, state: FilterState, context: dict[str, Tensor]) -> DiagonalGaussian:
        """p(z_t | past), (B, D)."""

    def predict(self, state: FilterState) -> Prediction:
        """What is expected of the next frame."""
        context = self.context(state)
        return Prediction(self.prior(state, context), context)

    @abstractmethod
    def emission(self, context: dict[str, Tensor], z: Tensor) -> Likelihood:
        """p(x_t | z_t, past) for samples z (B, S, D), with one entry per row and sample."""

    @abstractmethod
    def transition(self, context: dict[str, Tensor], x: Tensor, mask: Tensor, q: DiagonalGaussian, z: Tensor) -> FilterState:
        """The state after a frame. x (B, X) has its unobserved entries (mask 0) filled in; z (B, D) is drawn from q."""

    @abstractmethod
    def summary(self, context: dict[str, Tensor]) -> Tensor:
        """What a custom-designed filter reads of the past, (B, summary_size)."""

    def standardise(self, x: Tensor) -> Tensor:
        """x in units of the training frames: (x − mean)/std, the form in which networks read it."""
        return (x - self.x_mean) / self.x_std

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Takes over the training frames' mean and standard deviation: numbers, or (X,)."""
        with torch.no_grad():
            self.x_mean.copy_(mean)
            self.x_std.copy_(std)

    def start(self, rows: int) -> FilterState:
        """`begin` for several sequences at once."""
        return {name: value.expand(rows, -1) for name, value in self.begin().items()}

    def prior_kl(self, prediction: Prediction, q: DiagonalGaussian) -> Tensor:
        """KL(q ‖ p(z_t | past)) in nats, (B,)."""
        return q.kl(prediction.prior)

    def log_prior(self, prediction: Prediction, z: Tensor) -> Tensor:
        """log p(z_t | past) of samples (B, S, D) in nats: (B, S)."""
        return prediction.prior.log_prob(z)

    def prior_error(self, prediction: Prediction, z: Tensor) -> Tensor:
        """ε_z = (z − μ_p)/σ_p², mean over samples: (B, D)."""
        return (z.mean(1) - prediction.prior.mu) * torch.exp(-2 * prediction.prior.log_sigma)

    def expected_log_likelihood(self, prediction: Prediction, q: DiagonalGaussian, z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """E_q[log p(x_t | z_t, past)] in nats, (B,): the mean over samples unless a closed form is known."""
        return self.emission(prediction.context, z).log_prob(x, mask).mean(-1)

    def foresee(self, state: FilterState, x: Tensor) -> tuple[FilterState, FilterState] | None:
        """Where x (B, T, X) alone decides all of the states but their array `z`: what `context`, `prior` and `summary` read of them
        before each frame, (B, T, n) each, so that it can be computed for all frames at once, and the state after the last, both
        without z. None where the past of z enters."""
        return None

    def unroll(self, state: FilterState, x: Tensor, mask: Tensor, q: DiagonalGaussian, z: Tensor) -> list[FilterState]:
        """The states before each frame and after the last, T + 1 of them, when every z is already known.

        A model may override it to do in one product what does not depend on the state (tests compare the two).

        Args:
            x, mask: (B, T, X). q: (B, T, D). z: (B, T, D).
        """
        states = [state]
        for t in range(x.shape[1]):
            context = self.context(states[-1])
            q_t = DiagonalGaussian(q.mu[:, t], q.log_sigma[:, t])
            states.append(self.transition(context, x[:, t], mask[:, t], q_t, z[:, t]))
        return states


class Frame:
    """One frame given its past, as a static latent-variable model (the contract `Conditional`)."""

    def __init__(self, model: FilterGenerative, prediction: Prediction):
        self.model, self.prediction = model, prediction
        self.latent_sizes = model.latent_sizes

    def __call__(self, z: tuple[Tensor, ...]) -> Likelihood:
        return self.model.emission(self.prediction.context, z[0])

    def expected_log_likelihood(self, q: Posterior, z: tuple[Tensor, ...], x: Tensor, mask: Tensor) -> Tensor:
        return self.model.expected_log_likelihood(self.prediction, q[0], z[0], x, mask)

    def kl(self, q: Posterior, z: tuple[Tensor, ...]) -> Tensor:
        return self.model.prior_kl(self.prediction, q[0]).unsqueeze(-1)

    def log_prior(self, z: tuple[Tensor, ...]) -> Tensor:
        return self.model.log_prior(self.prediction, z[0])

    def prior_errors(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.model.prior_error(self.prediction, z[0]),)

    def prior_parameters(self, like: Tensor) -> Posterior:
        """λ₀: inference starts at the prediction (AVF, section 3.2)."""
        return (self.prediction.prior,)

    def transition(self, x: Tensor, mask: Tensor, q: Posterior, z: tuple[Tensor, ...]) -> FilterState:
        """The state after the frame; of several samples the first goes on."""
        return self.model.transition(self.prediction.context, x, mask, q[0], z[0][:, 0])
