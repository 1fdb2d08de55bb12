"""The optimisers on λ against torch.optim, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.architecture import OptimiserArchitecture
from models.catalogue import INFERENCE
from models.gaussian import LOG_SIGMA_LIMIT, DiagonalGaussian
from models.inference.base import Inference
from models.objective import Evidence

Draw = Callable[..., Tensor]
B, D = 5, 3

TORCH: dict[str, tuple[float, Callable[[list[Tensor], float], torch.optim.Optimizer]]] = {
    "sgd": (0.05, lambda values, rate: torch.optim.SGD(values, rate, maximize=True)),
    "momentum": (0.02, lambda values, rate: torch.optim.SGD(values, rate, momentum=0.9, maximize=True)),
    "rmsprop": (0.05, lambda values, rate: torch.optim.RMSprop(values, rate, alpha=0.99, maximize=True)),
    "adam": (0.1, lambda values, rate: torch.optim.Adam(values, rate, betas=(0.9, 0.999), maximize=True)),
}


def optimiser(kind: str, rate: float) -> Inference:
    return INFERENCE[kind](OptimiserArchitecture(kind, rate), 4, (D,))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TORCH)
def test_climbing_a_quadratic_equals_torch(kind: str, normal: Draw) -> None:
    rate, theirs = TORCH[kind]
    centre, curvature, start = normal(B, 2 * D), normal(B, 2 * D).abs() + 0.1, normal(B, 2 * D)
    reference = start.clone()
    opt = theirs([reference], rate)
    inference = optimiser(kind, rate)
    state = inference.init({}, (DiagonalGaussian(*start.split(D, -1)),))
    for _ in range(25):
        flat = torch.cat([state.q[0].mu, state.q[0].log_sigma], -1)
        grad = DiagonalGaussian(*(curvature * (centre - flat)).split(D, -1))
        state = inference.step(state, {}, Evidence((grad,), None, None, terms=None))  # type: ignore[arg-type]
        reference.grad = curvature * (centre - reference)
        opt.step()
    exact = 1e-6 if start.dtype == torch.float64 else 1e-4
    assert_close(torch.cat([state.q[0].mu, state.q[0].log_sigma], -1), reference, atol=exact, rtol=exact)


def test_every_optimiser_keeps_log_sigma_in_its_range(normal: Draw) -> None:
    for kind in TORCH:
        inference = optimiser(kind, 1e3)
        state = inference.init({}, (DiagonalGaussian(normal(B, D), normal(B, D)),))
        grad = DiagonalGaussian(normal(B, D), normal(B, D))
        state = inference.step(state, {}, Evidence((grad,), None, None, terms=None))  # type: ignore[arg-type]
        assert float(state.q[0].log_sigma.abs().max()) <= LOG_SIGMA_LIMIT


def test_optimisers_have_no_parameters_and_read_nothing_of_x() -> None:
    for kind in TORCH:
        inference = optimiser(kind, 0.1)
        assert not list(inference.parameters())
        assert inference.context(torch.zeros(1, 4), torch.ones(1, 4)) == {}
