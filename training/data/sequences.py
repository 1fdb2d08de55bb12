"""What `load_sequences` returns: sequences of frames, split into training and validation.

N sequences, T_i frames in sequence i, X entries per frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from training.data.errors import DataError
from training.data.ragged import Ragged

S = TypeVar("S")
Kind = Literal["binary", "audio", "real"]
HELD_OUT_SEED = 1234
HELD_OUT_SHARE = 0.05
PCM16_SCALE = 32768


@dataclass(frozen=True)
class Parts:
    """What a reader gives: the splits it keeps and, for audio, the rate. Recordings are joined samples, not frames yet; `empty` ones, which
    have none, are counted only."""

    train: Ragged
    valid: Ragged
    test: Ragged | None = None
    sample_rate: int | None = None
    empty: int = 0

    @classmethod
    def of(cls, splits: Iterable[Ragged], sample_rate: int | None = None) -> Parts:
        """From two or three splits: train, valid and maybe test."""
        train, valid, *rest = splits
        return cls(train, valid, rest[0] if rest else None, sample_rate)


@dataclass(frozen=True, eq=False)
class Sequences:
    """A data set of sequences.

    Attributes:
        name: as given to `load_sequences`.
        kind: "binary": 0/1 entries, uint8; "audio": frames of PCM samples in −1…1, float32; "real": any values, float32.
        train, valid: arrays (T_i, X), ragged.
        sha256: of the file they were read from (of the listing, where there are several): goes into provenance.
        description: what one frame is, for the artifact's card.
        test: only of sets whose test split is kept for choosing nothing (docs/data.md); None elsewhere.
        sample_rate: samples per second (audio).
        frame_size: samples per frame, X (audio).
        too_short: recordings that fill no frame, and so are in no split.
        mean, std: of all values of the training split together, in the units of the data; None for binary sets. The
            data are *not* standardised: the model does that inside, so that clients send raw values.
    """

    name: str
    kind: Kind
    train: Ragged
    valid: Ragged
    sha256: str
    description: str
    test: Ragged | None = None
    sample_rate: int | None = None
    frame_size: int | None = None
    mean: float | None = None
    std: float | None = None
    too_short: int = 0

    def __post_init__(self) -> None:
        dtype = np.uint8 if self.kind == "binary" else np.float32
        for split, part in self.splits.items():
            if part.joined.ndim != 2 or part.joined.dtype != dtype or part.joined.shape[1] != self.size:
                raise DataError(
                    f"{self.name}: {split} must be {np.dtype(dtype)} frames of {self.size}, not {part.joined.dtype} {part.joined.shape}"
                )
            if self.kind == "binary" and part.joined.max() > 1:
                raise DataError(f"{self.name}: {split} is said to be binary but holds the value {part.joined.max()}")
            if self.kind != "binary" and not np.isfinite(part.joined).all():
                raise DataError(f"{self.name}: {split} holds values that are not finite")

    @property
    def left_out(self) -> str:
        """What of the set is not used, in words; "" if all is."""
        if not self.too_short:
            return ""
        recordings = sum(len(part) for part in self.splits.values()) + self.too_short
        return f"{self.too_short:,} of {recordings:,} recordings are shorter than a frame of {self.frame_size} samples, and left out"

    @property
    def size(self) -> int:
        """X."""
        return int(self.train.joined.shape[1])

    @property
    def splits(self) -> dict[str, Ragged]:
        """The splits there are, by name."""
        return {"train": self.train, "valid": self.valid} | ({"test": self.test} if self.test is not None else {})

    def frame_mean(self) -> NDArray[np.float32]:
        """(X,): the mean training frame; of a binary set the share of ones per entry (emission bias, input centring)."""
        return self.train.joined.mean(axis=0, dtype=np.float64).astype(np.float32)


def binary_sequences(name: str, parts: Parts, sha256: str, description: str) -> Sequences:
    """Piano rolls and the like: 0/1 frames (T_i, X)."""
    return Sequences(name, "binary", parts.train, parts.valid, sha256, description, test=parts.test)


def real_sequences(name: str, parts: Parts, sha256: str, description: str) -> Sequences:
    """Frames of real numbers (T_i, X), with their global training mean and standard deviation."""
    mean, std = _moments(parts.train)
    return Sequences(name, "real", parts.train, parts.valid, sha256, description, test=parts.test, mean=mean, std=std)


def audio_sequences(name: str, parts: Parts, sha256: str, frame_size: int) -> Sequences:
    """Recordings cut into frames of `frame_size` samples; the samples after the last whole frame are dropped.

    Raises:
        DataError: as `cut_frames`, or every training sample is the same.
    """
    whole = [part for part in (parts.train, parts.valid, parts.test) if part is not None]
    train, valid, *rest = (cut_frames(part, frame_size) for part in whole)
    test = rest[0] if rest else None
    too_short = parts.empty + sum(len(part) for part in whole) - sum(len(part) for part in (train, valid, *rest))
    mean, std = _moments(train)
    description = f"{frame_size} samples of mono PCM at {parts.sample_rate} Hz, in -1 to 1"
    return Sequences(
        name,
        "audio",
        train,
        valid,
        sha256,
        description,
        test,
        sample_rate=parts.sample_rate,
        frame_size=frame_size,
        mean=mean,
        std=std,
        too_short=too_short,
    )


def cut_frames(recordings: Ragged, frame_size: int) -> Ragged:
    """Joined samples (int16, or float in −1…1) to frames (T_i, frame_size) float32 in −1…1; int16 is divided by 32,768.

    The remainder of each recording is dropped, and with it a recording shorter than one frame.

    Raises:
        DataError: `frame_size` is not positive, or no recording fills a frame.
    """
    if frame_size < 1:
        raise DataError(f"frame_size must be at least 1, not {frame_size}")
    longest = int(recordings.lengths.max())
    if longest < frame_size:
        raise DataError(
            f"no sequence has a frame: a frame is {frame_size:,} samples, and the longest of {len(recordings):,} recordings (of one split) "
            f"has {longest:,}: choose a smaller frame, or longer recordings"
        )
    whole = [wave[: len(wave) // frame_size * frame_size].reshape(-1, frame_size) for wave in recordings]
    frames = Ragged.of(whole)
    if frames.joined.dtype == np.int16:
        return Ragged(np.divide(frames.joined, PCM16_SCALE, dtype=np.float32), frames.lengths)
    return Ragged(frames.joined.astype(np.float32, copy=False), frames.lengths)


def hold_out(items: Sequence[S]) -> tuple[list[S], list[S]]:
    """(train, valid): a seeded 5 % (at least one) for validation, the published share and seed for TIMIT: 231 of 4,620.

    The published permutation came from another generator, so the files held out are not the published ones. Both lists
    keep the order of `items`.

    Raises:
        DataError: there is only one item, or none.
    """
    if len(items) < 2:
        raise DataError(f"{len(items)} files are too few to split into training and validation")
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(items))
    valid = max(1, round(HELD_OUT_SHARE * len(items)))
    return [items[row] for row in np.sort(order[valid:])], [items[row] for row in np.sort(order[:valid])]


def _moments(part: Ragged) -> tuple[float, float]:
    """Mean and standard deviation of every value, in float64.

    Raises:
        DataError: all values are equal, so that nothing can be standardised by them.
    """
    mean, std = float(part.joined.mean(dtype=np.float64)), float(part.joined.std(dtype=np.float64))
    if std == 0:
        raise DataError("every training value is the same: silence, or an empty channel")
    return mean, std
