"""Amortized variational filtering against the exact Kalman filter: one trained step finds the gain (papers: AVF, section 3).

The state carries the belief and the expectation is in closed form, so nothing is random: the inference network (gradient
and λ read raw, gated, no layer norm over a latent that small) is trained by L-BFGS on a fixed set of frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.architecture import IterativeArchitecture
from models.catalogue import FilterModel
from models.filtering import FilteredSequence, filter_sequence
from models.generative.filter import FilterState
from models.generative.linear_gaussian import LinearGaussian
from models.inference.iterative import IterativeInference
from models.kalman import Filtered, LinearSystem, kalman_filter
from models.objective import Noise
from tests.models.small_filters import linear_system
from training.sequence_step import Chunk, accumulate_sequence


def beliefs(system: LinearSystem, filtered: Filtered) -> FilterState:
    """What is known before each frame, one row per frame: the oracle's (m, V)."""
    rows = len(filtered.mean)
    mean = torch.cat([system.mean.expand(rows, 1, -1), filtered.mean[:, :-1]], 1)
    covariance = torch.cat([system.covariance.expand(rows, 1, -1, -1), filtered.covariance[:, :-1]], 1)
    return {"m": mean.flatten(0, 1), "V": covariance.flatten(0, 1).flatten(1)}


def no_noise(rows: int, latent: int, dtype: torch.dtype) -> tuple[Sequence[Noise], Noise]:
    zero = torch.zeros(rows, 1, latent, dtype=dtype)
    return [(zero,)], (zero,)


def trained(system: LinearSystem, width: int, frames: int, iterations: int, generator: torch.Generator) -> FilterModel:
    """φ after L-BFGS on frames drawn from the system, each with the oracle's belief before it; θ is the system itself."""
    x_size, latent = system.C.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inference = IterativeInference(IterativeArchitecture(("q", "grad_raw"), (width,)), x_size, (latent,)).to(system.A.dtype)
    model = FilterModel(LinearGaussian.of(system).requires_grad_(False), inference)
    _, x = system.simulate(frames // 10, 10, generator)
    state = beliefs(system, kalman_filter(system, x, torch.ones_like(x)))
    x = x.reshape(-1, 1, x_size)
    noise = torch.zeros(1, 2, len(x), 1, latent, dtype=x.dtype)
    chunk = Chunk(x, torch.ones_like(x), torch.full((len(x), 1), 1 / len(x), dtype=x.dtype), noise, state)
    optimiser = torch.optim.LBFGS(
        inference.parameters(),
        max_iter=iterations,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        return -accumulate_sequence(model, chunk).elbo[..., -1].mean()

    optimiser.step(loss)
    return model


def filtered(model: FilterModel, x: Tensor, mask: Tensor, state: FilterState | None = None) -> FilteredSequence:
    latent = model.generative.latent_sizes[0]
    return filter_sequence(model.generative, model.inference, x, mask, lambda _: no_noise(len(x), latent, x.dtype), state)


def rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def test_one_trained_step_agrees_with_the_exact_filter_in_one_dimension(generator: torch.Generator) -> None:
    system = linear_system()
    model = trained(system, 16, 2000, 300, generator)
    _, x = system.simulate(200, 30, generator)
    mask = torch.ones_like(x)
    mask[::2, 5:8] = 0
    exact, ours = kalman_filter(system, x, mask), filtered(model, x, mask)
    std = exact.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert rms((ours.q.mu - exact.mean) / std) < 0.01
    assert rms(ours.elbo - exact.log_likelihood) < 0.01
    # where nothing is seen the belief is the prediction, and costs nothing
    assert rms((ours.q.mu - exact.predicted_mean)[::2, 5:8] / std[::2, 5:8]) < 0.01
    assert not ours.elbo[::2, 5:8].any()


def test_an_untrained_step_does_not(generator: torch.Generator) -> None:
    system = linear_system()
    model = trained(system, 16, 20, 0, generator)
    _, x = system.simulate(50, 30, generator)
    exact, ours = kalman_filter(system, x, torch.ones_like(x)), filtered(model, x, torch.ones_like(x))
    assert rms((ours.q.mu - exact.mean) / exact.covariance[..., 0].sqrt()) > 0.1


@pytest.mark.parametrize(
    ("iterations", "tolerance"), [(300, 0.15), pytest.param(1500, 0.01, marks=pytest.mark.slow)], ids=["fast", "trained to the end"]
)
def test_the_mean_of_one_trained_step_is_exact_in_two_dimensions(iterations: int, tolerance: float, generator: torch.Generator) -> None:
    system = linear_system(2, 2)
    model = trained(system, 32, 1000, iterations, generator)
    _, x = system.simulate(200, 20, generator)
    exact = kalman_filter(system, x, torch.ones_like(x))
    # frame by frame from the oracle's belief
    rows = x.reshape(-1, 1, 2)
    ours = filtered(model, rows, torch.ones_like(rows), beliefs(system, exact))
    std = exact.covariance.diagonal(dim1=-2, dim2=-1).sqrt().reshape(-1, 1, 2)
    assert rms((ours.q.mu - exact.mean.reshape(-1, 1, 2)) / std) < tolerance
    # a diagonal q is a bound, and not a tight one: the best variance it has is 1/diag(P⁻¹ + CᵀR⁻¹C)
    assert bool((ours.elbo <= exact.log_likelihood.reshape(-1, 1) + 1e-9).all())
