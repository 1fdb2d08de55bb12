"""A version swapped, and a server ended, under load: no request lost, nothing answered but 200 and the announced 503."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from service.keys import digest_of
from tests.service.operations.conftest import add_version
from tests.service.streams.conftest import FRAME, ServerProcess, sound
from tests.service.streams.test_server import CLOSE, PATH, of, rest_of, results, talk

CLIENTS = 8
BODY = {"inputs": [[0.5] * 20] * 2, "steps": 6, "return": ["elbo"]}


class Load:
    """Clients in closed loop until told to stop; a request that is not answered, or oddly, is an error."""

    def __init__(self, url: str):
        self.url, self.seen, self.stopped = url, Counter[tuple[int, str]](), asyncio.Event()
        self.refused_to_connect = 0

    async def client(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=30) as http:
            while not self.stopped.is_set():
                try:
                    reply = await http.post("/v1/models/iterative/encode", json=BODY)
                except httpx.ConnectError:  # there was no server to take it: nothing was lost
                    self.refused_to_connect += 1
                    return
                if reply.status_code == 503:
                    assert int(reply.headers["retry-after"]) >= 1
                    assert reply.headers["connection"] == "close"
                    assert reply.json()["code"] == "shutting_down"
                    await asyncio.sleep(0.02)
                self.seen[reply.status_code, reply.json().get("version", "")] += 1

    async def run(self, meanwhile: Any) -> None:
        clients = [asyncio.create_task(self.client()) for _ in range(CLIENTS)]
        try:
            await meanwhile
        finally:
            self.stopped.set()
        await asyncio.gather(*clients)


async def heard_until(socket: ClientConnection, frames: int) -> list[Any]:
    heard: list[Any] = []
    while len(results(heard)) < frames:
        heard.append(json.loads(await socket.recv()))
    return heard


def test_a_new_version_takes_over_under_load_and_streams_finish_on_the_old(start: Callable[..., ServerProcess], folder: Path) -> None:
    server = start(ELBOW_WATCH_S="0.2", ELBOW_TOKEN_TTL_S="4", ELBOW_DRAIN_S="0.5", ELBOW_LOG_LEVEL="error")
    pcm = sound(3, 40 * FRAME)
    expected = results(talk(server, [pcm.tobytes(), CLOSE])[0])
    load = Load(server.url)

    async def swap() -> tuple[list[Any], str]:
        async with connect(f"ws://127.0.0.1:{server.port}{PATH}?seed=1") as socket:
            await socket.send(pcm[: 10 * FRAME].tobytes())
            heard = await heard_until(socket, 10)
            await socket.send(json.dumps({"type": "snapshot"}))
            heard.append(json.loads(await socket.recv()))
            token = str(heard[-1]["state"])
            broken = add_version(folder, "iterative", "3")
            (broken / "weights.safetensors").write_bytes(b"no weights")
            add_version(folder, "iterative", "2")
            add_version(folder, "tiny-speech", "2")
            await until(lambda: load.seen[200, "2"] > 50)
            await asyncio.sleep(0.5)
            await socket.send(pcm[10 * FRAME :].tobytes())
            await socket.send(json.dumps(CLOSE))
            return heard + await rest_of(socket), token

    outcome: list[Any] = []

    async def meanwhile() -> None:
        outcome.extend(await swap())
        async with connect(f"ws://127.0.0.1:{server.port}{PATH}?state={outcome[1]}") as resumed:  # the default is 2 by now
            await resumed.send(pcm[10 * FRAME :].tobytes())
            await resumed.send(json.dumps(CLOSE))
            outcome.append(await rest_of(resumed))
        async with httpx.AsyncClient(base_url=server.url) as http:
            assert (await http.post("/v1/models/iterative/versions/1/encode", json=BODY)).status_code == 200
            ready = (await http.get("/readyz")).json()
            assert ready["failed"].keys() == {"iterative/3"}
            assert "weights.safetensors" in ready["failed"]["iterative/3"]

    asyncio.run(asyncio.wait_for(load.run(meanwhile()), 90))
    heard, _, resumed = outcome
    assert {status for status, _ in load.seen} == {200}
    assert {version for _, version in load.seen} == {"1", "2"}
    assert of(heard, "opened")[0]["version"] == of(resumed, "opened")[0]["version"] == "1"
    np.testing.assert_allclose([r["elbo"] for r in results(heard)], [r["elbo"] for r in expected], atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose([r["elbo"] for r in results(resumed)], [r["elbo"] for r in expected[10:]], atol=1e-5, rtol=1e-6)
    wait_until(lambda: httpx.get(server.url + "/readyz").json()["models"] == ["iterative/2", "tiny-speech/2"])
    assert httpx.post(server.url + "/v1/models/iterative/versions/1/encode", json=BODY).status_code == 404
    metrics = httpx.get(server.url + "/metrics").text
    assert 'elbow_model_loads_total{outcome="unloaded"} 2.0' in metrics
    assert "elbow_artifacts_refused 1.0" in metrics


def test_at_sigterm_under_load_every_request_is_answered(start: Callable[..., ServerProcess]) -> None:
    server = start(ELBOW_DRAIN_DELAY_S="1", ELBOW_DRAIN_S="5")
    load = Load(server.url)
    seen: dict[str, Any] = {}

    async def meanwhile() -> None:
        async with connect(f"ws://127.0.0.1:{server.port}{PATH}?seed=1") as socket, httpx.AsyncClient(base_url=server.url) as http:
            await socket.send(sound(1, 5 * FRAME).tobytes())
            await heard_until(socket, 5)
            await until(lambda: load.seen[200, "1"] > 50)
            server.process.terminate()
            seen["told"] = time.monotonic()
            await asyncio.sleep(0.4)
            seen["ready"] = (await http.get("/readyz")).status_code
            seen["still"] = (await http.post("/v1/models/iterative/encode", json=BODY)).status_code
            seen["stream"] = (await rest_of(socket))[-1]
            seen["close"] = socket.close_code
            await until(lambda: server.process.poll() is not None)
            seen["ended"] = time.monotonic()

    asyncio.run(asyncio.wait_for(load.run(meanwhile()), 60))
    assert (seen["ready"], seen["still"]) == (503, 200)
    assert (seen["stream"]["type"], seen["stream"]["frame"], seen["close"]) == ("draining", 5, 1012)
    assert {status for status, _ in load.seen} <= {200, 503}
    assert load.seen[200, "1"] > 50
    assert seen["ended"] - seen["told"] < 1 + 5 + 4


def test_admin_routes_load_and_unload_for_the_admin_key_alone(start: Callable[..., ServerProcess], folder: Path) -> None:
    ours, root = {"X-API-Key": "ours"}, {"Authorization": "Bearer root"}
    server = start(ELBOW_KEYS=f"ours {digest_of('ours')}", ELBOW_ADMIN_KEY_SHA256=digest_of("root"), ELBOW_LOG_LEVEL="error")
    with httpx.Client(base_url=server.url) as http:
        for method, path in (("GET", "/admin/repository"), ("POST", "/admin/repository/reload"), ("POST", "/v2/repository/index")):
            assert http.request(method, path).status_code == 401
            assert http.request(method, path, headers=ours).status_code == 403
        add_version(folder, "iterative", "2")
        models = http.post("/admin/repository/reload", headers=root).json()["models"]
        states = {f"{row['name']}/{row['version']}": (row["state"], row["reason"][:10]) for row in models}
        assert states == {"iterative/1": ("READY", "superseded"), "iterative/2": ("READY", ""), "tiny-speech/1": ("READY", "")}
        assert http.post("/v1/models/iterative/encode", json=BODY, headers=ours).json()["version"] == "2"
        unloaded = http.post("/admin/repository/unload", json={"name": "iterative", "version": "2"}, headers=root)
        assert unloaded.json() == {"unloaded": ["iterative/2"]}
        assert http.post("/v1/models/iterative/encode", json=BODY, headers=ours).json()["version"] == "1"
        assert http.post("/v2/repository/models/iterative/load", headers=root).json() == {}
        assert http.post("/v1/models/iterative/encode", json=BODY, headers=ours).json()["version"] == "2"
        for name in ("nothing", "../iterative", "iterative/1"):
            refused = http.post("/admin/repository/load", json={"name": name}, headers=root)
            assert refused.status_code == 404
        (folder / "iterative" / "2" / "artifact.json").write_text("{")
        assert http.post("/admin/repository/load", json={"name": "iterative"}, headers=root).status_code == 422
        assert http.post("/v1/models/iterative/encode", json=BODY, headers=ours).json()["version"] == "2"


def test_without_an_admin_key_there_are_no_admin_routes(start: Callable[..., ServerProcess]) -> None:
    server = start()
    assert httpx.get(server.url + "/admin/repository").status_code == 404
    assert httpx.post(server.url + "/v2/repository/index").status_code == 404


async def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.02)


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    asyncio.run(until(true, seconds))
