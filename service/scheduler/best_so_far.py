"""Rows whose jobs want an event after every step: the best posterior so far is kept, told, and in the end returned.

The ELBO that made a step the best is biased upwards (it is a maximum over noisy values), so what is returned is scored
again, with a third stream of noise (architecture.md, section 2). ELBOs in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays
from service.engine.base import Engine, Slots
from service.scheduler.job import StepEvent
from service.scheduler.queue import Ticket
from service.scheduler.rows import RowTable


@dataclass
class _Best:
    step: int
    elbo: float
    carry: Arrays
    kl: NDArray[np.float32]


class BestSoFar:
    """Slot -> best so far, for the rows of one table that have a listener."""

    def __init__(self, engine: Engine, rows: RowTable):
        self._engine, self._rows = engine, rows
        self._carry = [tensor.name for tensor in engine.card.carry]
        self._best: dict[int, _Best] = {}

    def tell(
        self, slots: Slots, elbo: NDArray[np.float64], kl: NDArray[np.float32], fail: Callable[[list[Ticket], Exception], None]
    ) -> None:
        """Keeps what was just measured if it is the best of its row, and tells the job; a listener that raises fails its own job."""
        rows, carry = self._rows, self._engine.read_rows(slots, self._carry)
        for i, slot in enumerate(slots.tolist()):
            ticket, best = rows.tickets[slot], self._best.get(slot)
            if ticket is None or ticket.outcome is not None or ticket.job.on_step is None:
                continue
            step = int(rows.first[slot] + rows.done[slot])
            if best is None or elbo[i] > best.elbo:
                best = self._best[slot] = _Best(
                    step, float(elbo[i]), {name: value[i].copy() for name, value in carry.items()}, kl[i].copy()
                )
            event = StepEvent(int(rows.row[slot]), step, float(elbo[i]), best.step, best.elbo, best.carry, best.kl)
            try:
                ticket.job.on_step(event)
            except Exception as exc:
                fail([ticket], exc)

    def restore(self, slots: Slots) -> None:
        """Puts the best carry of these rows back into their slots."""
        best = [self._best[slot].carry for slot in slots.tolist()]
        self._engine.load_rows(slots, {name: np.stack([carry[name] for carry in best]) for name in self._carry})

    def take_step(self, slot: int) -> int | None:
        """The step of the row's best, if it has one, and forgets it."""
        best = self._best.pop(slot, None)
        return None if best is None else best.step

    def forget(self, slots: list[int]) -> None:
        for slot in slots:
            self._best.pop(slot, None)

    def __bool__(self) -> bool:
        return bool(self._best)
