"""Small models for the tests of the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models.architecture import Architecture, InferenceArchitecture, IterativeArchitecture, VAEArchitecture
from models.catalogue import LatentModel, build
from models.generative.vae import VAE

Draw = Callable[..., Tensor]
MakeModel = Callable[..., LatentModel]

X_SIZE, LATENT = 12, 3


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of small operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def normal(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Draw:
    """normal(B, S, D): standard normal noise in the precision of the test."""
    return lambda *shape: torch.randn(*shape, dtype=dtype, device=device, generator=generator)


@pytest.fixture
def binary(normal: Draw) -> Draw:
    """binary(B, X): zeros and ones."""
    return lambda *shape: (normal(*shape) > 0).to(normal(1).dtype)


@pytest.fixture
def make(dtype: torch.dtype, device: torch.device) -> MakeModel:
    """A small model whose heads are not at zero, so that every step moves λ."""

    def make(inference: InferenceArchitecture | None = None, likelihood: str = "bernoulli", hidden: tuple[int, ...] = (16,)) -> LatentModel:
        inference = inference or IterativeArchitecture(hidden=(16, 16))
        model = build(Architecture(VAEArchitecture(X_SIZE, LATENT, hidden, likelihood), inference), seed=0)
        heads = getattr(model.inference, "heads", None)
        if heads is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                torch.nn.init.normal_(heads.weight, std=0.3)
                torch.nn.init.normal_(heads.bias, std=0.3)
        return model.to(device=device, dtype=dtype)

    return make


class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(Wz + b, σ²I): a VAE without hidden layers, whose posterior and log p(x) are exact."""

    def __init__(self, dtype: torch.dtype, device: torch.device, x_size: int = 6, latent: int = 2, sigma: float = 0.7):
        architecture = Architecture(VAEArchitecture(x_size, latent, (), "gaussian"), IterativeArchitecture(hidden=(8,)))
        self.model = build(architecture, seed=3).to(device=device, dtype=dtype).requires_grad_(False)
        assert isinstance(self.model.generative, VAE)
        self.generative = self.model.generative
        heads = self.generative.heads
        heads["log_sigma"].weight.zero_()
        # the raw output that the smooth bound maps to log σ
        raw = 8 * torch.atanh(torch.log(torch.tensor(sigma, dtype=torch.float64)) / 8)
        heads["log_sigma"].bias.fill_(float(raw))
        self.w, self.b, self.sigma = heads["mu"].weight, heads["mu"].bias, sigma

    def log_px(self, x: Tensor) -> Tensor:
        """log N(x; b, W Wᵀ + σ² I), (B,)."""
        covariance = self.w @ self.w.T + self.sigma**2 * torch.eye(len(self.b), dtype=x.dtype, device=x.device)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, D) and covariance (D, D) of p(z|x)."""
        precision = torch.eye(self.w.shape[1], dtype=x.dtype, device=x.device) + self.w.T @ self.w / self.sigma**2
        covariance = torch.linalg.inv(precision)
        return (x - self.b) @ self.w @ covariance / self.sigma**2, covariance

    def sample(self, z: Tensor, noise: Tensor) -> Tensor:
        return z @ self.w.T + self.b + self.sigma * noise


@pytest.fixture
def linear_gaussian(dtype: torch.dtype, device: torch.device) -> LinearGaussian:
    return LinearGaussian(dtype, device)
