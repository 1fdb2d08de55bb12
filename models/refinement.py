"""Iterative amortized inference (Marino, Yue & Mandt 2018, Algorithm 1, at test time):

    λ₀ = prior;   repeat   λ ← f(x, λ, ∇λ L(x, λ; ε)),   ε fresh at every step.

The loop cannot tell a learned refiner from plain gradient ascent. The noise that drives the gradient and the noise that
measures are two streams: with one ε kept for all steps λ overfits it, and the reported ELBO rises while the true one falls.

Shapes: B rows, S samples, D latent size, X size of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from models.gaussian import DiagonalGaussian, Posterior
from models.generative.base import Conditional
from models.inference.base import Context, Inference, State
from models.objective import Evidence, Noise, elbo, evidence

TOLERANCE_WINDOW = 4
"""A row has converged when its best measured ELBO rose by less than the tolerance over this many steps."""


class Status(IntEnum):
    """Where a row stands; the names are the service's stop reasons."""

    RUNNING = 0
    STEPS = 1
    CONVERGED = 2
    NONFINITE = 3


def refine_once(
    generative: Conditional, inference: Inference, x: Tensor, mask: Tensor, context: Context, state: State, noise: Noise
) -> tuple[State, Tensor]:
    """One step of every row, and the norm of ∇λ L before it, (B,): see `refine_seen`."""
    new, norm, _ = refine_seen(generative, inference, x, mask, context, state, noise)
    return new, norm


def refine_seen(
    generative: Conditional,
    inference: Inference,
    x: Tensor,
    mask: Tensor,
    context: Context,
    state: State,
    noise: Noise,
    kl_weight: float | Tensor = 1.0,
) -> tuple[State, Tensor, Evidence]:
    """One step of every row, the norm of ∇λ L before it, (B,), and the evidence it was made from.

    A row of which nothing is observed keeps its state: there is no evidence to refine by. A row whose step is not
    finite keeps its state too, and its norm is NaN.
    """
    seen = evidence(generative, state.q, x, mask, noise, errors=inference.reads_errors, kl_weight=kl_weight)
    new = inference.step(state, context, seen)
    norm = torch.linalg.vector_norm(torch.cat([g for level in seen.grad for g in (level.mu, level.log_sigma)], -1), dim=-1)
    # 0 · v is 0 for finite v and NaN otherwise, so one sum finds any bad entry of a row
    flaw = 0 * (norm + torch.cat([part for level in new.q for part in (level.mu, level.log_sigma)], -1).sum(-1))
    finite = flaw == 0
    accept = (finite & (mask.sum(-1) > 0)).unsqueeze(-1)
    q = tuple(
        DiagonalGaussian(torch.where(accept, b.mu, a.mu), torch.where(accept, b.log_sigma, a.log_sigma))
        for a, b in zip(state.q, new.q, strict=True)
    )
    memory = {name: torch.where(accept, new.memory[name], state.memory[name]) for name in state.memory}
    return State(q, memory), norm + flaw, seen


def begin(generative: Conditional, inference: Inference, x: Tensor, mask: Tensor) -> tuple[State, Context]:
    """λ₀ and the context of every row of x (B, X)."""
    context = inference.context(x, mask)
    return inference.init(context, generative.prior_parameters(x)), context


def steps(
    generative: Conditional, inference: Inference, x: Tensor, mask: Tensor, count: int, noise: Callable[[int], Noise]
) -> Iterator[State]:
    """The states after 0, 1, … `count` steps; `noise(k)` gives fresh noise for step k. No parameter gets a gradient."""
    with torch.no_grad():
        state, context = begin(generative, inference, x, mask)
        yield state
        for k in range(count if inference.refines else 0):
            state, _ = refine_once(generative, inference, x, mask, context, state, noise(k))
            yield state


@dataclass(frozen=True)
class Refined:
    """The answer of `refine`, one entry per row.

    Attributes:
        state: the last state of each row; best: the λ with the best measured ELBO so far.
        trace: (B, 1 + steps done by any row) measured ELBO in nats after each step; a row that stopped repeats its last value.
        steps_used: (B,) steps done. status: (B,) Status.
    """

    state: State
    best: Posterior
    trace: Tensor
    steps_used: Tensor
    status: Tensor


def refine(
    generative: Conditional,
    inference: Inference,
    x: Tensor,
    mask: Tensor,
    count: int,
    noise: Callable[[int], Noise],
    measure: Noise,
    tolerance: float | None = None,
) -> Refined:
    """Up to `count` steps per row, measured after every step by `measure`; each row stops on its own.

    Args:
        noise: fresh noise for step k. measure: another stream, fixed for the request; at least 8 samples with a tolerance.
        tolerance: nats; a row stops when its best measured ELBO rose by less over the last 4 steps.
    """
    with torch.no_grad():
        state, context = begin(generative, inference, x, mask)
        value = elbo(generative, state.q, x, mask, measure).elbo
        best, best_value = state.q, value
        trace, best_trace = [value], [value]
        status = torch.full_like(value, Status.RUNNING, dtype=torch.long)
        used = torch.zeros_like(status)
        for k in range(count if inference.refines else 0):
            running = status == Status.RUNNING
            if not bool(running.any()):
                break
            proposal, norm = refine_once(generative, inference, x, mask, context, state, noise(k))
            status = torch.where(running & ~torch.isfinite(norm), Status.NONFINITE, status)
            running = status == Status.RUNNING
            state = _choose(running, proposal, state)
            used = used + running
            value = torch.where(running, elbo(generative, state.q, x, mask, measure).elbo, value)
            better = value > best_value
            # not torch.maximum: a measure that is not finite must not become the best for good
            best, best_value = _choose(better, State(state.q), State(best)).q, torch.where(better, value, best_value)
            trace.append(value)
            best_trace.append(best_value)
            if tolerance is not None and k + 1 >= TOLERANCE_WINDOW:
                gain = best_trace[-1] - best_trace[-1 - TOLERANCE_WINDOW]
                status = torch.where(running & (gain < tolerance), Status.CONVERGED, status)
        done = Status.STEPS if inference.refines else Status.CONVERGED
        status = torch.where(status == Status.RUNNING, done, status)
        return Refined(state, best, torch.stack(trace, -1), used, status)


def _choose(condition: Tensor, a: State, b: State) -> State:
    """Row by row a where the condition (B,) holds, else b."""
    c = condition.unsqueeze(-1)
    q = tuple(DiagonalGaussian(torch.where(c, p.mu, r.mu), torch.where(c, p.log_sigma, r.log_sigma)) for p, r in zip(a.q, b.q, strict=True))
    return State(q, {name: torch.where(c, a.memory[name], b.memory[name]) for name in b.memory})
