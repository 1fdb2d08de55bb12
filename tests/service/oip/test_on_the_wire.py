"""Bytes on a socket that no HTTP client would send: refused, and the server answers the next request."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.0] * 8}]}).encode()
HEAD = b"POST /v2/models/closed-form/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


def exchange(live, raw):
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(raw)
        reply = b""
        while chunk := connection.recv(65536):
            reply += chunk
    return reply


def chunked(*chunks):
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def status(reply):
    return int(reply.split(b" ", 2)[1])


@pytest.fixture(autouse=True)
def still_alive(live):
    yield
    reply = httpx.post(f"{live.url}/v2/models/closed-form/infer", content=BODY, timeout=10)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_chunked_body_is_read_whatever_its_chunks(live, size):
    chunks = [BODY[at : at + size] for at in range(0, len(BODY), size)]
    assert status(exchange(live, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*chunks))) == 200


def test_a_chunked_body_that_grows_too_large_is_refused_while_it_comes(live):
    reply = exchange(live, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*[b"x" * 2**17] * 9))
    assert status(reply) == 413


@pytest.mark.parametrize(
    "rest",
    [
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nnonsense\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nx\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + chunked(BODY),
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    ],
)
def test_nonsense_in_the_framing_is_refused(live, rest):
    reply = exchange(live, HEAD + rest)
    assert not reply or status(reply) == 400


def test_a_head_length_given_twice_is_refused(live):
    twice = b"Inference-Header-Content-Length: 5\r\n" * 2
    reply = exchange(live, HEAD + twice + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
    assert status(reply) == 400
    assert b"more than once" in reply
