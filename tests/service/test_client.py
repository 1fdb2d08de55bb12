"""The Python client, both kinds, against the application: what goes in, what comes out, what is raised."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import pytest

from service.client import AsyncElbowClient, ElbowClient, ElbowHTTPError, Reply, StepEvent
from service.errors import Overloaded

ROWS = np.zeros((2, 784))


@pytest.fixture
def client(service):
    """An asynchronous client in the application's loop, and `run` to wait for it."""
    made = AsyncElbowClient("http://test", model="digits", retries=0, transport=httpx.ASGITransport(service.app))
    yield made, service.run
    service.run(made.close())


def test_encode_gives_arrays_and_nats(client):
    elbow, run = client
    reply = run(elbow.encode(ROWS, steps=3, returns=("posterior", "elbo", "trace", "z", "reconstruction")))
    assert (reply.model, reply.version) == ("digits", "2")
    assert reply.mu.shape == reply.log_sigma.shape == (2, 4)
    assert reply.mu.dtype == np.float32
    assert reply.elbo.tolist() == [-90.0, -90.0]
    row = reply.rows[1]
    assert (row.steps_used, row.stop_reason, len(row.trace), row.mean.shape) == (3, "steps", 4, (784,))
    assert row.z["z"].shape == (1, 4)


def test_refine_hands_posteriors_back_as_they_came(client, service):
    elbow, run = client
    first = run(elbow.encode(ROWS, steps=2, model="recurrent", returns=("posterior", "carry")))
    run(elbow.refine(ROWS, first.posteriors, steps=1, model="recurrent"))
    job = service.scheduler.jobs[1]
    assert job.first_step.tolist() == [2, 2]
    assert np.array_equal(job.carry["q.mu"], first.mu)
    assert job.carry["hidden"].tolist() == [[7.0] * 3] * 2


def test_reconstruct_score_and_generate(client):
    elbow, run = client
    posteriors = run(elbow.encode(ROWS)).posteriors
    assert run(elbow.reconstruct(posteriors=posteriors, samples=2)).rows[0].samples.shape == (2, 784)
    assert run(elbow.reconstruct(ROWS, model="images")).rows[0].mean.shape == (28, 28)
    scored = run(elbow.score(ROWS, samples=10))
    assert scored.rows[0].log_px == scored.log_px[0] == -88.0
    assert len(run(elbow.generate(3)).rows) == 3
    assert len(run(elbow.generate(4, between=(posteriors[0], posteriors[1]))).rows) == 4


def test_models_cards_and_curves(client):
    elbow, run = client
    assert [model["name"] for model in run(elbow.models())] == ["digits", "direct", "images", "recurrent"]
    assert run(elbow.card())["x"]["shape"] == [784]
    assert run(elbow.curve("direct"))["steps"] == [0, 1, 5]


def test_events_end_with_the_reply(client):
    elbow, run = client

    async def collect():
        return [event async for event in elbow.events(ROWS, steps=1)]

    *steps, reply = run(collect())
    assert [(event.row, event.step) for event in steps] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(isinstance(event, StepEvent) and event.posterior is not None for event in steps)
    assert isinstance(reply, Reply)


def test_a_refusal_raises_with_the_problem(client):
    elbow, run = client
    with pytest.raises(ElbowHTTPError, match="422 invalid_input: steps: must be at least 0") as caught:
        run(elbow.encode(ROWS, steps=-1))
    assert caught.value.problem["errors"] == [{"field": "steps", "message": "must be at least 0, not -1"}]

    async def collect():
        return [event async for event in elbow.events(ROWS, steps=-1)]

    with pytest.raises(ElbowHTTPError, match="422"):
        run(collect())


def test_a_model_must_be_named_somewhere():
    with ElbowClient() as elbow, pytest.raises(ValueError, match="model: name one"):
        elbow.encode(ROWS)


def test_values_that_json_cannot_carry_are_refused_before_sending():
    with ElbowClient(model="digits") as elbow, pytest.raises(ValueError, match="finite"):
        elbow.encode([[np.nan]])


def test_a_version_is_part_of_the_path():
    with ElbowClient(model="digits", version="7") as elbow:
        assert elbow.path("/encode", None) == "/v1/models/digits/versions/7/encode"
        assert elbow.path("/encode", "other") == "/v1/models/other/encode"


def refusing(times):
    """A transport that refuses `times` times with 503 and then lists no models; counts the requests."""
    seen = []

    def answer(request):
        seen.append(request)
        if len(seen) <= times:
            return httpx.Response(503, headers={"Retry-After": "7"}, json={"code": "overloaded", "detail": "full"})
        return httpx.Response(200, json={"models": []})

    return httpx.MockTransport(answer), seen


def test_the_synchronous_client_waits_as_long_as_the_server_asks(monkeypatch):
    waits = []
    monkeypatch.setattr("service.client.time.sleep", waits.append)
    transport, seen = refusing(2)
    with ElbowClient(transport=transport) as elbow:
        assert elbow.models() == []
    assert waits == [7.0, 7.0]
    assert len(seen) == 3


def test_the_asynchronous_client_gives_up_after_its_retries(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("service.client.asyncio.sleep", sleep)
    transport, seen = refusing(9)

    async def models():
        async with AsyncElbowClient(transport=transport, retries=2) as elbow:
            return await elbow.models()

    with pytest.raises(ElbowHTTPError, match="503 overloaded: full") as caught:
        asyncio.run(models())
    assert caught.value.retry_after_s == 7.0
    assert len(seen) == 3


def test_an_error_after_the_stream_began_is_raised():
    stream = "event: step\ndata: " + json.dumps({"row": 0, "step": 0, "elbo": None, "best_step": 0, "best_elbo": None})
    stream += '\n\nevent: error\ndata: {"status": 503, "code": "shutting_down", "detail": "draining", "retry_after_s": 1}\n\n'
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=stream))
    with ElbowClient(model="digits", transport=transport) as elbow:
        events = elbow.events(ROWS)
        assert next(events).step == 0
        with pytest.raises(ElbowHTTPError, match="503 shutting_down"):
            next(events)


def test_a_reply_that_is_not_json_is_still_an_error_with_its_text():
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="bad gateway"))
    with ElbowClient(transport=transport) as elbow, pytest.raises(ElbowHTTPError, match="502 : bad gateway"):
        elbow.models()


def test_overload_reaches_the_client_with_its_retry_after(client, service):
    elbow, run = client
    service.scheduler.fault = Overloaded("full", retry_after_s=2.0)
    with pytest.raises(ElbowHTTPError) as caught:
        run(elbow.encode(ROWS))
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, "overloaded", 2.0)
