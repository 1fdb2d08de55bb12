"""Hostile clients against a live server with raw sockets: refused, and the service lives on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

ENCODE = b"POST /v1/models/closed-form/encode HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ELBOW_")} | {
        "ELBOW_PORT": str(port),
        "ELBOW_CLOSED_FORM": "1",
        "ELBOW_REPOSITORY": str(tmp_path_factory.mktemp("nothing")),
        "ELBOW_LOG_LEVEL": "error",
        "ELBOW_HEAD_S": "0.5",
        "ELBOW_BODY_S": "0.5",
        "ELBOW_SEND_S": "0.5",
        "ELBOW_KEEP_ALIVE_S": "1",
        "ELBOW_MAX_CONNECTIONS": "40",
        "ELBOW_MAX_BODY_BYTES": "4000000",
    }
    process = subprocess.Popen([sys.executable, "-m", "service", "run"], env=environment)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/readyz")
                break
            except httpx.TransportError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.05)
        yield port
        assert process.poll() is None, "the server ended"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(autouse=True)
def _is_alive_afterwards(port: int) -> Iterator[None]:
    yield
    for _ in range(100):  # the connections of the test may still be closing
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/models/closed-form/encode", json={"inputs": [[0.0] * 8], "steps": 2})
        if reply.status_code == 200:
            return
        time.sleep(0.05)
    raise AssertionError("the service is not alive")


def answer(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """All that the server says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        except OSError:
            pass  # refused before all was sent
        said = b""
        try:
            while chunk := connection.recv(65536):
                said += chunk
        except ConnectionResetError:
            pass
        return said


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1]) if said else 0


def test_a_head_that_comes_byte_by_byte_is_cut(port: int) -> None:
    said = answer(port, b"GET /livez HTTP/1.1\r\n", *(b"X-%d: y\r\n" % i for i in range(30)), pause_s=0.05)
    assert status(said) == 408
    assert b'"code":"idle"' in said


def test_a_connection_that_says_nothing_is_closed(port: int) -> None:
    began = time.monotonic()
    assert answer(port) == b""
    assert time.monotonic() - began < 15


def test_a_body_that_does_not_come_gets_408(port: int) -> None:
    for pieces in ((b"{",), (b"{", *(b" " for _ in range(30)))):
        said = answer(port, ENCODE + b"Content-Length: 1000\r\n\r\n", *pieces, pause_s=0.05)
        assert status(said) == 408
        assert b"application/problem+json" in said


def test_a_head_without_end_gets_431(port: int) -> None:
    for head in (b"GET /livez HTTP/1.1\r\nX-A: " + b"a" * 100_000, b"GET /livez HTTP/1.1\r\n" + b"X-A: aaaaaaaa\r\n" * 4000 + b"\r\n"):
        assert status(answer(port, head)) == 431
    assert status(answer(port, b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n")) == 431
    assert status(answer(port, b"GET /livez HTTP/1.1\r\nX-A: " + b"a" * 17_000 + b"\r\n\r\n")) == 431


def test_a_body_refused_by_its_head_does_not_destroy_the_answer(port: int) -> None:
    """The answer leaves before the body comes; were the connection closed with it, a reset would overtake it."""
    head = ENCODE + b"Content-Length: 4000001\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(head)
            time.sleep(0.1)
            for _ in range(4):
                connection.sendall(b" " * 100_000)
                time.sleep(0.02)
            said = connection.recv(65536)
            assert status(said) == 413
            assert b"connection: close" in said.lower()
            assert connection.recv(65536) == b""


def test_a_client_that_takes_no_answer_is_cut_off(port: int) -> None:
    body = json.dumps({"count": 10_000, "samples": 60}).encode()
    head = ENCODE.replace(b"encode", b"generate") + b"Content-Length: %d\r\n\r\n" % len(body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", port))
        connection.sendall(head + body)
        received = len(connection.recv(1))  # the reply has begun
        time.sleep(4)
        try:
            while chunk := connection.recv(1 << 20):
                received += len(chunk)
        except ConnectionResetError:
            pass
    assert received < 10_000_000  # the whole reply has some 40 MB: it was cut


def test_more_connections_than_allowed_are_told_when_to_come_back(port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    try:
        said = answer(port)
        assert status(said) == 503
        assert b"retry-after: 1" in said
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        ENCODE + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n\r\n",
        ENCODE + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n",
        ENCODE + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        ENCODE + b"Content-Length: -1\r\n\r\n",
        ENCODE + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"\x00" * 100,
    ],
)
def test_what_is_no_http_is_refused(port: int, sent: bytes) -> None:
    assert 400 <= status(answer(port, sent)) < 500


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"[" * 100_000, 400),
        (b'{"inputs":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
        (b'{"inputs": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", 400),
        (b'{"inputs": [[NaN, 0, 0, 0, 0, 0, 0, 0]]}', 400),
        (b'{"inputs": [[1e999, 0, 0, 0, 0, 0, 0, 0]]}', 400),
        (b'{"inputs": [[1e308, 0, 0, 0, 0, 0, 0, 0]]}', 422),
        (b'{"inputs": [' + b"[0]," * 900_000 + b"[0]]}", 422),
        (b'{"inputs": [[0,0,0,0,0,0,0,0]], "steps": 1000000}', 422),
        (b'{"inputs": [[0,0,0,0,0,0,0,0]], "samples": 1000000}', 422),
        (b" " * 5_000_000, 413),
        (b"\xff\xfe{}", 400),
    ],
)
def test_bodies_that_ask_too_much_are_refused_in_words(port: int, body: bytes, expected: int) -> None:
    url = f"http://127.0.0.1:{port}/v1/models/closed-form/encode"
    reply = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert reply.status_code == expected
    assert reply.headers["content-type"] == "application/problem+json"


def test_a_million_rows_are_claimed_in_vain(port: int) -> None:
    base = f"http://127.0.0.1:{port}/v1/models/closed-form"
    assert httpx.post(f"{base}/generate", json={"count": 10**6}).status_code == 422
    tensor = {"name": "inputs", "shape": [10**6, 8], "datatype": "FP32", "data": [0.0]}
    reply = httpx.post(f"http://127.0.0.1:{port}/v2/models/closed-form/infer", json={"inputs": [tensor]})
    assert 400 <= reply.status_code < 500


@pytest.mark.parametrize(
    "name", ["..", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e", "closed-form%00", "closed-form%2f1", "é", "a" * 5000, "%ff", "."]
)
def test_model_names_lead_nowhere(port: int, name: str) -> None:
    for path in (f"/v1/models/{name}", f"/v1/models/closed-form/versions/{name}", f"/v2/models/{name}/infer"):
        said = answer(port, f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        assert status(said) in (400, 404, 405)
        assert b"root:" not in said
