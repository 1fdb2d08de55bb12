"""The calls on a model: what a body becomes, and what comes back."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import pytest

from service.errors import Overloaded
from service.scheduler.job import StepEvent

ROW = [0.0] * 784


def encode(service, body=None, model="digits", **options):
    return service.post(f"{model}/encode", {"inputs": [ROW], **(body or {})}, **options)


def test_encode_answers_with_the_shape_of_the_contract(service):
    reply = encode(service, {"steps": 3, "return": ["posterior", "elbo", "trace", "reconstruction", "z"], "samples": 2})
    assert reply.status_code == 200
    body = reply.json()
    assert {name: body[name] for name in ("model", "version", "precision", "seed")} == {
        "model": "digits",
        "version": "2",
        "precision": "float32",
        "seed": 0,
    }
    assert body["timing"] == {"queue_ms": 0.25, "compute_ms": 1.5, "predicted_ms": 1.25, "batch_rows": 1}
    (result,) = body["results"]
    assert result.pop("z") == {"z": [[0.0] * 4] * 2}
    assert result.pop("reconstruction") == {"mean": [0.5] * 784}
    assert result == {
        "elbo": -90.0,
        "log_likelihood": -70.0,
        "kl": 20.0,
        "steps_used": 3,
        "stop_reason": "steps",
        "posterior": {"step": 3, "levels": [{"mu": [0.0] * 4, "log_sigma": [0.33333334] * 4, "kl": 20.0}]},
        "trace": [-100.0, -99.0, -98.0, -97.0],
    }


def test_without_return_a_result_has_posterior_and_elbo(service):
    (result,) = encode(service).json()["results"]
    assert result.keys() == {"elbo", "log_likelihood", "kl", "steps_used", "stop_reason", "posterior"}


def test_only_what_is_asked_for_comes_back_and_is_computed(service):
    (result,) = encode(service, {"return": ["z"]}).json()["results"]
    assert result.keys() == {"steps_used", "stop_reason", "z"}
    assert not service.scheduler.jobs[0].ask.measure


@pytest.mark.parametrize(
    ("body", "steps", "elastic"),
    [
        ({}, 5, False),
        ({"steps": 0}, 0, False),
        ({"steps": 2.0}, 2, False),  # in JSON the same number as 2
        ({"deadline_ms": 20}, 64, True),
        ({"tolerance": 0.05}, 64, True),
        ({"steps": 3, "tolerance": 0.05}, 3, True),
        ({"steps": 3, "deadline_ms": 20, "elastic": False}, 3, False),
        ({"steps": 3, "elastic": True}, 3, True),
    ],
)
def test_budgets_take_their_defaults_from_the_card(service, body, steps, elastic):
    assert encode(service, body).status_code == 200
    budget = service.scheduler.jobs[0].budget
    assert (budget.steps, budget.elastic) == (steps, elastic)
    assert (budget.deadline is None) == ("deadline_ms" not in body)


def test_a_direct_model_takes_any_steps_up_to_128(service):
    assert encode(service, {"steps": 128}, "direct").status_code == 200
    assert encode(service, {"steps": 129}, "direct").status_code == 422


def test_one_seed_serves_all_rows_and_a_list_serves_each(service):
    assert encode(service, {"inputs": [ROW, ROW], "seed": 7}).json()["seed"] == 7
    assert service.scheduler.jobs[0].seeds.tolist() == [7, 7]
    assert encode(service, {"inputs": [ROW, ROW], "seed": [1, 2**64 - 1]}).json()["seed"] == [1, 2**64 - 1]
    assert service.scheduler.jobs[1].seeds.tolist() == [1, 2**64 - 1]


def test_rows_may_be_flat_or_nested_to_the_shape_of_x(service):
    flat = np.linspace(0, 1, 784)
    assert service.post("images/encode", {"inputs": [flat.tolist()]}).status_code == 200
    assert service.post("images/encode", {"inputs": [flat.reshape(28, 28).tolist()]}).status_code == 200
    first, second = (job.x for job in service.scheduler.jobs)
    assert first.shape == (1, 28, 28)
    assert np.array_equal(first, second)
    assert first.dtype == np.float32


def test_a_mask_of_booleans_or_of_zeros_and_ones_says_what_is_observed(service):
    row = [0] * 392 + [1] * 392
    encode(service, {"mask": [row]})
    encode(service, {"mask": [[bool(value) for value in row]]})
    encode(service)
    masks = [job.mask for job in service.scheduler.jobs]
    assert np.array_equal(masks[0], masks[1])
    assert masks[0].sum() == 392
    assert masks[2].all()


def test_every_call_also_exists_by_version(service):
    assert service.post("digits/versions/1/encode", {"inputs": [ROW]}).json()["version"] == "1"
    assert service.post("digits/versions/2/generate", {"count": 1}).json()["version"] == "2"


def test_refine_goes_on_from_what_encode_returned(service):
    (first,) = encode(service, {"steps": 2}).json()["results"]
    reply = service.post("digits/refine", {"inputs": [ROW], "steps": 3, "posterior": [first["posterior"]]})
    assert reply.json()["results"][0]["posterior"]["step"] == 5
    job = service.scheduler.jobs[1]
    assert job.first_step.tolist() == [2]
    assert np.array_equal(job.carry["q.log_sigma"], np.full((1, 4), 1 / 3, np.float32))


def test_posteriors_survive_json_bit_for_bit(service):
    values = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    posterior = [{"step": 1, "levels": [{"mu": row.tolist(), "log_sigma": (row * 1e-3).tolist()}]} for row in values]
    reply = service.post("digits/refine", {"inputs": [ROW] * 20, "posterior": posterior})
    assert reply.status_code == 200
    assert np.array_equal(service.scheduler.jobs[0].carry["q.mu"], values)


def test_what_a_recurrent_model_keeps_travels_in_the_carry(service):
    (first,) = encode(service, {}, "recurrent").json()["results"]
    assert isinstance(first["posterior"]["carry"], str)
    reply = service.post("recurrent/refine", {"inputs": [ROW], "posterior": [first["posterior"]]})
    assert reply.status_code == 200
    assert service.scheduler.jobs[1].carry["hidden"].tolist() == [[7.0, 7.0, 7.0]]


def test_reconstruct_starts_from_inputs_or_from_a_posterior(service):
    from_inputs = service.post("images/reconstruct", {"inputs": [ROW], "steps": 1, "samples": 2}).json()["results"][0]
    assert np.shape(from_inputs["reconstruction"]["mean"]) == (28, 28)
    assert np.shape(from_inputs["reconstruction"]["samples"]) == (2, 28, 28)
    posterior = {"step": 1, "levels": [{"mu": [0] * 4, "log_sigma": [0] * 4}]}
    alone = service.post("images/reconstruct", {"posterior": [posterior]}).json()["results"][0]
    assert alone["reconstruction"].keys() == {"mean"}
    assert service.scheduler.jobs[1].budget.steps == 0


def test_score_gives_log_px_and_the_quantile_of_the_elbo(service):
    (result,) = service.post("digits/score", {"inputs": [ROW], "steps": 5}).json()["results"]
    assert result == {"steps_used": 5, "stop_reason": "steps", "log_px": -88.0, "elbo": -90.0, "elbo_quantile": 0.5}
    assert service.scheduler.jobs[0].ask.importance_samples == 100


def test_generate_draws_with_a_seed_for_each(service):
    reply = service.post("digits/generate", {"count": 5, "seed": 3, "samples": 1}).json()
    assert len(reply["results"]) == 5
    assert reply["results"][0].keys() == {"mean", "samples"}
    service.post("digits/generate", {"count": 2, "seed": 3})
    five, two = (job.seeds.tolist() for job in service.scheduler.jobs)
    assert len(set(five)) == 5
    assert five[0] == 3
    assert five[:2] == two


def test_generate_walks_between_two_posteriors(service):
    ends = [{"step": 0, "levels": [{"mu": [value] * 4, "log_sigma": [0] * 4}]} for value in (0, 1)]
    assert len(service.post("digits/generate", {"between": ends, "count": 3}).json()["results"]) == 3
    assert service.scheduler.jobs[0].z["z"][:, 0].tolist() == [0.0, 0.5, 1.0]


def parse_events(text: str) -> list[tuple[str, dict]]:
    frames = [frame.split("\n") for frame in text.strip().split("\n\n")]
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in frames]


def test_events_tell_the_best_so_far_and_end_with_the_reply(service):
    reply = encode(service, {"steps": 2}, headers={"Accept": "text/event-stream"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = parse_events(reply.text)
    assert [kind for kind, _ in events] == ["step", "step", "step", "done"]
    step = events[1][1]
    assert {name: step[name] for name in ("row", "step", "elbo", "best_step", "best_elbo")} == {
        "row": 0,
        "step": 1,
        "elbo": -99.0,
        "best_step": 1,
        "best_elbo": -99.0,
    }
    assert step["posterior"]["step"] == 1
    assert events[-1][1]["results"][0]["steps_used"] == 2


def test_a_refusal_before_the_first_event_is_an_ordinary_error(service):
    service.scheduler.fault = Overloaded("full", retry_after_s=2.0)
    reply = encode(service, headers={"Accept": "text/event-stream"})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "2"


def scope(path, accept=b"*/*"):
    """A POST as uvicorn hands it to an application."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": path,
        "raw_path": b"",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"accept", accept)],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
    }


