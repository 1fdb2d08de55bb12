"""Batches of frames out of sequences that stay on the device, resumable bit for bit in mid-epoch.

N sequences of T_i frames in F = Σ T_i joined ones, B rows and T steps per batch, X entries per frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from training.data.ragged import Ragged
from training.data.sequence_plan import IDLE, Carried, Order, Plan, longest_first


class SequenceBatch(NamedTuple):
    """What one step of training or evaluation sees, on the device.

    Attributes:
        x: (B, T, X) float32, 0 where there is no frame.
        mask: (B, T) float32, 1 = a frame of the sequence, 0 = padding.
        lengths: (B,) int64, frames in each row: mask.sum(1).
        restart: (B,) bool, rows that begin with a fresh state. All but with `Carried`, where the others go on from the last batch.
        sequence: (B,) int64, which sequence of the split each row is from; -1 in an idle row of `Carried`.
        start: (B,) int64, the frame of that sequence which x begins with.
    """

    x: Tensor
    mask: Tensor
    lengths: Tensor
    restart: Tensor
    sequence: Tensor
    start: Tensor


@dataclass(frozen=True, eq=False)
class ResidentSequences:
    """A split on a device: uint8 stays uint8 until its frames are batched.

    Attributes:
        joined: (F, X).
        offsets: (N,) int64, the first frame of each sequence.
        lengths: (N,) int64.
        cpu_lengths: the same on the CPU, where epochs are planned.
    """

    joined: Tensor
    offsets: Tensor
    lengths: Tensor
    cpu_lengths: Tensor

    @classmethod
    def of(cls, part: Ragged, device: torch.device | str = "cpu") -> ResidentSequences:
        lengths = torch.from_numpy(part.lengths)
        return cls(
            torch.from_numpy(part.joined).to(device), torch.from_numpy(part.offsets[:-1]).to(device), lengths.to(device), lengths.clone()
        )

    def __len__(self) -> int:
        return len(self.cpu_lengths)

    def gather(self, sequence: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frames start … start + steps − 1 of each row's sequence, by index arithmetic alone.

        Args:
            sequence: (B,) int64, on the device; IDLE for a row without frames.
            start: (B,) int64, on the device.

        Returns:
            x (B, steps, X), mask (B, steps), lengths (B,) as in `SequenceBatch`.
        """
        known = sequence.clamp(min=0)
        left = torch.where(sequence == IDLE, 0, self.lengths[known] - start).clamp(max=steps)
        step = torch.arange(steps, device=self.joined.device)
        inside = step < left[:, None]
        frame = torch.where(inside, (self.offsets[known] + start)[:, None] + step, 0)
        mask = inside.float()
        return self.joined[frame].float() * mask[..., None], mask, left


class SequenceBatchesState(TypedDict):
    """Everything that decides which frames come next. Tensors are on the CPU."""

    generator: Tensor
    sequence: Tensor
    start: Tensor
    steps: Tensor
    restart: Tensor
    position: int
    epoch: int


class SequenceBatches:
    """One epoch per `for` loop, in the order that `order` draws: `Whole`, `Crops` or `Carried` of sequence_plan.py.

        for batch in batches:                       # a SequenceBatch
            state = torch.where(batch.restart[:, None], fresh, state)      # with Carried

    A batch counts as used from the moment it is handed out: a state taken inside the loop continues with the next one,
    and the next `for` after `load_state_dict` finishes the interrupted epoch. An epoch left by `break` is likewise
    continued, not restarted. With `Carried`, the model's state at that moment is the caller's to save.

    Args:
        sequences: the split, on its device.
        batch_size: B. The last batch of an epoch may have fewer rows; with `Carried` never.
        generator: draws the epochs; on the CPU the order is the same whatever the device of the data.
        order: how an epoch goes through the sequences.

    Raises:
        ValueError: a batch size that an epoch cannot fill.
    """

    def __init__(self, sequences: ResidentSequences, batch_size: int, generator: torch.Generator, order: Order):
        self.sequences, self.batch_size, self.generator, self.order = sequences, batch_size, generator, order
        self.epoch = 0  # epochs begun and finished
        self.position = 0  # batches of the current epoch already handed out
        self._plan = self._draw()

    def __len__(self) -> int:
        """Batches in the current epoch, or in the one that comes next. With `Carried` it varies a little between epochs."""
        return len(self._plan)

    def __iter__(self) -> Iterator[SequenceBatch]:
        plan = self._plan
        device = self.sequences.joined.device
        table, starts, restarts = plan.sequence.to(device), plan.start.to(device), plan.restart.to(device)
        keeps_idle = isinstance(self.order, Carried)
        rows = [self.batch_size] * len(plan) if keeps_idle else (plan.sequence != IDLE).sum(1).tolist()
        steps = plan.steps.tolist()
        while self.position < len(plan):
            at = self.position
            self.position += 1
            yield _batch(self.sequences, table[at, : rows[at]], starts[at, : rows[at]], restarts[at, : rows[at]], steps[at])
        self.position = 0
        self.epoch += 1
        self._plan = self._draw()

    def state_dict(self) -> SequenceBatchesState:
        plan = self._plan
        return {
            "generator": self.generator.get_state(),
            "sequence": plan.sequence.clone(),
            "start": plan.start.clone(),
            "steps": plan.steps.clone(),
            "restart": plan.restart.clone(),
            "position": self.position,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: SequenceBatchesState) -> None:
        """Continues exactly where `state` was taken.

        Raises:
            ValueError: the state was taken over other sequences or another batch size.
        """
        known = state["sequence"] != IDLE
        fits = state["sequence"].shape[1] == self.batch_size and int(state["sequence"].max()) < len(self.sequences)
        if not fits or (state["start"] >= self.sequences.cpu_lengths[state["sequence"].clamp(min=0)])[known].any():
            raise ValueError(f"the saved epoch does not fit these {len(self.sequences)} sequences in batches of {self.batch_size}")
        self.generator.set_state(state["generator"].cpu())
        self._plan = Plan(*(state[name].cpu().clone() for name in ("sequence", "start", "steps", "restart")))
        self.position, self.epoch = state["position"], state["epoch"]

    def _draw(self) -> Plan:
        return self.order.plan(self.sequences.cpu_lengths, self.batch_size, self.generator)


def evaluation_batches(sequences: ResidentSequences, batch_size: int) -> Iterator[SequenceBatch]:
    """Every sequence once, whole, sorted by length, longest first; `sequence` says which is which.

    Padding costs little beside neighbours of similar length, and nothing is random.
    """
    plan = longest_first(sequences.cpu_lengths, batch_size)
    device = sequences.joined.device
    for sequence, start, restart, steps in zip(plan.sequence, plan.start, plan.restart, plan.steps.tolist(), strict=True):
        rows = int((sequence != IDLE).sum())
        yield _batch(sequences, sequence[:rows].to(device), start[:rows].to(device), restart[:rows].to(device), steps)


def _batch(sequences: ResidentSequences, sequence: Tensor, start: Tensor, restart: Tensor, steps: int) -> SequenceBatch:
    x, mask, lengths = sequences.gather(sequence, start, steps)
    return SequenceBatch(x, mask, lengths, restart, sequence, start)
