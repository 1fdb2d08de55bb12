"""The fully connected VAE (Kingma & Welling 2014; sizes of Marino 2018, C.7): p(z) = N(0, I), p(x|z) from an ELU network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import VAEArchitecture
from models.gaussian import DiagonalGaussian, Posterior, standard_log_prob
from models.generative.base import Generative
from models.layers import MLP
from models.likelihood import LIKELIHOODS, Likelihood


class VAE(Generative):
    """z (B, S, D) -> MLP -> one linear head per parameter of the likelihood, (B, S, X)."""

    def __init__(self, architecture: VAEArchitecture):
        super().__init__()
        self.x_size = architecture.x_size
        self.latent_sizes = (architecture.latent,)
        self.likelihood = LIKELIHOODS[architecture.likelihood]
        self.decoder = MLP(architecture.latent, architecture.hidden)
        self.heads = nn.ModuleDict({name: nn.Linear(self.decoder.output_size, architecture.x_size) for name in self.likelihood.HEADS})

    def forward(self, z: tuple[Tensor, ...]) -> Likelihood:
        rows, samples, size = z[0].shape
        # one matrix product over all rows and samples
        h = self.decoder(z[0].reshape(rows * samples, size))
        # in full precision whatever the matrices were in: the likelihood sums hundreds of entries
        heads = {name: head(h).to(z[0].dtype).reshape(rows, samples, self.x_size) for name, head in self.heads.items()}
        return self.likelihood.from_heads(heads)

    def kl(self, q: Posterior, z: tuple[Tensor, ...]) -> Tensor:
        return q[0].kl_to_standard().unsqueeze(-1)

    def log_prior(self, z: tuple[Tensor, ...]) -> Tensor:
        return standard_log_prob(z[0])

    def prior_errors(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (z[0].mean(1),)

    def prior_sample(self, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return noise

    def prior_parameters(self, like: Tensor) -> Posterior:
        zero = like.new_zeros(like.shape[0], self.latent_sizes[0])
        return (DiagonalGaussian(zero, torch.zeros_like(zero)),)
