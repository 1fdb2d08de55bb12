"""From a hidden layer and z to p(x_t | z_t, past), in the units in which x comes.

The network works in standardised units; its Gaussian is moved to the units of x (PCM in −1…1), so that parameters, means
and samples are those a client sees. Densities are counted per *standardised* x, as the literature counts them
(log p + Σ log std over observed entries); the mass of a quantisation interval needs no unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.gaussian import bound_log_sigma
from models.layers import MLP, elu
from models.likelihood import Bernoulli, Gaussian, Likelihood, QuantisedGaussian


@dataclass(frozen=True)
class StandardisedGaussian(Gaussian):
    """N(μ, σ²) in the units of x whose density and error are those of x / std: `log_std` is (X,)."""

    log_std: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"mu": self.mu, "log_sigma": self.log_sigma}

    def log_prob(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().log_prob(x, mask) + (self.log_std * mask).sum(-1, keepdim=True)

    def error(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().error(x, mask) * torch.exp(self.log_std)


@dataclass(frozen=True)
class StandardisedQuantisedGaussian(QuantisedGaussian):
    """The mass of one interval of N(μ, σ²), in the units of x; its error, like the density's, in those of x / std."""

    log_std: Tensor = field(default_factory=lambda: torch.zeros(()))

    def error(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().error(x, mask) * torch.exp(self.log_std)


class Emission(nn.Module):
    """An ELU network of z and of the past, whose first layer is a sum W_z z + W_h h: the second share is made once per frame."""

    def __init__(self, past: int, latent: int, hidden: tuple[int, ...], x_size: int, likelihood: str, interval: float):
        super().__init__()
        if likelihood not in EMISSIONS:
            raise ValueError(f"likelihood: {likelihood!r} is unknown: one of {', '.join(EMISSIONS)}")
        first, *rest = hidden
        self.likelihood, self.interval = likelihood, interval
        self.embed_past = nn.Linear(past, first)
        self.embed_z = nn.Linear(latent, first, bias=False)
        self.body = MLP(first, rest)
        self.heads = nn.ModuleDict({name: nn.Linear(self.body.output_size, x_size) for name in EMISSIONS[likelihood].HEADS})

    def prepare(self, past: Tensor) -> Tensor:
        """What of the first layer depends on the past alone: (B, hidden[0])."""
        return self.embed_past(past)

    def forward(self, prepared: Tensor, z: Tensor, x_mean: Tensor, x_std: Tensor) -> Likelihood:
        """p(x|z) for z (B, S, n)."""
        rows, samples, size = z.shape
        # one matrix product over all rows and samples
        a = self.embed_z(z.reshape(rows * samples, size)).reshape(rows, samples, -1) + prepared.unsqueeze(1)
        h = self.body(elu(a).reshape(rows * samples, -1))
        # in full precision whatever the matrices were in: the likelihood sums hundreds of entries
        heads = {name: head(h).to(x_mean.dtype).reshape(rows, samples, -1) for name, head in self.heads.items()}
        if self.likelihood == "bernoulli":
            return Bernoulli(heads["logits"])
        log_std = x_std.log()
        mu, log_sigma = x_mean + x_std * heads["mu"], log_std + bound_log_sigma(heads["log_sigma"])
        if self.likelihood == "gaussian":
            return StandardisedGaussian(mu, log_sigma, log_std)
        return StandardisedQuantisedGaussian(mu, log_sigma, self.interval, log_std)

    def start_at_mean(self, mean: Tensor) -> None:
        """Bernoulli: the output bias at logit(mean), so that training starts from the notes' frequencies (FIVO's code does)."""
        if self.likelihood == "bernoulli":
            logits = self.heads["logits"]
            assert isinstance(logits, nn.Linear)
            with torch.no_grad():
                logits.bias.copy_(torch.logit(mean.clamp(1e-4, 1 - 1e-4)))


EMISSIONS: dict[str, type[Bernoulli] | type[Gaussian]] = {
    "bernoulli": Bernoulli,
    "gaussian": StandardisedGaussian,
    "quantised_gaussian": StandardisedQuantisedGaussian,
}
