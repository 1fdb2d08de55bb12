"""A training run of a sequence model, whole: what the functions in training/runs/ for music and speech return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from models.architecture import FilterArchitecture
from training.config import OptimiserConfig, RefinementConfig, with_tuples
from training.data.sequence_catalogue import FRAME_SIZE, STEPS_PER_BEAT, load_sequences
from training.data.sequence_plan import Carried, Crops, Order, Whole
from training.data.sequences import Sequences


@dataclass(frozen=True)
class SequenceDataConfig:
    """What a run learns from, and in which pieces.

    Attributes:
        name: as `load_sequences` takes it.
        order: "crops": random pieces, as published; "carried": whole sequences in successive chunks, the state carried over;
            "whole": whole sequences.
        frames: of a crop or chunk (25 for music, 40 for speech, as published).
        transpose: about half of the pieces of music are shifted by up to so many semitones either way (columns of a piano roll).
        frame_size: samples per frame of audio. steps_per_beat: frames per quarter note of `midi:FOLDER`.
    """

    name: str = "jsb"
    order: Literal["crops", "carried", "whole"] = "crops"
    frames: int = 25
    transpose: int = 0
    frame_size: int = FRAME_SIZE
    steps_per_beat: int = STEPS_PER_BEAT

    def load(self, root: str | None = None) -> Sequences:
        """Raises DataError, as `load_sequences` does."""
        return load_sequences(self.name, root, frame_size=self.frame_size, steps_per_beat=self.steps_per_beat)

    def plan(self) -> Order:
        return {"crops": Crops, "carried": Carried}[self.order](self.frames) if self.order != "whole" else Whole()


@dataclass(frozen=True)
class SequenceRunConfig:
    """Everything that decides the weights a run ends with (`seconds` lets the machine's speed decide too).

    Attributes:
        refinement: K steps and S samples per frame; a model's own filter has K = 0.
        seconds: end after so many seconds of updates, validation and compiling not counted; the learning rate then follows the
            share of them that is spent instead of epochs: rivals at equal training seconds each get their whole schedule.
        one_step_share: over this share of the run, as its learning rate counts it, a frame gets one step; then 2, 4, … and K, for
            equal parts of the rest. Many short updates teach the model most, and f learns to go on from where it leads itself.
        later_frames: a refiner also learns from what later frames of its chunk make of a frame's z; published is that it does not.
        kl_warmup_epochs: the KL's weight rises linearly to 1 over so many epochs.
        validate_every: epochs between validations, which also choose the best checkpoint.
        validate_frames: of each validation sequence, from its beginning; None = whole. validation_sequences: the first so many.
        precision: of matrix products; master weights, likelihoods and λ stay float32.
        compiled: compile a refining model's chain of frames (training/sequence_update.py).
    """

    name: str
    architecture: FilterArchitecture = field(default_factory=FilterArchitecture)
    data: SequenceDataConfig = field(default_factory=SequenceDataConfig)
    refinement: RefinementConfig = field(default_factory=lambda: RefinementConfig(steps=1))
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(learning_rate=5e-4, weight_decay=0.3))
    batch_size: int = 16
    epochs: int = 800
    seconds: float | None = None
    one_step_share: float = 0.0
    later_frames: bool = False
    kl_warmup_epochs: int = 0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compiled: bool = True
    validate_every: int = 1
    validate_frames: int | None = None
    validation_sequences: int | None = None
    frozen: tuple[str, ...] = ()
    seed: int = 0

    def steps_at(self, share: float) -> int:
        """K of an update made when `share` of the run is done."""
        if share >= 1 or self.refinement.steps <= 1 or not self.one_step_share:
            return self.refinement.steps
        if share < self.one_step_share:
            return 1
        rising = [2**i for i in range(1, 64) if 2**i < self.refinement.steps] + [self.refinement.steps]
        part = (share - self.one_step_share) / (1 - self.one_step_share)
        return rising[int(round(part * len(rising), 9))]

    def kl_weight(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.kl_warmup_epochs) if self.kl_warmup_epochs else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> SequenceRunConfig:
        """Rebuilds what `to_dict` wrote. Raises TypeError if a field is unknown."""
        parts = {"data": SequenceDataConfig, "refinement": RefinementConfig, "optimiser": OptimiserConfig}
        built = {name: kind(**with_tuples(values[name])) for name, kind in parts.items()}
        return SequenceRunConfig(**{**with_tuples(values), **built, "architecture": FilterArchitecture.from_dict(values["architecture"])})
