"""Standard normal noise that depends on what it is for, never on when or beside whom it is drawn.

Every number is a pure function of

    (seed of the row, frame, step, sample, level, purpose, element)

through the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
and the Box-Muller transform. So a row's answer cannot depend on its place in a batch, noise can be made ahead of use, and
an accelerator makes the same integers from the same words:

    key      word 0   low half of the seed          word 1   high half of the seed
    counter  word 0   block of four elements        word 1   sample
             word 2   step | level << 20 | purpose << 28     word 3   frame

A block of four words (w0, w1, w2, w3) gives four elements: r(w0) cos θ(w1), r(w0) sin θ(w1), r(w2) cos θ(w3),
r(w2) sin θ(w3), with r(w) = sqrt(−2 log((w + ½) 2⁻³²)) and θ(w) = π 2⁻³¹ · (w as a signed integer).

Shapes: R rows, S samples, D elements (latent size of a level, or size of x).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

STEP_BITS, LEVEL_BITS = 20, 8
MAX_STEP = (1 << STEP_BITS) - 1

_HALF = np.uint64(32)
_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64).reshape(2, 1, 1)
_LANES = [_MULTIPLIERS[:: 1 if i % 2 == 0 else -1].copy() for i in range(_ROUNDS)]
_WEYL = np.array([0xBB67AE85, 0x9E3779B9], np.uint64).reshape(2, 1, 1) << _HALF
_WEYL_HIGH = np.stack([_WEYL * np.uint64(i) for i in range(1, _ROUNDS)])
_BLOCKS_AT_ONCE = 4096
"""Blocks per pass, so that the few arrays of a pass (64 KB each) stay in the second-level cache."""


class Purpose(IntEnum):
    """Streams that must never be mixed: λ overfits the noise that it is refined with."""

    REFINE = 0
    MEASURE = 1
    VERIFY = 2
    SCORE = 3
    DRAW = 4
    PRIOR = 5
    SAMPLE_X = 6
    INIT = 7


def normals(
    seeds: NDArray[np.uint64],
    steps: NDArray[np.int64] | int,
    *,
    purpose: Purpose,
    samples: int | tuple[int | NDArray[np.int64], int],
    size: int,
    level: int = 0,
    frame: NDArray[np.int64] | int = 0,
    antithetic: bool = False,
) -> NDArray[np.float32]:
    """Standard normal noise for R rows.

    Args:
        seeds: (R,), one 64-bit seed per row.
        steps: index of the refinement step, one for all rows or (R,); at most `MAX_STEP`.
        purpose: which stream.
        samples: how many, or (first, count), where `first` may be (R,) unless `antithetic`.
        size: D.
        level: latent level the noise is for.
        frame: absolute frame of a stream, one for all rows or (R,).
        antithetic: sample 2j + 1 is minus sample 2j.

    Returns:
        (R, S, D) float32.

    Raises:
        ValueError: a step beyond `MAX_STEP`: it would repeat the noise of another.
    """
    if np.max(steps, initial=0) > MAX_STEP:
        raise ValueError(f"steps: {int(np.max(steps))} is beyond the last step that noise exists for, {MAX_STEP}")
    first, count = samples if isinstance(samples, tuple) else (0, samples)
    word = words(steps, level=level, purpose=purpose)
    if not antithetic:
        return _draw(seeds, word, np.add.outer(first, np.arange(count)), size, frame)
    begin = int(first) & ~1
    noise = _draw(seeds, word, np.arange(begin, int(first) + count, 2), size, frame)
    pairs = np.stack([noise, -noise], axis=2).reshape(len(seeds), -1, size)
    return pairs[:, int(first) - begin : int(first) - begin + count]


def words(steps: NDArray[np.int64] | int, *, level: int, purpose: Purpose) -> NDArray[np.uint64]:
    """The counter word that packs step (at most `MAX_STEP`), level and purpose; one per entry of `steps`."""
    return np.asarray(steps).astype(np.uint64) | np.uint64(level << STEP_BITS | int(purpose) << (STEP_BITS + LEVEL_BITS))


def vectors(
    seeds: NDArray[np.uint64],
    samples: NDArray[np.int64],
    word: NDArray[np.uint64],
    size: int,
    *,
    frame: NDArray[np.int64] | int = 0,
) -> NDArray[np.float32]:
    """F vectors of D normals, each with a seed, a sample, a word (from `words`; or one for all) and a frame of its own: (F, D) float32.

    What `normals` is made of; callers that want vectors for several purposes at once save the fixed cost of a call.
    """
    count, blocks = len(seeds), (size + 3) // 4
    out = np.empty((count, blocks, 2, 2), np.float32)
    counters = np.empty((2, 1, count), np.uint64)
    counters[0, 0], counters[1, 0] = samples, frame
    high = np.left_shift(word, _HALF)
    counters[1, 0] |= high
    at_once = max(1, _BLOCKS_AT_ONCE // max(1, blocks))
    block = np.arange(blocks, dtype=np.uint64)
    block <<= _HALF
    for start in range(0, count, at_once):
        part = slice(start, start + at_once)
        state = np.empty((2, blocks, len(seeds[part])), np.uint64)
        np.bitwise_or(counters[0, :, part], block[:, None], out=state[0])
        state[1] = counters[1, :, part]
        _box_muller(_philox(state, seeds[part]), out[part])
    return out.reshape(count, blocks * 4)[:, :size]


@dataclass(frozen=True, eq=False)
class Keys:
    """Noise that is still to be drawn: R rows × U uses × S samples × D elements, by the few words per row that it depends on.

    A device engine draws it itself, so that only these words cross; `draw` makes the same numbers here.

    Attributes:
        seeds, first, frames: (R,), the seed, the number of the first sample (0 if `antithetic`) and the frame of each row.
        words: (R, U), from `words`, one for each use. samples, size: S and D.
        shape: of one row: U, S and D in this order, in whatever axes the program wants them.
    """

    seeds: NDArray[np.uint64]
    words: NDArray[np.uint64]
    first: NDArray[np.int64]
    frames: NDArray[np.int64]
    samples: int
    size: int
    shape: tuple[int, ...]
    antithetic: bool = False

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, rows: slice) -> Keys:
        """Those of some rows."""
        few = (self.seeds[rows], self.words[rows], self.first[rows], self.frames[rows])
        return Keys(*few, self.samples, self.size, self.shape, self.antithetic)

    def draw(self) -> NDArray[np.float32]:
        """(R, *shape)."""
        (rows, uses), drawn = self.words.shape, np.arange(0, self.samples, 2 if self.antithetic else 1)
        each = uses * len(drawn)
        noise = vectors(
            self.seeds.repeat(each),
            np.repeat(self.first[:, None] + drawn, uses, axis=0).reshape(-1),
            self.words.reshape(-1).repeat(len(drawn)),
            self.size,
            frame=self.frames.repeat(each),
        ).reshape(rows, uses, len(drawn), self.size)
        if self.antithetic:
            noise = np.stack([noise, -noise], axis=3).reshape(rows, uses, -1, self.size)[:, :, : self.samples]
        return noise.reshape(rows, *self.shape)


def philox(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The raw integers: counters (N, 4) and keys (N, 2) -> (N, 4). For tests and for other implementations to compare with."""
    counter = counters.astype(np.uint64)
    state = np.stack([counter[:, 0] << _HALF | counter[:, 1], counter[:, 2] << _HALF | counter[:, 3]])[:, None]
    state = _philox(state, keys[:, 0].astype(np.uint64) | keys[:, 1].astype(np.uint64) << _HALF)
    return state.view(np.uint32).reshape(2, -1, 2)[:, :, ::-1].swapaxes(0, 1).reshape(-1, 4)


