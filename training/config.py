"""A training run, whole: what the functions in training/runs/ return. Frozen; a variant is `dataclasses.replace` of another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from models.architecture import Architecture
from training.data.catalogue import load
from training.data.images import Images


@dataclass(frozen=True)
class DataConfig:
    """What a run learns from.

    Attributes:
        name: as `training.data.load` takes it.
        mask_probability: how often a training row has a part hidden.
        shape: (height, width) of the images; those of `folder:PATH` are stretched to it, the other sets have their own.
    """

    name: str = "mnist"
    mask_probability: float = 0.0
    shape: tuple[int, int] = (28, 28)

    def load(self, root: str | None = None) -> Images:
        """Raises DataError, as `training.data.load` does."""
        return load(self.name, root, shape=self.shape)


@dataclass(frozen=True)
class RefinementConfig:
    """K refinement steps per update, and S samples per step (antithetic: in pairs ε, −ε). A direct model only has S.

    late: in φ's loss step i weighs in proportion to i, instead of all alike.
    linked: from the step after so many on, φ's loss also goes back through λ to the steps before; None = never, as published.
    """

    steps: int = 5
    samples: int = 1
    antithetic: bool = False
    late: bool = False
    linked: int | None = None


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW for φ and θ alike (without decay of the weights it is Adam).

    Attributes:
        decay: "exponential": × `per_epoch` each epoch, as published; "cosine": to zero at `horizon` (default: the last epoch).
        cooldown_epochs: over so many last epochs the rate also falls linearly to zero, wherever its decay stands then.
        clip_norm: largest norm of the gradient of φ, and of θ, per row (of sequences: per frame) of the batch; None = no clipping.
        weight_decay: decoupled; the learning rate times this is the share of a weight that an update takes away.
    """

    learning_rate: float = 2e-4
    decay: Literal["exponential", "cosine"] = "exponential"
    per_epoch: float = 0.999
    horizon: int | None = None
    cooldown_epochs: int = 0
    clip_norm: float | None = None
    weight_decay: float = 0.0

    def rate(self, epoch: float, epochs: int) -> float:
        """The learning rate in `epoch` (from 0) of `epochs`."""
        if self.decay == "exponential":
            rate = self.learning_rate * self.per_epoch**epoch
        else:
            rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / (self.horizon or epochs)))
        return rate * min(1.0, (epochs - epoch) / self.cooldown_epochs) if self.cooldown_epochs else rate


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the weights a run ends with.

    Attributes:
        kl_warmup_epochs: the KL's weight rises linearly to 1 over so many epochs.
        precision: Lightning Fabric's name. Master weights, likelihoods and λ stay float32 in "bf16-mixed".
        compiled: trace the whole update once and compile it (fixed batch size; the odd rows of an epoch wait for the next).
        parent: begin with the best weights of this run, whose folder lies beside ours; None = fresh weights.
        frozen: parts that keep their weights: "generative" leaves θ as it is and trains φ alone.
        train_rows: use only the first so many training rows; None = all.
    """

    name: str
    architecture: Architecture = field(default_factory=Architecture)
    data: DataConfig = field(default_factory=DataConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    batch_size: int = 64
    epochs: int = 1500
    kl_warmup_epochs: int = 0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compiled: bool = False
    parent: str | None = None
    frozen: tuple[str, ...] = ()
    train_rows: int | None = None
    validation_rows: int | None = None
    seed: int = 0

    def kl_weight(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.kl_warmup_epochs) if self.kl_warmup_epochs else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RunConfig:
        """Rebuilds what `to_dict` wrote. Raises TypeError if a field is unknown."""
        parts = {"data": DataConfig, "refinement": RefinementConfig, "optimiser": OptimiserConfig}
        built = {name: kind(**with_tuples(values[name])) for name, kind in parts.items()}
        return RunConfig(**{**with_tuples(values), **built, "architecture": Architecture.from_dict(values["architecture"])})


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON turns tuples into lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
