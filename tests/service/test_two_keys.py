"""Two keys on one live server: neither sees the other's data, streams, sequences or tokens, nor pays for the other."""

from __future__ import annotations

import asyncio
import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from service import bulk
from service.browser_tokens import BrowserTokens
from service.client import ElbowClient, ElbowHTTPError
from service.keys import digest_of
from service.stream_cli import KEY_VARIABLE
from tests.service.streams.conftest import ServerProcess, free_port
from tests.service.streams.test_server import CLOSE, of, rest_of, results

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
FILTER, ENCODE, INFER = "/v1/models/jsb-filter/filter", "/v1/models/closed-form/encode", "/v2/models/jsb-filter/infer"
ALICE, BOB, POOR = {"X-API-Key": "alices-key"}, {"Authorization": "Bearer bobs-key"}, {"X-API-Key": "poors-key"}
SECRET = "secret of two keys"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("two-keys")
    shutil.copytree(CHECKPOINTS / "jsb-filter" / "1", repository / "jsb-filter" / "1")
    keys = f"alice {digest_of('alices-key')}; bob {digest_of('bobs-key')}; poor {digest_of('poors-key')} 0.001/8"
    process = ServerProcess(repository, free_port(), ELBOW_KEYS=keys, ELBOW_TOKEN_SECRET=SECRET, ELBOW_CLOSED_FORM="1", ELBOW_ENGINE="onnx")
    yield process
    process.stop()


def frames(owner: str, count: int = 6) -> list[list[float]]:
    """Chords that tell whose they are."""
    generator = np.random.default_rng({"alice": 1, "bob": 2, "poor": 3}[owner])
    return (generator.random((count, 88)) < 0.05).astype(float).tolist()


