"""Contenders timed in turn in one process, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

CALLS = 5
"""Calls of a contender in a row; the first finds the others' data in the caches, so it is not counted."""


def time_in_turn(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median µs of each, in blocks of CALLS, in turn until the time is over."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(4):
        for call in calls.values():
            call()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, times.values())) < 3 * (CALLS - 1):
        for name, call in calls.items():
            for i in range(CALLS):
                began = time.perf_counter()
                call()
                if i:
                    times[name].append(time.perf_counter() - began)
    return {name: 1e6 * statistics.median(kept) for name, kept in times.items()}
