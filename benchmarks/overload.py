"""Open loop with 64-step requests at 0.5, 1, 2 and 10 times what the server can do, over HTTP: what is still answered, and how.

    python benchmarks/overload.py [--seconds 6] [--last 300]

Capacity is the closed-loop maximum of the same run, measured before and after (the mean of both is taken). Exact requests get all
their steps or 503 with Retry-After; elastic ones give up steps and say `degraded`. Generator and server share the machine.
Memory: what the server's resident set (all its processes) grew by during the last `--last` seconds of a run of exact and elastic
requests at 10 times capacity that began a minute before: buffers of as many connections as this load ever opens are there by then.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from typing import Any

import numpy as np
import orjson
from _report import keep, table
from _served import Pool, closed_loop, encode_request, open_loop, resident_mb, server

STEPS, CLIENTS, LOADS = 64, 64, (0.5, 1.0, 2.0, 10.0)
BEFORE_S, LOOK_S = 60.0, 10.0
"""Of the memory phase: what comes before the seconds that count, and between two looks."""


class Tally:
    """What came back."""

    def __init__(self) -> None:
        self.replies: Counter[str] = Counter()
        self.steps, self.full, self.degraded, self.without_retry_after = 0, 0, 0, 0
        self.latencies: list[float] = []

    def add(self, status: int, head: bytes, body: bytes, seconds: float) -> None:
        self.replies[str(status)] += 1
        if status == 200:
            result = orjson.loads(body)["results"][0]
            self.steps += result["steps_used"]
            self.full += result["steps_used"] == STEPS
            self.degraded += result["stop_reason"] == "degraded"
            self.latencies.append(1e3 * seconds)
        elif b"retry-after:" not in head.lower():
            self.without_retry_after += 1

    def figures(self, seconds: float) -> dict[str, Any]:
        return {
            "replies": dict(self.replies),
            "full_per_s": self.full / seconds,
            "steps_per_s": self.steps / seconds,
            "degraded": self.degraded,
            "refused": sum(count for status, count in self.replies.items() if status != "200"),
            "without_retry_after": self.without_retry_after,
            "p50_ms": float(np.median(self.latencies)) if self.latencies else float("nan"),
            "p99_ms": float(np.percentile(self.latencies, 99)) if self.latencies else float("nan"),
        }


def sender(pool: Pool, tally: Tally, requests: list[bytes]) -> Any:
    async def send(number: int) -> None:
        started = time.perf_counter()
        status, head, body = await pool.ask(requests[number % len(requests)])
        tally.add(status, head, body, time.perf_counter() - started)

    return send


async def capacity(pool: Pool, requests: list[bytes], seconds: float) -> dict[str, Any]:
    tally = Tally()
    return tally.figures(await closed_loop(sender(pool, tally, requests), CLIENTS, seconds))


async def measure(port: int, pid: int, seconds: float, last: float) -> dict[str, Any]:
    x = (np.random.default_rng(0).random((64, 784)) < 0.2).astype(int).tolist()
    exact = [encode_request({"inputs": [row], "steps": STEPS, "seed": i}) for i, row in enumerate(x)]
    elastic = [encode_request({"inputs": [row], "steps": STEPS, "seed": i, "elastic": True}) for i, row in enumerate(x)]
    pool = Pool(port)
    await capacity(pool, exact, 1.0)
    before = await capacity(pool, exact, seconds)
    loads: dict[str, list[dict[str, Any]]] = {"exact": [], "elastic": []}
    for kind, requests in (("exact", exact), ("elastic", elastic)):
        for load in LOADS:
            tally = Tally()
            await open_loop(sender(pool, tally, requests), load * before["full_per_s"], seconds)
            loads[kind].append({"load": load, **tally.figures(seconds)})
    after = await capacity(pool, exact, seconds)
    memory: list[tuple[float, float]] = []
    if last:
        mixed, tally, started = [request for pair in zip(exact, elastic, strict=True) for request in pair], Tally(), time.monotonic()
        memory = [(0.0, resident_mb(pid))]
        while memory[-1][0] < BEFORE_S + last:
            await open_loop(sender(pool, tally, mixed), 10 * before["full_per_s"], LOOK_S)
            memory.append((time.monotonic() - started, resident_mb(pid)))
    pool.close()
    return {"capacity": [before, after], "loads": loads, "memory_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load")
    parser.add_argument("--last", type=float, default=0.0, help="seconds of the memory phase at the end; 0 leaves it out")
    args = parser.parse_args()
    with server() as (port, pid):
        results = asyncio.run(measure(port, pid, args.seconds, args.last))
    full = float(np.mean([one["full_per_s"] for one in results["capacity"]]))
    rows = [
        ["capacity", "closed", one["full_per_s"], one["steps_per_s"], 1.0, 0, 0, one["p50_ms"], one["p99_ms"]]
        for one in results["capacity"]
    ]
    for kind, loads in results["loads"].items():
        for one in loads:
            one["of_capacity"] = (one["full_per_s"] if kind == "exact" else one["steps_per_s"] / STEPS) / full
            columns = ("full_per_s", "steps_per_s", "of_capacity", "degraded", "refused", "p50_ms", "p99_ms")
            rows.append([kind, f"{one['load']:g} x", *(one[name] for name in columns)])
    print(f"mnist-iterative, {STEPS}-step requests, {args.seconds:g} s per load; `of capacity`: full replies (exact), steps (elastic)")
    print(table(("requests", "load", "full/s", "steps/s", "of capacity", "degraded", "refused", "p50 ms", "p99 ms"), rows))
    print(f"refusals without Retry-After: {sum(one['without_retry_after'] for loads in results['loads'].values() for one in loads)}")
    if results["memory_mb"]:
        counted = [mb for seconds, mb in results["memory_mb"] if seconds >= BEFORE_S]
        results["grown_mb"] = counted[-1] - counted[0]
        first = results["memory_mb"][0][1]
        print(
            f"resident memory at 10 x: {first:.1f} MB at the beginning, {counted[0]:.1f} after {BEFORE_S:g} s; "
            f"in the {args.last:g} s after that {results['grown_mb']:+.1f} MB, most {max(counted):.1f}"
        )
    print(f"kept in {keep('overload', {'seconds': args.seconds, 'last': args.last, **results})}")


if __name__ == "__main__":
    main()
