"""Requests and stream cycles by the hundred thousand with faults injected: the counts add up, memory and descriptors stay.

    python benchmarks/soak.py [--requests 1000000] [--cycles 2000] [--clients 16]

Faults, drawn by a fixed seed: bodies that are not JSON, or do not fit (4 %); clients that leave in the middle (2 %); the engine
fails on a step once in 5,000 calls (and then everybody in that batch gets a 500). Streams are opened on jsb-filter, sent some
frames, and closed properly or dropped. One line of progress per percent. At the end:

    counts        what clients saw equals what the server counted, by status; the scheduler's own counts add up
    memory        resident set at the end within 2 % or 5 MB of that at 10 %
    descriptors   open files at the end as at 10 %, but for the connections that are open
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from _report import keep
from _served import Connection, Pool, encode_request, resident_mb, server

LEAVE, BAD = 0.02, 0.04


class Soak:
    def __init__(self, port: int, pid: int, requests: int, cycles: int, clients: int):
        self.port, self.pid, self.requests, self.cycles, self.clients = port, pid, requests, cycles, clients
        self.seen: Counter[str] = Counter()
        self.streams: Counter[str] = Counter()
        self.done, self.marks, self.started = 0, [], time.monotonic()
        x = (np.random.default_rng(0).random((64, 784)) < 0.2).astype(int).tolist()
        budgets = [{"steps": 1}, {"steps": 2}, {"steps": 4}, {"deadline_ms": 20}, {"tolerance": 0.5}, {"steps": 8, "elastic": True}]
        self.good = [encode_request({"inputs": [row], "seed": i, **budgets[i % len(budgets)]}) for i, row in enumerate(x)]
        head = (
            b"POST /v1/models/mnist-iterative/encode HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n"
        )
        self.bad = [
            head + b'{"nan":',
            head + b"1234567",
            encode_request({"inputs": [[1, 2]]}),
            encode_request({"inputs": [x[0]], "steps": -1}),
        ]

    async def run(self) -> dict[str, Any]:
        turns = iter(range(self.requests))
        pool = Pool(self.port)
        cycles = asyncio.ensure_future(self._stream_cycles())
        await asyncio.gather(*(self._client(pool, turns, random.Random(i)) for i in range(self.clients)))
        await cycles
        await asyncio.sleep(1.0)
        self._mark()
        text = (await pool.get("/metrics")).decode()
        pool.close()
        return {"seen": dict(self.seen), "streams": dict(self.streams), "marks": self.marks, "metrics": _counts(text)}

    async def _client(self, pool: Pool, turns: Any, draw: random.Random) -> None:
        for number in turns:
            chance = draw.random()
            try:
                if chance < LEAVE:
                    await self._leave(self.good[number % len(self.good)], draw)
                    self.seen["left"] += 1
                else:
                    request = draw.choice(self.bad) if chance < LEAVE + BAD else self.good[number % len(self.good)]
                    status, _, _ = await pool.ask(request)
                    self.seen[str(status)] += 1
            except OSError as exc:
                self.seen[f"lost: {type(exc).__name__}"] += 1
            self.done += 1
            if self.done % max(1, self.requests // 100) == 0:
                self._mark()

    async def _leave(self, request: bytes, draw: random.Random) -> None:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port)
        answer = connection.ask(request if draw.random() < 0.8 else request[: len(request) // 2])
        await asyncio.sleep(draw.random() * 0.005)
        connection.transport.abort()
        answer.add_done_callback(lambda future: future.cancelled() or future.exception())
        answer.cancel()

    async def _stream_cycles(self) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import ConnectionClosed

        draw, uri = random.Random(99), f"ws://127.0.0.1:{self.port}/v1/models/jsb-filter/filter"
        frames = (np.random.default_rng(1).random((4, 88)) < 0.05).astype(float).tolist()
        for number in range(self.cycles):
            while self.done < self.requests * number / self.cycles:  # spread over the whole run
                await asyncio.sleep(0.01)
            try:
                async with connect(uri, open_timeout=20) as socket:
                    await socket.send(json.dumps({"type": "open", "steps": 1, "seed": number}))
                    self.streams[json.loads(await asyncio.wait_for(socket.recv(), 20))["type"]] += 1
                    await socket.send(json.dumps({"type": "frames", "frames": frames}))
                    self.streams[json.loads(await asyncio.wait_for(socket.recv(), 20))["type"]] += 1
                    if draw.random() < 0.5:
                        socket.transport.abort()
                    else:
                        await socket.close()
            except (ConnectionClosed, OSError, TimeoutError) as exc:
                self.streams[type(exc).__name__] += 1

    def _mark(self) -> None:
        mark = {
            "done": self.done,
            "seconds": time.monotonic() - self.started,
            "resident_mb": resident_mb(self.pid),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
        }
        self.marks.append(mark)
        shown = " ".join(f"{status} {count}" for status, count in sorted(self.seen.items()))
        print(
            f"{self.done:9d} of {self.requests} in {mark['seconds']:.0f} s; {mark['resident_mb']:.1f} MB, "
            f"{mark['descriptors']} descriptors; {shown}; streams {dict(self.streams)}",
            flush=True,
        )


def _counts(text: str) -> dict[str, float]:
    """Samples of the counters that must add up."""
    wanted = ("elbow_requests_total{", "elbow_scheduler_jobs", "elbow_scheduler_rows", "elbow_rows_in_flight", "elbow_streams_live")
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(wanted)}


def verdict(results: dict[str, Any], requests: int) -> list[str]:
    """What does not hold."""
    seen, metrics, wrong = results["seen"], results["metrics"], []
    if sum(seen.values()) != requests:
        wrong.append(f"{requests} requests were sent, {sum(seen.values())} accounted for")
    for status in ("200", "400", "422", "500", "503", "504"):
        counted = sum(value for name, value in metrics.items() if 'endpoint="encode"' in name and f'code="{status}"' in name)
        least, most = seen.get(status, 0), seen.get(status, 0) + seen.get("left", 0)
        if not least <= counted <= most:
            wrong.append(f"status {status}: clients saw {least}, the server counted {counted:.0f}")
    for name, value in metrics.items():
        if (
            name.startswith(
                ("elbow_rows_in_flight", "elbow_streams_live", "elbow_scheduler_rows_waiting", "elbow_scheduler_rows_in_flight")
            )
            and value
        ):
            wrong.append(f"{name} is {value:g} when all is over")
    wrong.extend(f"{name}: {count} connections" for name, count in seen.items() if name.startswith("lost"))
    marks = results["marks"]
    early = next(mark for mark in marks if mark["done"] >= requests / 10)
    grown = marks[-1]["resident_mb"] - early["resident_mb"]
    if grown > max(5.0, 0.02 * early["resident_mb"]):
        wrong.append(f"memory grew by {grown:.1f} MB")
    if marks[-1]["descriptors"] > early["descriptors"] + 2:
        wrong.append(f"descriptors went from {early['descriptors']} to {marks[-1]['descriptors']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--cycles", type=int, default=2_000)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    with server(FAIL_STEPS_EVERY="5000") as (port, pid):
        soak = Soak(port, pid, args.requests, args.cycles, args.clients)
        results = asyncio.run(soak.run())
    wrong = verdict(results, args.requests)
    print("; ".join(wrong) or "all counts add up, memory and descriptors stayed")
    print(f"kept in {keep('soak', {'requests': args.requests, 'cycles': args.cycles, 'wrong': wrong, **results})}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
