"""Connections that cost the server something: each is under some timer at every moment, whoever is reading is left in peace."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from service.connections import Patience, guarded
from service.telemetry import Metrics

KEEP_ALIVE_S = 0.4
LARGE = 12_000_000
"""More than the kernels hold on both sides of a loopback connection."""
PIECE = 60_000
Started = Callable[..., uvicorn.Server]


async def app(scope, receive, send):
    """/large answers LARGE bytes, /slow after 0.6 s, all else 401 at once; none waits for a body. A WebSocket: LARGE bytes, then close;
    /talk listens."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        with contextlib.suppress(Exception):  # cut
            if scope["path"] == "/talk":
                while (await receive())["type"] != "websocket.disconnect":
                    pass
            for _ in range(LARGE // PIECE):
                await send({"type": "websocket.send", "bytes": bytes(PIECE)})
            await send({"type": "websocket.close"})
        return
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(0.6)
    body = bytes(LARGE) if scope["path"] == "/large" else b"{}"
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def start() -> Iterator[Started]:
    """start(patience, **of uvicorn's): a server in a thread."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(patience: Patience, **options: object) -> uvicorn.Server:
        config = uvicorn.Config(
            app,
            port=0,
            http=guarded(patience, Metrics()),
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S,
            **options,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        wait_for(lambda: server.started)
        return server

    yield start
    for server, _ in running:
        server.should_exit = server.force_exit = True
    for _, thread in running:
        thread.join(10)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """How long it took to come true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never came true"
        time.sleep(0.005)
    return time.monotonic() - began


def connect(server: uvicorn.Server, *sent: bytes, receive_buffer: int = 0) -> socket.socket:
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(5)
    client.connect(server.servers[0].sockets[0].getsockname())
    for piece in sent:
        client.sendall(piece)
    return client


def read_slowly(client: socket.socket) -> None:
    """LARGE bytes, at 10 MB/s: several times send_s and KEEP_ALIVE_S."""
    received, began = 0, time.monotonic()
    while received < LARGE:
        chunk = client.recv(65536)
        assert chunk, f"cut after {received} bytes"
        received += len(chunk)
        time.sleep(max(0.0, began + received / 10e6 - time.monotonic()))
    assert time.monotonic() - began > 1.0


def heard_until_closed(client: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            said += chunk
    return said


HALF = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1000\r\n\r\n"
WHOLE = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"\r\n", b""),
        (b"\r\n\r\n", b"\r\n"),
        (b"\r\nGET", b""),
        (WHOLE, b""),
        (WHOLE, b"\r\n"),
        (WHOLE + b"GE", b""),
        (HALF, b""),
        (HALF, b"x"),
        (HALF + b"x", b"x"),
        (HALF + b"x" * 1000, b"\r\n"),
    ],
)
def test_no_connection_stays_that_asks_for_nothing(start: Started, first: bytes, later: bytes) -> None:
    """A line end begins no head, a byte of an answered request's body no request: yet either once ended the only timer there was."""
    server = start(Patience(head_s=0.4, send_s=0.4))
    began = time.monotonic()
    with connect(server, first) as client:
        for _ in range(3):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                client.sendall(later)
        said = heard_until_closed(client)
        assert time.monotonic() - began < 1.5  # lingering included
        assert said.startswith(b"HTTP/1.1 401") == (first[:4] in (WHOLE[:4], HALF[:4]))
        assert (b"HTTP/1.1 408" in said) == (first[-2:] in (b"GE", b"ET"))
    wait_for(lambda: not server.server_state.connections)


def test_a_request_in_work_has_time_and_no_slow_head_behind_it_gets_ahead(start: Started) -> None:
    server = start(Patience(head_s=0.1, send_s=0.2))
    with connect(server, WHOLE.replace(b"/ ", b"/slow ") + b"GE") as client:
        said = heard_until_closed(client)
        assert said.startswith(b"HTTP/1.1 401")
        assert b"HTTP/1.1 408" in said[1:]


def tls(certificate: tuple[Path, Path], connection: socket.socket) -> ssl.SSLSocket:
    return ssl.create_default_context(cafile=certificate[0]).wrap_socket(connection, server_hostname="127.0.0.1")


