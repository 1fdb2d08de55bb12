"""A model's own, custom-designed filter: the published baseline, the whole answer in one pass per frame.

    VRNN (Chung 2015):             q(z_t | x_≤t) = f(x_t, h_{t−1})
    SRNN, filtering (Fraccaro 2016, "Resq"):  μ_q = μ_prior + f_μ(x_t, d_t),  σ_q = f_σ(x_t, d_t)

Shapes: B rows, D latent size, X size of x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import OwnFilterArchitecture
from models.gaussian import DiagonalGaussian, Posterior, bound_log_sigma
from models.inference.base import Context, Inference, State
from models.layers import MLP
from models.objective import Evidence


class OwnFilter(Inference):
    """Reads the frame (standardised, unobserved entries zero) and the past's summary; nothing of λ."""

    refines = False
    encodings = ("x", "past")

    def __init__(self, architecture: OwnFilterArchitecture, x_size: int, latent_sizes: tuple[int, ...], past_size: int):
        super().__init__()
        self.residual, self.encode_mask = architecture.residual, architecture.encode_mask
        self.embed_x = MLP(x_size * (2 if architecture.encode_mask else 1), architecture.x_hidden)
        self.body = MLP(self.embed_x.output_size + past_size, architecture.hidden)
        self.head = nn.Linear(self.body.output_size, 2 * latent_sizes[0])

    def context(self, x: Tensor, mask: Tensor, past: Tensor | None = None) -> Context:
        if past is None:
            raise ValueError("past: a custom-designed filter needs the summary of earlier frames")
        seen = torch.cat([x * mask, mask], -1) if self.encode_mask else x * mask
        return {"correction": self.head(self.body(torch.cat([self.embed_x(seen), past], -1)))}

    def init(self, context: Context, prior: Posterior) -> State:
        mu, raw = context["correction"].to(prior[0].mu.dtype).chunk(2, -1)
        return State((DiagonalGaussian(prior[0].mu + mu if self.residual else mu, bound_log_sigma(raw)),))

    def step(self, state: State, context: Context, evidence: Evidence) -> State:
        return state
