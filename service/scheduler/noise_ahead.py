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
from service.noise import Keys, Purpose, normals, vectors, words
from service.scheduler.rows import RowTable

NOISE = "noise"
_BUFFER_BYTES = 32 << 20
_MOST_STEPS_AHEAD = 16
SLOT_FREE = ("decode", "prior_sample", "sample_x")
"""Programs that `Engine.run` calls on arrays of the caller; the others work on slots."""
KEPT_SAMPLES = 8
"""Measuring noise of up to so many samples is kept with the row; beyond that it is drawn when it is needed."""


class Noise:
    """Noise inputs of a card's programs; as keys for those that run on rows in slots, if the engine draws its own noise (`keyed`)."""

    def __init__(self, card: Card, keyed: bool = False):
        self._keyed = keyed
        self._inputs = {program: _noise_inputs(spec) for program, spec in card.programs.items()}

    def draw(
        self,
        program: str,
        seeds: NDArray[np.uint64],
        purpose: Purpose,
        samples: tuple[int | NDArray[np.int64], int],
    ) -> dict[str, Any]:
        """Every noise input of `program` for rows with these seeds (R,), samples as for `normals`: name -> (R, S, D), or its keys."""
        if self._keyed and program not in SLOT_FREE:
            return {
                name: keys(seeds, words(0, level=level, purpose=purpose), samples, shape) for name, level, shape in self._inputs[program]
            }
        return {
            name: normals(seeds, 0, purpose=purpose, samples=samples, size=int(np.prod(shape)), level=level).reshape(-1, samples[1], *shape)
            for name, level, shape in self._inputs[program]
        }

    def zeros(self, program: str, rows: int, samples: int = 1) -> Arrays:
        """In place of noise where the mean is wanted."""
        return {name: np.zeros((rows, samples, *shape), np.float32) for name, _, shape in self._inputs[program]}


