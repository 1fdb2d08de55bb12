"""Elbow on a real local Ray: two replicas of the shipped models, encode, and a stream that outlives every replica it meets.

Needs the extra `ray` (500 MB) and about 30 s: `pytest -m ray tests/deploy/test_ray.py`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from service.stream_client import FilterStream, Frame, read_sound

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]
ray = pytest.importorskip("ray", reason="needs the extra `ray`")

ROOT = Path(__file__).resolve().parents[2]
DIGITS = np.load(ROOT / "tests/data/mnist_sample.npz")["valid"][:3] / 255
SPEECH = np.concatenate([read_sound(file)[1] for file in sorted((ROOT / "tests/data/digits").glob("*.wav"))])
RATE, CHUNK = 8000, 800
REPLICAS = 2


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of a Ray Serve with two replicas."""
    from ray import serve

    from service.ray_app import Options, build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("ELBOW_REPOSITORY", str(ROOT / "checkpoints"))
        patch.setenv("ELBOW_TOKEN_SECRET", "secret of the tests")
        patch.setenv("ELBOW_LOG_LEVEL", "error")
        ray.init(num_cpus=REPLICAS, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build(Options(replicas=REPLICAS)), name="elbow")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def test_the_application_needs_a_secret_that_its_replicas_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.ray_app import Options, build

    monkeypatch.setenv("ELBOW_REPOSITORY", str(ROOT / "checkpoints"))
    monkeypatch.delenv("ELBOW_TOKEN_SECRET", raising=False)
    with pytest.raises(ValueError, match="set ELBOW_TOKEN_SECRET"):
        build(Options(replicas=2))


def test_every_replica_is_ready_with_every_model(url: str) -> None:
    assert len(replicas()) == REPLICAS
    assert set(httpx.get(f"{url}/readyz").json()["models"]) >= {"mnist-iterative/1", "speech-filter/1"}


def test_all_replicas_give_the_same_answer_to_the_same_request(url: str) -> None:
    body = {"inputs": DIGITS.reshape(len(DIGITS), -1).tolist(), "steps": 8, "seed": 5, "return": ["elbo"]}
    answers = [httpx.post(f"{url}/v1/models/mnist-iterative/encode", json=body, timeout=30).raise_for_status().json() for _ in range(20)]
    elbos = [[row["elbo"] for row in answer["results"]] for answer in answers]
    np.testing.assert_allclose(elbos, [elbos[0]] * len(elbos), rtol=1e-5)
    assert {row["steps_used"] for answer in answers for row in answer["results"]} == {8}


def test_a_stream_outlives_every_replica_it_meets(url: str) -> None:
    """Someone speaks; both replicas are killed in turn, the second when the first has been replaced; no frame is lost or different."""
    spoken: list[NDArray[np.int16]] = []

    async def speak(enough: asyncio.Event) -> AsyncIterator[NDArray[np.int16]]:
        while not enough.is_set():
            spoken.append(np.resize(SPEECH, (len(spoken) + 1) * CHUNK)[-CHUNK:])
            yield spoken[-1]
            await asyncio.sleep(CHUNK / RATE)

    async def killed() -> tuple[list[Frame], FilterStream]:
        enough = asyncio.Event()
        stream, frames, killing = FilterStream(url, "speech-filter", speak(enough), sample_rate=RATE, seed=7, token_every=8), [], None
        async for frame in stream:
            frames.append(frame)
            if killing is None and frame.frame >= 20:
                killing = asyncio.create_task(asyncio.to_thread(kill_each_in_turn, url))
                killing.add_done_callback(lambda _: enough.set())
        assert killing is not None
        await killing
        return frames, stream

    async def unbroken() -> list[Frame]:
        return [frame async for frame in FilterStream(url, "speech-filter", np.concatenate(spoken), sample_rate=RATE, seed=7)]

    before = replicas()
    frames, stream = asyncio.run(asyncio.wait_for(killed(), 180))
    assert not set(before) & set(replicas())
    assert stream.summary is not None
    assert stream.summary.connections >= 2
    expected = asyncio.run(asyncio.wait_for(unbroken(), 60))
    assert [frame.frame for frame in frames] == [frame.frame for frame in expected]
    np.testing.assert_allclose([frame.elbo for frame in frames], [frame.elbo for frame in expected], rtol=1e-4, atol=1e-3)


def kill_each_in_turn(url: str) -> None:
    for name in replicas():
        ray.kill(ray.get_actor(name, namespace="serve"))
        until = time.monotonic() + 60
        while name in replicas() or len(replicas()) < REPLICAS or not all_ready():
            assert time.monotonic() < until, f"{name} was not replaced: {replicas()}"
            time.sleep(0.2)


def all_ready() -> bool:
    from ray import serve

    states = serve.status().applications["elbow"].deployments["elbow"].replica_states
    return states == {"RUNNING": REPLICAS}


def replicas() -> list[str]:
    """Names of the actors that serve."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::elbow#"))
