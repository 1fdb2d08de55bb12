"""What decides the shapes in a state dict: frozen dataclasses, saved beside the weights, from which a model is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class VAEArchitecture:
    """The fully connected VAE's decoder: latent -> hidden… -> x_size."""

    x_size: int = 784
    latent: int = 64
    hidden: tuple[int, ...] = (512, 512)
    likelihood: str = "bernoulli"
    kind: Literal["vae"] = "vae"


@dataclass(frozen=True)
class DirectArchitecture:
    """A standard encoder, λ = f(x). `encode_mask`: it also reads which entries are observed."""

    hidden: tuple[int, ...] = (512, 512)
    highway: bool = False
    encode_mask: bool = False
    kind: Literal["direct"] = "direct"


@dataclass(frozen=True)
class IterativeArchitecture:
    """A learned refiner, λ ← g ⊙ λ + (1 − g) ⊙ f.

    Attributes:
        encodings: what it reads, names of models/inference/encodings.py.
        recurrent: keeps a GRU state of width hidden[-1] between steps.
        encode_mask: it also reads which entries of x are observed.
    """

    encodings: tuple[str, ...] = ("x", "grad_layer_norm", "q")
    hidden: tuple[int, ...] = (512, 512)
    highway: bool = False
    recurrent: bool = False
    encode_mask: bool = False
    kind: Literal["iterative"] = "iterative"


@dataclass(frozen=True)
class OptimiserArchitecture:
    """A conventional optimiser on λ: no parameters but its constants (papers: Marino 2018, Fig. 4)."""

    kind: Literal["sgd", "momentum", "rmsprop", "adam"] = "adam"
    learning_rate: float = 0.1
    momentum: float = 0.9
    decay: float = 0.999


InferenceArchitecture = DirectArchitecture | IterativeArchitecture | OptimiserArchitecture


@dataclass(frozen=True)
class Architecture:
    """A whole model: the generative side and the inference side."""

    generative: VAEArchitecture = field(default_factory=VAEArchitecture)
    inference: InferenceArchitecture = field(default_factory=IterativeArchitecture)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Architecture:
        """Rebuilds what `to_dict` wrote (JSON turns tuples into lists).

        Raises:
            ValueError: the `kind` of a part is unknown.
        """
        return Architecture(_part(values["generative"]), _part(values["inference"]))


_KINDS: dict[str, type] = {
    "vae": VAEArchitecture,
    "direct": DirectArchitecture,
    "iterative": IterativeArchitecture,
    **dict.fromkeys(("sgd", "momentum", "rmsprop", "adam"), OptimiserArchitecture),
}


def _part(values: Mapping[str, Any]) -> Any:
    kind = values.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"architecture kind {kind!r} is unknown: one of {', '.join(_KINDS)}")
    return _KINDS[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