@pytest.mark.parametrize("over", ["http", "https"])
@pytest.mark.parametrize("closing", [False, True])
def test_who_reads_slowly_gets_everything_and_who_reads_nothing_is_cut(
    start: Started, request: pytest.FixtureRequest, over: str, closing: bool
) -> None:
    certificate = request.getfixturevalue("certificate") if over == "https" else None
    options = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]} if certificate else {}
    server = start(Patience(head_s=0.2, send_s=0.2), **options)
    asked = WHOLE.replace(b"/ ", b"/large ")
    if closing:
        asked = asked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with connect(server, receive_buffer=65536) as raw:
        client = tls(certificate, raw) if certificate else raw
        client.sendall(asked)
        read_slowly(client)
        client.close()
    with connect(server, receive_buffer=65536) as raw:
        client = tls(certificate, raw) if certificate else raw
        client.sendall(asked)
        wait_for(lambda: not server.server_state.connections, 2)
        client.close()


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def test_of_a_websocket_too_who_reads_slowly_gets_everything_and_who_reads_nothing_is_cut(start: Started) -> None:
    server = start(Patience(head_s=0.2, send_s=0.2))
    with connect(server, UPGRADE, receive_buffer=65536) as client:
        read_slowly(client)
    with connect(server, UPGRADE, receive_buffer=65536):
        wait_for(lambda: bool(server.server_state.connections), 2)
        wait_for(lambda: not server.server_state.connections, 3)


def test_a_websocket_that_pings_without_end_and_reads_no_pong_is_cut(start: Started) -> None:
    server = start(Patience(head_s=0.2, send_s=0.2))
    ping = b"\x89\xfd" + bytes(4) + bytes(125)
    with connect(server, UPGRADE.replace(b"/ ", b"/talk "), receive_buffer=65536) as client:
        assert client.recv(12) == b"HTTP/1.1 101"
        until = time.monotonic() + 10
        with contextlib.suppress(ConnectionError, TimeoutError):
            while time.monotonic() < until:
                client.sendall(ping * 500)
        assert time.monotonic() < until, "it still listens"


def test_a_quiet_websocket_is_left_in_peace(start: Started) -> None:
    server = start(Patience(head_s=0.1, send_s=0.1))
    with connect(server, UPGRADE.replace(b"/ ", b"/talk ")) as client:
        assert client.recv(12) == b"HTTP/1.1 101"
        time.sleep(0.5)
        assert server.server_state.connections


def refused(server: uvicorn.Server) -> socket.socket:
    """A client that was told 503 and does not close."""
    client = connect(server)
    assert client.recv(20).startswith(b"HTTP/1.1 503")
    return client


def test_refused_clients_that_stay_do_not_keep_the_door_shut(start: Started) -> None:
    server = start(Patience(head_s=5, max_connections=3))
    with contextlib.ExitStack() as stack:
        held = [connect(server) for _ in range(3)]
        wait_for(lambda: len(server.server_state.connections) == 3)
        for _ in range(20):
            stack.enter_context(refused(server))
        for client in held:
            client.close()
        wait_for(lambda: len(server.server_state.connections) == 20)
        with connect(server, WHOLE) as client:
            assert client.recv(20).startswith(b"HTTP/1.1 401")


def is_cut(client: socket.socket) -> bool:
    try:
        client.sendall(b"x")
    except OSError:
        return True
    return False


def test_those_that_linger_are_bounded_the_oldest_goes_first(start: Started) -> None:
    server = start(Patience(head_s=5, max_connections=1, max_lingering=4))
    with contextlib.ExitStack() as stack:
        stack.enter_context(connect(server))
        wait_for(lambda: len(server.server_state.connections) == 1)
        lingering = [stack.enter_context(refused(server)) for _ in range(10)]
        assert len(server.server_state.connections) == 1 + 4
        wait_for(lambda: is_cut(lingering[0]))
        lingering[-1].sendall(b"x" * 10_000)  # is still heard out
        assert heard_until_closed(lingering[-1]).endswith(b"}")
