"""The standard encoder: the whole answer in one pass, λ = f(x) (Kingma & Welling 2014). Its gap is what the rest closes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import DirectArchitecture
from models.gaussian import DiagonalGaussian, Posterior, bound_log_sigma
from models.inference.base import Context, Inference, State
from models.layers import MLP
from models.objective import Evidence

X_CENTRE = 0.5


def centred(x: Tensor, mask: Tensor, encode_mask: bool) -> Tensor:
    """x as encoders read it: around zero, unobserved entries exactly zero; beside it the mask if asked, (B, X or 2X)."""
    x = (x - X_CENTRE) * mask
    return torch.cat([x, mask], -1) if encode_mask else x


class DirectEncoder(Inference):
    refines = False
    encodings = ("x",)

    def __init__(self, architecture: DirectArchitecture, x_size: int, latent_sizes: tuple[int, ...]):
        super().__init__()
        self.encode_mask = architecture.encode_mask
        self.latent_sizes = latent_sizes
        self.encoder = MLP(x_size * (2 if architecture.encode_mask else 1), architecture.hidden, architecture.highway)
        self.head = nn.Linear(self.encoder.output_size, 2 * sum(latent_sizes))

    def context(self, x: Tensor, mask: Tensor, past: Tensor | None = None) -> Context:
        return {"lambda": self.head(self.encoder(centred(x, mask, self.encode_mask)))}

    def init(self, context: Context, prior: Posterior) -> State:
        parts = context["lambda"].to(prior[0].mu.dtype).split([size for latent in self.latent_sizes for size in (latent, latent)], -1)
        return State(tuple(DiagonalGaussian(mu, bound_log_sigma(raw)) for mu, raw in zip(parts[::2], parts[1::2], strict=True)))

    def step(self, state: State, context: Context, evidence: Evidence) -> State:
        return state
