"""What shares the engine thread: lanes, each bringing work of one model, in ticks of about two milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from service.scheduler.queue import Ticket

PATIENCE = 4
"""Ticks for which a lane with work may be passed over in favour of earlier deadlines."""


class Lane(Protocol):
    """One kind of work on one model. All methods run on the engine thread."""

    key: str
    passed_over: int
    last_served: int

    def has_work(self) -> bool: ...

    def urgency(self) -> float:
        """The earliest deadline among its work, on the scheduler's clock; inf = none."""
        ...

    def tick(self, budget_s: float) -> None:
        """Does about `budget_s` seconds of work. Whatever goes wrong ends in answers, not in an exception."""
        ...

    def answered(self) -> list[Ticket]:
        """Tickets answered since the last call."""
        ...

    def fail_all(self, error: Exception) -> None:
        """Answers everything it holds with `error`."""
        ...


def choose(lanes: Sequence[Lane]) -> Lane | None:
    """The lane to serve next: earliest deadline, then least recently served; none is passed over more than `PATIENCE` times."""
    ready = [lane for lane in lanes if lane.has_work()]
    if not ready:
        return None
    if len(ready) == 1:
        return ready[0]
    chosen = min(ready, key=lambda lane: (lane.passed_over < PATIENCE, lane.urgency(), lane.last_served))
    for lane in ready:
        lane.passed_over += 1
    chosen.passed_over = 0
    return chosen