def test_a_client_that_leaves_cancels_its_job(service):
    service.scheduler.hold = asyncio.Event()
    raw = json.dumps({"inputs": [ROW]}).encode()
    messages = [{"type": "http.request", "body": raw, "more_body": False}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    service.run(service.app(scope("/v1/models/digits/encode"), receive, send))
    assert service.scheduler.cancelled == 1
    assert sent[0]["status"] == 499
    assert 'elbow_rows_in_flight{model="digits",version="2"} 0.0' in service.get("/metrics").text


def test_a_reader_of_events_that_leaves_cancels_its_job(service):
    left = asyncio.Event()
    cancelled = []

    async def submit(job):
        job.on_step(StepEvent(0, 0, -1.0, 0, -1.0, {name: np.zeros(4, np.float32) for name in ("q.mu", "q.log_sigma")}, np.zeros(1)))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(job)
            raise

    service.scheduler.submit = submit
    raw = json.dumps({"inputs": [ROW]}).encode()
    messages = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message.get("body"):
            left.set()

    service.run(service.app(scope("/v1/models/digits/encode", accept=b"text/event-stream"), receive, send))
    assert len(cancelled) == 1


def test_a_large_body_is_parsed_in_a_worker_and_answered_the_same(service):
    row = np.random.default_rng(0).random(784).tolist()
    reply = encode(service, {"inputs": [row] * 20})
    assert reply.status_code == 200
    assert int(httpx.Request("POST", "http://test", json={"inputs": [row] * 20}).headers["content-length"]) > 256 * 1024
    assert len(reply.json()["results"]) == 20
