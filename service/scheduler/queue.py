"""Who waits: tickets, and the line they stand in until there is room for their rows.

The queue decides who is next, and nothing else. Order: earliest deadline; then jobs that have no row in flight yet, oldest
first; then the further rows of jobs that have some, in turn. So a job of 10,000 rows trickles in beside one-row jobs. Deadlines
take up to half of the places where others wait too, however many rows they bring.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator

from service.scheduler.job import Job, JobResult
from service.scheduler.lane import Loop
from service.scheduler.load import NO_WORK
from service.telemetry import REQUEST_ID


class Ticket:
    """One job, its progress, and its one answer. Owned by the engine thread once it is in line.

    Attributes:
        outcome: the answer; None until there is one. Set exactly once.
        abandoned: the waiter has gone; set from any thread.
        deadline: instant by which refinement and measuring must be done, so that final stages and reply still fit; inf = none.
        next_row: first row that is still in line. left: rows not finished yet.
        result: columns, allocated when the first row is finished (or needs a place for its outputs).
        work: what it counts for in the lane's load, until it is answered. request_id: of the request that made it, for the log.
        tag, served: where the job stands in the fair order of rows, and of final stages.
    """

    __slots__ = (
        "abandoned", "arrived", "deadline", "future", "in_flight", "job", "left", "loop", "next_row",
        "outcome", "predicted_s", "request_id", "result", "rows", "served", "started", "tag", "weight", "work",
    )  # fmt: skip

    def __init__(self, job: Job, arrived: float):
        self.job, self.arrived, self.request_id = job, arrived, REQUEST_ID.get()
        self.started = math.nan
        self.deadline = math.inf
        self.predicted_s = 0.0
        self.rows = self.left = job.rows
        self.next_row, self.in_flight, self.weight = 0, 0, 0
        self.tag, self.served = -math.inf, 0.0
        self.work = NO_WORK
        self.abandoned = False
        self.result: JobResult | None = None
        self.outcome: JobResult | BaseException | None = None
        self.loop: Loop | None = None
        self.future: asyncio.Future[JobResult] | None = None

    def answer(self, outcome: JobResult | BaseException) -> None:
        """Raises RuntimeError at a second answer: that would be a fault of the scheduler."""
        if self.outcome is not None:
            raise RuntimeError("a job was answered twice")
        self.outcome = outcome

    def settle(self) -> None:
        """Hands the outcome to whoever awaits it. Runs in the waiter's event loop."""
        if self.future is None or self.future.done():
            return
        if isinstance(self.outcome, JobResult):
            self.future.set_result(self.outcome)
        elif isinstance(self.outcome, BaseException):
            self.future.set_exception(self.outcome)


class WaitingLine:
    """Tickets in the order of the module; answered ones are skipped when their turn comes."""

    def __init__(self) -> None:
        self._urgent: list[tuple[float, int, Ticket]] = []
        self._fresh: deque[Ticket] = deque()
        self._started: deque[Ticket] = deque()
        self._count = itertools.count()
        self._odd = 0

    def __bool__(self) -> bool:
        return bool(self._urgent or self._fresh or self._started)

    def __iter__(self) -> Iterator[Ticket]:
        return itertools.chain((ticket for _, _, ticket in self._urgent), self._fresh, self._started)

    def add(self, ticket: Ticket) -> None:
        if ticket.deadline < math.inf:
            heapq.heappush(self._urgent, (ticket.deadline, next(self._count), ticket))
        else:
            self._fresh.append(ticket)

    def earliest_deadline(self) -> float:
        return self._urgent[0][0] if self._urgent else math.inf

    def take(self, free: int, reserve: int) -> list[tuple[Ticket, int, int]]:
        """Chooses rows for `free` places: (ticket, first row, end row) each. The last `reserve` places go to jobs' first rows only."""
        chosen: list[tuple[Ticket, int, int]] = []

        def give(ticket: Ticket, most: int) -> bool:
            """Whether rows of the ticket are still in line afterwards."""
            nonlocal free
            first = ticket.next_row
            end = min(ticket.rows, first + most)
            if end > first:
                chosen.append((ticket, first, end))
                ticket.next_row, free = end, free - (end - first)
            return end < ticket.rows

        def serve_urgent(left: int) -> None:
            """Until so many places are left."""
            kept: list[tuple[float, int, Ticket]] = []
            while self._urgent and free > left:
                entry = heapq.heappop(self._urgent)
                ticket = entry[2]
                if ticket.outcome is None and give(ticket, max(free - max(reserve, left), 0 if ticket.next_row else 1)):
                    kept.append(entry)
            for entry in kept:
                heapq.heappush(self._urgent, entry)

        self._odd ^= 1  # half of a single place is every other time
        serve_urgent((free + 1 - self._odd) // 2 if self._fresh or self._started else 0)
        while self._fresh and free > 0:
            ticket = self._fresh.popleft()
            if ticket.outcome is None and give(ticket, max(1, free - reserve)):
                self._started.append(ticket)
        turns = len(self._started)
        while turns and free > reserve:
            ticket = self._started.popleft()
            # An equal share of what is free for each, so that a second large job need not wait for the first.
            if ticket.outcome is None and give(ticket, max(1, (free - reserve) // turns)):
                self._started.append(ticket)
            turns -= 1
        serve_urgent(0)
        return chosen

    def forget_answered(self) -> None:
        """Drops tickets that were answered while in line: abandoned, failed or too late."""
        self._urgent = [entry for entry in self._urgent if entry[2].outcome is None]
        heapq.heapify(self._urgent)
        self._fresh = deque(ticket for ticket in self._fresh if ticket.outcome is None)
        self._started = deque(ticket for ticket in self._started if ticket.outcome is None)
