"""The way out: within one drain_s whatever is slow, at once when told twice, and nobody in the accept queue spoils it for others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from service.app import create_app
from service.connections import Patience, guarded
from service.process import LAST_S, SPEAK_S, DrainingServer
from service.settings import Settings
from service.telemetry import Metrics
from tests.service.test_connections import app, wait_for


class Parts:
    """As much of deps.Server as the way out uses: streams that take `streams_s` to leave, requests that take all they are given."""

    def __init__(self, streams_s: float):
        self.draining = self.refusing = False
        self.scheduler = SimpleNamespace(alive=True)
        self._streams_s, self.until, self.stopped_at = streams_s, float("inf"), 0.0

    async def hand_over_streams(self) -> None:
        await asyncio.sleep(self._streams_s)

    async def stop(self, grace_s: float) -> None:
        self.until = min(self.until, time.monotonic() + grace_s)
        while time.monotonic() < self.until:
            await asyncio.sleep(0.01)
        self.stopped_at = time.monotonic()


def draining_server(application: object, parts: object, settings: Settings, **options: object) -> DrainingServer:
    config = uvicorn.Config(
        application, port=0, http=guarded(Patience(), Metrics()), log_config=None, timeout_graceful_shutdown=2, **options
    )
    return DrainingServer(config, parts, settings)


Run = Callable[[DrainingServer], threading.Thread]


@pytest.fixture
def run() -> Iterator[Run]:
    """run(server): the thread it runs in."""
    threads = []

    def run(server: DrainingServer) -> threading.Thread:
        threads.append((server, threading.Thread(target=server.run)))
        threads[-1][1].start()
        wait_for(lambda: server.started)
        return threads[-1][1]

    yield run
    for server, thread in threads:
        server.should_exit = server.force_exit = True
        thread.join(10)


def test_streams_and_requests_share_one_drain_s(run: Run) -> None:
    parts = Parts(streams_s=0.5)
    server = draining_server(app, SimpleNamespace(state=SimpleNamespace(server=parts)), Settings(drain_s=0.7), lifespan="off")
    thread = run(server)
    told = time.monotonic()
    server.handle_exit(signal.SIGTERM, None)
    thread.join(5)
    assert 0.6 < parts.stopped_at - told < 1.0  # 0.1 s until it is seen


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("delay_s", "streams_s"), [(30, 0), (0, 30), (0, 0)])
def test_a_second_signal_cuts_every_wait(run: Run, second: signal.Signals, delay_s: float, streams_s: float) -> None:
    parts = Parts(streams_s)
    settings = Settings(drain_delay_s=delay_s, drain_s=30)
    server = draining_server(app, SimpleNamespace(state=SimpleNamespace(server=parts)), settings, lifespan="off")
    thread = run(server)
    server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: parts.draining)
    time.sleep(0.15)  # in the wait in question
    server.handle_exit(second, None)
    thread.join(1.5)
    assert not thread.is_alive()
    assert parts.stopped_at > 0


def test_whose_work_a_second_signal_ends_is_told(run: Run, tmp_path: Path) -> None:
    settings = Settings(closed_form=True, repository=tmp_path, drain_s=30)
    application = create_app(settings)
    server = draining_server(application, application, settings)
    thread = run(server)
    port = server.servers[0].sockets[0].getsockname()[1]
    replies: list[httpx.Response] = []
    # minutes of work
    body = json.dumps({"inputs": [[0.5] * 8] * 2000, "steps": 128, "samples": 256, "return": ["trace"]})
    url = f"http://127.0.0.1:{port}/v1/models/closed-form/encode"
    client = threading.Thread(target=lambda: replies.append(httpx.post(url, content=body, timeout=20)))
    client.start()
    wait_for(lambda: any(counts.rows_in_flight for counts in application.state.server.scheduler.stats().values()))
    server.handle_exit(signal.SIGTERM, None)
    time.sleep(0.3)
    assert thread.is_alive()
    server.handle_exit(signal.SIGTERM, None)
    thread.join(3)
    assert not thread.is_alive()
    client.join(3)
    assert (replies[0].status_code, replies[0].json()["code"]) == (503, "shutting_down")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_who_waits_in_the_accept_queue_waits_for_nobody_else(certificate: tuple[Path, Path], loop: str) -> None:
    """A probe that has gone again, one that says nothing, one that talks no TLS: the client between them is answered, in time."""
    chain, key = certificate
    around = SimpleNamespace(state=SimpleNamespace(server=Parts(0)))
    server = draining_server(app, around, Settings(), ssl_certfile=chain, ssl_keyfile=key, lifespan="off", loop=loop)
    trust = ssl.create_default_context(cafile=chain)

    def ask(connection: socket.socket) -> bytes:
        with trust.wrap_socket(connection, server_hostname="127.0.0.1") as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
            return client.recv(20)

    async def main() -> tuple[float, bytes]:
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        listening = await asyncio.get_running_loop().create_server(server._protocol, "127.0.0.1", 0, ssl=server.config.ssl)
        server.servers = [listening]
        to = listening.sockets[0].getsockname()
        with contextlib.ExitStack() as stack:
            socket.create_connection(to).close()
            silent, plain, proper = (stack.enter_context(socket.create_connection(to, timeout=5)) for _ in range(3))
            socket.create_connection(to).close()
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            asking = asyncio.get_running_loop().run_in_executor(None, ask, proper)
            began = time.monotonic()
            await server._take_the_last()
            took = time.monotonic() - began
            said = await asking
            assert silent.recv(1) == b""
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0.05)
        return took, said

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        took, said = runner.run(main())
    assert said.startswith(b"HTTP/1.1 401")
    assert took < 4 * LAST_S


def test_who_connected_in_the_last_instant_and_is_slow_to_ask_is_answered() -> None:
    """A client on a starved machine; one that never speaks costs a second."""
    server = draining_server(
        app, SimpleNamespace(state=SimpleNamespace(server=Parts(0))), Settings(drain_delay_s=0, drain_s=0.1), lifespan="off"
    )

    def ask(client: socket.socket, after_s: float) -> bytes:
        time.sleep(after_s)
        client.sendall(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
        return client.recv(12)

    async def main() -> tuple[bytes, float]:
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        loop = asyncio.get_running_loop()
        server.servers = [await loop.create_server(server._protocol, "127.0.0.1", 0)]
        to = server.servers[0].sockets[0].getsockname()
        with socket.create_connection(to, timeout=5) as slow, socket.create_connection(to, timeout=5):
            asking = loop.run_in_executor(None, ask, slow, 3 * LAST_S)
            began = time.monotonic()
            await server.shutdown()
            return await asking, time.monotonic() - began

    said, took = asyncio.run(main())
    assert said == b"HTTP/1.1 401"
    assert SPEAK_S <= took < 5 * SPEAK_S
