"""Two figures of a filter that cost more than running it: a bound by many particles, and the amortization gap of single frames.

B sequences, T frames, K steps, N particles, S samples, X entries per frame, D latent size. All in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.architecture import OptimiserArchitecture
from models.catalogue import FilterModel, infer_with
from models.filtering import filter_frame
from models.gaussian import Posterior
from models.generative.filter import FilterState, Frame
from models.inference.base import State
from models.objective import elbo
from models.refinement import refine_once

GAP_RATES, GAP_UPDATES, GAP_SAMPLES, GAP_MEASURED = (0.05, 0.01), 100, 4, 200


def fivo_bound(model: FilterModel, x: Tensor, mask: Tensor, steps: int, particles: int, generator: torch.Generator) -> Tensor:
    """log of an unbiased estimate of p(x) by N particles that q proposes (FIVO, Maddison 2017), (B,) float64.

    Resampled, row by row, when fewer than half of the particles are effective. Its mean is at most log p(x), and with N = 1
    it is the ELBO's.

    Args:
        x: (B, T, X). mask: (B, T), which entries are frames. steps: K of every frame.
    """
    rows, frames = mask.shape
    generative, (latent,) = model.generative, model.generative.latent_sizes
    state = generative.start(rows * particles)
    log_w, total = x.new_zeros(rows, particles, dtype=torch.float64), x.new_zeros(rows, dtype=torch.float64)
    with torch.no_grad():
        for t in range(frames):
            x_t = x[:, t].repeat_interleave(particles, 0)
            seen = torch.ones_like(x_t)
            noise = torch.randn(steps + 1, len(x_t), 1, latent, generator=generator, dtype=x.dtype)
            result = filter_frame(generative, model.inference, state, x_t, seen, [(part,) for part in noise[:-1]], (noise[-1],))
            z = result.advance.z.unsqueeze(1)
            log_weight = result.frame((z,)).log_prob(x_t, seen) + result.frame.log_prior((z,)) - result.q[0].log_prob(z)
            log_w = log_w + log_weight.double().reshape(rows, particles) * mask[:, t, None]
            total, log_w, state = _resampled(total, log_w, result.advance.state, mask[:, t] > 0, generator)
    return total + torch.logsumexp(log_w, 1) - math.log(particles)


def _resampled(
    total: Tensor, log_w: Tensor, state: FilterState, alive: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, FilterState]:
    rows, particles = log_w.shape
    share = torch.softmax(log_w, 1)
    poor = alive & (1 / share.square().sum(1) < particles / 2)
    if not bool(poor.any()):
        return total, log_w, state
    drawn = torch.multinomial(share, particles, replacement=True, generator=generator)
    chosen = torch.where(poor[:, None], drawn, torch.arange(particles).expand(rows, -1))
    index = (chosen + torch.arange(rows)[:, None] * particles).flatten()
    total = total + torch.where(poor, torch.logsumexp(log_w, 1) - math.log(particles), 0.0)
    return total, torch.where(poor[:, None], 0.0, log_w), {name: value[index] for name, value in state.items()}


def amortization_gap(
    model: FilterModel, x: Tensor, mask: Tensor, steps: int, samples: int, wanted: set[int], generator: torch.Generator
) -> float:
    """Nats per frame between a frame's own optimum and λ_K, mean over the frames `wanted` of every sequence.

    The optimum is the better of λ_K and where Adam with fresh noise comes from it; which one is better is decided by other
    samples than those that measure it (Cremer 2018). The state goes on from λ_K.

    Args:
        x: (B, T, X). mask: (B, T), which entries are frames. steps, samples: K and S of every frame.
    """
    generative, (latent,) = model.generative, model.generative.latent_sizes
    state, gained, count = generative.start(len(x)), 0.0, 0.0

    def noise(size: int) -> Tensor:
        return torch.randn(len(x), size, latent, generator=generator, dtype=x.dtype)

    with torch.no_grad():
        for t in range(max(wanted) + 1):
            parts = [(noise(samples),) for _ in range(steps)]
            result = filter_frame(generative, model.inference, state, x[:, t], torch.ones_like(x[:, t]), parts, (noise(samples),))
            state = result.advance.state
            if t in wanted:
                adam = _climbed(result.frame, result.q, x[:, t], generator)
                choosing, measuring = noise(GAP_MEASURED), noise(GAP_MEASURED)
                better = _value(result.frame, adam, x[:, t], choosing) > _value(result.frame, result.q, x[:, t], choosing)
                gain = _value(result.frame, adam, x[:, t], measuring) - _value(result.frame, result.q, x[:, t], measuring)
                gained += float((gain * better * mask[:, t]).sum())
                count += float(mask[:, t].sum())
    return gained / count


def _climbed(frame: Frame, q: Posterior, x: Tensor, generator: torch.Generator) -> Posterior:
    """Each row's λ after Adam at a large and then a small rate."""
    seen = torch.ones_like(x)
    for rate in GAP_RATES:
        adam = infer_with(frame.model, OptimiserArchitecture("adam", learning_rate=rate))
        belief = State(q, adam.init({}, q).memory)
        for _ in range(GAP_UPDATES):
            half = torch.randn(len(x), GAP_SAMPLES, frame.latent_sizes[0], generator=generator, dtype=x.dtype)
            belief, _ = refine_once(frame, adam, x, seen, {}, belief, (torch.cat([half, -half], 1),))
        q = belief.q
    return q


def _value(frame: Frame, q: Posterior, x: Tensor, noise: Tensor) -> Tensor:
    return elbo(frame, q, x, torch.ones_like(x), (noise,)).elbo
