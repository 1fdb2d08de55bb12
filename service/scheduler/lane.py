"""What shares the engine thread: lanes, each bringing work of one model, in ticks of about two milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from service.engine.base import Engine

PATIENCE = 4
"""Ticks for which a lane with work may be passed over in favour of earlier deadlines."""


class Loop(Protocol):
    """As much of an event loop as the engine thread needs to reach those who wait in it."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object: ...


class Answer(Protocol):
    """Something that a lane has finished with and that somebody waits for."""

    @property
    def loop(self) -> Loop | None:
        """Where the waiter lives; None = nobody needs to be told."""
        ...

    def settle(self) -> None:
        """Hands it over; called once, in `loop`."""
        ...


class Lane(Protocol):
    """One kind of work on one model. All methods run on the engine thread.

    `retiring`: takes nothing new, its engine is closed when it has no work left. `draining`: the server is stopping.
    """

    key: str
    engine: Engine
    retiring: bool
    draining: bool
    passed_over: int
    last_served: int

    def has_work(self) -> bool: ...

    def in_use(self) -> bool:
        """Whether somebody may still bring it work, even while it retires."""
        ...

    def urgency(self) -> float:
        """The earliest deadline among its work, on the scheduler's clock; inf = none."""
        ...

    def tick(self, budget_s: float) -> None:
        """Does about `budget_s` seconds of work. Whatever goes wrong ends in answers, not in an exception."""
        ...

    def answered(self) -> Sequence[Answer]:
        """What was answered since the last call."""
        ...

    def fail_all(self, error: Exception) -> None:
        """Answers everything it holds with `error`."""
        ...

    def request_ids(self) -> list[str]:
        """Some of the requests whose work it holds, for the log."""
        ...


def choose(lanes: Sequence[Lane], urgency: Callable[[Lane], float]) -> Lane | None:
    """The lane to serve next: earliest deadline, then least recently served; one that was passed over `PATIENCE` times comes before all
    others, and of several such the one that has waited longest."""
    ready = [lane for lane in lanes if lane.has_work()]
    if not ready:
        return None
    if len(ready) == 1:
        return ready[0]
    patient = [lane for lane in ready if lane.passed_over >= PATIENCE]
    if patient:
        chosen = max(patient, key=lambda lane: (lane.passed_over, -lane.last_served))
    else:
        chosen = min(ready, key=lambda lane: (urgency(lane), lane.last_served))
    for lane in ready:
        lane.passed_over += 1
    chosen.passed_over = 0
    return chosen
