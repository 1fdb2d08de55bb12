"""What VRNN and SRNN share: a recurrent core with a learned first state, a learned prior, an emission network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import SRNNArchitecture, VRNNArchitecture
from models.gaussian import DiagonalGaussian, bound_log_sigma
from models.generative.cells import CELLS
from models.generative.emission import Emission
from models.generative.filter import FilterGenerative, FilterState
from models.layers import MLP
from models.likelihood import Likelihood


class RecurrentFilter(FilterGenerative):
    """Base of the two: `cell` over features of x (and z), prior and emission networks of what it remembers."""

    def __init__(self, architecture: VRNNArchitecture | SRNNArchitecture, core_inputs: int, prior_inputs: int, z_features: int):
        super().__init__(architecture.x_size, architecture.latent)
        if architecture.cell not in CELLS:
            raise ValueError(f"cell: {architecture.cell!r} is unknown: one of {', '.join(CELLS)}")
        self.embed_x = MLP(architecture.x_size, architecture.x_hidden)
        self.cell = CELLS[architecture.cell](core_inputs + self.embed_x.output_size, architecture.hidden)
        self.first = nn.ParameterDict({name: nn.Parameter(torch.zeros(1, architecture.hidden)) for name in self.cell.names})
        self.prior_body = MLP(prior_inputs, architecture.prior_hidden)
        self.prior_head = nn.Linear(self.prior_body.output_size, 2 * architecture.latent)
        self.output = Emission(
            architecture.hidden,
            z_features,
            architecture.decoder_hidden,
            architecture.x_size,
            architecture.likelihood,
            architecture.interval,
        )
        self.summary_size = architecture.hidden

    def begin(self) -> FilterState:
        return dict(self.first.items())

    def summary(self, context: dict[str, Tensor]) -> Tensor:
        return context["h"]

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        super().set_statistics(mean, std)
        self.output.start_at_mean(mean)

    def _prior(self, features: Tensor) -> DiagonalGaussian:
        mu, raw = self.prior_head(self.prior_body(features)).to(self.x_mean.dtype).chunk(2, -1)
        return DiagonalGaussian(mu, bound_log_sigma(raw))

    def _emit(self, prepared: Tensor, z: Tensor) -> Likelihood:
        return self.output(prepared, z, self.x_mean, self.x_std)

    def _run(self, projected: Tensor, state: FilterState) -> list[FilterState]:
        """The core over projected inputs (B, T, n): its T + 1 states."""
        return self.cell.run(projected, {name: state[name] for name in self.cell.names})
