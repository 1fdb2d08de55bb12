"""A plain HTTP client that closes its socket, against a live server: its rows are freed, whatever steps they still had."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
import uvicorn

from service.app import create_app
from service.settings import Settings


@pytest.fixture
def live(tmp_path):
    """(port, application) of a server on a real socket."""
    app = create_app(Settings(closed_form=True, repository=tmp_path, drain_s=1.0))
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


def test_a_client_that_closes_its_socket_frees_its_rows(live):
    port, app = live
    # 2,000 rows of 128 steps, each measured with 256 samples after every step: minutes of work
    body = json.dumps({"inputs": [[0.5] * 8] * 2000, "steps": 128, "samples": 256, "return": ["trace"]}).encode()
    head = (
        f"POST /v1/models/closed-form/encode HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    scheduler = app.state.server.scheduler

    def counts():
        (found,) = scheduler.stats().values()
        return found

    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        wait_for(lambda: counts().rows_in_flight > 0)
        assert counts().jobs_done == 0
    wait_for(lambda: counts().jobs_abandoned == 1)
    wait_for(lambda: counts().rows_in_flight == counts().rows_waiting == 0)
    assert counts().jobs_done == 0
