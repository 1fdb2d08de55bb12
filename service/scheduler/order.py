"""Who goes first when more rows are in flight than a tick holds: deadlines, first steps, and start-time fair queueing.

Up to half the places go to the earliest deadlines, up to half of the others to rows that had no step yet, and the rest by
tag: a step adds to a row's tag what it is charged, one for a job of one row, n for one of n rows, and a new job starts at
the virtual time, which is what every job would have had of an equal share. So the first step comes at once, jobs share by
request and not by row, and neither deadlines nor newcomers starve anyone. Nothing is charged while all rows fit.
"""

from __future__ import annotations

import math

import numpy as np

from service.engine.base import Slots
from service.scheduler.queue import Ticket
from service.scheduler.rows import RowTable


class FairOrder:
    """The order of one table's active rows. `jobs`: how many jobs have rows in the table."""

    def __init__(self, rows: RowTable):
        self._rows, self.jobs = rows, 0
        self._virtual, self._odd = 0.0, 0

    def enter(self, ticket: Ticket, count: int) -> None:
        """`count` more rows of a job are about to get slots."""
        if ticket.in_flight == 0:
            self.jobs += 1
        ticket.in_flight += count
        # What a large job was given while there was room for all is not held against it.
        ticket.tag = min(max(ticket.tag, self._virtual), self._virtual + ticket.in_flight)

    def tag(self, ticket: Ticket) -> float:
        """The tag of the job's next row: rows of a job stand one behind another."""
        tag, ticket.tag = ticket.tag, ticket.tag + 1
        return tag

    def leave(self, ticket: Ticket, count: int) -> None:
        """`count` rows of a job have given up their slots."""
        ticket.in_flight -= count
        if count and ticket.in_flight == 0:
            self.jobs -= 1

    def charge(self, chosen: Slots) -> None:
        """These rows were served while others were not."""
        self._rows.tag[chosen] += self._rows.charge[chosen]
        self._virtual += len(chosen) / max(1, self.jobs)

    def turn(self) -> None:
        """A tick begins: half of a single place is every other tick's."""
        self._odd ^= 1

    def first(self, places: int) -> Slots:
        """The rows for `places` places; those that have no step left, and only need to be measured, before all others."""
        rows, active = self._rows, self._rows.active
        stepping = rows.target[active] > rows.done[active]
        over = active[~stepping][:places]
        left, places = active[stepping], places - len(over)
        urgent = left[:0]
        deadlines = rows.deadline[left]
        if deadlines.min(initial=math.inf) < math.inf:
            count = min((places + self._odd) // 2, int(np.count_nonzero(deadlines < math.inf)))
            order = np.argsort(deadlines, kind="stable")
            urgent, left = left[order[:count]], left[np.sort(order[count:])]
            places -= count
        if places >= len(left):
            return np.concatenate([over, urgent, left])
        left = left[np.argsort(rows.tag[left], kind="stable")]
        first_steps = np.flatnonzero(rows.done[left] == 0)[: (places + self._odd) // 2]
        others = np.delete(np.arange(len(left)), first_steps)[: places - len(first_steps)]
        return np.concatenate([over, urgent, left[first_steps], left[others]])
