"""The whole service in process: the closed-form engine behind the real scheduler, and what starts without heavy libraries."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.building import build_engine
from service.client import AsyncElbowClient, ElbowHTTPError
from service.engine.closed_form import ClosedFormEngine
from service.settings import Settings
from tests.int8 import needs_exact_int8

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
ENGINE = ClosedFormEngine()
ROWS = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)


@contextmanager
def running(settings, model):
    """(client, run) of a running application; `run` waits for a call of the client."""
    app = create_app(settings.model_copy(update={"engine_process": "off"}))  # tests/service/apart has the other way
    with asyncio.Runner() as runner:

        def run(awaitable):
            async def waited():
                return await awaitable

            return runner.run(waited())

        lifespan = app.router.lifespan_context(app)
        run(lifespan.__aenter__())
        client = AsyncElbowClient("http://test", model=model, transport=httpx.ASGITransport(app))
        yield client, run
        run(client.close())
        run(lifespan.__aexit__(None, None, None))


@pytest.fixture
def elbow(tmp_path):
    with running(Settings(closed_form=True, repository=tmp_path, drain_s=1.0), "closed-form") as client_and_run:
        yield client_and_run


def equal(a, b):
    return np.array_equal(a.mu, b.mu) and np.array_equal(a.log_sigma, b.log_sigma)


def test_the_elbo_rises_to_log_px_with_the_steps(elbow):
    client, run = elbow
    elbos = [run(client.encode(ROWS, steps=steps, samples=200)).elbo for steps in (0, 1, 4, 32)]
    assert np.all(np.diff([elbo.mean() for elbo in elbos]) > 0)
    exact = ENGINE.log_px(ROWS, np.ones_like(ROWS))
    assert np.allclose(elbos[-1], exact, atol=0.4)  # 200 samples of the log-likelihood, std 0.1


def test_k_steps_and_k_more_by_refine_equal_2k_bit_for_bit(elbow):
    client, run = elbow
    half = run(client.encode(ROWS, steps=4, seed=3))
    both = run(client.refine(ROWS, half.posteriors, steps=4, seed=3))
    whole = run(client.encode(ROWS, steps=8, seed=3))
    assert equal(both, whole)
    assert [posterior.step for posterior in both.posteriors] == [8] * 6
    assert np.array_equal(both.elbo, whole.elbo)


def test_a_row_alone_equals_the_row_in_a_batch(elbow):
    client, run = elbow
    batch = run(client.encode(ROWS, steps=3, samples=4))
    alone = run(client.encode(ROWS[2:3], steps=3, samples=4))
    assert np.allclose(alone.mu[0], batch.mu[2], atol=1e-5)
    assert np.allclose(alone.elbo[0], batch.elbo[2], rtol=1e-5)


def test_the_same_request_twice_gives_the_same_results(elbow):
    client, run = elbow
    everything = ("posterior", "elbo", "trace", "reconstruction", "z")
    first, second = (run(client.encode(ROWS, steps=2, seed=5, returns=everything)) for _ in range(2))
    other = run(client.encode(ROWS, steps=2, seed=6, returns=everything))
    assert equal(first, second)
    assert first.elbo.tolist() == second.elbo.tolist()
    assert not np.array_equal(first.rows[0].z["z0"], other.rows[0].z["z0"])
    assert len(first.rows[0].trace) == 3


def test_score_estimates_log_px_and_places_the_elbo(elbow):
    client, run = elbow
    reply = run(client.score(ROWS, steps=32, samples=500))
    assert np.allclose([row.log_px for row in reply.rows], ENGINE.log_px(ROWS, np.ones_like(ROWS)), atol=1e-3)
    assert all(0 <= row.elbo_quantile <= 1 for row in reply.rows)


def test_reconstruction_from_inputs_equals_that_from_their_posterior(elbow):
    client, run = elbow
    posteriors = run(client.encode(ROWS, steps=3)).posteriors
    direct = run(client.reconstruct(ROWS, steps=3, samples=2))
    later = run(client.reconstruct(posteriors=posteriors, samples=2))
    for one, other in zip(direct.rows, later.rows, strict=True):
        assert np.array_equal(one.mean, other.mean)
        assert one.samples.shape == (2, 8)
    assert np.allclose(direct.rows[0].mean[:4], posteriors[0].levels[0].mu)


def test_generate_draws_differently_for_each_and_repeats_by_seed(elbow):
    client, run = elbow
    first, second = (np.stack([row.mean for row in run(client.generate(4, seed=1)).rows]) for _ in range(2))
    assert np.array_equal(first, second)
    assert len(np.unique(first[:, 0])) == 4
    a, b = run(client.encode(ROWS[:2])).posteriors
    walk = np.stack([row.mean for row in run(client.generate(3, between=(a, b))).rows])
    assert np.allclose(walk[1], (walk[0] + walk[2]) / 2, atol=1e-6)


def test_events_tell_every_step_and_end_with_the_best(elbow):
    client, run = elbow

    async def collect():
        return [event async for event in client.events(ROWS[:1], steps=3)]

    *steps, reply = run(collect())
    assert [event.step for event in steps] == [0, 1, 2, 3]
    assert [event.best_elbo for event in steps] == sorted(event.best_elbo for event in steps)
    assert reply.rows[0].posterior.step == steps[-1].best_step
    assert np.array_equal(reply.mu[0], steps[-1].posterior.levels[0].mu)


def test_a_hidden_entry_does_not_matter(elbow):
    client, run = elbow
    mask = np.ones_like(ROWS)
    mask[:, 1] = 0
    changed = ROWS.copy()
    changed[:, 1] = 9.0
    assert equal(run(client.encode(ROWS, mask=mask, steps=3)), run(client.encode(changed, mask=mask, steps=3)))


def test_a_tolerance_ends_early_and_a_deadline_is_elastic(elbow):
    client, run = elbow
    tolerant = run(client.encode(ROWS, tolerance=0.5))
    assert {row.stop_reason for row in tolerant.rows} == {"converged"}
    assert all(row.steps_used < 64 for row in tolerant.rows)
    hurried = run(client.encode(ROWS, deadline_ms=5_000, steps=2))
    assert {row.steps_used for row in hurried.rows} == {2}


def test_concurrent_requests_are_all_answered_with_their_own_rows(elbow):
    client, run = elbow
    alone = [run(client.encode(ROWS[index : index + 1], steps=3)).mu for index in range(6)]

    async def together():
        return await asyncio.gather(*(client.encode(ROWS[i % 6 : i % 6 + 1], steps=3) for i in range(60)))

    for index, reply in enumerate(run(together())):
        assert np.allclose(reply.mu, alone[index % 6], atol=1e-5)


def test_what_does_not_fit_the_queue_is_refused_with_a_time_to_come_back(tmp_path):
    settings = Settings(closed_form=True, repository=tmp_path, queue_rows=8)
    with running(settings, "closed-form") as (client, run):

        async def burst():
            body = {"inputs": ROWS.tolist() * 50, "steps": 64}
            calls = (client._http.post("/v1/models/closed-form/encode", json=body) for _ in range(40))
            return await asyncio.gather(*calls)

        replies = run(burst())
    refused = [reply for reply in replies if reply.status_code == 503]
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all(int(reply.headers["retry-after"]) >= 1 and reply.json()["code"] == "overloaded" for reply in refused)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(elbow):
    client, run = elbow
    with pytest.raises(ElbowHTTPError, match="504 deadline_exceeded"):
        run(client.encode(ROWS, steps=3, deadline_ms=0.01))


def test_the_schedulers_own_counts_are_among_the_metrics(elbow):
    client, run = elbow
    run(client.encode(ROWS, steps=4))
    text = run(client._http.get("/metrics")).text
    assert 'elbow_scheduler_steps_total{model="closed-form",version="1"} 24.0' in text
    assert 'elbow_scheduler_rows_waiting{model="closed-form",version="1"} 0.0' in text


def test_the_curve_has_times_measured_on_this_machine(elbow):
    client, run = elbow
    curve = run(client.curve())
    assert all(len(times) == len(curve["steps"]) and times[0] > 0 for times in curve["ms"].values())


def test_the_example_of_the_document_is_answered(elbow):
    client, run = elbow
    document = run(client._http.get("/openapi.json")).json()
    call = document["paths"]["/v1/models/closed-form/encode"]["post"]["requestBody"]["content"]["application/json"]
    assert run(client._http.post("/v1/models/closed-form/encode", json=call["example"])).status_code == 200


WITHOUT = """
    import asyncio, json, sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    BLOCKED = set(sys.argv[1].split(","))
    sys.meta_path.insert(0, Blocked())

    import httpx
    from service.app import create_app
    from service.settings import Settings

    async def main():
        app = create_app(Settings(closed_form=True, repository=sys.argv[2], engine_process="off"))
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                answers = {}
                for model in (await client.get("/v1/models")).json()["models"]:
                    body = {"inputs": [[0.5] * model["x"]["shape"][0]], "steps": 3}
                    reply = await client.post(f"/v1/models/{model['name']}/encode", json=body)
                    answers[model["name"]] = [model["engine"], reply.status_code]
                print(json.dumps({"answers": answers, "loaded": sorted(BLOCKED & set(sys.modules))}))

    asyncio.run(main())
