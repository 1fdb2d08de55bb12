"""One update of φ and θ, as published (Marino 2018, Algorithm 1 in training).

    for i = 1 … K:   λ_i = f_φ(x, sg[λ_{i−1}], sg[∇λ L(λ_{i−1})])
    φ descends  −Σ_i w_i L(λ_i),   each term through its own call of f only;   θ descends  −L(λ_K).      w_i = 1/K

∇λ L(λ_i), which the next call of f reads, is also all that the loss at λ_i sends into φ. So each λ_i costs one decoder
pass forward and one back to λ, and φ's backward runs once at the end from these gradients. Sums over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.catalogue import LatentModel
from models.gaussian import DiagonalGaussian, Posterior
from models.inference.base import State
from models.objective import ElboTerms, Noise, elbo, evidence
from models.refinement import begin

FreshNoise = Callable[[], Noise]


@dataclass(frozen=True)
class Seen:
    """What one decoder pass of an update saw, detached: the objective at λ_i (B,), and |∇λ L|, mean over the batch and levels' entries."""

    elbo: Tensor
    log_likelihood: Tensor
    grad_mu: Tensor
    grad_log_sigma: Tensor


def fresh_noise(
    latent_sizes: tuple[int, ...], rows: int, samples: int, antithetic: bool, device: torch.device, generator: torch.Generator | None
) -> Noise:
    """Standard normal ε, (B, S, D) per level; antithetic: sample 2j + 1 is minus sample 2j.

    Raises:
        ValueError: antithetic samples come in pairs, and `samples` is odd.
    """
    if antithetic and samples % 2:
        raise ValueError(f"samples: {samples} is odd, and antithetic samples come in pairs")
    noise = []
    for size in latent_sizes:
        if antithetic:
            half = torch.randn(rows, samples // 2, 1, size, device=device, generator=generator)
            noise.append(torch.cat([half, -half], 2).reshape(rows, samples, size))
        else:
            noise.append(torch.randn(rows, samples, size, device=device, generator=generator))
    return tuple(noise)


def accumulate(
    model: LatentModel,
    x: Tensor,
    mask: Tensor,
    refinement_steps: int,
    noise: FreshNoise,
    kl_weight: float | Tensor = 1.0,
    late: bool = False,
    greedy: int | None = None,
) -> list[Seen]:
    """Adds the gradients of one update to φ and θ; gives what was seen after 0 … K steps (direct: one entry).

    `noise()` must give fresh noise at every call. `late`: w_i ∝ i instead of 1/K, so that the small gains of late steps
    count beside the large ones of the first (Lin 2019, IODINE). `greedy`: only after so many first steps is there a
    stop-gradient; the later terms also teach the calls of f before them what these leave to them, ∇λ L staying a mere input
    (no second derivatives; Andrychowicz 2016). None: after every step, as published.
    """
    if not model.inference.refines:
        state, _ = begin(model.generative, model.inference, x, mask)
        terms = elbo(model.generative, state.q, x, mask, noise())
        for level in state.q:
            level.mu.retain_grad()
            level.log_sigma.retain_grad()
        (-terms.annealed(kl_weight).sum()).backward()
        return [_seen(terms, _gradients(state.q))]

    state, context = begin(model.generative, model.inference, x, mask)
    state = _leaf(state)
    weights = [2 * (i + 1) / (refinement_steps + 1) / refinement_steps if late else 1 / refinement_steps for i in range(refinement_steps)]
    trace: list[Seen] = []
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for k in range(refinement_steps):
        with torch.no_grad():
            # θ gets nothing from here: func.grad differentiates λ alone, and no_grad keeps θ out of the graph
            seen = evidence(model.generative, state.q, x, mask, noise(), errors=model.inference.reads_errors, kl_weight=kl_weight)
        trace.append(_seen(seen.terms, _pairs(seen.grad)))
        if outputs:
            gradients += [part * -weights[k - 1] for part in _pairs(seen.grad)]
        new = model.inference.step(state, context, seen)
        outputs += _pairs(new.q)
        # stop-gradient between steps: no term reaches φ through an earlier call
        state = _leaf(new) if greedy is None or k < greedy else new

    last = _leaf(state, requires_grad=True)
    terms = elbo(model.generative, last.q, x, mask, noise())
    (-terms.annealed(kl_weight).sum()).backward()
    descent = _gradients(last.q)
    trace.append(_seen(terms, descent))
    torch.autograd.backward(outputs, gradients + [part * weights[-1] for part in descent])
    return trace


def _pairs(q: Posterior) -> list[Tensor]:
    return [part for level in q for part in (level.mu, level.log_sigma)]


def _gradients(q: Posterior) -> list[Tensor]:
    """What the last backward left on λ: the gradient of −L."""
    gradients = [part.grad for part in _pairs(q)]
    assert all(grad is not None for grad in gradients)
    return [grad for grad in gradients if grad is not None]


def _leaf(state: State, requires_grad: bool = False) -> State:
    q = tuple(DiagonalGaussian(*(part.detach().requires_grad_(requires_grad) for part in _pairs((level,)))) for level in state.q)
    return State(q, {name: value.detach() for name, value in state.memory.items()})


def _seen(terms: ElboTerms, gradients: list[Tensor]) -> Seen:
    sizes = [torch.cat([part.detach().abs().mean().reshape(1) for part in gradients[i::2]]).mean() for i in (0, 1)]
    return Seen(terms.elbo.detach(), terms.log_likelihood.detach(), *sizes)
