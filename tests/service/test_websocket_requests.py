"""A WebSocket is a request like any other: it has an id, which every answer and log line names, and is counted once, when it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from service.settings import Settings
from service.streams.connection import Connection
from tests.service.oip.conftest import ROOT, LiveServer

MINE = {"X-Request-ID": "mine"}
FRAMES = {"type": "frames", "frames": [[0.0] * 88] * 3}
CLOSE = {"type": "close"}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    repository = tmp_path_factory.mktemp("sockets")
    shutil.copytree(ROOT / "checkpoints/jsb-filter/1", repository / "jsb-filter/1")
    server = LiveServer(Settings(repository=repository, engine="onnx", closed_form=True, threads=1, drain_s=1.0))
    yield server
    server.stop()


def talk(server, *messages, path="/v1/models/jsb-filter/filter?seed=1", headers=MINE):
    """(headers of the handshake's answer, all that the server said, close code)."""

    async def run():
        heard = []
        async with connect(f"ws://{server.address}{path}", additional_headers=headers, compression=None) as socket:
            for message in messages:
                await socket.send(json.dumps(message))
            try:
                while True:
                    heard.append(json.loads(await socket.recv()))
            except ConnectionClosed:
                return socket.response.headers, heard, socket.close_code

    return asyncio.run(asyncio.wait_for(run(), 30))


def denied(server, **options):
    """(headers, problem document) of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        talk(server, **options)
    return caught.value.response.headers, json.loads(caught.value.response.body)


def counted(server, code, model="jsb-filter", endpoint="stream"):
    """WebSockets counted so far under this code, and nowhere timed."""
    metrics, version = server.app.state.metrics, "1" if model else ""
    labels = {"endpoint": endpoint, "model": model, "version": version}
    assert metrics.registry.get_sample_value("elbow_request_duration_seconds_count", labels) is None
    return metrics.registry.get_sample_value("elbow_requests_total", {**labels, "code": str(code)}) or 0


def becomes(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def refusals(server, reason):
    return server.app.state.metrics.registry.get_sample_value("elbow_refusals_total", {"reason": reason}) or 0


def test_a_stream_has_the_id_that_its_client_gave_or_one_of_its_own(live):
    assert talk(live, CLOSE)[0]["X-Request-ID"] == "mine"
    own = [talk(live, CLOSE, headers=headers)[0]["X-Request-ID"] for headers in ({}, {"X-Request-ID": "not plain"})]
    assert {len(one) for one in own} == {32}
    assert own[0] != own[1]


def test_a_stream_is_counted_once_when_it_ends(live):
    before = counted(live, 101)
    _, heard, code = talk(live, FRAMES, CLOSE)
    assert (heard[-1]["type"], code) == ("closed", 1000)
    becomes(lambda: counted(live, 101) == before + 1)


@pytest.mark.parametrize(
    ("model", "status", "counted_as", "code"), [("nobody", 404, "", "unknown_model"), ("closed-form", 422, "closed-form", "invalid_input")]
)
def test_a_denial_names_the_id_and_is_counted_under_its_status(live, model, status, counted_as, code):
    before, reasons = counted(live, status, counted_as), refusals(live, code)
    headers, problem = denied(live, path=f"/v1/models/{model}/filter")
    assert (problem["status"], problem["code"], problem["request_id"], headers["X-Request-ID"]) == (status, code, "mine", "mine")
    becomes(lambda: counted(live, status, counted_as) == before + 1)
    assert refusals(live, code) == reasons + 1


def test_a_denial_at_the_gate_names_the_id_too(live, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(live.app.state.server, "refusing", True)
        headers, problem = denied(live)
    assert (problem["code"], problem["request_id"], headers["X-Request-ID"]) == ("shutting_down", "mine", "mine")
    becomes(lambda: counted(live, 503, "", "other") >= 1)


def test_an_error_message_names_the_id_and_the_problem_is_counted(live):
    before, reasons = counted(live, 422), refusals(live, "invalid_input")
    _, heard, code = talk(live, {"type": "frames", "frames": [[0.0]]})
    assert (heard[-1]["type"], heard[-1]["code"], heard[-1]["request_id"], code) == ("error", "invalid_input", "mine", 1007)
    becomes(lambda: counted(live, 422) == before + 1)
    assert refusals(live, "invalid_input") == reasons + 1


def test_a_failing_engine_is_logged_by_id_and_counted_once_however_many_messages_were_in_line(live, caplog, monkeypatch):
    lane = live.app.state.server.scheduler.stream_lane("jsb-filter/1")
    before, reasons = counted(live, 500), refusals(live, "backend_failure")
    monkeypatch.setattr(lane.engine, "run_rows", lambda *_, **__: 1 / 0)
    _, heard, code = talk(live, FRAMES, FRAMES, FRAMES)
    assert (heard[-1]["code"], heard[-1]["request_id"], code) == ("backend_failure", "mine", 1011)
    becomes(lambda: [record.message for record in caplog.records][-1:] == ["request failed"])
    assert counted(live, 500) == before + 1
    assert refusals(live, "backend_failure") == reasons + 1
    why, line = caplog.records
    assert (why.message, why.request_ids, why.exc_info[0]) == ("frames failed", ["mine"], ZeroDivisionError)
    assert (line.message, line.levelname, line.request_id, line.method) == ("request failed", "ERROR", "mine", "WEBSOCKET")
    assert (line.endpoint, line.model, line.status, line.problem) == ("stream", "jsb-filter", 500, "backend_failure")


def test_a_fault_of_ours_is_logged_said_and_counted(live, caplog, monkeypatch):
    async def broken(self):
        raise ZeroDivisionError("oh")

    before = counted(live, 500)
    monkeypatch.setattr(Connection, "serve", broken)
    _, heard, code = talk(live, CLOSE)
    assert ([message["code"] for message in heard], heard[-1]["request_id"], code) == (["internal"], "mine", 1011)
    becomes(lambda: [record.message for record in caplog.records] == ["unforeseen failure", "request failed"])
    assert {record.request_id for record in caplog.records} == {"mine"}
    assert counted(live, 500) == before + 1


def test_a_fault_of_ours_before_the_answer_is_a_plain_500(live, monkeypatch):
    monkeypatch.setattr("service.routes.filters.model_of", lambda *_: 1 / 0)
    headers, problem = denied(live)
    assert (problem["status"], problem["code"], problem["request_id"], headers["X-Request-ID"]) == (500, "internal", "mine", "mine")


def test_at_debug_every_stream_has_one_line(live, caplog):
    with caplog.at_level(logging.DEBUG, "elbow"):
        talk(live, FRAMES, CLOSE)
        becomes(lambda: any(record.message == "request" for record in caplog.records))
    (line,) = [record for record in caplog.records if record.message == "request"]
    assert (line.request_id, line.method, line.status, line.endpoint) == ("mine", "WEBSOCKET", 101, "stream")
