"""Small sequence models for the tests of filters, one per kind, and a linear system to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from models.architecture import (
    FilterArchitecture,
    FilterGenerativeArchitecture,
    FilterInferenceArchitecture,
    IterativeArchitecture,
    KalmanArchitecture,
    LinearGaussianArchitecture,
    OptimiserArchitecture,
    OwnFilterArchitecture,
    SRNNArchitecture,
    VRNNArchitecture,
)
from models.catalogue import FilterModel, build_filter
from models.generative.filter import FilterGenerative
from models.kalman import LinearSystem

X_SIZE, LATENT = 7, 3

GENERATIVE: dict[str, FilterGenerativeArchitecture] = {
    "vrnn": VRNNArchitecture(X_SIZE, LATENT, 10, "lstm", (9,), (8,), (11,), (12, 13)),
    "vrnn gru bernoulli": VRNNArchitecture(X_SIZE, LATENT, 10, "gru", (), (), (), (12,), "bernoulli"),
    "vrnn quantised": VRNNArchitecture(X_SIZE, LATENT, 10, "lstm", (9,), (8,), (11,), (12,), "quantised_gaussian", 0.05),
    "srnn": SRNNArchitecture(X_SIZE, LATENT, 10, "lstm", (), (11,), (12, 13)),
    "srnn gru gaussian": SRNNArchitecture(X_SIZE, LATENT, 10, "gru", (9,), (11,), (12,), "gaussian"),
    "linear gaussian": LinearGaussianArchitecture(X_SIZE, LATENT),
    "linear gaussian 1-D": LinearGaussianArchitecture(1, 1),
}
INFERENCE: dict[str, FilterInferenceArchitecture] = {
    "avf": IterativeArchitecture(("q_layer_norm", "grad_layer_norm"), (14, 14), highway=True),
    "avf with x": IterativeArchitecture(("x", "q", "grad_log_sign", "error_x", "error_z", "step", "previous_grad"), (14,), recurrent=True),
    "avf with past": IterativeArchitecture(("x", "past", "q", "grad_log_sign"), (14,), highway=True),
    "own": OwnFilterArchitecture((9,), (12,)),
    "own residual": OwnFilterArchitecture((), (12,), residual=True, encode_mask=True),
    "adam": OptimiserArchitecture("adam"),
}


def small_filter(generative: str, inference: str, dtype: torch.dtype = torch.float64) -> FilterModel:
    """A model of the two kinds named (or "kalman"), whose refiner's heads are not at zero, so that every step moves λ."""
    model = build_filter(FilterArchitecture(GENERATIVE[generative], INFERENCE.get(inference, KalmanArchitecture())), seed=0)
    heads = getattr(model.inference, "heads", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if heads is not None:
            torch.nn.init.normal_(heads.weight, std=0.3)
            torch.nn.init.normal_(heads.bias, std=0.3)
        if generative not in ("linear gaussian", "linear gaussian 1-D"):
            for first in model.generative.begin().values():
                torch.nn.init.normal_(first, std=0.5)
    binary = "bernoulli" in generative or generative == "srnn"
    if not binary:
        model.generative.set_statistics(torch.tensor(0.1), torch.tensor(0.6))
    return model.to(dtype)


def frames(generative: FilterGenerative, rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and mask (B, T, X): a whole frame of the first row and single entries of the others are missing."""
    dtype = generative.x_mean.dtype
    x = torch.randn(rows, count, generative.x_size, generator=generator, dtype=dtype)
    mask = torch.ones_like(x)
    mask[0, count // 2] = 0
    mask[1:, 0, 0] = 0
    return (x > 0).to(dtype), mask


def linear_system(latent: int = 1, x_size: int = 1) -> LinearSystem:
    """A stable system whose latents turn into one another and of which every entry says something else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(latent)
        turn = torch.linalg.qr(torch.randn(latent, latent, dtype=torch.float64)).Q
        factor = torch.randn(latent, latent, dtype=torch.float64)
        return LinearSystem(
            A=0.9 * turn.abs() if latent == 1 else 0.9 * turn,
            C=torch.randn(x_size, latent, dtype=torch.float64) + 1,
            Q=0.3 * factor @ factor.mT + 0.2 * torch.eye(latent, dtype=torch.float64),
            R=torch.diag(torch.linspace(0.5, 0.9, x_size, dtype=torch.float64)),
            mean=torch.full((latent,), 0.3, dtype=torch.float64),
            covariance=torch.eye(latent, dtype=torch.float64),
        )
