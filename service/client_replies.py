"""What the client's calls return: the server's JSON as small dataclasses with numpy arrays. Nats throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Level:
    """One level of latent variables: mu, log_sigma (D,), and KL to the prior in nats."""

    mu: Floats
    log_sigma: Floats
    kl: float | None = None


@dataclass(frozen=True, eq=False)
class Posterior:
    """q(z|x) of one row after `step` steps. `carry` is opaque: hand it back."""

    step: int
    levels: tuple[Level, ...]
    carry: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Posterior:
        levels = (Level(_floats(level["mu"]), _floats(level["log_sigma"]), level.get("kl")) for level in raw["levels"])
        return cls(raw["step"], tuple(levels), raw.get("carry"))

    def as_json(self) -> dict[str, Any]:
        levels = [{"mu": level.mu, "log_sigma": level.log_sigma, "kl": level.kl} for level in self.levels]
        return {"step": self.step, "levels": levels} | ({"carry": self.carry} if self.carry is not None else {})


@dataclass(frozen=True, eq=False)
class Row:
    """What a reply says of one row; what was not asked for is None. Nats throughout."""

    steps_used: int | None = None
    stop_reason: str | None = None
    elbo: float | None = None
    log_likelihood: float | None = None
    kl: float | None = None
    posterior: Posterior | None = None
    trace: list[float] | None = None
    mean: Floats | None = None
    samples: Floats | None = None
    z: dict[str, Floats] | None = None
    log_px: float | None = None
    elbo_quantile: float | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Row:
        drawn = raw.get("reconstruction", raw)
        plain = ("steps_used", "stop_reason", "elbo", "log_likelihood", "kl", "trace", "log_px", "elbo_quantile")
        return cls(
            **{name: raw.get(name) for name in plain},
            posterior=Posterior.parse(raw["posterior"]) if "posterior" in raw else None,
            mean=_floats(drawn["mean"]) if "mean" in drawn else None,
            samples=_floats(drawn["samples"]) if "samples" in drawn else None,
            z={level: _floats(values) for level, values in raw["z"].items()} if "z" in raw else None,
        )


@dataclass(frozen=True, eq=False)
class Reply:
    """One row per input, in order."""

    model: str
    version: str
    rows: list[Row]
    timing: dict[str, float] = field(default_factory=dict)
    precision: str = "float32"
    seed: int | list[int] | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Reply:
        rows = [Row.parse(row) for row in raw["results"]]
        return cls(raw["model"], raw["version"], rows, raw["timing"], raw.get("precision", "float32"), raw.get("seed"))

    @property
    def posteriors(self) -> list[Posterior]:
        """As `refine`, `reconstruct` and `generate(between=…)` take them."""
        return [row.posterior for row in self.rows if row.posterior is not None]

    @property
    def mu(self) -> Floats:
        """(R, D) posterior means of the first level."""
        return np.stack([posterior.levels[0].mu for posterior in self.posteriors])

    @property
    def log_sigma(self) -> Floats:
        """(R, D) log standard deviations of the first level."""
        return np.stack([posterior.levels[0].log_sigma for posterior in self.posteriors])

    @property
    def elbo(self) -> NDArray[np.float64]:
        """(R,) in nats; NaN where it was not finite or not asked for."""
        return np.asarray([np.nan if row.elbo is None else row.elbo for row in self.rows])

    @property
    def log_px(self) -> NDArray[np.float64]:
        """(R,) importance-weighted log p(x) of `score`, in nats; NaN where it was not asked for."""
        return np.asarray([np.nan if row.log_px is None else row.log_px for row in self.rows])


@dataclass(frozen=True, eq=False)
class Frame:
    """What the server said of one frame of a sequence; what was not asked for is None. Nats. `raw` is the whole result."""

    frame: int
    elbo: float | None
    surprise: float | None
    surprise_quantile: float | None
    steps_used: int
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Frame:
        return cls(raw["frame"], raw["elbo"], raw["surprise"], raw["surprise_quantile"], raw["steps_used"], raw)

    @property
    def mu(self) -> Floats:
        """(D,), posterior mean; needs `returns=["posterior"]`."""
        return _floats(self.raw["posterior"]["levels"][0]["mu"])

    @property
    def log_sigma(self) -> Floats:
        """(D,)."""
        return _floats(self.raw["posterior"]["levels"][0]["log_sigma"])


@dataclass(frozen=True, eq=False)
class Filtered:
    """One result per frame, in order, and the `state` from which the next call goes on; `frame` is the index of the next frame."""

    model: str
    version: str
    frames: list[Frame]
    state: str = field(repr=False)
    frame: int = 0
    timing: dict[str, float] = field(default_factory=dict)
    precision: str = "float32"
    seed: int | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Filtered:
        frames = [Frame.parse(result) for result in raw["results"]]
        rest = (raw["state"], raw["frame"], raw["timing"], raw.get("precision", "float32"), raw.get("seed"))
        return cls(raw["model"], raw["version"], frames, *rest)

    @property
    def elbo(self) -> NDArray[np.float64]:
        """(T,) in nats; NaN where it was not finite."""
        return np.asarray([np.nan if frame.elbo is None else frame.elbo for frame in self.frames])


@dataclass(frozen=True, eq=False)
class Dream:
    """A sequence drawn from a filter's model: frames and the means of their predictions, (T, X); `state` goes on from the last."""

    frames: Floats
    mean: Floats
    state: str
    frame: int = 0

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Dream:
        return cls(_floats(raw["frames"]), _floats(raw["mean"]), raw["state"], raw["frame"])


@dataclass(frozen=True, eq=False)
class StepEvent:
    """Best so far of one row after a step of it."""

    row: int
    step: int
    elbo: float | None
    best_step: int
    best_elbo: float | None
    posterior: Posterior | None = None


def _floats(values: Any) -> Floats:
    return np.asarray(values, np.float32)
