"""What p(x|z) may be. A likelihood is a distribution over x with one entry per row and sample.

Shapes: B rows, S samples, X size of x. Parameters are (B, S, X); x and mask are (B, X). Everything in nats, summed over
the observed entries of x (mask = 1); an entry with mask 0 contributes nothing, whatever finite value x holds there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from models.gaussian import HALF_LOG_2PI, bound_log_sigma
from models.layers import softplus


class Likelihood(Protocol):
    """The contract every output distribution keeps (tests/models/test_likelihood.py runs over all of them)."""

    HEADS: ClassVar[tuple[str, ...]]

    @classmethod
    def from_heads(cls, heads: Mapping[str, Tensor]) -> Self:
        """From the raw outputs of a decoder, one per name in HEADS, each (B, S, X)."""
        ...

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, as a reply shows them."""
        ...

    @property
    def mean(self) -> Tensor:
        """E[x|z], (B, S, X)."""
        ...

    def log_prob(self, x: Tensor, mask: Tensor) -> Tensor:
        """log p(x|z) over observed entries, in nats: (B, S)."""
        ...

    def error(self, x: Tensor, mask: Tensor) -> Tensor:
        """ε_x: the data error weighted by its precision, (x − μ)/σ², mean over samples: (B, X) (Marino 2018, §4)."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """x from standard normal noise (B, S, X)."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    """Independent binary entries by their logits ℓ. For grey x in [0, 1] `log_prob` is minus the cross-entropy."""

    logits: Tensor
    HEADS: ClassVar[tuple[str, ...]] = ("logits",)

    @classmethod
    def from_heads(cls, heads: Mapping[str, Tensor]) -> Self:
        return cls(heads["logits"])

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"logits": self.logits}

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def log_prob(self, x: Tensor, mask: Tensor) -> Tensor:
        # x log p + (1 − x) log(1 − p) = x ℓ − softplus(ℓ)
        return ((x.unsqueeze(1) * self.logits - softplus(self.logits)) * mask.unsqueeze(1)).sum(-1)

    def error(self, x: Tensor, mask: Tensor) -> Tensor:
        # (x − p)/(p(1 − p)) = x(1 + e^{−ℓ}) − (1 − x)(1 + e^{ℓ}); ℓ is limited so that one sure pixel cannot drown the rest
        logits = 5 * torch.tanh(self.logits / 5)
        x = x.unsqueeze(1)
        return (mask.unsqueeze(1) * (x * (1 + torch.exp(-logits)) - (1 - x) * (1 + torch.exp(logits)))).mean(1)

    def sample(self, noise: Tensor) -> Tensor:
        # u = Φ(ε) is uniform, so x = [u < p] is Bernoulli(p)
        return (0.5 * (1 + torch.erf(noise * math.sqrt(0.5))) < self.mean).to(self.logits.dtype)


@dataclass(frozen=True)
class Gaussian:
    """Independent real entries N(μ, σ²), log density in nats."""

    mu: Tensor
    log_sigma: Tensor
    HEADS: ClassVar[tuple[str, ...]] = ("mu", "log_sigma")

    @classmethod
    def from_heads(cls, heads: Mapping[str, Tensor]) -> Self:
        return cls(heads["mu"], bound_log_sigma(heads["log_sigma"]))

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def mean(self) -> Tensor:
        return self.mu

    def log_prob(self, x: Tensor, mask: Tensor) -> Tensor:
        standard = (x.unsqueeze(1) - self.mu) * torch.exp(-self.log_sigma)
        return ((-0.5 * standard.square() - self.log_sigma - HALF_LOG_2PI) * mask.unsqueeze(1)).sum(-1)

    def error(self, x: Tensor, mask: Tensor) -> Tensor:
        return (mask.unsqueeze(1) * (x.unsqueeze(1) - self.mu) * torch.exp(-2 * self.log_sigma)).mean(1)

    def sample(self, noise: Tensor) -> Tensor:
        return self.mu + torch.exp(self.log_sigma) * noise


@dataclass(frozen=True)
class QuantisedGaussian(Gaussian):
    """x known up to an interval of width δ around it: log[Φ(b) − Φ(a)], a, b = (x ∓ δ/2 − μ)/σ, in nats.

    The difference of two CDFs cancels in float32 exactly where it matters, so it is taken in log space. With
    m = (x − μ)/σ and u = δ/σ it is log φ(m) + log ∫_{−u/2}^{u/2} e^{−mt − t²/2} dt. For u < 1/4, with y = mu/2, that is
    u·sinh(y)/y times the mean of e^{−t²/2} under the weight e^{−mt}, and this mean is e^{−E[t²]/2} to within u⁴/1,000 nats:
    E[t²] grows from u²/12 at the centre to u²/4 in the tails. For wider intervals log Φ of both ends is subtracted in the
    tail where it is accurate. The reference implementation used CDF(x + δ) − CDF(x), off-centre, with a floor of 1e-6.
    """

    width: float = 1 / 255
    HEADS: ClassVar[tuple[str, ...]] = ("mu", "log_sigma")

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"mu": self.mu, "log_sigma": self.log_sigma}

    def log_prob(self, x: Tensor, mask: Tensor) -> Tensor:
        m = (x.unsqueeze(1) - self.mu) * torch.exp(-self.log_sigma)
        u = self.width * torch.exp(-self.log_sigma)
        narrow = _log_mass_narrow(m, torch.clamp(u, max=0.25))
        wide = _log_mass_wide(m, torch.clamp(u, min=0.2))
        return (torch.where(u < 0.25, narrow, wide) * mask.unsqueeze(1)).sum(-1)


def _log_mass_narrow(m: Tensor, u: Tensor) -> Tensor:
    y = (0.5 * m * u).abs()
    # log(sinh y / y) = y + log((1 − e^{−2y})/(2y)); its series y²/6 − y⁴/180 near zero, where the quotient is 0/0
    safe = torch.clamp(y, min=1e-2)
    far = safe + torch.log(-torch.expm1(-2 * safe) / (2 * safe))
    sinhc = torch.where(y < 1e-2, y.square() / 6, far)
    return -0.5 * m.square() - HALF_LOG_2PI + torch.log(u) + sinhc - u.square() / 8 * _tilted_square(y)


def _tilted_square(y: Tensor) -> Tensor:
    """E[s²] for s in [−1, 1] weighted by e^{−ys}: 1 + 2/y² − 2 coth(y)/y, from 1/3 at y = 0 to 1."""
    safe = torch.clamp(y, min=0.3)
    coth = (1 + torch.exp(-2 * safe)) / -torch.expm1(-2 * safe)
    # near zero the closed form is a difference of large numbers
    near = 1 / 3 + y.square() * (2 / 45 - 4 / 945 * y.square())
    return torch.where(y < 0.3, near, 1 + 2 / safe.square() - 2 * coth / safe)


def _log_mass_wide(m: Tensor, u: Tensor) -> Tensor:
    # by symmetry Φ(b) − Φ(a) = Φ(−a) − Φ(−b): use the side on which both ends are negative or straddle zero
    m = -m.abs()
    b, a = m + u / 2, m - u / 2
    # straddling, an interval this wide holds at least 0.08: nothing cancels
    across = torch.log(0.5 * (torch.erf(torch.clamp(b, min=0) * SQRT_HALF) - torch.erf(a * SQRT_HALF)))
    # in the tail Φ(t) = φ(t) R(t), and log φ(a) − log φ(b) = (b² − a²)/2 = (b − a)(b + a)/2 exactly
    b, a = torch.clamp(b, max=0), torch.clamp(a, max=0)
    log_r = _log_tail_ratio(b)
    gap = 0.5 * (b - a) * (b + a) + _log_tail_ratio(a) - log_r
    tail = -0.5 * b.square() + log_r + torch.log(-torch.expm1(torch.clamp(gap, max=-1e-6)))
    return torch.where(m + u / 2 >= 0, across, tail)


def _log_tail_ratio(t: Tensor) -> Tensor:
    """log Φ(t) + t²/2 for t ≤ 0, to 1.2e-7: Chebyshev's fit of erfc (Press et al., Numerical Recipes, section 6.2).

    In plain operations, since log Φ itself has no counterpart in ONNX.
    """
    y = 1 / (1 - 0.5 * SQRT_HALF * t)
    fit = torch.full_like(y, ERFC_FIT[-1])
    for coefficient in reversed(ERFC_FIT[:-1]):
        fit = fit * y + coefficient
    return torch.log(0.5 * y) + fit


SQRT_HALF = math.sqrt(0.5)
ERFC_FIT = (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277)

LIKELIHOODS: dict[str, type[Likelihood]] = {"bernoulli": Bernoulli, "gaussian": Gaussian, "quantised_gaussian": QuantisedGaussian}
