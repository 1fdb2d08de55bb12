"""What the log says of requests: one line where the server failed, none (at level info) of what went well or was refused as announced."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from service.errors import BackendFailure, DeadlineExceeded, Overloaded, ShuttingDown
from service.scheduler.job import StepEvent

BODY = {"inputs": [[0.0] * 784], "steps": 3}
ROW = np.zeros(4, np.float32)
EVENTS = {"Accept": "text/event-stream", "Content-Type": "application/json", "X-Request-ID": "mine"}


@pytest.fixture
def lines(caplog):
    """What was logged so far, at the level that a server has unless told otherwise."""
    caplog.set_level(logging.INFO, "elbow")
    return lambda: caplog.records


@pytest.mark.parametrize(
    ("fault", "status", "level", "problem"),
    [
        (BackendFailure("the engine failed"), 500, "ERROR", "backend_failure"),
        (DeadlineExceeded("too late"), 504, "WARNING", "deadline_exceeded"),
    ],
)
def test_a_reply_of_a_failure_has_a_line_that_is_found_by_its_id(service, lines, fault, status, level, problem):
    service.scheduler.fault = fault
    reply = service.post("digits/encode", BODY, headers={"X-Request-ID": "mine"})
    assert reply.status_code == status
    (line,) = lines()
    assert (line.message, line.levelname, line.request_id, line.method) == ("request failed", level, "mine", "POST")
    assert (line.path, line.endpoint, line.model, line.version) == ("/v1/models/digits/encode", "encode", "digits", "2")
    assert (line.status, line.problem) == (status, problem)
    assert line.duration_ms > 0


def test_a_fault_of_ours_has_its_traceback_too(service, lines):
    service.scheduler.fault = ZeroDivisionError("oh")
    assert service.post("digits/encode", BODY, headers={"X-Request-ID": "mine"}).status_code == 500
    fault, line = lines()
    assert (fault.message, fault.request_id, fault.exc_info[0]) == ("unforeseen failure", "mine", ZeroDivisionError)
    assert (line.message, line.request_id, line.status, line.problem) == ("request failed", "mine", 500, "internal")


@pytest.mark.parametrize("fault", [None, Overloaded("full"), ShuttingDown("over")])
def test_success_and_the_announced_503_have_none(service, lines, fault):
    service.scheduler.fault = fault
    assert service.post("digits/encode", BODY).status_code == (200 if fault is None else 503)
    assert service.post("digits/encode", {}).status_code == 422
    service.app.state.server.draining = True
    assert service.get("/readyz").status_code == 503
    assert lines() == []


def test_at_debug_every_request_has_exactly_one(service, caplog):
    caplog.set_level(logging.DEBUG, "elbow")
    service.post("digits/encode", BODY)
    service.scheduler.fault = BackendFailure("the engine failed")
    service.post("digits/encode", BODY)
    assert [record.message for record in caplog.records] == ["request", "request failed"]


def test_events_that_end_in_a_failure_count_as_one(service, lines, monkeypatch):
    async def fails_later(job):
        job.on_step(StepEvent(0, 0, -1.0, 0, -1.0, {"q.mu": ROW, "q.log_sigma": ROW}, ROW[:1]))
        raise BackendFailure("the engine failed")

    monkeypatch.setattr(service.scheduler, "submit", fails_later)
    reply = service.run(service.http.post("/v1/models/digits/encode", json=BODY, headers=EVENTS))
    assert reply.status_code == 200
    assert "event: error" in reply.text
    (line,) = lines()
    assert (line.message, line.request_id, line.status, line.problem) == ("request failed", "mine", 500, "backend_failure")
    text = service.get("/metrics").text
    assert 'elbow_requests_total{code="500",endpoint="encode",model="digits",version="2"} 1.0' in text
    assert 'elbow_refusals_total{reason="backend_failure"} 1.0' in text
