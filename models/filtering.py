"""Amortized variational filtering (Marino, Cvitkovic & Yue 2018, Algorithm 1): predict, refine, advance, frame by frame,

    λ₀ = p(z_t | past);   repeat K times   λ ← f(λ, ∇λ L_t);   z_t ~ q;   state ← transition(state, x_t, z_t)

F = −Σ_t L_t, each L_t = E_q[log p(x_t | z_t, past)] − KL(q_t ‖ p(z_t | past)) given the z drawn before. A frame of which
nothing is observed takes no steps and keeps λ = prior; unobserved entries are fed on as the mean of p(x_t | z_t, past).

Shapes: B rows (sequences), T frames, S samples, D latent size, X size of x. The noise of the steps and that of `advance`
are two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.gaussian import DiagonalGaussian, Posterior
from models.generative.filter import FilterGenerative, FilterState, Frame
from models.inference.base import Context, Inference, State
from models.likelihood import Likelihood
from models.objective import ElboTerms, Evidence, Noise
from models.refinement import refine_seen


@dataclass(frozen=True)
class Step:
    """One refinement as it happened: the state and evidence that the inference model read, and |∇λ L| (B,)."""

    state: State
    evidence: Evidence
    grad_norm: Tensor


@dataclass(frozen=True)
class Advance:
    """A frame when it is over.

    Attributes:
        state: of the sequence, after it. terms: the objective at the final λ. likelihood: p(x_t | z_t, past), (B, S, X).
        x: the frame as it was fed on, unobserved entries filled, (B, X). z: (B, D), the draw that was fed on.
    """

    state: FilterState
    terms: ElboTerms
    likelihood: Likelihood
    x: Tensor
    z: Tensor


@dataclass(frozen=True)
class FrameResult:
    """A whole frame: how λ was refined, its value, and the frame's end."""

    frame: Frame
    steps: tuple[Step, ...]
    q: Posterior
    advance: Advance

    @property
    def trace(self) -> Tensor:
        """The ELBO after 0 … K steps, each by noise that λ has not seen: (B, K + 1), nats."""
        return torch.stack([*(step.evidence.terms.elbo for step in self.steps), self.advance.terms.elbo], -1)


def observed(mask: Tensor) -> Tensor:
    """Which rows have any observed entry, (B, 1)."""
    return mask.sum(-1, keepdim=True) > 0


def predict(generative: FilterGenerative, state: FilterState) -> Frame:
    return Frame(generative, generative.predict(state))


def read(frame: Frame, inference: Inference, x: Tensor, mask: Tensor) -> Context:
    """What inference reads of the frame itself, x standardised."""
    return inference.context(frame.model.standardise(x), mask, frame.model.summary(frame.prediction.context))


def init(frame: Frame, inference: Inference, context: Context, mask: Tensor) -> State:
    """λ₀: a custom-designed filter's answer, or the prediction; a row of which nothing is observed has the prediction."""
    state = inference.init(context, frame.prior_parameters(mask))
    if inference.refines:
        return state
    seen, prior = observed(mask), frame.prediction.prior
    q = state.q[0]
    return State((DiagonalGaussian(torch.where(seen, q.mu, prior.mu), torch.where(seen, q.log_sigma, prior.log_sigma)),))


def advance(frame: Frame, q: Posterior, x: Tensor, mask: Tensor, noise: Noise) -> Advance:
    """Ends the frame with the posterior q: measures it, draws z and moves the state on."""
    z = (q[0].rsample(noise[0]),)
    likelihood: Likelihood = frame(z)
    # what is fed on in the place of missing entries is data: it carries no gradient
    filled = torch.where(mask > 0, x, likelihood.mean[:, 0].detach())
    terms = ElboTerms(frame.expected_log_likelihood(q, z, x, mask), frame.kl(q, z))
    return Advance(frame.transition(filled, mask, q, z), terms, likelihood, filled, z[0][:, 0])


def filter_frame(
    generative: FilterGenerative,
    inference: Inference,
    state: FilterState,
    x: Tensor,
    mask: Tensor,
    step_noise: Sequence[Noise],
    advance_noise: Noise,
) -> FrameResult:
    """One frame of every row: predict, as many refinements as there is noise for them, advance. x, mask: (B, X)."""
    frame = predict(generative, state)
    context = read(frame, inference, x, mask)
    belief = init(frame, inference, context, mask)
    taken = []
    for noise in step_noise if inference.refines else ():
        new, norm, seen = refine_seen(frame, inference, x, mask, context, belief, noise)
        taken.append(Step(belief, seen, norm))
        belief = new
    return FrameResult(frame, tuple(taken), belief.q, advance(frame, belief.q, x, mask, advance_noise))


@dataclass(frozen=True)
class FilteredSequence:
    """What filtering said of each frame. Padding frames hold numbers too: weigh them with zero.

    Attributes:
        trace: (B, T, K + 1), ELBO of the frame after 0 … K steps. log_likelihood, kl: (B, T), at the last. All in nats.
        q, prior: (B, T, D). reconstruction: mean of p(x_t | z_t, past), (B, T, X). state: after the last frame.
    """

    trace: Tensor
    log_likelihood: Tensor
    kl: Tensor
    q: DiagonalGaussian
    prior: DiagonalGaussian
    reconstruction: Tensor
    state: FilterState

    @property
    def elbo(self) -> Tensor:
        """(B, T), nats, after the last step."""
        return self.log_likelihood - self.kl


FrameNoise = Callable[[int], tuple[Sequence[Noise], Noise]]
"""Frame index -> (fresh noise for each step, noise for `advance`)."""


def random_noise(
    generator: torch.Generator | None, rows: int, latent: int, steps: int, samples: int = 1, device: torch.device | None = None
) -> FrameNoise:
    """Standard normal noise from a generator, frame by frame."""

    def noise(frame: int) -> tuple[Sequence[Noise], Noise]:
        drawn = torch.randn(steps + 1, rows, samples, latent, generator=generator, device=device)
        return [(part,) for part in drawn[:-1]], (drawn[-1],)

    return noise


def filter_sequence(
    generative: FilterGenerative,
    inference: Inference,
    x: Tensor,
    mask: Tensor,
    noise: FrameNoise,
    state: FilterState | None = None,
) -> FilteredSequence:
    """Filters x (B, T, X), from `state` or from the beginning. No parameter gets a gradient."""
    with torch.no_grad():
        state = generative.start(len(x)) if state is None else state
        results = []
        for t in range(x.shape[1]):
            step_noise, advance_noise = noise(t)
            result = filter_frame(generative, inference, state, x[:, t], mask[:, t], step_noise, advance_noise)
            state = result.advance.state
            results.append(result)
        q = stacked([result.q[0] for result in results])
        prior = stacked([result.frame.prediction.prior for result in results])
        return FilteredSequence(
            trace=torch.stack([result.trace for result in results], 1),
            log_likelihood=torch.stack([result.advance.terms.log_likelihood for result in results], 1),
            kl=torch.stack([result.advance.terms.kl.sum(-1) for result in results], 1),
            q=q,
            prior=prior,
            reconstruction=torch.stack([result.advance.likelihood.mean.mean(1) for result in results], 1),
            state=state,
        )


def stacked(gaussians: Sequence[DiagonalGaussian]) -> DiagonalGaussian:
    """(B, D) each -> (B, T, D)."""
    return DiagonalGaussian(torch.stack([g.mu for g in gaussians], 1), torch.stack([g.log_sigma for g in gaussians], 1))
