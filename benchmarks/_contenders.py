"""Contenders timed in turn, each in a fresh process of its own.

In one process they disturb each other: a pool of OpenMP threads that was once two stays two for whoever runs on one, and what one
left in the allocator slows the next. Processes that wait for their turn take no time.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from _timing import CALLS

Make = Callable[..., Callable[[], object]]
"""Gives the call to be timed. Taken into the new process by name, so it stands at the top of its module."""

WARM_CALLS = 4


class Contender:
    """A process in which `make(*args)` was called. `times(n)`: seconds of n further calls each.

    Raises:
        RuntimeError: the process ended before it answered; what it said is on its standard error.
    """

    def __init__(self, make: Make, *args: Any):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, args))
        self._process.start()
        there.close()
        self.times(WARM_CALLS)

    def times(self, calls: int) -> list[float]:
        try:
            self._here.send(calls)
            times: list[float] = self._here.recv()
        except (EOFError, BrokenPipeError) as exc:
            raise RuntimeError("a contender's process ended before it answered") from exc
        return times

    def close(self) -> None:
        self._here.close()
        self._process.join()


def time_in_processes(makes: Mapping[str, tuple[Make, tuple[Any, ...]]], seconds: float, rounds: int) -> dict[str, float]:
    """Median µs of each, over `rounds` of fresh processes that are timed in turn, block by block, until `seconds` are over.

    The median is that of the rounds' medians: one unlucky process does not decide.
    """
    medians: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(rounds):
        contenders = {name: Contender(make, *args) for name, (make, args) in makes.items()}
        times: dict[str, list[float]] = {name: [] for name in makes}
        until = time.perf_counter() + seconds / rounds
        while time.perf_counter() < until or min(map(len, times.values())) < 3 * (CALLS - 1):
            for name, contender in contenders.items():
                # the first finds the others' data in the caches
                times[name] += contender.times(CALLS)[1:]
        for name, contender in contenders.items():
            contender.close()
            medians[name].append(1e6 * statistics.median(times[name]))
    return {name: statistics.median(found) for name, found in medians.items()}


def _serve(pipe: Connection, make: Make, args: tuple[Any, ...]) -> None:
    call = make(*args)
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            return
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        pipe.send(times)
