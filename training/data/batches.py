"""Shuffled index batches over data that stays on the device, resumable bit for bit in mid-epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor


class BatchesState(TypedDict):
    """Everything that decides which rows come next. Tensors are on the CPU."""

    generator: Tensor
    permutation: Tensor
    position: int
    epoch: int


class Batches:
    """One pass per `for` loop: each row of x once, in an order drawn from the generator.

        for index in batches:           # (B,) int64, on the device of x
            rows = x[index]

    A batch counts as used from the moment it is handed out: a state taken inside the loop continues with the next one,
    and the next `for` after `load_state_dict` finishes the interrupted epoch. An epoch left by `break` is likewise
    continued, not restarted.

    Args:
        x: (N, ...) the data; only its length and device matter here.
        batch_size: B, rows per batch.
        generator: draws the permutations; on the CPU the order is the same whatever the device of x.
        drop_last: leave out an incomplete last batch (a captured graph needs one shape).
    """

    def __init__(self, x: Tensor, batch_size: int, generator: torch.Generator, *, drop_last: bool = False):
        if not 1 <= batch_size <= len(x):
            raise ValueError(f"batch_size must be between 1 and the {len(x)} rows, not {batch_size}")
        self.batch_size, self.generator, self.drop_last = batch_size, generator, drop_last
        self.epoch = 0  # epochs begun and finished
        self._rows, self._device = len(x), x.device
        self._permutation = torch.empty(0, dtype=torch.int64, device=x.device)
        self._position = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return math.ceil(self._used_rows / self.batch_size)

    @property
    def position(self) -> int:
        """Batches of the current epoch already handed out; 0 between epochs."""
        return math.ceil(self._position / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if len(self._permutation) == 0:
            drawn = torch.randperm(self._rows, generator=self.generator, device=self.generator.device)
            self._permutation = drawn.to(self._device)
        while self._position < self._used_rows:
            index = self._permutation[self._position : self._position + self.batch_size]
            self._position += len(index)
            yield index
        self._permutation, self._position = self._permutation[:0], 0
        self.epoch += 1

    def state_dict(self) -> BatchesState:
        return {
            "generator": self.generator.get_state(),
            "permutation": self._permutation.cpu().clone(),
            "position": self._position,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: BatchesState) -> None:
        """Continues exactly where `state` was taken.

        Raises:
            ValueError: the state was taken over another number of rows.
        """
        rows = len(state["permutation"])
        if rows not in (0, self._rows):
            raise ValueError(f"the saved permutation is of {rows} rows, the data has {self._rows}")
        self.generator.set_state(state["generator"].cpu())
        self._permutation = state["permutation"].to(self._device)
        self._position, self.epoch = state["position"], state["epoch"]

    @property
    def _used_rows(self) -> int:
        return self._rows - self._rows % self.batch_size if self.drop_last else self._rows