class NoiseAhead:
    """The noise of the rows in a table, made when they enter: refining noise, fresh at every step and keyed by the step's
    absolute index, for the next steps; and the measuring noise, one for the whole request. If the engine draws its own
    noise (`keyed`), nothing is made and its keys are handed out.
    """

    def __init__(self, card: Card, rows: RowTable, keyed: bool = False):
        self._rows, self._antithetic, self._samples, self._keyed = rows, card.antithetic, card.samples, keyed
        self._step = {name: (level, shape) for name, level, shape in _noise_inputs(card.programs["step"])} if card.iterative else {}
        self._score = {name: (level, shape) for name, level, shape in _noise_inputs(card.programs["score"])}
        bytes_per_step = 4 * card.samples * sum(int(np.prod(shape)) for _, shape in self._step.values())
        self._ahead = int(np.clip(_BUFFER_BYTES // max(1, rows.capacity * bytes_per_step), 1, _MOST_STEPS_AHEAD))
        self._drawn = np.arange(0, card.samples, 2 if card.antithetic else 1)
        self._refining = {
            name: np.empty((rows.capacity, self._ahead, card.samples, *shape), np.float32) for name, (_, shape) in self._step.items()
        }
        self._measuring = {name: np.empty((rows.capacity, KEPT_SAMPLES, *shape), np.float32) for name, (_, shape) in self._score.items()}
        self._end = np.zeros(rows.capacity, np.int64)
        """Steps (of this job) for which noise was made; the last `_ahead` of them are in the buffer."""

    def enter(self, slots: Slots) -> None:
        """Makes noise for new rows in these slots, for their first steps and (where it is kept) for measuring."""
        rows = self._rows
        if self._keyed:
            return
        kept = np.where(rows.measure[slots] & (rows.samples[slots] <= KEPT_SAMPLES), rows.samples[slots], 0)
        self._make(slots, np.zeros(len(slots), np.int64), kept)

    def refining(self, slots: Slots) -> dict[str, Any]:
        """Noise for the next step of these rows: name -> (R, S, D), or its keys."""
        done = self._rows.done[slots]
        if self._keyed:
            seeds, step = self._rows.seed[slots], self._rows.first[slots] + done
            return {
                name: keys(seeds, words(step, level=level, purpose=Purpose.REFINE), (0, self._samples), shape, self._antithetic)
                for name, (level, shape) in self._step.items()
            }
        empty = self._end[slots] <= done
        if empty.any():
            self._make(slots[empty], done[empty], np.zeros(int(np.count_nonzero(empty)), np.int64))
        place = done % self._ahead
        return {name: buffer[slots, place] for name, buffer in self._refining.items()}

    def measuring(self, slots: Slots, samples: int) -> dict[str, Any]:
        """The measuring noise of rows that are measured with so many samples, at most `KEPT_SAMPLES`: name -> (R, S, D), or its keys."""
        if self._keyed:
            seeds = self._rows.seed[slots]
            return {
                name: keys(seeds, words(0, level=level, purpose=Purpose.MEASURE), (0, samples), shape)
                for name, (level, shape) in self._score.items()
            }
        return {name: buffer[slots, :samples] for name, buffer in self._measuring.items()}

    def _make(self, slots: Slots, done: NDArray[np.int64], kept: NDArray[np.int64]) -> None:
        """Noise for up to `_ahead` steps after `done`, and for `kept` measuring samples of each row, in one pass per level."""
        rows, each = self._rows, len(self._drawn)
        counts = np.minimum(rows.target[slots] - done, self._ahead)
        self._end[slots] = done + counts
        slot, within = _spread(slots, counts)
        step = done.repeat(counts) + within
        measured, sample = _spread(slots, kept)
        seeds = np.concatenate([rows.seed[slot].repeat(each), rows.seed[measured]])
        samples = np.concatenate([np.tile(self._drawn, len(slot)), sample])
        place, count = step % self._ahead, len(slot) * each
        for name, (level, shape) in {**self._step, **self._score}.items():
            word = np.empty(len(seeds), np.uint64)
            word[:count] = words(rows.first[slot] + step, level=level, purpose=Purpose.REFINE).repeat(each)
            word[count:] = words(0, level=level, purpose=Purpose.MEASURE)
            drawn = vectors(seeds, samples, word, int(np.prod(shape)))
            if len(measured) and name in self._measuring:
                self._measuring[name][measured, sample] = drawn[count:].reshape(-1, *shape)
            if len(slot) and name in self._refining:
                buffer, fresh = self._refining[name], drawn[:count].reshape(len(slot), each, *shape)
                if self._antithetic:
                    buffer[slot, place, 0::2], buffer[slot, place, 1::2] = fresh, -fresh[:, : buffer.shape[2] // 2]
                else:
                    buffer[slot, place] = fresh


def keys(
    seeds: NDArray[np.uint64],
    word: NDArray[np.uint64],
    samples: tuple[int | NDArray[np.int64], int],
    shape: tuple[int, ...],
    antithetic: bool = False,
) -> Keys:
    """Keys of one vector of `shape` per sample; `word` (from `words`) and the first sample are of each row, or one for all."""
    rows, (first, count) = len(seeds), samples
    return Keys(
        seeds,
        np.broadcast_to(word, rows)[:, None],
        np.broadcast_to(np.asarray(first, np.int64), rows),
        np.zeros(rows, np.int64),
        count,
        int(np.prod(shape)),
        (count, *shape),
        antithetic,
    )


def _spread(slots: Slots, counts: NDArray[np.int64]) -> tuple[Slots, NDArray[np.int64]]:
    """Each slot `counts` times, and 0, 1, …, count − 1 beside it."""
    repeated = slots.repeat(counts)
    return repeated, np.arange(len(repeated)) - (counts.cumsum() - counts).repeat(counts)


def _noise_inputs(spec: ProgramSpec) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, level, shape of one sample) of each; `noise2` is of level 2, and `noise_x`, which belongs to no level, counts as 0."""
    found = []
    for tensor in spec.inputs:
        if tensor.name.startswith(NOISE):
            suffix = tensor.name.removeprefix(NOISE)
            found.append((tensor.name, int(suffix) if suffix.isdigit() else 0, tuple(int(size) for size in tensor.shape[2:])))
    return found
