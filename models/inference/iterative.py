"""The learned refiner of Marino, Yue & Mandt 2018 (equations 7–9, C.1): one network, applied again and again,

    λ ← g ⊙ λ + (1 − g) ⊙ f,     (f, g) from (x, λ, ∇λ L, …),     g = σ(·) per entry.

Heads start at zero: g = ½ and f = 0, so the untrained first step leaves λ₀ = 0 where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import IterativeArchitecture
from models.gaussian import DiagonalGaussian, Posterior, bound_log_sigma
from models.inference.base import Context, Inference, State
from models.inference.direct import centred
from models.inference.encodings import encode, encoded_size
from models.layers import MLP, elu
from models.objective import Evidence


class IterativeInference(Inference):
    """x, and the past of a filter, enter once: their share of the first layer is the context (B, hidden[0]), so a step costs only what
    changed."""

    def __init__(self, architecture: IterativeArchitecture, x_size: int, latent_sizes: tuple[int, ...], past_size: int = 0):
        super().__init__()
        if "past" in architecture.encodings and not past_size:
            raise ValueError("encodings: only a filter's refiner can read the past")
        self.encodings = architecture.encodings
        self.reads_errors = any(name.startswith("error") for name in architecture.encodings)
        self.encode_mask = architecture.encode_mask
        self.latent_sizes = latent_sizes
        first, *rest = architecture.hidden
        self.embed_x = nn.Linear(x_size * (2 if architecture.encode_mask else 1), first) if "x" in self.encodings else None
        self.embed_past = nn.Linear(past_size, first, bias=self.embed_x is None) if "past" in self.encodings else None
        known = self.embed_x is not None or self.embed_past is not None
        self.embed = nn.Linear(encoded_size(self.encodings, x_size, latent_sizes), first, bias=not known)
        self.body = MLP(first, rest, architecture.highway)
        width = self.body.output_size
        self.cell = nn.GRUCell(width, width) if architecture.recurrent else None
        self.heads = nn.Linear(width, 4 * sum(latent_sizes))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def context(self, x: Tensor, mask: Tensor, past: Tensor | None = None) -> Context:
        shares = [] if self.embed_x is None else [self.embed_x(centred(x, mask, self.encode_mask))]
        if self.embed_past is not None:
            if past is None:
                raise ValueError("past: this refiner needs the summary of earlier frames")
            shares.append(self.embed_past(past))
        return {"x_embedding": sum(shares[1:], shares[0])} if shares else {}

    def init(self, context: Context, prior: Posterior) -> State:
        rows = prior[0].mu
        memory: dict[str, Tensor] = {}
        if "step" in self.encodings:
            memory["step"] = rows.new_zeros(rows.shape[0], 1)
        if "previous_grad" in self.encodings:
            memory["previous_grad"] = rows.new_zeros(rows.shape[0], 2 * sum(self.latent_sizes))
        if self.cell is not None:
            memory["hidden"] = rows.new_zeros(rows.shape[0], self.cell.hidden_size)
        return State(prior, memory)

    def step(self, state: State, context: Context, evidence: Evidence) -> State:
        a = self.embed(encode(self.encodings, state, evidence))
        h = self.body(elu(a + context["x_embedding"] if "x_embedding" in context else a))
        memory = dict(state.memory)
        if "step" in memory:
            memory["step"] = memory["step"] + 1
        if "previous_grad" in memory:
            memory["previous_grad"] = encode(("grad_log_sign",), state, evidence)
        if self.cell is not None:
            h = memory["hidden"] = self.cell(h, memory["hidden"])
        return State(self._gated(state.q, self.heads(h).to(state.q[0].mu.dtype)), memory)

    def _gated(self, q: Posterior, heads: Tensor) -> Posterior:
        sizes = [size for latent in self.latent_sizes for size in (latent,) * 4]
        parts = heads.split(sizes, -1)
        new = []
        for level, (f_mu, f_log_sigma, a_mu, a_log_sigma) in zip(q, zip(*(parts[i::4] for i in range(4)), strict=True), strict=True):
            g_mu, g_log_sigma = torch.sigmoid(a_mu), torch.sigmoid(a_log_sigma)
            new.append(
                DiagonalGaussian(
                    g_mu * level.mu + (1 - g_mu) * f_mu,
                    # a convex mix of two bounded values stays bounded
                    g_log_sigma * level.log_sigma + (1 - g_log_sigma) * bound_log_sigma(f_log_sigma),
                )
            )
        return tuple(new)
