"""`generate` of a filter: sequences drawn from the model, by the noise of their seeds, from the beginning or on from a state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.artifact import Artifact
from service.client import AsyncElbowClient, Dream, ElbowClient, ElbowHTTPError
from service.engine.onnx import OnnxEngine
from service.noise import Purpose, normals
from service.streams.stream import StreamSpec
from tests.service.streams.conftest import FRAME, ServerProcess
from tests.service.streams.test_lane import Bench, frames

PATH = "/v1/models/tiny-speech/generate"
MODEL = "tiny-speech"


@pytest.fixture
def client(server: ServerProcess) -> Iterator[ElbowClient]:
    with ElbowClient(server.url, model=MODEL) as client:
        yield client


def test_sequences_repeat_by_seed_and_each_has_noise_of_its_own(client: ElbowClient) -> None:
    first, second = client.dream(5, count=3, seed=7), client.dream(5, count=3, seed=7)
    assert [dream.frames.shape for dream in first] == [(5, FRAME)] * 3
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert not np.array_equal(a.frames, a.mean)
    assert not np.allclose(first[0].frames, first[1].frames)
    assert not np.allclose(first[0].frames, client.dream(5, seed=8)[0].frames)
    alone = client.dream(5, seed=7)[0]
    np.testing.assert_allclose(alone.frames, first[0].frames, atol=1e-5)  # beside others or not


def test_what_goes_on_from_a_state_is_what_would_have_come(client: ElbowClient) -> None:
    whole = client.dream(9, seed=3)[0]
    begin = client.dream(4, seed=3)[0]
    for seed in (3, None):
        rest = client.dream(5, seed=seed, state=begin.state)[0]
        assert rest.frame == 4
        np.testing.assert_allclose(np.concatenate([begin.frames, rest.frames]), whole.frames, atol=1e-5)


def test_one_of_several_goes_on_alone(client: ElbowClient) -> None:
    whole, begin = client.dream(6, count=2, seed=3)[1], client.dream(4, count=2, seed=3)[1]
    rest = client.dream(2, state=begin.state)[0]
    np.testing.assert_allclose(np.concatenate([begin.frames, rest.frames]), whole.frames, atol=1e-5)


def test_a_filtered_sequence_may_be_dreamt_on_and_a_dream_filtered(server: ServerProcess, client: ElbowClient) -> None:
    heard = httpx.post(f"{server.url}/v1/models/{MODEL}/filter", json={"frames": frames(1, 6).tolist(), "seed": 1}).json()
    dreamt = client.dream(3, count=2, state=heard["state"])
    assert [dream.frame for dream in dreamt] == [6, 6]
    after = httpx.post(f"{server.url}/v1/models/{MODEL}/filter", json={"frames": frames(2, 2).tolist(), "state": dreamt[0].state}).json()
    assert [result["frame"] for result in after["results"]] == [9, 10]
    fresh = client.dream(3, count=2)
    assert not np.allclose(fresh[0].frames, dreamt[0].frames), "the past matters"


def test_a_dream_is_the_models_own_simulation(repository: Path, artifact: Artifact) -> None:
    """z from the prediction, x from p(x|z), and the state moved on with the two: by the trained model itself, from the same noise."""
    torch = pytest.importorskip("torch")
    from models.filtering import predict
    from training.checkpoint import load_filter

    model = load_filter(repository / MODEL / "1")[0].generative
    bench = Bench(OnnxEngine(artifact))
    portion = bench.feed(bench.open(StreamSpec(steps=0, seed=11, dreams=True)), np.zeros((6, FRAME), np.float32))
    bench.run()
    assert portion.error is None
    state, latent = model.begin(), model.latent_sizes[0]
    for t, shown in enumerate(portion.shown):
        draw = normals(np.array([11], np.uint64), 0, purpose=Purpose.PRIOR, samples=(0, 1), size=latent, frame=np.array([t]))
        pixel = normals(np.array([11], np.uint64), 0, purpose=Purpose.SAMPLE_X, samples=(0, 1), size=FRAME, frame=np.array([t]))
        with torch.no_grad():
            frame = predict(model, state)
            prior = frame.prediction.prior
            z = prior.rsample(torch.from_numpy(draw.reshape(1, 1, latent)))
            likelihood = frame((z,))
            x = likelihood.sample(torch.from_numpy(pixel.reshape(1, 1, FRAME)))[:, 0]
            state = frame.transition(x, torch.ones_like(x), (prior,), (z,))
        np.testing.assert_allclose(shown["x"], x[0].numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(shown["mean"], likelihood.mean[0, 0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"count": 0}, "count"),
        ({"frames": 0}, "frames"),
        ({"frames": True}, "frames"),
        ({"count": 101, "frames": 100}, "frames: must be at most"),
        ({"seed": -1}, "seed"),
        ({"between": []}, "between: is not a field of this call, which takes count, frames, seed, state"),
    ],
)
def test_what_does_not_fit_is_named(server: ServerProcess, body: dict[str, object], said: str) -> None:
    reply = httpx.post(server.url + PATH, json=body)
    assert reply.status_code == 422
    assert said in reply.json()["detail"]


def test_a_foreign_state_is_refused(client: ElbowClient) -> None:
    with pytest.raises(ElbowHTTPError) as refused:
        client.dream(1, state="nonsense")
    assert refused.value.status in (400, 401, 403, 422)


def test_more_sequences_than_streams_are_refused_and_leave_nothing_open(start_server: Callable[..., ServerProcess]) -> None:
    few = start_server(ELBOW_MAX_STREAMS="4")
    for _ in range(3):
        refused = httpx.post(few.url + PATH, json={"count": 5, "frames": 1})
        assert refused.status_code == 422
        assert "count: must be at most 4" in refused.json()["detail"]
        assert httpx.post(few.url + PATH, json={"count": 4, "frames": 1}).status_code == 200


def test_the_asynchronous_client_dreams_too(server: ServerProcess) -> None:
    async def dreamt() -> list[Dream]:
        async with AsyncElbowClient(server.url, model=MODEL) as client:
            return await client.dream(2)

    assert asyncio.run(dreamt())[0].frames.shape == (2, FRAME)
