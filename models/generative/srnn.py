"""The stochastic recurrent network (Fraccaro 2016), as a filter: a deterministic core under a stochastic one,

    d_t = cell(φ_x(x_{t−1}), d_{t−1}),   p(z_t | z_{t−1}, d_t),   p(x_t | z_t, d_t)

The state after frame t holds d_{t+1} already: what comes next is predicted without waiting for it.
Shapes: B rows, S samples, D latent size, X size of x, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import SRNNArchitecture
from models.gaussian import DiagonalGaussian
from models.generative.filter import FilterState
from models.generative.recurrent import RecurrentFilter
from models.likelihood import Likelihood


class SRNN(RecurrentFilter):
    """State: the core's (h = d, and c of an LSTM), and z."""

    def __init__(self, architecture: SRNNArchitecture):
        super().__init__(architecture, 0, architecture.hidden + architecture.latent, architecture.latent)
        self.first_z = nn.Parameter(torch.zeros(1, architecture.latent))

    def begin(self) -> FilterState:
        return {**super().begin(), "z": self.first_z}

    def context(self, state: FilterState) -> dict[str, Tensor]:
        core = {name: state[name] for name in self.cell.names if name in state}
        return {**core, "decoder": self.output.prepare(state["h"])}

    def prior(self, state: FilterState, context: dict[str, Tensor]) -> DiagonalGaussian:
        return self._prior(torch.cat([state["h"], state["z"]], -1))

    def emission(self, context: dict[str, Tensor], z: Tensor) -> Likelihood:
        return self._emit(context["decoder"], z)

    def transition(self, context: dict[str, Tensor], x: Tensor, mask: Tensor, q: DiagonalGaussian, z: Tensor) -> FilterState:
        return {**self.cell.advance(self._project(x), context), "z": z}

    def foresee(self, state: FilterState, x: Tensor) -> tuple[FilterState, FilterState]:
        h, after = self.cell.before(self.embed_x(self.standardise(x)), {name: state[name] for name in self.cell.names})
        return {"h": h}, after

    def unroll(self, state: FilterState, x: Tensor, mask: Tensor, q: DiagonalGaussian, z: Tensor) -> list[FilterState]:
        core = self._run(self._project(x), state)
        return [{**now, "z": drawn} for now, drawn in zip(core, [state["z"], *z.unbind(1)], strict=True)]

    def _project(self, x: Tensor) -> Tensor:
        return self.cell.project(self.embed_x(self.standardise(x)))
