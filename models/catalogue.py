"""Name -> constructor: the only file that knows every model. A new model is one class, one row here, one line in its contract test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from models.architecture import Architecture, FilterArchitecture, IterativeArchitecture, KalmanArchitecture, OwnFilterArchitecture
from models.generative.base import Generative
from models.generative.filter import FilterGenerative
from models.generative.linear_gaussian import LinearGaussian
from models.generative.srnn import SRNN
from models.generative.vae import VAE
from models.generative.vrnn import VRNN
from models.inference.base import Inference
from models.inference.direct import DirectEncoder
from models.inference.iterative import IterativeInference
from models.inference.kalman import KalmanFilter
from models.inference.optimisers import SGD, Adam, Momentum, RMSProp
from models.inference.own_filter import OwnFilter
from models.likelihood import LIKELIHOODS

T = TypeVar("T")

GENERATIVE: dict[str, Callable[[Any], Generative]] = {"vae": VAE}

FILTERS: dict[str, Callable[[Any], FilterGenerative]] = {"vrnn": VRNN, "srnn": SRNN, "linear_gaussian": LinearGaussian}

INFERENCE: dict[str, Callable[[Any, int, tuple[int, ...]], Inference]] = {
    "direct": DirectEncoder,
    "iterative": IterativeInference,
    "sgd": SGD,
    "momentum": Momentum,
    "rmsprop": RMSProp,
    "adam": Adam,
}


class LatentModel(nn.Module):
    """A generative model (parameters θ) and the inference model trained with it (parameters φ)."""

    def __init__(self, generative: Generative, inference: Inference):
        super().__init__()
        self.generative = generative
        self.inference = inference


def build(architecture: Architecture, seed: int | None = None) -> LatentModel:
    """A model with fresh weights; with `seed` the same ones each time, and the caller's generator is left alone.

    Raises:
        ValueError: a kind, likelihood or encoding is unknown.
    """
    _row(LIKELIHOODS, "likelihood", architecture.generative.likelihood)
    with torch.random.fork_rng(enabled=seed is not None, devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        generative = _row(GENERATIVE, "kind", architecture.generative.kind)(architecture.generative)
        return LatentModel(generative, infer_with(generative, architecture.inference))


class FilterModel(nn.Module):
    """A sequence model (parameters θ) and the inference model that filters with it (parameters φ)."""

    def __init__(self, generative: FilterGenerative, inference: Inference):
        super().__init__()
        self.generative = generative
        self.inference = inference


def build_filter(architecture: FilterArchitecture, seed: int | None = None) -> FilterModel:
    """A sequence model with fresh weights; `seed` as in `build`.

    Raises:
        ValueError: a kind, cell, likelihood or encoding is unknown.
    """
    with torch.random.fork_rng(enabled=seed is not None, devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        generative = FILTERS[architecture.generative.kind](architecture.generative)
        return FilterModel(generative, infer_with(generative, architecture.inference))


def infer_with(generative: Generative | FilterGenerative, architecture: Any) -> Inference:
    """An inference model of another kind for a given generative model (for example Adam on a trained decoder)."""
    if isinstance(architecture, OwnFilterArchitecture):
        if not isinstance(generative, FilterGenerative):
            raise ValueError("architecture: a custom-designed filter needs a sequence model")
        return OwnFilter(architecture, generative.x_size, generative.latent_sizes, generative.summary_size)
    if isinstance(architecture, KalmanArchitecture):
        if not isinstance(generative, LinearGaussian):
            raise ValueError("architecture: the Kalman filter is exact for the linear-Gaussian model, and for no other")
        return KalmanFilter(generative)
    if isinstance(architecture, IterativeArchitecture) and isinstance(generative, FilterGenerative):
        return IterativeInference(architecture, generative.x_size, generative.latent_sizes, generative.summary_size)
    return _row(INFERENCE, "kind", architecture.kind)(architecture, generative.x_size, generative.latent_sizes)


def _row(table: Mapping[str, T], argument: str, name: str) -> T:
    if name not in table:
        raise ValueError(f"{argument}: {name!r} is unknown: one of {', '.join(table)}")
    return table[name]
