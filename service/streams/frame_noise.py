"""The noise of frames by the names of a filter's programs: keyed by (seed, frame, step), so that it depends on nothing else.

Shapes: R rows of a tick, S samples, D latent size, X entries per frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card
from service.noise import Keys, Purpose, words
from service.streams.stream import Portion

FRAME = "frame_K"
NOISE_FRAMES, NOISE_AT_ONCE = 64, 2048
"""Most frames of one portion, and of all portions together, whose noise is drawn in one go: a call for some dozens costs about what one
for a single frame does, and a call for a long portion would hold up every lane."""


class FrameNoise:
    """The noise of frames, keyed by (seed, frame, step): (R, …) arrays by the names of the programs' inputs, or (`keyed`) the keys
    of them, for an engine that draws its own."""

    def __init__(self, card: Card, keyed: bool = False):
        self._card, self._keyed = card, keyed
        self._latent = card.levels[0].size
        self._samples, self._antithetic = card.samples, card.antithetic

    def step(self, seeds: NDArray[np.uint64], frames: NDArray[np.int64], step: int) -> dict[str, Any]:
        return {"noise0": self._one(seeds, frames, (step, Purpose.REFINE))}

    def advance(self, seeds: NDArray[np.uint64], frames: NDArray[np.int64], purpose: Purpose = Purpose.DRAW) -> dict[str, Any]:
        return {self._name("advance", "noise_advance"): self._one(seeds, frames, (0, purpose))}

    def predict(self, seeds: NDArray[np.uint64], frames: NDArray[np.int64]) -> dict[str, Any]:
        return {self._name("predict", "noise0"): self._one(seeds, frames, (0, Purpose.PRIOR))}

    def sample_x(self, seeds: NDArray[np.uint64], frames: NDArray[np.int64]) -> Arrays:
        """One draw of x per row: the program runs on arrays, not on slots, so its noise is one."""
        size, rows = self._card.x.size, len(seeds)
        word = np.broadcast_to(words(0, level=0, purpose=Purpose.SAMPLE_X), (rows, 1))
        return {self._name("sample_x", "noise_x"): Keys(seeds, word, np.zeros(rows, np.int64), frames, 1, size, (1, size), False).draw()}

    def ahead(self, portions: list[Portion]) -> dict[str, Any]:
        """For the fused program, the very numbers that `step` and `advance` would get: of the next frames of a portion at once."""
        if self._keyed:
            seeds = np.array([portion.stream.spec.seed for portion in portions], np.uint64)
            return self._fused(seeds, np.array([portion.stream.frame for portion in portions], np.int64))
        new = [portion for portion in portions if portion.noise is None or portion.done - portion.noise_from >= len(portion.noise)]
        if new:
            most = min(NOISE_FRAMES, max(1, NOISE_AT_ONCE // len(new)))
            left = [min(most, len(portion.x) - portion.done) for portion in new]
            seeds = np.repeat(np.array([portion.stream.spec.seed for portion in new], np.uint64), left)
            frames = np.concatenate([np.arange(p.stream.frame, p.stream.frame + n) for p, n in zip(new, left, strict=True)])
            drawn = self._keys(seeds, frames, [*self._refining(), (0, Purpose.DRAW)]).draw()
            at = 0
            for portion, count in zip(new, left, strict=True):
                portion.noise, portion.noise_from = drawn[at : at + count], portion.done
                at += count
        rows = np.stack([p.noise[p.done - p.noise_from] for p in portions if p.noise is not None])
        noise = {"noise_advance": np.ascontiguousarray(rows[:, -1])}
        return noise | ({"noise0": np.ascontiguousarray(rows[:, :-1])} if self._card.trained_steps else {})

    def blank(self, program: str, rows: int) -> dict[str, Any]:
        """For warm-up: zeros, or keys of anything."""
        if self._keyed:
            seeds, frames = np.zeros(rows, np.uint64), np.zeros(rows, np.int64)
            wanted = {
                "predict": lambda: self.predict(seeds, frames),
                "step": lambda: self.step(seeds, frames, 0),
                "advance": lambda: self.advance(seeds, frames),
                FRAME: lambda: self._fused(seeds, frames),
            }
            return wanted[program]() if program in wanted else {}
        axes = {"rows": rows, "samples": self._samples}
        return {
            spec.name: np.zeros([axes[size] if isinstance(size, str) else size for size in spec.shape], np.float32)
            for spec in self._card.programs[program].inputs
            if spec.name.startswith("noise")
        }

    def _fused(self, seeds: NDArray[np.uint64], frames: NDArray[np.int64]) -> dict[str, Any]:
        """Keys for the fused program."""
        keys: dict[str, Any] = {"noise_advance": self._one(seeds, frames, (0, Purpose.DRAW))}
        return keys | ({"noise0": self._keys(seeds, frames, self._refining())} if self._card.trained_steps else {})

    def _refining(self) -> list[tuple[int, Purpose]]:
        return [(step, Purpose.REFINE) for step in range(self._card.trained_steps)]

    def _name(self, program: str, default: str) -> str:
        return next((spec.name for spec in self._card.programs[program].inputs if spec.name.startswith("noise")), default)

    def _one(self, seeds: NDArray[np.uint64], frames: NDArray[np.int64], use: tuple[int, Purpose]) -> Any:
        """Of one use: (R, S, D), or its keys."""
        keys = self._keys(seeds, frames, [use])
        keys = replace(keys, shape=keys.shape[1:])
        return keys if self._keyed else keys.draw()

    def _keys(self, seeds: NDArray[np.uint64], frames: NDArray[np.int64], uses: list[tuple[int, Purpose]]) -> Keys:
        """Of (R, uses, S, D)."""
        word = np.concatenate([words(np.array([step]), level=0, purpose=purpose) for step, purpose in uses])
        return Keys(
            seeds,
            np.broadcast_to(word, (len(seeds), len(word))),
            np.zeros(len(seeds), np.int64),
            frames,
            self._samples,
            self._latent,
            (len(uses), self._samples, self._latent),
            self._antithetic,
        )
