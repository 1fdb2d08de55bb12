"""Which frames of which sequences make up each batch of an epoch: drawn once per epoch, so that a batch costs no Python per row.

N sequences of T_i frames, K batches in the epoch, B rows per batch.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IDLE = -1


@dataclass(frozen=True)
class Plan:
    """One epoch. All on the CPU.

    Attributes:
        sequence: (K, B) int64, the sequence in each row; IDLE where a batch has no such row.
        start: (K, B) int64, the first frame taken of it.
        steps: (K,) int64, frames per row, the padded ones included.
        restart: (K, B) bool, whether the row begins with a fresh state (else it goes on from the batch before).
    """

    sequence: Tensor
    start: Tensor
    steps: Tensor
    restart: Tensor

    def __len__(self) -> int:
        return len(self.sequence)


class Order(Protocol):
    """How an epoch goes through the sequences."""

    def plan(self, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Plan:
        """Draws an epoch over sequences of `lengths` (N,)."""
        ...


@dataclass(frozen=True)
class Whole:
    """Every sequence once, whole, beside others of similar length.

    A seeded permutation is cut into pools of `pool` batches; each pool is sorted by length and cut into batches, and the
    batches are shuffled. A larger pool pads less and mixes less.
    """

    pool: int = 16
    drop_last: bool = False

    def __post_init__(self) -> None:
        _positive("pool", self.pool)

    def plan(self, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Plan:
        _check(batch_size, len(lengths))
        order = _permutation(len(lengths), generator)
        pool = torch.arange(len(order)) // (self.pool * batch_size)
        by_length = order[torch.argsort(lengths[order], stable=True)]
        pool_of = torch.empty_like(order).scatter_(0, order, pool)
        table = _table(by_length[torch.argsort(pool_of[by_length], stable=True)], batch_size, self.drop_last)
        table = table[_permutation(len(table), generator)]
        steps = torch.where(table == IDLE, 0, lengths[table.clamp(min=0)]).amax(1)
        return Plan(table, torch.zeros_like(table), steps, torch.ones_like(table, dtype=torch.bool))


@dataclass(frozen=True)
class Crops:
    """Random crops of `frames` frames: all rows of all batches alike, as the papers train (25 for music, 40 for speech).

    A sequence shorter than that is taken whole and padded under the mask (the published music runs dropped it).

    Attributes:
        cover: ceil(T_i / frames) crops of sequence i in an epoch, about all of its frames, instead of a single one.
    """

    frames: int
    cover: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        _positive("frames", self.frames)

    def plan(self, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Plan:
        rows = torch.arange(len(lengths))
        if self.cover:
            rows = rows.repeat_interleave(_chunks(lengths, self.frames))
        table = _table(rows[_permutation(len(rows), generator)], batch_size, self.drop_last)
        starts = (lengths - self.frames).clamp(min=0) + 1  # so many places to begin at
        uniform = torch.rand(table.shape, dtype=torch.float64, generator=generator, device=generator.device).cpu()
        start = torch.where(table == IDLE, 0, (uniform * starts[table.clamp(min=0)]).long())
        steps = torch.full((len(table),), self.frames)
        return Plan(table, start, steps, torch.ones_like(table, dtype=torch.bool))


@dataclass(frozen=True)
class Carried:
    """Whole sequences in successive chunks of `frames` frames, for truncated back-propagation with carried state.

    Each of the B rows plays one sequence after another, in a seeded order; where a new one begins, the row restarts. A
    sequence goes to the row that is free first. Rows that have nothing left at the end of the epoch are idle, fully masked.
    """

    frames: int

    def __post_init__(self) -> None:
        _positive("frames", self.frames)

    def plan(self, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Plan:
        _check(batch_size, len(lengths))
        order = _permutation(len(lengths), generator)
        chunks = _chunks(lengths, self.frames)
        free = [(0, row) for row in range(batch_size)]  # (batch from which the row is free, row): a heap as it stands
        places = []
        for sequence in order.tolist():
            batch, row = heapq.heappop(free)
            places.append((batch, row))
            heapq.heappush(free, (batch + int(chunks[sequence]), row))
        batch_of, row_of = torch.tensor(places).unbind(1)
        repeats = chunks[order]
        chunk = torch.arange(int(repeats.sum())) - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
        where = (batch_of.repeat_interleave(repeats) + chunk, row_of.repeat_interleave(repeats))
        table = torch.full((max(batch for batch, _ in free), batch_size), IDLE)
        start = torch.zeros_like(table)
        table[where] = order.repeat_interleave(repeats)
        start[where] = chunk * self.frames
        return Plan(table, start, torch.full((len(table),), self.frames), (start == 0) & (table != IDLE))


def longest_first(lengths: Tensor, batch_size: int) -> Plan:
    """Every sequence once, whole, sorted by length: for evaluation. The largest batch comes first, so memory fails early or never."""
    table = _table(torch.argsort(lengths, descending=True, stable=True), min(batch_size, len(lengths)), drop_last=False)
    return Plan(table, torch.zeros_like(table), lengths[table[:, 0]], torch.ones_like(table, dtype=torch.bool))


def _permutation(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).cpu()


def _chunks(lengths: Tensor, frames: int) -> Tensor:
    """ceil(T_i / frames)."""
    return (lengths + frames - 1) // frames


def _table(rows: Tensor, batch_size: int, drop_last: bool) -> Tensor:
    """(K, B): `rows` in batches, the last one filled up with IDLE or left out."""
    _check(batch_size, len(rows))
    surplus = len(rows) % batch_size
    if surplus and drop_last:
        rows = rows[:-surplus]
    elif surplus:
        rows = torch.cat([rows, torch.full((batch_size - surplus,), IDLE)])
    return rows.reshape(-1, batch_size)


def _check(batch_size: int, rows: int) -> None:
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size must be between 1 and the {rows} rows of an epoch, not {batch_size}")


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
