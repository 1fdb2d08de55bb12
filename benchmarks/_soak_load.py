"""The clients of the soak: most behave, some send nonsense, hold back half a body, or leave; what each of them saw is counted.

A leg is a part of the soak that ends with nobody connected, so that the server's counts and the clients' can be compared to the last one.
What cannot be counted exactly (a client that leaves may or may not have been seen) goes by a call of its own: `reconstruct`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from _served import MODEL, Connection, encode_request

LEAVE, BAD, SLOW = 0.02, 0.04, 0.0002
"""Shares of the requests: clients that leave in the middle; bodies that do not fit; bodies of which the second half never comes."""
BUDGETS: list[tuple[int, dict[str, Any]]] = [
    (44, {"steps": 1}),
    (10, {"steps": 2}),
    (4, {"steps": 4}),
    (2, {"steps": 8, "elastic": True}),
    (2, {"deadline_ms": 20, "steps": 16}),
    (2, {"tolerance": 0.5, "steps": 16}),
]
FRAMES = 4
_CODE = re.compile(rb'"code":"([a-z_]+)"')


class Leg:
    """`requests` requests by `clients` clients at a time, and beside them `cycles` streams opened and closed.

    Attributes:
        seen: statuses of `encode` requests. codes: the problem codes among them. left, slow: clients of those kinds, `slow` by status.
        streams: how each stream ended. frames: results heard; frames_sent: frames that may have been filtered unheard.
    """

    def __init__(self, port: int, requests: int, cycles: int, clients: int, seed: int, stop: asyncio.Event):
        self.port, self.requests, self.cycles, self.clients, self.seed, self.stop = port, requests, cycles, clients, seed, stop
        self.seen: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.slow: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.streams: Counter[str] = Counter()
        self.frames = self.frames_sent = self.started = self.done = 0
        self.odd: list[str] = []
        self._good, self._bad, self._leaving, self._held_back = _requests()

    async def run(self, progress: Callable[[Leg], None]) -> None:
        streams = asyncio.ensure_future(self._cycles())
        clients = [asyncio.ensure_future(self._client(random.Random(self.seed * 1000 + i))) for i in range(self.clients)]
        while (await asyncio.wait(clients, timeout=10.0))[1]:
            progress(self)
        await asyncio.gather(streams, *clients)

    def counts(self) -> dict[str, Any]:
        """All that was counted, for JSON."""
        kinds = {name: dict(getattr(self, name)) for name in ("seen", "codes", "slow", "left", "streams")}
        return {"done": self.done, "cycles": self.streams.total(), "frames": self.frames, "frames_sent": self.frames_sent, **kinds}

    async def _client(self, draw: random.Random) -> None:
        connection: Connection | None = None
        while self.started < self.requests and not self.stop.is_set():
            number, chance = self.started, draw.random()
            self.started += 1
            if chance < LEAVE:
                await self._leave(draw)
            elif chance < LEAVE + SLOW:
                self.slow[str((await (await self._connected()).ask(self._held_back))[0])] += 1
            else:
                expected, request = draw.choice(self._bad) if chance < LEAVE + SLOW + BAD else (0, self._good[number % len(self._good)])
                if connection is None or connection.lost:
                    connection = await self._connected()
                connection = await self._ask(connection, request, expected)
            self.done += 1
        if connection is not None:
            connection.transport.close()

    async def _ask(self, connection: Connection, request: bytes, expected: int) -> Connection | None:
        """Counts the reply; the connection, if it stays open."""
        try:
            status, head, body = await connection.ask(request)
        except ConnectionError:
            self.seen["lost"] += 1
            return None
        self.seen[str(status)] += 1
        if status != 200 and (found := _CODE.search(body)):
            self.codes[found[1].decode()] += 1
        if expected and status not in (expected, 503):
            self.odd.append(f"{request[:60]!r}: {status} instead of {expected}")
        if b"connection: close" in head.lower():
            connection.transport.close()
            return None
        return connection

    async def _leave(self, draw: random.Random) -> None:
        """A client that sends some of a request, or all of it, and is gone."""
        connection, chance, request = await self._connected(), draw.random(), self._leaving
        kind = "whole" if chance < 0.6 else "half a body" if chance < 0.9 else "half a head"
        connection.transport.write(request[: {"whole": len(request), "half a body": len(request) // 2, "half a head": 40}[kind]])
        await asyncio.sleep(draw.random() * 0.005)
        connection.transport.abort()
        self.left[kind] += 1

    async def _connected(self) -> Connection:
        return (await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port))[1]

    async def _cycles(self) -> None:
        draw = random.Random(self.seed * 1000 + 999)
        for number in range(self.cycles):
            while self.done < self.requests * number / self.cycles:  # spread over the whole leg
                if self.stop.is_set():
                    return
                await asyncio.sleep(0.01)
            self.streams[await self._cycle(draw, number)] += 1

    async def _cycle(self, draw: random.Random, number: int) -> str:  # noqa: PLR0911  # how it ended, where it ended
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        frames, chance = (np.random.default_rng(number).random((FRAMES, 88)) < 0.05).astype(float).tolist(), draw.random()
        try:
            async with connect(f"ws://127.0.0.1:{self.port}/v1/models/jsb-filter/filter?steps=1&seed={number}", compression=None) as socket:
                opened = json.loads(await asyncio.wait_for(socket.recv(), 20))
                if opened["type"] != "opened":
                    return f"refused: {opened.get('code')}"
                if chance < 0.1:
                    await socket.send('{"type": "frames", "frames": [[1, 2]]}')
                    answer = json.loads(await asyncio.wait_for(socket.recv(), 20))
                    return "told that it does not fit" if answer["type"] == "error" else f"odd: {answer['type']}"
                await socket.send(json.dumps({"type": "frames", "frames": frames}))
                if chance < 0.3:
                    self.frames_sent += FRAMES
                    socket.transport.abort()
                    return "dropped with frames under way"
                answer = json.loads(await asyncio.wait_for(socket.recv(), 20))
                if answer["type"] == "error":
                    self.frames_sent += FRAMES
                    return f"failed: {answer['code']}"
                self.frames += len(answer["results"])
                self.frames_sent += FRAMES - len(answer["results"])
                if chance < 0.55:
                    socket.transport.abort()
                    return "dropped"
                await socket.send('{"type": "close"}')
                while json.loads(await asyncio.wait_for(socket.recv(), 20))["type"] != "closed":
                    pass
                return "closed"
        except (WebSocketException, OSError, TimeoutError) as exc:
            return f"lost: {type(exc).__name__}"


def _requests() -> tuple[list[bytes], list[tuple[int, bytes]], bytes, bytes]:
    """Good requests in turn; bad ones and their status; one to leave with; one of which half is held back."""
    x = (np.random.default_rng(0).random((sum(many for many, _ in BUDGETS), 784)) < 0.2).astype(int).tolist()
    budgets = [budget for many, budget in BUDGETS for _ in range(many)]
    good = [encode_request({"inputs": [row], "seed": i, "return": ["elbo"], **budgets[i]}) for i, row in enumerate(x)]
    random.Random(0).shuffle(good)
    head = f"POST /v1/models/{MODEL}/encode HTTP/1.1\r\nHost: soak\r\n"
    json_head = head + "Content-Type: application/json\r\nContent-Length: 7\r\n\r\n"
    bad = [
        (400, json_head.encode() + b'{"nan":'),
        (422, json_head.encode() + b"1234567"),
        (422, encode_request({"inputs": [[1, 2]]})),
        (422, encode_request({"inputs": [x[0]], "steps": -1})),
        (422, encode_request({"inputs": [x[0]], "stepps": 1})),
        (400, encode_request({"inputs": [[float("nan")] * 784]})),
        (404, encode_request({"inputs": [x[0]]}, path="/v1/models/nobody/encode")),
        (415, (head + "Content-Type: image/png\r\nContent-Length: 7\r\n\r\n").encode() + b"1234567"),
    ]
    leaving = encode_request({"inputs": [x[0]] * 4, "steps": 32}, path=f"/v1/models/{MODEL}/reconstruct")
    held_back = encode_request({"inputs": [x[0]]}, path=f"/v1/models/{MODEL}/score")
    return good, bad, leaving, held_back[: len(held_back) - 800]
