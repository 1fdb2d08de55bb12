"""The variational recurrent network (Chung 2015):

    p(z_t | h_{t−1}),   p(x_t | φ_z(z_t), h_{t−1}),   h_t = cell(φ_x(x_t), φ_z(z_t), h_{t−1})

Shapes: B rows, S samples, D latent size, X size of x, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.architecture import VRNNArchitecture
from models.gaussian import DiagonalGaussian
from models.generative.filter import FilterState
from models.generative.recurrent import RecurrentFilter
from models.layers import MLP
from models.likelihood import Likelihood


class VRNN(RecurrentFilter):
    """State: the core's (h, and c of an LSTM)."""

    def __init__(self, architecture: VRNNArchitecture):
        z_features = (architecture.latent, *architecture.z_hidden)[-1]
        super().__init__(architecture, z_features, architecture.hidden, z_features)
        self.embed_z = MLP(architecture.latent, architecture.z_hidden)

    def context(self, state: FilterState) -> dict[str, Tensor]:
        return {**state, "decoder": self.output.prepare(state["h"])}

    def prior(self, state: FilterState, context: dict[str, Tensor]) -> DiagonalGaussian:
        return self._prior(state["h"])

    def emission(self, context: dict[str, Tensor], z: Tensor) -> Likelihood:
        rows, samples, size = z.shape
        # one matrix product over all rows and samples
        features = self.embed_z(z.reshape(rows * samples, size))
        return self._emit(context["decoder"], features.reshape(rows, samples, features.shape[-1]))

    def transition(self, context: dict[str, Tensor], x: Tensor, mask: Tensor, q: DiagonalGaussian, z: Tensor) -> FilterState:
        return self.cell.advance(self._project(x, z), context)

    def unroll(self, state: FilterState, x: Tensor, mask: Tensor, q: DiagonalGaussian, z: Tensor) -> list[FilterState]:
        return self._run(self._project(x, z), state)

    def _project(self, x: Tensor, z: Tensor) -> Tensor:
        return self.cell.project(torch.cat([self.embed_x(self.standardise(x)), self.embed_z(z)], -1))
