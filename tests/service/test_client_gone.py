"""A client that leaves: what it asked for is given up at the next tick, whatever steps it still had and by whichever call it came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time

import pytest
import uvicorn
from starlette.requests import ClientDisconnect

from service.app import create_app
from service.settings import Settings
from service.submission import EventReply
from tests.service.oip.conftest import ROOT


@pytest.fixture
def live(tmp_path):
    """(port, application) of a server on a real socket: the exact stand-in, and a filter."""
    shutil.copytree(ROOT / "checkpoints/jsb-filter/1", tmp_path / "jsb-filter/1")
    app = create_app(Settings(closed_form=True, repository=tmp_path, engine="onnx", threads=1, drain_s=1.0))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, http="httptools", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1], app
    server.should_exit = True
    thread.join(20)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def posted(path, body):
    head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_a_client_that_closes_its_socket_frees_its_rows(live):
    port, app = live
    # 2,000 rows of 128 steps, each measured with 256 samples after every step: minutes of work
    body = json.dumps({"inputs": [[0.5] * 8] * 2000, "steps": 128, "samples": 256, "return": ["trace"]}).encode()
    scheduler = app.state.server.scheduler

    def counts():
        (found,) = scheduler.stats().values()
        return found

    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(posted("/v1/models/closed-form/encode", body))
        wait_for(lambda: counts().rows_in_flight > 0)
        assert counts().jobs_done == 0
    wait_for(lambda: counts().jobs_abandoned == 1)
    wait_for(lambda: counts().rows_in_flight == counts().rows_waiting == 0)
    assert counts().jobs_done == 0


FRAMES = 5000
"""Of 16 steps: some ten seconds of work."""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models/jsb-filter/filter", {"frames": [[0.0] * 88] * FRAMES, "steps": 16}),
        (
            "/v2/models/jsb-filter/infer",
            {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [FRAMES, 88], "data": [0] * (88 * FRAMES)}],
                "parameters": {"steps": 16},
            },
        ),
    ],
    ids=["native", "oip"],
)
def test_a_client_that_leaves_while_its_frames_are_filtered_ends_its_stream(live, path, body):
    port, app = live

    def lane():
        ((streams, counts),) = app.state.server.scheduler.stream_stats().values()
        return streams, counts.frames

    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(posted(path, json.dumps(body).encode()))
        wait_for(lambda: lane()[1] > 0)
        assert lane()[0] == 1
    wait_for(lambda: lane()[0] == 0)
    assert 0 < lane()[1] < FRAMES


def test_a_client_that_leaves_before_its_first_event_is_noticed(service):
    """Its job waits in line, and nothing is sent meanwhile that could fail."""
    service.scheduler.hold = asyncio.Event()
    left = asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps({"inputs": [[0.0] * 784]}).encode()}]
    sent = []

    async def receive():
        if body:
            return body.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def call():
        headers = [(b"accept", b"text/event-stream")]
        scope = {"type": "http", "method": "POST", "path": "/v1/models/digits/encode", "headers": headers, "query_string": b""}
        running = asyncio.create_task(service.app(scope, receive, lambda message: asyncio.sleep(0, sent.append(message))))
        while not service.scheduler.jobs:
            await asyncio.sleep(0.001)
        assert service.scheduler.cancelled == 0
        left.set()
        async with asyncio.timeout(5):
            await running

    service.run(call())
    assert service.scheduler.cancelled == 1
    assert sent[0]["status"] == 499


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_a_client_that_leaves_between_the_first_event_and_the_reply_ends_the_job(version):
    """Nothing of the events is asked for then, so nothing in them could end it."""

    async def gone():
        return {"type": "http.disconnect"}

    async def broken(message):
        raise OSError("nobody is there")

    async def frames():
        yield b"never asked for"

    async def run():
        job = asyncio.create_task(asyncio.sleep(3600))
        with contextlib.suppress(ClientDisconnect, OSError):
            await EventReply(frames(), job)({"type": "http", "asgi": {"spec_version": version}}, gone, broken)
        await asyncio.wait([job], timeout=5)
        return job.cancelled()

    assert asyncio.run(run())
