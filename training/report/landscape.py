"""The 2-D landscape (Marino 2018, Figs 1 and 3): log p(x, z) of one digit over z ∈ [−5, 5]², and how μ travels on it.

Shapes: X size of x, G grid points a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.catalogue import LatentModel
from models.generative.base import Generative
from training.config import RefinementConfig
from training.evaluate import MEASURE_SEED, measured
from training.report.race import RATES, Refiner, optimiser, search_rate

LIMIT, SPACING = 5.0, 0.05
STEPS = 16
Points = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Path:
    """μ after 0, 1, … steps, (steps + 1, 2), and the ELBO there in nats. `rate`: learning rate, None for the learned refiner."""

    mu: Points
    elbo: list[float]
    rate: float | None = None


@dataclass(frozen=True, eq=False)
class Landscape:
    """What the figure shows.

    Attributes:
        axis: the G coordinates of both sides. log_joint: log p(x, z) in nats, (G, G), first axis z₂.
        peak: the grid point with the highest value.
        x: the digit (X,), shape (height, width); row: which validation row it is.
    """

    axis: Points
    log_joint: Points
    peak: tuple[float, float]
    learned: Path
    ascent: Path
    x: NDArray[np.float32]
    shape: tuple[int, int]
    row: int


def landscape(
    model: LatentModel,
    refinement: RefinementConfig,
    x: Tensor,
    row: int,
    shape: tuple[int, int],
    *,
    tuning: Tensor,
    count: int = STEPS,
    spacing: float = SPACING,
    rates: Sequence[float] = RATES,
    quiet: bool = False,
) -> Landscape:
    """Everything about validation row `row` of x (B, X).

    Plain gradient ascent on λ gets as many steps and the same noise as the learned refiner, and the learning rate whose
    ELBO after them is highest on the rows `tuning`.

    Raises:
        ValueError: z is not two-dimensional.
    """
    if model.generative.latent_sizes != (2,):
        raise ValueError(f"landscape: z of sizes {model.generative.latent_sizes}, but only one level of size 2 can be drawn")
    digit = x[row : row + 1]
    axis, values = grid(model.generative, digit, spacing, quiet)
    top, right = np.unravel_index(int(values.argmax()), values.shape)
    rate, _ = search_rate(model, "sgd", refinement, tuning, count, 100, rates, quiet)
    return Landscape(
        axis,
        values,
        (float(axis[right]), float(axis[top])),
        path(Refiner(model, model.inference, refinement), digit, count),
        path(optimiser(model, "sgd", rate, refinement), digit, count, rate),
        digit[0].cpu().numpy(),
        shape,
        row,
    )


def grid(generative: Generative, x: Tensor, spacing: float, quiet: bool = False) -> tuple[Points, Points]:
    """The coordinates (G,) of one side, and log p(x, z) = log p(x|z) + log p(z) of x (1, X) on the grid, (G, G) in nats."""
    axis = torch.linspace(-LIMIT, LIMIT, round(2 * LIMIT / spacing) + 1, device=x.device)
    lines = []
    with torch.no_grad():
        for z2 in tqdm(axis, desc="landscape", leave=False, disable=quiet):
            z = (torch.stack([axis, z2.expand_as(axis)], -1).unsqueeze(0),)
            lines.append((generative(z).log_prob(x, torch.ones_like(x)) + generative.log_prior(z))[0])
    return axis.cpu().double().numpy(), torch.stack(lines).cpu().double().numpy()


def path(refiner: Refiner, x: Tensor, count: int, rate: float | None = None) -> Path:
    """μ of x (1, X) after 0 … `count` steps, and its ELBO by 1,000 fresh samples."""
    generator = torch.Generator(x.device).manual_seed(MEASURE_SEED)
    states = list(refiner.states(x, count))
    elbo = [float(measured(refiner.generative, state.q, x, 1000, generator)) for state in states]
    return Path(torch.cat([state.q[0].mu for state in states]).cpu().double().numpy(), elbo, rate)
