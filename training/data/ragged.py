"""Sequences of different lengths without padding: one joined array and the lengths.

N sequences, T_i frames in sequence i, F = Σ T_i frames in all, X entries per frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from training.data.errors import DataError


@dataclass(frozen=True, eq=False)
class Ragged(Sequence[NDArray[Any]]):
    """A list of arrays (T_i, X) that is stored as one; indexing gives views, slicing another `Ragged`.

    Attributes:
        joined: (F, X), the sequences end to end; (F,) for recordings that are not cut into frames yet.
        lengths: (N,) int64, T_i ≥ 1.
    """

    joined: NDArray[Any]
    lengths: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1 or self.lengths.size == 0 or self.lengths.min() < 1:
            raise DataError("there must be at least one sequence, and none without frames")
        if int(self.lengths.sum()) != len(self.joined):
            raise DataError(f"the lengths add up to {int(self.lengths.sum()):,}, the array has {len(self.joined):,} frames")

    @classmethod
    def of(cls, arrays: Iterable[NDArray[Any]]) -> Ragged:
        """Joins arrays of any lengths; those without a frame are left out.

        Raises:
            DataError: nothing is left, or the arrays differ in X.
        """
        kept = [array for array in arrays if len(array)]
        if not kept:
            raise DataError("no sequence has a frame")
        if len({array.shape[1:] for array in kept}) > 1:
            raise DataError("the sequences differ in the width of a frame")
        return cls(np.concatenate(kept), np.array([len(array) for array in kept], np.int64))

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(N + 1,): sequence i is joined[offsets[i]:offsets[i + 1]]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def frames(self) -> int:
        """F."""
        return len(self.joined)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> NDArray[Any] | Ragged:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        row = index % len(self)
        return self.joined[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: NDArray[np.integer[Any]]) -> Ragged:
        """The sequences with these numbers, in this order; a copy."""
        return Ragged.of(self[int(row)] for row in rows)
