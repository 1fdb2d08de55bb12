"""The rows in flight: one record per slot, so that a tick is a few array operations and no Python per row.

Rows R of one model; a slot's number is the same here and in the engine. ELBOs in nats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine.base import Slots
from service.scheduler.job import StopReason
from service.scheduler.queue import Ticket

REASONS = tuple(StopReason)
CODE = {reason: code for code, reason in enumerate(REASONS)}
PATIENCE = 4
"""A tolerance looks back this many steps (architecture.md, section 5)."""

ROW = np.dtype(
    [
        ("row", np.int64),  # index within its job
        ("seed", np.uint64),
        ("first", np.int64),  # index of the first step, where an earlier request stopped
        ("done", np.int64),  # steps done by this job
        ("target", np.int64),  # steps to do; lowered to `done` to stop the row
        ("samples", np.int64),  # of the measuring noise
        ("deadline", np.float64),  # inf = none
        ("tolerance", np.float64),  # -inf = none
        ("tag", np.float64),  # place in the fair order: the smallest is next
        ("charge", np.float64),  # what a step adds to the tag: rows of the job in flight
        ("elastic", np.bool_),
        ("every", np.bool_),  # measured after every step, not only the last
        ("measure", np.bool_),  # measured after the last step, in the tick of that step
        ("events", np.bool_),
        ("outputs", np.bool_),  # has final stages to go through
        ("measured", np.int64),  # `done` at the last measure, -1 = never
        ("reason", np.int8),
    ]
)


class RowTable:
    """Records, free slots, and which slots are in refinement (`active`, oldest first)."""

    def __init__(self, capacity: int, levels: int, max_steps: int):
        self.capacity = capacity
        self.records = np.zeros(capacity, ROW)
        column = self.records.__getitem__
        self.row: NDArray[np.int64] = column("row")
        self.seed: NDArray[np.uint64] = column("seed")
        self.first: NDArray[np.int64] = column("first")
        self.done: NDArray[np.int64] = column("done")
        self.target: NDArray[np.int64] = column("target")
        self.samples: NDArray[np.int64] = column("samples")
        self.deadline: NDArray[np.float64] = column("deadline")
        self.tolerance: NDArray[np.float64] = column("tolerance")
        self.tag: NDArray[np.float64] = column("tag")
        self.charge: NDArray[np.float64] = column("charge")
        self.elastic: NDArray[np.bool_] = column("elastic")
        self.every: NDArray[np.bool_] = column("every")
        self.measure: NDArray[np.bool_] = column("measure")
        self.events: NDArray[np.bool_] = column("events")
        self.outputs: NDArray[np.bool_] = column("outputs")
        self.measured: NDArray[np.int64] = column("measured")
        self.reason: NDArray[np.int8] = column("reason")

        self.log_likelihood = np.full(capacity, np.nan)
        self.kl = np.full((capacity, levels), np.nan)
        self.trace = np.full((capacity, max_steps + 1), np.nan)
        self._best = np.full((capacity, PATIENCE + 1), -np.inf)
        self.tickets: list[Ticket | None] = [None] * capacity
        self.free: list[int] = list(range(capacity - 1, -1, -1))
        self.active: Slots = np.empty(0, np.intp)

    @property
    def in_flight(self) -> int:
        return self.capacity - len(self.free)

    def enter(self, tickets: list[Ticket], records: list[tuple[Any, ...]]) -> Slots:
        """Gives each record (in the order of `ROW`) a slot and puts it in refinement."""
        count = len(records)
        taken = self.free[-count:][::-1]
        del self.free[-count:]
        slots = np.array(taken, np.intp)
        self.records[slots] = np.array(records, ROW)
        for slot, ticket in zip(taken, tickets, strict=True):
            self.tickets[slot] = ticket
        self.log_likelihood[slots] = np.nan
        self.kl[slots] = np.nan
        self.active = np.concatenate([self.active, slots])
        return slots

    def ticket(self, slot: int) -> Ticket:
        ticket = self.tickets[slot]
        assert ticket is not None, "a slot in use has a ticket"
        return ticket

    def deactivate(self, slots: Slots) -> None:
        """Refinement of these rows is over; they keep their slots until `release`."""
        over = np.zeros(self.capacity, np.bool_)
        over[slots] = True
        self.active = self.active[~over[self.active]]

    def release(self, slots: list[int]) -> None:
        for slot in slots:
            self.tickets[slot] = None
        self.free.extend(slots)

    def stop(self, slots: Slots, reason: StopReason) -> None:
        """No further step for these rows."""
        self.target[slots] = self.done[slots]
        self.reason[slots] = CODE[reason]

    def record(self, slots: Slots, log_likelihood: NDArray[Any], kl: NDArray[Any]) -> NDArray[np.float64]:
        """Notes a measure of the current λ, log_likelihood (R,) and kl (R, levels), and stops rows whose tolerance is reached.

        Tolerance: the best measured ELBO rose by less than this in total over the last `PATIENCE` steps.

        Returns:
            The ELBOs (R,).
        """
        self.log_likelihood[slots], self.kl[slots] = log_likelihood, kl
        done = self.done[slots]
        self.measured[slots] = done
        elbo = log_likelihood.astype(np.float64) - np.sum(kl, axis=1, dtype=np.float64)
        every = self.every[slots]
        if np.any(every):
            kept, steps = slots[every], done[every]
            self.trace[kept, steps] = elbo[every]
            self._remember_best(kept, steps, elbo[every])
        return elbo

    def _remember_best(self, slots: Slots, steps: NDArray[np.int64], elbo: NDArray[np.float64]) -> None:
        length = PATIENCE + 1
        before = np.where(steps > 0, self._best[slots, (steps - 1) % length], -np.inf)
        best = np.fmax(before, elbo)
        self._best[slots, steps % length] = best
        oldest = self._best[slots, (steps + 1) % length]
        done = (steps >= PATIENCE) & (best < oldest + self.tolerance[slots])
        if np.any(done):
            self.stop(slots[done], StopReason.CONVERGED)
