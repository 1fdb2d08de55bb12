"""Noise for the rows of one model, by the names of its programs' noise inputs; refining noise made several steps ahead.

Making noise costs about the same for one vector as for some hundred, so a row gets the noise of its next steps in the call
that serves all rows which have run out, and a tick mostly only copies.

Shapes: R rows, S samples, D latent size of a level.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card, ProgramSpec
from service.engine.base import Slots
from service.noise import Purpose, normals
from service.scheduler.rows import RowTable

NOISE = "noise"
_BUFFER_BYTES = 32 << 20
_MOST_STEPS_AHEAD = 16


class Noise:
    """Noise inputs of a card's programs."""

    def __init__(self, card: Card):
        self._inputs = {program: _noise_inputs(spec) for program, spec in card.programs.items()}

    def draw(
        self,
        program: str,
        seeds: NDArray[np.uint64],
        purpose: Purpose,
        samples: tuple[int | NDArray[np.int64], int],
    ) -> Arrays:
        """Every noise input of `program` for rows with these seeds (R,), samples as for `normals`: name -> (R, S, D)."""
        return {
            name: normals(seeds, 0, purpose=purpose, samples=samples, size=int(np.prod(shape)), level=level).reshape(-1, samples[1], *shape)
            for name, level, shape in self._inputs[program]
        }

    def zeros(self, program: str, rows: int, samples: int = 1) -> Arrays:
        """In place of noise where the mean is wanted."""
        return {name: np.zeros((rows, samples, *shape), np.float32) for name, _, shape in self._inputs[program]}


class NoiseAhead:
    """The refining noise of the rows in a table: fresh at every step, keyed by the step's absolute index."""

    def __init__(self, card: Card, rows: RowTable):
        self._rows, self._antithetic = rows, card.antithetic
        self._levels = _noise_inputs(card.programs["step"]) if card.iterative else []
        bytes_per_step = 4 * card.samples * sum(int(np.prod(shape)) for _, _, shape in self._levels)
        self._ahead = int(np.clip(_BUFFER_BYTES // max(1, rows.capacity * bytes_per_step), 1, _MOST_STEPS_AHEAD))
        self._buffers = {name: np.empty((rows.capacity, self._ahead, card.samples, *shape), np.float32) for name, _, shape in self._levels}
        self._end = np.zeros(rows.capacity, np.int64)
        """Steps (of this job) for which noise was made; the last `_ahead` of them are in the buffer."""

    def enter(self, slots: Slots) -> None:
        """New rows are in these slots: what was made before was for others."""
        self._end[slots] = 0

    def take(self, slots: Slots) -> dict[str, NDArray[Any]]:
        """Noise for the next step of these rows: name -> (R, S, D)."""
        if not self._levels:
            return {}
        done = self._rows.done[slots]
        empty = self._end[slots] <= done
        if np.any(empty):
            self._make(slots[empty], done[empty])
        place = done % self._ahead
        return {name: self._buffers[name][slots, place] for name, _, _ in self._levels}

    def _make(self, slots: Slots, done: NDArray[np.int64]) -> None:
        rows = self._rows
        counts = np.minimum(rows.target[slots] - done, self._ahead)
        self._end[slots] = done + counts
        slot = np.repeat(slots, counts)
        # 0, 1, …, count − 1 for each row, after one another.
        within = np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts, counts)
        step = np.repeat(done, counts) + within
        for name, level, shape in self._levels:
            buffer = self._buffers[name]
            buffer[slot, step % self._ahead] = normals(
                rows.seed[slot],
                rows.first[slot] + step,
                purpose=Purpose.REFINE,
                samples=buffer.shape[2],
                size=int(np.prod(shape)),
                level=level,
                antithetic=self._antithetic,
            ).reshape(len(slot), *buffer.shape[2:])


def _noise_inputs(spec: ProgramSpec) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, level, shape of one sample) of each; `noise2` is of level 2, and `noise_x`, which belongs to no level, counts as 0."""
    found = []
    for tensor in spec.inputs:
        if tensor.name.startswith(NOISE):
            suffix = tensor.name.removeprefix(NOISE)
            found.append((tensor.name, int(suffix) if suffix.isdigit() else 0, tuple(int(size) for size in tensor.shape[2:])))
    return found