def _draw(
    seeds: NDArray[np.uint64], word: NDArray[np.uint64], samples: NDArray[np.int64], size: int, frame: NDArray[np.int64] | int
) -> NDArray[np.float32]:
    """`normals` for the given sample numbers, (S,) or (R, S), and words, () or (R,)."""
    rows, count = len(seeds), samples.shape[-1]
    drawn = vectors(
        np.repeat(seeds, count),
        np.tile(samples, rows) if samples.ndim == 1 else samples.reshape(-1),
        np.repeat(word, count) if word.ndim else word,
        size,
        frame=np.repeat(frame, count) if np.ndim(frame) else frame,
    )
    return drawn.reshape(rows, count, size)


def _philox(state: NDArray[np.uint64], seed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds over counters (2, B, F) with keys (F,): state[0] packs words 0 and 1, state[1] words 2 and 3, the first one high.

    With hi and lo the halves of a 64-bit product, a round is
        (w0', w1') = (hi(M1 w2) ^ w1 ^ k0, lo(M1 w2)),   (w2', w3') = (hi(M0 w0) ^ w3 ^ k1, lo(M0 w0)),
    that is, for both lanes in one pass over packed words: product of the *other* lane's high word, xored with what was the
    low word, and the key, shifted high. The lanes change places with every round instead of being copied. Keys stand in
    the high half, where their sums wrap as 32-bit sums do.
    """
    keys = np.empty((_ROUNDS, 2, 1, len(seed)), np.uint64)
    np.left_shift(seed, _HALF, out=keys[0, 1, 0])
    np.bitwise_and(seed, np.uint64(0xFFFFFFFF << 32), out=keys[0, 0, 0])
    np.add(keys[0], _WEYL_HIGH, out=keys[1:])
    keys[1::2] = keys[1::2, ::-1]
    low = np.empty_like(state)
    (first, second), (low_first, low_second) = state, low
    for key, lanes in zip(keys, _LANES, strict=True):
        np.left_shift(second, _HALF, out=low_first)  # halves apart: numpy is slow on a reversed axis
        np.left_shift(first, _HALF, out=low_second)
        state >>= _HALF
        state *= lanes
        state ^= low
        state ^= key
    return state


def _box_muller(state: NDArray[np.uint64], out: NDArray[np.float32]) -> None:
    """Packed words (2, B, F), lanes in order -> `out` (F, B, 2, 2): per block and lane, the cosine and the sine normal."""
    halves = state.view(np.uint32).reshape(*state.shape, 2)
    radius = halves[..., 1].astype(np.float32)
    radius *= np.float32(2.0**-32)
    radius += np.float32(2.0**-33)
    np.log(radius, out=radius)
    radius *= np.float32(-2.0)
    np.sqrt(radius, out=radius)
    angle = halves[..., 0].view(np.int32).astype(np.float32)
    angle *= np.float32(np.pi * 2.0**-31)
    np.multiply(radius, np.cos(angle), out=out[:, :, :, 0].transpose(2, 1, 0))
    np.multiply(radius, np.sin(angle), out=out[:, :, :, 1].transpose(2, 1, 0))
