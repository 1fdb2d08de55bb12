"""What the figures of a sequence model show: frames before and after each inference step, and what each step is worth.

B sequences, T frames, K steps, X entries per frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.catalogue import FilterModel
from models.filtering import filter_frame, filter_sequence, random_noise
from models.likelihood import Gaussian
from training.data.ragged import Ragged
from training.data.sequence_batches import ResidentSequences, evaluation_batches

SEED = 6
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FramesSeen:
    """Some frames of one sequence as the model saw them.

    Attributes:
        x: (T, X). mean: of p(x_t | z_t) at q's mean after 0 … K steps, (T, K + 1, X); before the first step q is the prediction.
        std: the same shape, of the likelihood (√(p (1 − p)) of a Bernoulli). elbo: (T, K + 1), nats.
    """

    x: Floats
    mean: Floats
    std: Floats
    elbo: Floats


@dataclass(frozen=True)
class Gains:
    """Mean ELBO per frame: `within[k]` after k of the K steps at each frame; `across[i]` when every frame gets `steps[i]`."""

    within: list[float]
    steps: list[int]
    across: list[float]
    frames: int


def frames_seen(model: FilterModel, sequence: NDArray[np.generic], first: int, count: int, steps: int) -> FramesSeen:
    """Filters one sequence (T, X) and keeps frames first … first + count − 1."""
    x = torch.from_numpy(np.ascontiguousarray(sequence)).float()
    (latent,) = model.generative.latent_sizes
    generator = torch.Generator().manual_seed(SEED)
    state = model.generative.start(1)
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for t in range(min(len(x), first + count)):
            row, seen = x[t : t + 1], torch.ones_like(x[t : t + 1])
            noise = torch.randn(steps + 1, 1, 1, latent, generator=generator)
            result = filter_frame(model.generative, model.inference, state, row, seen, [(part,) for part in noise[:-1]], (noise[-1],))
            if t >= first:
                beliefs = [step.state.q for step in result.steps] + [result.q]
                shown = [result.frame((q[0].mu.unsqueeze(1),)) for q in beliefs]
                means = torch.cat([likelihood.mean[:, 0] for likelihood in shown])
                stds = torch.cat([_std(likelihood)[:, 0] for likelihood in shown])
                kept.append((row[0], means, stds, result.trace[0]))
            state = result.advance.state
    stacked = [torch.stack(parts).numpy() for parts in zip(*kept, strict=True)]
    return FramesSeen(*stacked)


def gains(model: FilterModel, part: Ragged, trained: int, most: int, samples: int, sequences: int, frames: int) -> Gains:
    """What a step is worth, on the first frames of the first sequences."""
    pieces = ResidentSequences.of(Ragged.of([part[i][:frames] for i in range(min(sequences, len(part)))]))
    (latent,) = model.generative.latent_sizes
    wanted = sorted({0, 1, 2, 3, 4, 6, 8, trained, most} & set(range(most + 1))) if model.inference.refines else [0]
    within: list[float] = []
    across, total = [], 0.0
    for count in wanted:
        generator, summed, total = torch.Generator().manual_seed(SEED), torch.zeros(count + 1, dtype=torch.float64), 0.0
        for batch in evaluation_batches(pieces, min(128, len(pieces))):
            mask = batch.mask[..., None].expand_as(batch.x)
            noise = random_noise(generator, len(batch.x), latent, count, samples)
            filtered = filter_sequence(model.generative, model.inference, batch.x, mask, noise)
            summed += (filtered.trace * batch.mask[..., None]).sum((0, 1)).double()
            total += float(batch.mask.sum())
        across.append(float(summed[-1]) / total)
        if count == trained or not model.inference.refines:
            within = (summed / total).tolist()
    return Gains(within, wanted, across, int(total))


def _std(likelihood: object) -> Tensor:
    if isinstance(likelihood, Gaussian):
        return likelihood.log_sigma.exp()
    mean: Tensor = likelihood.mean  # type: ignore[attr-defined]
    return (mean * (1 - mean)).sqrt()
