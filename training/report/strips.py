"""Reconstruction strips (Marino 2018, Fig. 5): E[x | z = μ] of a few rows after 0, 1, 2, … refinement steps, beside x.

Shapes: B rows, X size of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.gaussian import Posterior
from models.generative.base import Generative
from training.evaluate import MEASURE_SEED, measured
from training.report.race import Refiner

STEPS = (0, 1, 2, 3, 5, 16)


@dataclass(frozen=True, eq=False)
class Strips:
    """What the figure shows.

    Attributes:
        steps: the number of steps behind each column. shape: (height, width) of an image.
        rows: which validation rows these are.
        means: E[x | z = μ], (B, len(steps), X); x: (B, X).
        elbo: (B, len(steps)) in nats, by `samples` fresh samples.
    """

    steps: list[int]
    rows: list[int]
    shape: tuple[int, int]
    means: NDArray[np.float32]
    x: NDArray[np.float32]
    elbo: list[list[float]]
    samples: int


def strips(
    refiner: Refiner, x: Tensor, rows: Sequence[int], shape: tuple[int, int], samples: int = 100, wanted: Sequence[int] = STEPS
) -> Strips:
    """Refines x (B, X), the validation rows with the given indices, and decodes the posterior mean at each wanted step."""
    generator = torch.Generator(x.device).manual_seed(MEASURE_SEED)
    kept = [state.q for k, state in enumerate(refiner.states(x, wanted[-1])) if k in set(wanted)]
    means = torch.stack([reconstruct(refiner.generative, q) for q in kept], 1)
    elbo = torch.stack([measured(refiner.generative, q, x, samples, generator) for q in kept], 1)
    return Strips(list(wanted), list(rows), shape, means.cpu().numpy(), x.cpu().numpy(), elbo.tolist(), samples)


def reconstruct(generative: Generative, q: Posterior) -> Tensor:
    """E[x | z = μ] at the posterior mean of every level: (B, X)."""
    with torch.no_grad():
        return generative(tuple(level.mu.unsqueeze(1) for level in q)).mean[:, 0]
