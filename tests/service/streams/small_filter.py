"""A filter in numpy, for what has nothing to do with the model: its belief goes half of the way to every frame; ELBO −|x − μ|²."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card, Curve, LevelSpec, LikelihoodSpec, ProgramSpec, Quantiles, TensorSpec, XSpec
from service.engine.base import HostRows

X = 4


def small_card(name: str = "small") -> Card:
    rows, frame = ("rows", X), TensorSpec(name="x", shape=("rows", X))
    mask, belief = TensorSpec(name="mask", shape=rows), TensorSpec(name="q.mu", shape=rows)
    noise = TensorSpec(name="noise_advance", shape=("rows", "samples", X))
    nats = tuple(TensorSpec(name=one, shape=("rows",)) for one in ("log_likelihood", "kl"))
    mean = TensorSpec(name="mean", shape=("rows", "samples", X))
    advance = ProgramSpec(inputs=(frame, mask, belief, noise), outputs=(belief, *nats, mean))
    return Card(
        name=name,
        version="1",
        family="filter",
        x=XSpec(shape=(X,), minimum=-1.0, maximum=1.0),
        likelihood=LikelihoodSpec(name="gaussian", parameters=("mean",)),
        levels=(LevelSpec(name="z", size=X, parameters={"mu": "q.mu"}),),
        state=(belief,),
        trained_steps=0,
        max_steps=0,
        samples=1,
        antithetic=False,
        programs={"predict": ProgramSpec(inputs=(belief,), outputs=(mean,)), "advance": advance, "frame_K": advance},
        curve=Curve(steps=(0,), elbo=(-1.0,), elbo_std=(1.0,), rows=1, samples=1),
        quantiles=Quantiles(probabilities=(0.0, 0.5, 1.0), steps=(0,), elbo=((-9.0, -1.0, 0.0),)),
    )


class SmallFilter(HostRows):
    """`broken`: the methods that raise."""

    name = "small"

    def __init__(self) -> None:
        self.card, self.begin = small_card(), {"q.mu": np.zeros(X, np.float32)}
        self.broken: set[str] = set()

    def run(self, program: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        if program == "predict":
            return {"mean": arrays["q.mu"][:, None]}
        miss = (arrays["x"] - arrays["q.mu"]) * arrays["mask"]
        mu = arrays["q.mu"] + miss / 2
        return {"q.mu": mu, "log_likelihood": -np.square(miss).sum(1), "kl": np.zeros(len(mu), np.float32), "mean": mu[:, None]}

    def load_rows(self, slots: NDArray[np.intp], arrays: Mapping[str, NDArray[Any]]) -> None:
        self._fail("load_rows")
        super().load_rows(slots, arrays)

    def read_rows(self, slots: NDArray[np.intp], names: Any) -> Arrays:
        self._fail("read_rows")
        return super().read_rows(slots, names)

    def close(self) -> None:
        self._fail("close")

    def _fail(self, method: str) -> None:
        if method in self.broken:
            raise RuntimeError(f"{method} broke")
