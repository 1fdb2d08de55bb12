"""A server of the shipped models in a process of its own, and a client for load: what the benchmarks of overload and deadlines share.

    python benchmarks/_served.py PORT      serves, and times every request from its head to the last byte of its reply

The client is a bare asyncio protocol with prepared requests: on two cores the generator must leave the server its share.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "mnist-iterative"


class Timed:
    """ASGI around the application: milliseconds from the scope to the last byte, by X-Request-ID; GET /measured takes them."""

    def __init__(self, app: Any):
        self.app = app
        self.measured: dict[str, float] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        if scope["path"] == "/measured":
            body, self.measured = json.dumps(self.measured).encode(), {}
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})
            return
        name = next((value.decode() for key, value in scope["headers"] if key == b"x-request-id"), None)
        await self.app(scope, receive, send)
        if name is not None:
            self.measured[name] = 1e3 * (time.monotonic() - started)


def serve(port: int) -> None:
    import uvicorn

    from service.app import create_app
    from service.settings import read_settings

    app = Timed(create_app(read_settings()))
    uvicorn.run(app, host="127.0.0.1", port=port, loop="auto", http="httptools", access_log=False, log_level="warning", server_header=False)


@contextmanager
def server(**environment: str) -> Iterator[tuple[int, int]]:
    """(port, pid) of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"ELBOW_REPOSITORY": str(ROOT / "checkpoints"), "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1", **environment}
    process = subprocess.Popen([sys.executable, __file__, str(port)], env={**os.environ, **settings})
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError("the server did not start")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(20)


def resident_mb(pid: int) -> float:
    """Of the server with all processes that it started."""
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family(pid))
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def descriptors(pid: int) -> int:
    """Open ones, likewise."""
    return sum(len(os.listdir(f"/proc/{one}/fd")) for one in family(pid))


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [pid, *(one for child in children for one in family(child))]


def encode_request(body: dict[str, Any], name: str = "", path: str = f"/v1/models/{MODEL}/encode") -> bytes:
    raw = json.dumps(body, separators=(",", ":")).encode()
    identified = f"X-Request-ID: {name}\r\n" if name else ""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n{identified}Content-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


class Connection(asyncio.Protocol):
    """One request at a time on a kept connection: `ask` gives (status, head, body)."""

    def __init__(self) -> None:
        self._buffer = b""
        self._waiting: asyncio.Future[tuple[int, bytes, bytes]] | None = None
        self.transport: Any = None
        self.lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionError("the server closed the connection"))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes, bytes]]:
        self._buffer, waiting = b"", asyncio.get_running_loop().create_future()
        self._waiting = waiting
        self.transport.write(request)
        return waiting

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        start = head.lower().find(b"content-length:")
        length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
        if len(body) >= length and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result((int(head[9:12]), head, body))


class Pool:
    """Connections that are free; `ask` takes one, or opens another."""

    def __init__(self, port: int):
        self._port = port
        self._free: list[Connection] = []

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Once more on a fresh connection where a kept one was closed, as an idle one may be, while the request was on its way."""
        try:
            return await self._ask(request)
        except ConnectionError:
            self._free.clear()
            return await self._ask(request)

    async def _ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        connection = None
        while self._free and connection is None:
            connection = self._free.pop()
            connection = None if connection.lost else connection
        if connection is None:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        answer = await connection.ask(request)
        self._free.append(connection)
        return answer

    async def get(self, path: str) -> bytes:
        return (await self.ask(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()))[2]

    def close(self) -> None:
        for connection in self._free:
            connection.transport.close()


Send = Callable[[int], Awaitable[None]]


async def closed_loop(send: Send, clients: int, seconds: float) -> float:
    """Each client sends its next request when the last is answered; the seconds it took."""
    started, number = time.perf_counter(), iter(range(10**9))

    async def client() -> None:
        while time.perf_counter() < started + seconds:
            await send(next(number))

    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started


async def open_loop(send: Send, rate: float, seconds: float) -> float:
    """Requests at `rate` per second whatever comes back; the seconds until all were answered."""
    started, number, running = time.perf_counter(), 0, set()
    while (now := time.perf_counter()) < started + seconds:
        due = int((now - started) * rate)
        while number < due:
            task = asyncio.ensure_future(send(number))
            running.add(task)
            task.add_done_callback(running.discard)
            number += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*running)
    return time.perf_counter() - started


if __name__ == "__main__":
    serve(int(sys.argv[1]))