def filtered(server: ServerProcess, headers: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx.post(server.url + FILTER, json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def elbos(found: list[dict[str, Any]]) -> list[float]:
    return [result["elbo"] for result in found]


def talk(server: ServerProcess, messages: list[dict[str, Any]], query: str = "seed=1", **options: Any) -> tuple[list[Any], int | None]:
    """Everything that is heard until the stream ends, and the close code."""

    async def run() -> tuple[list[Any], int | None]:
        async with connect(f"ws://127.0.0.1:{server.port}{FILTER}?{query}", **options) as socket:
            for message in messages:
                await socket.send(json.dumps(message))
            return await rest_of(socket), socket.close_code

    return asyncio.run(asyncio.wait_for(run(), 60))


def refused(server: ServerProcess, query: str = "seed=1", **options: Any) -> int:
    """The status with which the handshake is refused."""

    async def run() -> int:
        with pytest.raises(InvalidStatus) as caught:
            async with connect(f"ws://127.0.0.1:{server.port}{FILTER}?{query}", **options):
                pass
        return int(caught.value.response.status_code)

    return asyncio.run(asyncio.wait_for(run(), 60))


def token_of(server: ServerProcess, headers: dict[str, str]) -> str:
    reply = httpx.post(f"{server.url}/v1/token", headers=headers)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["token"])


def test_a_state_is_taken_from_its_own_key_and_no_other_on_every_way_in(server: ServerProcess) -> None:
    state = filtered(server, ALICE, {"frames": frames("alice", 2)})["state"]
    assert filtered(server, ALICE, {"frames": frames("alice", 1), "state": state})["frame"] == 3
    reply = httpx.post(server.url + FILTER, json={"frames": frames("bob", 1), "state": state}, headers=BOB)
    assert (reply.status_code, reply.json()["code"]) == (422, "token_refused")
    tensor = {"name": "x", "shape": [1, 88], "datatype": "FP32", "data": frames("bob", 1)[0]}
    for headers, status in ((BOB, 400), (ALICE, 200)):
        body = {"inputs": [tensor], "parameters": {"state": state}}
        assert httpx.post(server.url + INFER, json=body, headers=headers, timeout=60).status_code == status
    heard, code = talk(server, [], f"state={state}", additional_headers=BOB)
    assert (heard[-1]["code"], code) == ("token_refused", 1008)
    heard, code = talk(server, [CLOSE], f"state={state}", additional_headers=ALICE)
    assert (heard[0]["type"], heard[0]["frame"], code) == ("opened", 2, 1000)


def test_the_token_of_a_live_stream_is_its_keys_too(server: ServerProcess) -> None:
    heard, _ = talk(server, [{"type": "frames", "frames": frames("alice", 3)}, {"type": "snapshot"}, CLOSE], additional_headers=ALICE)
    for state in (of(heard, "state")[0]["state"], of(heard, "closed")[0]["state"]):
        reply = httpx.post(server.url + FILTER, json={"frames": frames("bob", 1), "state": state}, headers=BOB)
        assert "another API key" in reply.json()["detail"]
        assert filtered(server, ALICE, {"frames": frames("alice", 1), "state": state})["frame"] == 4


def test_streams_side_by_side_hear_what_each_would_hear_alone(server: ServerProcess) -> None:
    expected = {
        name: elbos(filtered(server, key, {"frames": frames(name), "seed": 1})["results"]) for name, key in (("alice", ALICE), ("bob", BOB))
    }

    async def next_result(socket: ClientConnection) -> dict[str, Any]:
        heard = json.loads(await socket.recv())
        return dict(heard["results"][0])

    async def side_by_side() -> dict[str, list[float]]:
        uri = f"ws://127.0.0.1:{server.port}{FILTER}?seed=1"
        heard: dict[str, list[float]] = {"alice": [], "bob": []}
        async with connect(uri, additional_headers=ALICE) as alice, connect(uri, additional_headers=BOB) as bob:
            sockets = {"alice": alice, "bob": bob}
            for socket in sockets.values():
                assert json.loads(await socket.recv())["type"] == "opened"
            for i in range(6):
                for name, socket in sockets.items():
                    await socket.send(json.dumps({"type": "frames", "frames": frames(name)[i : i + 1]}))
                for name, socket in sockets.items():
                    result = await next_result(socket)
                    assert result["frame"] == i
                    heard[name].append(result["elbo"])
        return heard

    heard = asyncio.run(asyncio.wait_for(side_by_side(), 60))
    assert heard["alice"] != pytest.approx(heard["bob"], abs=0.1)
    for name, values in heard.items():
        assert values == pytest.approx(expected[name], abs=1e-4)


def test_one_sequence_id_under_two_keys_is_two_sequences(server: ServerProcess) -> None:
    def ask(headers: dict[str, str], owner: str, index: int, status: int = 200, **parameters: Any) -> dict[str, Any]:
        tensor = {"name": "x", "shape": [1, 88], "datatype": "FP32", "data": frames(owner)[index]}
        body = {"inputs": [tensor], "parameters": {"sequence_id": 77, **parameters}}
        reply = httpx.post(server.url + INFER, json=body, headers=headers, timeout=60)
        assert reply.status_code == status, reply.text
        return dict(reply.json())

    def elbo(reply: dict[str, Any]) -> float:
        return float(next(tensor["data"][0] for tensor in reply["outputs"] if tensor["name"] == "elbo"))

    expected = {name: elbos(filtered(server, key, {"frames": frames(name)})["results"]) for name, key in (("alice", ALICE), ("bob", BOB))}
    alices, bobs = [], []
    alices.append(ask(ALICE, "alice", 0, sequence_start=True))
    assert "not live here" in ask(BOB, "bob", 0, status=400)["error"]
    bobs.append(ask(BOB, "bob", 0, sequence_start=True))
    for i in (1, 2):
        alices.append(ask(ALICE, "alice", i))
        bobs.append(ask(BOB, "bob", i))
    alices.append(ask(ALICE, "alice", 3, sequence_end=True))
    bobs.append(ask(BOB, "bob", 3))  # that hers has ended is nothing to his
    bobs.append(ask(BOB, "bob", 4, sequence_end=True))
    for name, replies in (("alice", alices), ("bob", bobs)):
        assert [reply["parameters"]["frame"] for reply in replies] == list(range(1, len(replies) + 1))
        assert [elbo(reply) for reply in replies] == pytest.approx(expected[name][: len(replies)], abs=1e-4)


def test_the_clients_send_the_key_they_are_given(server: ServerProcess) -> None:
    with ElbowClient(server.url, api_key="alices-key") as client:
        assert client.models()
    with ElbowClient(server.url, api_key="nobodys-key", retries=0) as client, pytest.raises(ElbowHTTPError, match="401"):
        client.models()


def test_both_commands_take_the_key_from_the_environment(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((3, 8), np.float32))
    encode = ["encode", str(tmp_path / "rows.npy"), "--out", str(tmp_path / "out.npz"), "--model", "closed-form", "--url", server.url]
    with wave.open(str(tmp_path / "some.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    stream = ["stream", str(tmp_path / "some.wav"), "--url", server.url, "--model", "jsb-filter"]

    assert bulk.main(encode) == 1
    assert "an API key is needed" in capsys.readouterr().err
    assert bulk.main(stream) == 1
    assert "an API key is needed" in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, "bobs-key")
    assert bulk.main(encode) == 0
    assert bulk.main(stream) == 1
    assert "API key" not in capsys.readouterr().err  # the filter of chords takes no sound, and says so


def test_events_are_those_of_ones_own_rows(server: ServerProcess) -> None:
    rows = {"alice": [[0.25] * 8], "bob": [[-0.75] * 8, [0.5] * 8]}
    keys = {"alice": ALICE, "bob": BOB}

    async def events(http: httpx.AsyncClient, name: str) -> list[dict[str, Any]]:
        body = {"inputs": rows[name], "steps": 40, "seed": 5}
        reply = await http.post(ENCODE, json=body, headers=keys[name] | {"Accept": "text/event-stream"})
        blocks = [block for block in reply.text.split("\n\n") if block]
        return [json.loads(block.partition("data: ")[2]) for block in blocks]

    def by_step(heard: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
        return {(event["row"], event["step"]): event["elbo"] for event in heard[:-1]}

    async def together() -> list[list[dict[str, Any]]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            alone = [await events(http, name) for name in rows]
            shared = await asyncio.gather(*(events(http, name) for name in [*rows] * 4))
        for i, heard in enumerate(shared):
            assert by_step(heard) == pytest.approx(by_step(alone[i % 2]), abs=1e-4)
        return alone

    for name, heard in zip(rows, asyncio.run(together()), strict=True):
        assert {event["row"] for event in heard[:-1]} == set(range(len(rows[name])))
        assert len(heard) == 41 * len(rows[name]) + 1
        assert len(heard[-1]["results"]) == len(rows[name])


def test_a_spent_quota_ends_its_owners_calls_and_streams_and_nobody_elses(server: ServerProcess) -> None:
    async def run() -> tuple[list[Any], int | None, list[Any]]:
        uri = f"ws://127.0.0.1:{server.port}{FILTER}?seed=1"
        async with connect(uri, additional_headers=POOR) as poor, connect(uri, additional_headers=ALICE) as alice:
            for _ in range(6):
                await poor.send(json.dumps({"type": "frames", "frames": frames("poor", 4)}))
            heard = await rest_of(poor)
            await alice.send(json.dumps({"type": "frames", "frames": frames("alice", 4)}))
            await alice.send(json.dumps(CLOSE))
            return heard, poor.close_code, await rest_of(alice)

    heard, code, alices = asyncio.run(asyncio.wait_for(run(), 60))
    assert (heard[-1]["code"], code) == ("quota_exceeded", 1013)
    assert len(results(alices)) == 4
    assert alices[-1]["type"] == "closed"
    assert refused(server, additional_headers=POOR) == 429
    row = {"inputs": [[0.0] * 8], "steps": 1}
    assert httpx.post(server.url + ENCODE, json=row, headers=POOR).status_code == 429
    assert httpx.post(server.url + ENCODE, json=row, headers=BOB).status_code == 200


@pytest.mark.parametrize("way", ["query", "subprotocol"])
def test_a_browser_token_acts_as_its_key_alone(server: ServerProcess, way: str) -> None:
    def with_token(token: str, query: str) -> dict[str, Any]:
        if way == "query":
            return {"query": f"{query}&token={token}"}
        return {"query": query, "subprotocols": [Subprotocol("elbow"), Subprotocol(f"elbow-token.{token}")]}

    state = filtered(server, ALICE, {"frames": frames("alice", 2)})["state"]
    counted = 'elbow_key_requests_total{key="alice"}'
    before = httpx.get(f"{server.url}/metrics").text
    heard, code = talk(server, [CLOSE], **with_token(token_of(server, ALICE), f"state={state}"))
    assert (heard[0]["type"], heard[0]["frame"], code) == ("opened", 2, 1000)
    assert "token=" not in json.dumps(heard)
    after = httpx.get(f"{server.url}/metrics").text
    assert _value(after, counted) == _value(before, counted) + 2  # the token and the stream
    heard, code = talk(server, [], **with_token(token_of(server, BOB), f"state={state}"))
    assert (heard[-1]["code"], code) == ("token_refused", 1008)


def test_an_accepted_subprotocol_is_never_the_token(server: ServerProcess) -> None:
    async def run() -> str | None:
        offered = [Subprotocol("elbow"), Subprotocol(f"elbow-token.{token_of(server, ALICE)}")]
        async with connect(f"ws://127.0.0.1:{server.port}{FILTER}?seed=1", subprotocols=offered) as socket:
            return socket.subprotocol

    assert asyncio.run(asyncio.wait_for(run(), 60)) == "elbow"


def test_a_browser_token_that_is_old_altered_or_nobodys_opens_nothing(server: ServerProcess) -> None:
    fresh = token_of(server, ALICE)
    others = {
        "expired": BrowserTokens(SECRET.encode(), ttl_s=-5.0).issue("alice"),
        "of another server": BrowserTokens(b"another secret", ttl_s=60.0).issue("alice"),
        "of a key that is no more": BrowserTokens(SECRET.encode(), ttl_s=60.0).issue("carol"),
        "altered": fresh.replace(fresh.split(".")[1], BrowserTokens(SECRET.encode(), 60.0).issue("bob").split(".")[1]),
        "a state token": filtered(server, ALICE, {"frames": frames("alice", 1)})["state"],
    }
    for what, token in others.items():
        assert refused(server, f"seed=1&token={token}") == 401, what
    for headers in ({"X-API-Key": fresh}, {"Authorization": f"Bearer {fresh}"}):  # it opens sockets, nothing else
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/v1/models?token={fresh}").status_code == 401


def test_a_page_of_another_origin_opens_nothing_even_with_a_token(server: ServerProcess) -> None:
    query = f"seed=1&token={token_of(server, ALICE)}"
    assert refused(server, query, origin=Origin("https://evil.example")) == 403
    assert refused(server, query, origin=Origin(f"http://127.0.0.1:{server.port + 1}")) == 403
    heard, code = talk(server, [CLOSE], query, origin=Origin(f"http://127.0.0.1:{server.port}"))
    assert (heard[-1]["type"], code) == ("closed", 1000)


def _value(metrics: str, name: str) -> float:
    return float(next(line.rsplit(" ", 1)[1] for line in metrics.splitlines() if line.startswith(name)))
