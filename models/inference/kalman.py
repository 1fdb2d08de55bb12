"""The exact filter of the linear-Gaussian model (Kalman 1960), under the contract of every inference model: its answer is in `init`.

    correct, from the prediction N(m, P):   V⁻¹ = P⁻¹ + Cᵀ R⁻¹ C,   m ← m + V Cᵀ R⁻¹ (x − C m)      (R is diagonal; observed entries only)

For D = 1 q is the belief itself, and the ELBO is log p(x_t | x_<t). For D > 1 a diagonal q has the belief's mean and its best variance,
1/diag(V⁻¹); the state's V is the whole one (models/generative/linear_gaussian.py).

Shapes: B rows, D latent size, X size of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.gaussian import DiagonalGaussian, Posterior
from models.generative.linear_gaussian import LinearGaussian
from models.inference.base import Context, Inference, State
from models.objective import Evidence


class KalmanFilter(Inference):
    """Has no parameters of its own: it reads those of the model it filters with. `past` is the model's summary, (m, P)."""

    refines = False
    encodings = ("x", "past")

    def __init__(self, generative: LinearGaussian):
        super().__init__()
        # in a tuple: as an attribute the model would be a part of this module too
        self._of = (generative,)

    def context(self, x: Tensor, mask: Tensor, past: Tensor | None = None) -> Context:
        if past is None:
            raise ValueError("past: the Kalman filter needs the prediction")
        (model,) = self._of
        (latent,) = model.latent_sizes
        x = x * model.x_std + model.x_mean
        m, P = past[:, :latent], past[:, latent:].unflatten(-1, (latent, latent))
        V, information = model.corrected(P, mask)
        error = (x - m @ model.C.mT) * mask * torch.exp(-2 * model.log_sigma)
        mean = m + (V @ (error @ model.C).unsqueeze(-1)).squeeze(-1)
        return {"mean": mean, "log_sigma": -0.5 * information.diagonal(dim1=-2, dim2=-1).log()}

    def init(self, context: Context, prior: Posterior) -> State:
        return State((DiagonalGaussian(context["mean"], context["log_sigma"]),))

    def step(self, state: State, context: Context, evidence: Evidence) -> State:
        return state
