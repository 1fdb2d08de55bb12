"""What a learned refiner reads: each encoding turns the evidence at λ into features, (B, n) per row.

All of them are continuous where the gradient is zero (architecture.md, section 7), so a row alone and a row in a batch
cannot part over the sign of a rounding error. `x`, and a filter's `past`, are not in this table: they enter once, as context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.gaussian import Posterior
from models.inference.base import State
from models.layers import layer_norm
from models.objective import Evidence

CONTEXT = ("x", "past")
"""Encodings that say nothing of λ. `past` is a filter's summary of earlier frames, which its own, custom-designed filter reads too."""
LOG_SIGN_SCALE = 0.1
"""c of sign(g)·log(1 + |g|/c): linear below c, logarithmic above."""


def _pairs(levels: Posterior) -> list[Tensor]:
    return [part for level in levels for part in (level.mu, level.log_sigma)]


def _layer_normed(levels: Posterior) -> list[Tensor]:
    """Every part normalised over its own features, (B, 2D) per level: both parts of a level in one call."""
    pairs = [torch.cat([level.mu, level.log_sigma], -1).unflatten(-1, (2, -1)) for level in levels]
    return [layer_norm(pair).flatten(-2) for pair in pairs]


def log_sign(g: Tensor) -> Tensor:
    """sign(g)·log(1 + |g|/c): the pair (log|g|, sign g) of Andrychowicz 2016 in one continuous feature."""
    return torch.sign(g) * torch.log1p(g.abs() / LOG_SIGN_SCALE)


def _grad_raw(state: State, evidence: Evidence) -> list[Tensor]:
    return _pairs(evidence.grad)


def _grad_log_sign(state: State, evidence: Evidence) -> list[Tensor]:
    return [log_sign(torch.cat(_pairs(evidence.grad), -1))]


def _grad_layer_norm(state: State, evidence: Evidence) -> list[Tensor]:
    # ∇μ and ∇log σ normalised separately, each over its own features: no statistic crosses a row
    return _layer_normed(evidence.grad)


def _error_x(state: State, evidence: Evidence) -> list[Tensor]:
    assert evidence.error_x is not None
    return [evidence.error_x]


def _error_z(state: State, evidence: Evidence) -> list[Tensor]:
    assert evidence.error_z is not None
    return list(evidence.error_z)


def _q(state: State, evidence: Evidence) -> list[Tensor]:
    return _pairs(state.q)


def _q_layer_norm(state: State, evidence: Evidence) -> list[Tensor]:
    return _layer_normed(state.q)


def _step(state: State, evidence: Evidence) -> list[Tensor]:
    return [torch.log1p(state.memory["step"])]


def _previous_grad(state: State, evidence: Evidence) -> list[Tensor]:
    return [state.memory["previous_grad"]]


Encoding = Callable[[State, Evidence], list[Tensor]]

ENCODINGS: dict[str, Encoding] = {
    "grad_raw": _grad_raw,
    "grad_log_sign": _grad_log_sign,
    "grad_layer_norm": _grad_layer_norm,
    "error_x": _error_x,
    "error_z": _error_z,
    "q": _q,
    "q_layer_norm": _q_layer_norm,
    "step": _step,
    "previous_grad": _previous_grad,
}


def encoded_size(encodings: Sequence[str], x_size: int, latent_sizes: Sequence[int]) -> int:
    """Number of features that `encode` gives.

    Raises:
        ValueError: an encoding is unknown, or none says anything about λ.
    """
    latent = sum(latent_sizes)
    sizes = dict.fromkeys(ENCODINGS, 2 * latent) | {"error_x": x_size, "error_z": latent, "step": 1}
    unknown = [name for name in encodings if name not in (*sizes, *CONTEXT)]
    if unknown:
        raise ValueError(f"encodings: {unknown[0]!r} is unknown: one of {', '.join((*CONTEXT, *sizes))}")
    size = sum(sizes[name] for name in encodings if name not in CONTEXT)
    if size == 0:
        raise ValueError(f"encodings: {tuple(encodings)} say nothing about λ: add one of {', '.join(sizes)}")
    return size


def encode(encodings: Sequence[str], state: State, evidence: Evidence) -> Tensor:
    """The features of every encoding side by side, (B, n)."""
    return torch.cat([part for name in encodings if name not in CONTEXT for part in ENCODINGS[name](state, evidence)], -1)
