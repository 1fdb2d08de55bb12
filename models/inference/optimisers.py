"""Conventional optimisers on λ = (μ, log σ), as inference models: what a learned refiner is measured against (Marino 2018, Fig. 4).

They ascend the ELBO along ∇λ L of each row, from the prior. log σ is projected to the range every Gaussian here keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.architecture import OptimiserArchitecture
from models.gaussian import LOG_SIGMA_LIMIT, DiagonalGaussian, Posterior
from models.inference.base import Context, Inference, State
from models.objective import Evidence


def _flat(levels: Posterior) -> Tensor:
    return torch.cat([part for level in levels for part in (level.mu, level.log_sigma)], -1)


def _shaped(flat: Tensor, like: Posterior) -> Posterior:
    sizes = [size for level in like for size in (level.mu.shape[-1],) * 2]
    parts = flat.split(sizes, -1)
    return tuple(
        DiagonalGaussian(mu, log_sigma.clamp(-LOG_SIGMA_LIMIT, LOG_SIGMA_LIMIT))
        for mu, log_sigma in zip(parts[::2], parts[1::2], strict=True)
    )


class Optimiser(Inference):
    """Base of the four: no parameters, no context; `update` turns a gradient into a step on the flat λ (B, n)."""

    def __init__(self, architecture: OptimiserArchitecture, x_size: int, latent_sizes: tuple[int, ...]):
        super().__init__()
        self.architecture = architecture

    moments: tuple[str, ...] = ()

    def context(self, x: Tensor, mask: Tensor, past: Tensor | None = None) -> Context:
        return {}

    def init(self, context: Context, prior: Posterior) -> State:
        flat = _flat(prior)
        return State(prior, {name: torch.zeros_like(flat) for name in self.moments} | {"step": flat.new_zeros(flat.shape[0], 1)})

    def step(self, state: State, context: Context, evidence: Evidence) -> State:
        memory = dict(state.memory)
        memory["step"] = memory["step"] + 1
        change = self.update(_flat(evidence.grad), memory)
        return State(_shaped(_flat(state.q) + self.architecture.learning_rate * change, state.q), memory)

    def update(self, g: Tensor, memory: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


class SGD(Optimiser):
    """λ ← λ + η g."""

    def update(self, g: Tensor, memory: dict[str, Tensor]) -> Tensor:
        return g


class Momentum(Optimiser):
    """v ← m v + g,  λ ← λ + η v."""

    moments = ("velocity",)

    def update(self, g: Tensor, memory: dict[str, Tensor]) -> Tensor:
        memory["velocity"] = self.architecture.momentum * memory["velocity"] + g
        return memory["velocity"]


class RMSProp(Optimiser):
    """s ← d s + (1 − d) g²,  λ ← λ + η g/√s (Tieleman & Hinton 2012), d = 0.99."""

    moments = ("square",)
    decay = 0.99

    def update(self, g: Tensor, memory: dict[str, Tensor]) -> Tensor:
        memory["square"] = self.decay * memory["square"] + (1 - self.decay) * g.square()
        return g / (memory["square"].sqrt() + 1e-8)


class Adam(Optimiser):
    """Kingma & Ba 2015, Algorithm 1, ascending: bias-corrected first and second moments."""

    moments = ("mean", "square")

    def update(self, g: Tensor, memory: dict[str, Tensor]) -> Tensor:
        b1, b2 = self.architecture.momentum, self.architecture.decay
        memory["mean"] = b1 * memory["mean"] + (1 - b1) * g
        memory["square"] = b2 * memory["square"] + (1 - b2) * g.square()
        mean = memory["mean"] / (1 - b1 ** memory["step"])
        square = memory["square"] / (1 - b2 ** memory["step"])
        return mean / (square.sqrt() + 1e-8)
