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


def test_events_of_a_refinement_go_on_from_its_posteriors(client, service):
    elbow, run = client
    posteriors = run(elbow.encode(ROWS, steps=2)).posteriors

    async def collect():
        return [event async for event in elbow.events(ROWS, posteriors, steps=1)]

    *steps, reply = run(collect())
    assert len(steps) == 4
    assert reply.posteriors[0].step == 3
    assert service.scheduler.jobs[-1].first_step.tolist() == [2, 2]


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


@pytest.mark.parametrize("values", [np.array([[None]]), [["a"]], [[1j]], [[1.0], [1.0, 2.0]], 1.0])
def test_rows_that_are_no_numbers_are_refused_by_name(values):
    with ElbowClient(model="digits") as elbow:
        with pytest.raises(ValueError, match=r"^inputs: "):
            elbow.encode(values)
        with pytest.raises(ValueError, match=r"^mask: "):
            elbow.encode(ROWS, mask=values)
        with pytest.raises(ValueError, match=r"^frames: "):
            elbow.filter(values)


@pytest.mark.parametrize("dtype", [">i2", ">i8", "<u4", ">f4", ">f8", "f2", "?", np.longdouble])
def test_numbers_of_any_kind_and_byte_order_are_sent(dtype):
    transport, seen = answering()
    with ElbowClient(model="digits", transport=transport) as elbow:
        elbow.encode(np.eye(3).astype(dtype)[:, ::2])
    assert json.loads(seen[0].content)["inputs"] == [[1, 0], [0, 0], [0, 1]]


def test_a_version_is_part_of_the_path():
    with ElbowClient(model="digits", version="7") as elbow:
        assert elbow.path("/encode", None) == elbow.path("/encode", "digits") == "/v1/models/digits/versions/7/encode"
    with ElbowClient(version="7") as elbow:
        assert elbow.path("/encode", "other") == "/v1/models/other/versions/7/encode"
    with ElbowClient(model="digits") as elbow:
        assert elbow.path("/encode", "other") == "/v1/models/other/encode"


def test_the_version_of_one_model_is_not_taken_for_anothers():
    with (
        ElbowClient(model="digits", version="7") as elbow,
        pytest.raises(ValueError, match="make another client for other, with model='other'"),
    ):
        elbow.encode(ROWS, model="other")


REPLY = {"model": "m", "version": "1", "results": [], "timing": {}, "seed": 3}


def answering(reply=REPLY):
    """A transport that always gives `reply`, and the requests it saw."""
    seen = []

    def answer(request):
        seen.append(request)
        return httpx.Response(200, json=reply)

    return httpx.MockTransport(answer), seen


BUDGET = {"deadline_ms": 50.0, "tolerance": 0.5, "elastic": False}


@pytest.mark.parametrize("call", ["encode", "reconstruct", "score"])
def test_every_budget_and_the_seed_said_back(call, client, service):
    elbow, run = client
    reply = run(getattr(elbow, call)(ROWS, **BUDGET, seed=[4, 5]))
    assert reply.seed == [4, 5]
    budget = service.scheduler.jobs[-1].budget
    assert (budget.tolerance, budget.elastic, budget.deadline is None) == (0.5, False, False)


def test_a_single_part_is_asked_for_by_its_name(client):
    elbow, run = client
    assert run(elbow.encode(ROWS, returns="elbo")).rows[0].elbo == -90.0


FILTERED = {
    "model": "notes",
    "version": "1",
    "precision": "float32",
    "seed": 5,
    "results": [
        {"frame": 7, "elbo": -2.0, "surprise": 2.0, "surprise_quantile": 0.5, "steps_used": 1, "posterior": {"levels": [{"mu": [1.0]}]}},
        {"frame": 8, "elbo": None, "surprise": None, "surprise_quantile": None, "steps_used": 1},
    ],
    "frame": 9,
    "state": "token",
    "timing": {"filter_ms": 1.0},
}


@pytest.mark.parametrize("kind", [ElbowClient, AsyncElbowClient])
def test_filter_takes_frames_and_a_state_and_gives_the_next(kind):
    transport, seen = answering(FILTERED)
    elbow = kind(model="notes", transport=transport)
    reply = elbow.filter(np.zeros((2, 3)), mask=np.ones((2, 3)), state="before", steps=1, returns="posterior")
    if kind is AsyncElbowClient:
        reply = asyncio.run(reply)
    assert seen[0].url.path == "/v1/models/notes/filter"
    zeros, ones = [[0.0] * 3] * 2, [[1.0] * 3] * 2
    assert json.loads(seen[0].content) == {"frames": zeros, "mask": ones, "state": "before", "steps": 1, "return": ["posterior"]}
    assert (reply.state, reply.frame, reply.seed, reply.precision) == ("token", 9, 5, "float32")
    assert [(frame.frame, frame.surprise) for frame in reply.frames] == [(7, 2.0), (8, None)]
    assert reply.frames[0].mu.tolist() == [1.0]
    assert np.array_equal(reply.elbo, [-2.0, np.nan], equal_nan=True)


def refusing(times):
    """A transport that refuses `times` times with 503 and then lists no models, or has no events; counts the requests."""
    seen = []

    def answer(request):
        seen.append(request)
        if len(seen) <= times:
            return httpx.Response(503, headers={"Retry-After": "7"}, json={"code": "overloaded", "detail": "full"})
        if request.headers["accept"] == "text/event-stream":
            return httpx.Response(200, text=f"event: done\ndata: {json.dumps(REPLY)}\n\n")
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


def test_events_wait_as_long_as_the_server_asks(monkeypatch):
    waits = []
    monkeypatch.setattr("service.client.time.sleep", waits.append)
    transport, seen = refusing(2)
    with ElbowClient(model="digits", transport=transport) as elbow:
        (reply,) = elbow.events(ROWS)
    assert (reply.model, waits, len(seen)) == ("m", [7.0, 7.0], 3)


def test_events_of_the_asynchronous_client_wait_too_and_give_up(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("service.client.asyncio.sleep", sleep)

    async def collect(times):
        async with AsyncElbowClient(model="digits", transport=refusing(times)[0], retries=2) as elbow:
            return [event async for event in elbow.events(ROWS)]

    assert len(asyncio.run(collect(2))) == 1
    assert waits == [7.0, 7.0]
    with pytest.raises(ElbowHTTPError, match="503 overloaded: full"):
        asyncio.run(collect(3))


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