"""
NOT_NEEDED = "matplotlib,lightning,onnx,tqdm,PIL"


def served_without(missing, repository):
    script = textwrap.dedent(WITHOUT)
    done = subprocess.run(
        [sys.executable, "-c", script, missing, str(repository)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["loaded"] == []
    return answer["answers"]


def test_without_torch_artifacts_run_on_onnxruntime(tiny_repository):
    answers = served_without("torch," + NOT_NEEDED, tiny_repository)
    assert answers == {"closed-form": ["closed_form", 200], "iterative": ["onnx", 200]}


def test_without_onnxruntime_artifacts_run_on_torch(tiny_repository):
    answers = served_without("onnxruntime," + NOT_NEEDED, tiny_repository)
    assert answers == {"closed-form": ["closed_form", 200], "iterative": ["torchscript", 200]}


def test_without_both_the_closed_form_model_still_answers(tmp_path):
    assert served_without("torch,onnxruntime," + NOT_NEEDED, tmp_path) == {"closed-form": ["closed_form", 200]}


@pytest.mark.parametrize("engine", ["onnx", "torchscript"])
def test_a_recurrent_model_goes_on_bit_for_bit_from_its_carry(tiny_repository, engine):
    rows = np.random.default_rng(0).integers(0, 2, (1, 20)).astype(np.float32)  # one row: the batch is always the same
    with running(Settings(repository=tiny_repository, engine=engine), "iterative") as (client, run):
        half = run(client.encode(rows, steps=3, returns=("posterior", "elbo", "carry")))
        both = run(client.refine(rows, half.posteriors, steps=3))
        whole = run(client.encode(rows, steps=6))
    assert equal(both, whole)


@needs_exact_int8
def test_int8_is_served_where_a_card_offers_it_and_every_reply_says_so(tmp_path):
    for name in ("mnist-iterative", "jsb-filter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1").symlink_to(CHECKPOINTS / name / "1")
    with np.load(CHECKPOINTS.parent / "tests" / "data" / "mnist_sample.npz") as sample:
        x = (sample["valid"][:8].reshape(8, 784) > 127).astype(np.float32)
    answers = {}
    for precision in ("float32", "int8"):
        with running(Settings(repository=tmp_path, engine="onnx", precision=precision), "mnist-iterative") as (client, run):
            reply = answers[precision] = run(client.encode(x, steps=10, samples=200))
            card, other = (run(client.card(name)) for name in ("mnist-iterative", "jsb-filter"))
            alone = run(client.encode(x[:1], steps=10, samples=200))
        assert (reply.precision, card["precision"]) == (precision, precision)
        assert other["precision"] == "float32"
        if precision == "int8":
            assert card["precision_cost_nats"] == card["precisions"]["int8"]["cost_nats"] > 0
            assert "programs" not in card["precisions"]["int8"]
            assert np.array_equal(alone.mu[0], reply.mu[0])
    lost = answers["float32"].elbo - answers["int8"].elbo
    assert 0 < np.abs(lost).max() < 2
    assert lost.mean() < 0.5


def test_without_any_engine_an_artifact_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr("service.building.available_engines", list)
    with pytest.raises(Exception, match="neither onnxruntime nor torch is installed"):
        build_engine(None, "auto", 1)
