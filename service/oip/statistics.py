"""Counters of the inference requests on /v2, per model version, in the shapes of the statistics extension: {count, ns}.

    success, fail          from the request's head to its reply, written or refused
    queue, compute_infer   as the scheduler measured them · compute_input: parsing and checking · compute_output: shaping the reply

`inference_count` (rows or frames) and `execution_count` (batches) are the scheduler's own counts: of the model, on every surface.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SHARES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class Duration:
    """How often, and how long altogether."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += max(0, round(seconds * 1e9))

    def shown(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass
class Measured:
    """What one request took, in seconds; `rows` shared its last batch. The request fills it in."""

    queue: float = 0.0
    compute_input: float = 0.0
    compute_infer: float = 0.0
    compute_output: float = 0.0
    rows: int = 0


@dataclass
class _Model:
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    shares: dict[str, Duration] = field(default_factory=lambda: {name: Duration() for name in SHARES})
    batches: dict[int, dict[str, Duration]] = field(default_factory=dict)
    last_ms: int = 0


class Statistics:
    """The counters of one server. Used from the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, now: Callable[[], float] = time.time):
        self._clock, self._now = clock, now
        self._models: dict[str, _Model] = {}

    @contextmanager
    def measured(self, key: str) -> Iterator[Measured]:
        """Counts one request to the model of that key, as failed if it raises."""
        seen, request, began = self._models.setdefault(key, _Model()), Measured(), self._clock()
        try:
            yield request
        except BaseException:
            seen.fail.add(self._clock() - began)
            raise
        seen.success.add(self._clock() - began)
        seen.last_ms = round(self._now() * 1e3)
        batch = seen.batches.setdefault(request.rows, {name: Duration() for name in SHARES[1:]})
        for name in SHARES:
            seen.shares[name].add(getattr(request, name))
            if name in batch:
                batch[name].add(getattr(request, name))

    @contextmanager
    def timed(self, request: Measured, share: str) -> Iterator[None]:
        """Adds what happens inside to one share of the request."""
        began = self._clock()
        yield
        setattr(request, share, getattr(request, share) + self._clock() - began)

    def shown(self, name: str, version: str, inferences: int, executions: int) -> dict[str, Any]:
        """One entry of `model_stats`."""
        seen = self._models.get(f"{name}/{version}", _Model())
        return {
            "name": name,
            "version": version,
            "last_inference": seen.last_ms,
            "inference_count": inferences,
            "execution_count": executions,
            "inference_stats": {
                "success": seen.success.shown(),
                "fail": seen.fail.shown(),
                **{share: duration.shown() for share, duration in seen.shares.items()},
            },
            "batch_stats": [
                {"batch_size": size, **{share: duration.shown() for share, duration in shares.items()}}
                for size, shares in sorted(seen.batches.items())
            ],
        }
