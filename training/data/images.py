"""What `load` returns: still images as rows of bytes, split into training and validation.

N training rows, M validation rows, X = height · width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from training.data.errors import DataError

Kind = Literal["grey", "binary"]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Split:
    """One part of a set: images (N, X) and, where the source has them, labels (N,)."""

    images: Bytes
    labels: NDArray[Any] | None = None

    def take(self, rows: slice | NDArray[np.intp]) -> Split:
        return Split(self.images[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of still images. There is no test split: final figures are taken elsewhere, once.

    Attributes:
        name: as given to `load`.
        kind: "grey": value / 255 is the intensity: of a Bernoulli the probability of ink, to be drawn anew at each use (dynamic
            binarisation); "binary": already 0 or 1.
        shape: (height, width).
        train: (N, X) uint8.
        valid: (M, X) uint8.
        sha256: of the file the images were read from (of the listing, where there are several): goes into provenance.
        train_labels, valid_labels: (N,) and (M,), where the source has labels.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    train: Bytes
    valid: Bytes
    sha256: str
    train_labels: NDArray[Any] | None = None
    valid_labels: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        size = self.shape[0] * self.shape[1]
        for split, images, labels in (("train", self.train, self.train_labels), ("valid", self.valid, self.valid_labels)):
            if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != size or len(images) == 0:
                raise DataError(f"{self.name}: {split} must be uint8 rows of {size} pixels, not {images.dtype} {images.shape}")
            if labels is not None and len(labels) != len(images):
                raise DataError(f"{self.name}: {len(labels)} {split} labels for {len(images)} images")
            if self.kind == "binary" and int(images.max()) > 1:
                raise DataError(f"{self.name}: {split} is said to be binary but holds the value {int(images.max())}")


def hold_out_last(rows: Split, count: int) -> tuple[Split, Split]:
    """The last `count` rows become the validation split."""
    if len(rows.images) <= count:
        raise DataError(f"{len(rows.images)} images are too few: the last {count} are the validation split")
    return rows.take(slice(0, -count)), rows.take(slice(-count, None))


def hold_out_tenth(rows: Split, seed: int = 0) -> tuple[Split, Split]:
    """A seeded permutation; its last tenth (at least one row) becomes the validation split."""
    total = len(rows.images)
    if total < 2:
        raise DataError(f"{total} images are too few to split into training and validation")
    order = np.random.default_rng(seed).permutation(total)
    first_valid = total - max(1, total // 10)
    return rows.take(order[:first_valid]), rows.take(order[first_valid:])
