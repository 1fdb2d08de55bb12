"""One update of φ and θ, as published (Marino 2018, Algorithm 1 in training).

    for i = 1 … K:   λ_i = f_φ(x, sg[λ_{i−1}], sg[∇λ L(λ_{i−1})])
    φ descends  −Σ_i w_i L(λ_i),   each term through its own call of f only;   θ descends  −L(λ_K).      w_i = 1/K

∇λ L(λ_i), which the next call of f reads, is also all that the loss at λ_i sends into φ. So each λ_i costs one decoder
pass forward and one back to λ, and φ's backward runs once at the end from these gradients, over the rows of all steps at once, with
the matrix products that the steps have made already (training/kept_products.py). Sums over rows.

An option, not published: from some step on λ_{i−1} is not held fixed (`linked`), so that a step also learns what it leaves to the next;
∇λ L stays a mere input. φ's backward then goes from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.catalogue import LatentModel
from models.gaussian import DiagonalGaussian, Posterior
from models.inference.base import Context, State
from models.objective import ElboTerms, Evidence, Noise, elbo, evidence
from models.refinement import begin
from training.kept_products import Give, Keep

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
    linked: int | None = None,
) -> list[Seen]:
    """Adds the gradients of one update to φ and θ; gives what was seen after 0 … K steps (direct: one entry).

    `noise()` must give fresh noise at every call. `late`: w_i ∝ i instead of 1/K, so that the small gains of late steps
    count beside the large ones of the first (Lin 2019, IODINE). `linked`: later losses reach φ through λ_i too, for every i above it; the
    answers of the first `linked` steps are thus as published.
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
    if linked is not None:
        return _accumulate_linked(model, x, mask, (state, context), weights, noise, kl_weight, linked)
    trace: list[Seen] = []
    steps: list[tuple[State, Evidence]] = []
    products: list[list[Tensor]] = []
    for _ in range(refinement_steps):
        # nothing is learned from here: func.grad differentiates λ alone, and no_grad keeps θ and φ out of the graph
        with torch.no_grad(), Keep(model.inference) as kept:
            seen = evidence(model.generative, state.q, x, mask, noise(), errors=model.inference.reads_errors, kl_weight=kl_weight)
            new = model.inference.step(state, context, seen)
        trace.append(_seen(seen.terms, _pairs(seen.grad)))
        steps.append((state, seen))
        products.append(kept.products)
        state = new

    last = _leaf(state, requires_grad=True)
    terms = elbo(model.generative, last.q, x, mask, noise())
    (-terms.annealed(kl_weight).sum()).backward()
    descent = _gradients(last.q)
    trace.append(_seen(terms, descent))
    # the loss at the answer of step k is seen by step k + 1, as +∇λ L, or after the last, as −∇λ L
    later = [[-part for part in _pairs(seen.grad)] for _, seen in steps[1:]] + [descent]
    signals = [torch.cat([weight * part for weight, part in zip(weights, parts, strict=True)]) for parts in zip(*later, strict=True)]
    with Give([torch.cat(parts) for parts in zip(*products, strict=True)]):
        # each term reaches φ through its own call only: what a step reads is fixed, but for its share of x
        answer = model.inference.step(
            _joined_states([before for before, _ in steps]),
            {name: torch.cat([value] * refinement_steps) for name, value in context.items()},
            _joined_evidence([seen for _, seen in steps]),
        )
    torch.autograd.backward(_pairs(answer.q), signals)
    return trace


def _accumulate_linked(
    model: LatentModel,
    x: Tensor,
    mask: Tensor,
    begun: tuple[State, Context],
    weights: Sequence[float],
    noise: FreshNoise,
    kl_weight: float | Tensor,
    linked: int,
) -> list[Seen]:
    """The same with each λ_i, i > `linked`, part of one graph."""
    state, context = begun
    trace: list[Seen] = []
    answers: list[list[Tensor]] = []
    signals: list[list[Tensor]] = []
    for i, weight in enumerate([0.0, *weights[:-1]]):
        if i <= linked:
            state = _leaf(state)
        fixed = _leaf(state)
        with torch.no_grad():
            seen = evidence(model.generative, fixed.q, x, mask, noise(), errors=model.inference.reads_errors, kl_weight=kl_weight)
        trace.append(_seen(seen.terms, _pairs(seen.grad)))
        if i:
            signals.append([-weight * part for part in _pairs(seen.grad)])
        state = model.inference.step(state, context, seen)
        answers.append(_pairs(state.q))
    last = _leaf(state, requires_grad=True)
    terms = elbo(model.generative, last.q, x, mask, noise())
    (-terms.annealed(kl_weight).sum()).backward()
    descent = _gradients(last.q)
    trace.append(_seen(terms, descent))
    signals.append([weights[-1] * part for part in descent])
    torch.autograd.backward([part for parts in answers for part in parts], [part for parts in signals for part in parts])
    return trace


def _joined_states(states: Sequence[State]) -> State:
    """The rows of all of them, one after the other."""
    memory = {name: torch.cat([state.memory[name] for state in states]) for name in states[0].memory}
    return State(_joined([state.q for state in states]), memory)


def _joined_evidence(evidences: Sequence[Evidence]) -> Evidence:
    errors_x = [seen.error_x for seen in evidences if seen.error_x is not None]
    errors_z = [seen.error_z for seen in evidences if seen.error_z is not None]
    terms = [(seen.terms.log_likelihood, seen.terms.kl) for seen in evidences]
    return Evidence(
        _joined([seen.grad for seen in evidences]),
        torch.cat(errors_x) if errors_x else None,
        tuple(torch.cat(level) for level in zip(*errors_z, strict=True)) if errors_z else None,
        ElboTerms(*(torch.cat(part) for part in zip(*terms, strict=True))),
    )


def _joined(posteriors: Sequence[Posterior]) -> Posterior:
    pairs = [torch.cat(parts) for parts in zip(*map(_pairs, posteriors), strict=True)]
    return tuple(DiagonalGaussian(mu, log_sigma) for mu, log_sigma in zip(pairs[::2], pairs[1::2], strict=True))


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
