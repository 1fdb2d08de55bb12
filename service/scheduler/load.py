"""How much work a lane has promised, in seconds: what decides who is refused at the door and which elastic rows give up steps.

A job is taken on as its `least` work (all steps of an exact job, a share of an elastic one's) and as its `full` work. The door
refuses while the least work of the jobs here exceeds `max_wait_s`; elastic rows give up steps while the full work exceeds a
quarter of that. So elastic requests lose steps long before anybody is refused, and nobody is refused because of steps that
could have been given up. A job counts as at most a quarter of `max_wait_s`: a large one trickles in and must not close the door.
"""

from __future__ import annotations

import math
from typing import NamedTuple

KEPT = 0.25
"""An elastic row is left this share of its steps, whatever the load: below it, what a row costs besides its steps would eat the gain."""
_SHARE = 4


class Work(NamedTuple):
    """Predicted seconds of one job beside others, in full batches."""

    full: float
    least: float


NO_WORK = Work(0.0, 0.0)


class Load:
    """Sums over the jobs that are not answered yet. `take` at the door (under its lock), `give_back` on the engine thread:
    each sum is two counters with one writer each."""

    def __init__(self, max_wait_s: float):
        self.max_wait_s = max_wait_s
        self._taken = [0.0, 0.0]
        self._given_back = [0.0, 0.0]

    def work(self, rows: int, steps: int, elastic: bool, step_s: float, row_s: float) -> Work:
        """`step_s`: of one step of one row in a full batch; `row_s`: what else a row costs."""
        full = rows * (steps * step_s + row_s)
        least = rows * (kept_steps(steps) * step_s + row_s) if elastic else full
        most = self.max_wait_s / _SHARE
        return Work(min(full, most), min(least, most))

    def take(self, work: Work) -> None:
        self._taken[0] += work.full
        self._taken[1] += work.least

    def give_back(self, work: Work) -> None:
        self._given_back[0] += work.full
        self._given_back[1] += work.least

    @property
    def full_s(self) -> float:
        return max(0.0, self._taken[0] - self._given_back[0])

    @property
    def least_s(self) -> float:
        """After so long a newcomer would have its answer."""
        return max(0.0, self._taken[1] - self._given_back[1])

    @property
    def over(self) -> bool:
        return self.least_s > self.max_wait_s

    def share(self) -> float:
        """The share of its steps that an elastic row may take now."""
        comfortable = self.max_wait_s / _SHARE
        return 1.0 if self.full_s <= comfortable else max(KEPT, comfortable / self.full_s)


def kept_steps(steps: int) -> int:
    """What load leaves an elastic row of so many steps."""
    return math.ceil(KEPT * steps)
