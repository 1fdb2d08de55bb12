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
class VRNNArchitecture:
    """Chung 2015. Networks of ELU layers; an empty tuple is no network, the input itself.

    Attributes:
        hidden: of the recurrent core, `cell` "lstm" or "gru".
        x_hidden, z_hidden: features of x and z; prior_hidden: of p(z|h); decoder_hidden: of p(x|z, h), at least one layer.
        likelihood: "bernoulli", "gaussian" or "quantised_gaussian"; `interval`: of the last, in the units of x (16-bit PCM).
    """

    x_size: int = 200
    latent: int = 64
    hidden: int = 512
    cell: str = "lstm"
    x_hidden: tuple[int, ...] = (256,)
    z_hidden: tuple[int, ...] = (128,)
    prior_hidden: tuple[int, ...] = (256,)
    decoder_hidden: tuple[int, ...] = (256, 256)
    likelihood: str = "gaussian"
    interval: float = 2.0**-15
    kind: Literal["vrnn"] = "vrnn"


@dataclass(frozen=True)
class SRNNArchitecture:
    """Fraccaro 2016, filtering; attributes as VRNNArchitecture's. Sizes are the published ones for piano rolls."""

    x_size: int = 88
    latent: int = 100
    hidden: int = 300
    cell: str = "lstm"
    x_hidden: tuple[int, ...] = ()
    prior_hidden: tuple[int, ...] = (500,)
    decoder_hidden: tuple[int, ...] = (500, 500)
    likelihood: str = "bernoulli"
    interval: float = 2.0**-15
    kind: Literal["srnn"] = "srnn"


@dataclass(frozen=True)
class LinearGaussianArchitecture:
    """z′ = A z + w, x = C z + v: exactly solvable by the Kalman filter."""

    x_size: int = 1
    latent: int = 1
    kind: Literal["linear_gaussian"] = "linear_gaussian"


@dataclass(frozen=True)
class OwnFilterArchitecture:
    """A filter designed for its model. `residual`: μ_q = prior mean + f (as for the SRNN), else μ_q = f (the VRNN)."""

    x_hidden: tuple[int, ...] = ()
    hidden: tuple[int, ...] = (500,)
    residual: bool = False
    encode_mask: bool = False
    kind: Literal["own_filter"] = "own_filter"


@dataclass(frozen=True)
class KalmanArchitecture:
    """The exact filter, of the linear-Gaussian model only."""

    kind: Literal["kalman"] = "kalman"


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


AVF = IterativeArchitecture(encodings=("q_layer_norm", "grad_layer_norm"), hidden=(1024, 1024), highway=True)
"""The inference network of amortized variational filtering as published (Marino, Cvitkovic & Yue 2018, section 5.1)."""

FilterGenerativeArchitecture = VRNNArchitecture | SRNNArchitecture | LinearGaussianArchitecture
FilterInferenceArchitecture = IterativeArchitecture | OwnFilterArchitecture | KalmanArchitecture | OptimiserArchitecture


@dataclass(frozen=True)
class FilterArchitecture:
    """A whole sequence model: the generative side and the inference side."""

    generative: FilterGenerativeArchitecture = field(default_factory=SRNNArchitecture)
    inference: FilterInferenceArchitecture = AVF

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> FilterArchitecture:
        """Rebuilds what `to_dict` wrote.

        Raises:
            ValueError: the `kind` of a part is unknown.
        """
        return FilterArchitecture(_part(values["generative"]), _part(values["inference"]))


_KINDS: dict[str, type] = {
    "vae": VAEArchitecture,
    "vrnn": VRNNArchitecture,
    "srnn": SRNNArchitecture,
    "linear_gaussian": LinearGaussianArchitecture,
    "own_filter": OwnFilterArchitecture,
    "kalman": KalmanArchitecture,
    "direct": DirectArchitecture,
    "iterative": IterativeArchitecture,
    **dict.fromkeys(("sgd", "momentum", "rmsprop", "adam"), OptimiserArchitecture),
}


def _part(values: Mapping[str, Any]) -> Any:
    kind = values.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"architecture kind {kind!r} is unknown: one of {', '.join(_KINDS)}")
    return _KINDS[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
