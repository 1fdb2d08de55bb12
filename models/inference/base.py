"""One contract for every way to infer λ: a direct encoder, a learned refiner, conventional optimisers.

    context = inference.context(x, mask)              what depends on x alone, computed once
    state   = inference.init(context, prior)          λ₀ and whatever the method keeps between steps
    state   = inference.step(state, context, evidence)   λ ← f(x, λ, ∇λ L)

A state is a value: passed in and returned, never kept by the module. Shapes: B rows, D latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from models.gaussian import Posterior
from models.objective import Evidence

Context = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """λ, and what an inference model keeps between steps (hidden state, moments, step index), each (B, n)."""

    q: Posterior
    memory: dict[str, Tensor] = field(default_factory=dict)


class Inference(nn.Module, ABC):
    """Refines a posterior. A subclass whose `refines` is False gives its whole answer in `init`."""

    refines: bool = True
    reads_errors: bool = False
    encodings: tuple[str, ...] = ()

    @abstractmethod
    def context(self, x: Tensor, mask: Tensor, past: Tensor | None = None) -> Context:
        """What later steps need of x (B, X), by name, each (B, n). `past` (B, n): a filter's summary of earlier frames, if any."""

    @abstractmethod
    def init(self, context: Context, prior: Posterior) -> State:
        """λ₀. `prior` is the generative model's prior (static) or prediction (filtering), one entry per row."""

    @abstractmethod
    def step(self, state: State, context: Context, evidence: Evidence) -> State:
        """One refinement from the evidence at `state.q`."""
