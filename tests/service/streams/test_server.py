"""Streams over a real WebSocket to a real server process: the protocol, resuming after a kill, handing over at SIGTERM."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from models.artifact import Artifact
from service.client import ElbowClient
from service.keys import digest_of
from service.stream_client import FilterStream, Frame, StreamError
from tests.service.streams.conftest import FRAME, RATE, ServerProcess, sound, write_wav

TEN_SECONDS = 10 * RATE
PATH = "/v1/models/tiny-speech/filter"


async def rest_of(socket: ClientConnection) -> list[Any]:
    """Everything that still comes, whatever the close code."""
    heard = []
    try:
        while True:
            heard.append(json.loads(await socket.recv()))
    except ConnectionClosed:
        return heard


def talk(server: ServerProcess, messages: list[bytes | dict[str, Any]], query: str = "seed=1", path: str = PATH) -> tuple[list[Any], int]:
    """Everything the server says to these messages, and the close code."""

    async def run() -> tuple[list[Any], int]:
        async with connect(f"ws://127.0.0.1:{server.port}{path}?{query}", compression=None, max_size=None) as socket:

            async def send() -> None:
                try:
                    for message in messages:
                        await socket.send(message if isinstance(message, bytes) else json.dumps(message))
                except ConnectionClosed:
                    pass

            sender = asyncio.create_task(send())
            heard = await rest_of(socket)
            await sender
            assert socket.close_code is not None
            return heard, socket.close_code

    return asyncio.run(asyncio.wait_for(run(), 60))


def results(heard: list[Any]) -> list[dict[str, Any]]:
    return [result for message in heard if message["type"] == "results" for result in message["results"]]


def of(heard: list[Any], kind: str) -> list[Any]:
    return [message for message in heard if message["type"] == kind]


def cut(data: bytes, size: int) -> list[bytes | dict[str, Any]]:
    return [data[i : i + size] for i in range(0, len(data), size)]


CLOSE: dict[str, Any] = {"type": "close"}


def test_results_do_not_depend_on_message_sizes_engine_or_neighbours(
    server: ServerProcess, start_server: Callable[..., ServerProcess]
) -> None:
    data = sound(0, TEN_SECONDS).tobytes()
    whole = results(talk(server, [data, CLOSE])[0])
    assert [result["frame"] for result in whole] == list(range(TEN_SECONDS // FRAME))
    pieces = results(talk(server, [*cut(data, 997), CLOSE])[0])
    other = results(talk(start_server(ELBOW_ENGINE="torchscript"), [data, CLOSE])[0])

    async def together() -> list[list[Frame]]:
        sounds = [sound(0, TEN_SECONDS), *(sound(i, TEN_SECONDS // 2) for i in range(1, 6))]
        streams = [FilterStream(server.url, "tiny-speech", s, sample_rate=RATE, seed=1 + (i > 0) * i) for i, s in enumerate(sounds)]

        async def heard(stream: FilterStream) -> list[Frame]:
            return [frame async for frame in stream]

        return await asyncio.gather(*map(heard, streams))

    neighbours = [dict(frame.raw) for frame in asyncio.run(together())[0]]
    for found in (pieces, other, neighbours):
        a, b = (np.array([result["elbo"] for result in series]) for series in (found, whole))
        assert np.max(np.abs(a - b) / np.maximum(1, np.abs(b))) < 1e-4


def test_every_setting_is_said_back_and_parts_come_as_asked(server: ServerProcess) -> None:
    heard, code = talk(
        server,
        [sound(0, 4 * FRAME).tobytes(), CLOSE],
        "seed=3&steps=1&elastic=true&token_every=2&return=posterior,kl,log_likelihood,reconstruction,prediction&sample_rate=8000",
    )
    opened = heard[0]
    assert {opened[name] for name in ("type", "model", "version", "encoding")} == {"opened", "tiny-speech", "1", "pcm_s16le"}
    assert (opened["steps"], opened["seed"], opened["elastic"], opened["token_every"], opened["frame"]) == (1, 3, True, 2, 0)
    first = results(heard)[0]
    assert first["surprise"] == -first["elbo"]
    assert first["elbo"] == pytest.approx(first["log_likelihood"] - first["kl"], abs=1e-4)
    assert 0 <= first["surprise_quantile"] <= 1
    assert len(first["posterior"]["levels"][0]["mu"]) == 4
    assert len(first["reconstruction"]["mean"]) == len(first["prediction"]["std"]) == FRAME
    assert of(heard, "state")[0]["frame"] == 4
    closed = heard[-1]
    assert (closed["type"], closed["frames"], code) == ("closed", 4, 1000)
    assert closed["nats"] == pytest.approx(sum(result["elbo"] for result in results(heard)), abs=1e-3)


def test_markers_come_back_after_what_was_before_them(server: ServerProcess) -> None:
    data = sound(0, 8 * FRAME).tobytes()
    heard, _ = talk(server, [data, {"type": "marker", "id": "a"}, data, {"type": "keep_alive"}, {"type": "marker", "id": 2}, CLOSE])
    kinds = [(m["type"], m.get("id")) for m in heard[1:]]
    assert kinds == [("results", None), ("marker", "a"), ("results", None), ("marker", 2), ("closed", None)]


def test_gaps_and_flushes_are_frames_without_evidence(server: ServerProcess) -> None:
    data = sound(0, 3 * FRAME + 10).tobytes()
    heard, _ = talk(server, [data, {"type": "gap", "frames": 2}, data, {"type": "flush"}, CLOSE])
    frames = results(heard)
    assert [frame["frame"] for frame in frames] == list(range(10))
    assert [frame["steps_used"] for frame in frames] == [2, 2, 2, 2, 0, 0, 2, 2, 2, 2]


def test_a_stream_goes_on_from_a_token_taken_at_half_a_sample(server: ServerProcess) -> None:
    data = sound(7, 6 * FRAME).tobytes()
    whole = results(talk(server, [data, CLOSE])[0])
    begun = talk(server, [data[:333], {"type": "snapshot"}, CLOSE])[0]
    (token,) = of(begun, "state")
    rest = talk(server, [data[2 * token["samples"] :], CLOSE], f"state={token['state']}")[0]
    both = results(begun)[: token["frame"]] + results(rest)
    assert [frame["elbo"] for frame in both] == pytest.approx([frame["elbo"] for frame in whole], abs=1e-4)


def test_between_two_frames_an_audio_stream_goes_on_by_post(server: ServerProcess) -> None:
    pcm = sound(4, 6 * FRAME)
    whole = results(talk(server, [pcm.tobytes(), CLOSE])[0])
    frames = (pcm / 32768).reshape(6, FRAME).tolist()
    for cut, status in ((4 * FRAME, 200), (4 * FRAME + 1, 422)):
        (token,) = of(talk(server, [pcm[:cut].tobytes(), {"type": "snapshot"}, CLOSE])[0], "state")
        reply = httpx.post(server.url + PATH, json={"frames": frames[4:], "state": token["state"]})
        assert reply.status_code == status
        if status == 200:
            assert [r["elbo"] for r in reply.json()["results"]] == pytest.approx([frame["elbo"] for frame in whole[4:]], abs=1e-4)
        else:
            assert "samples of audio wait in this token" in reply.json()["detail"]


def test_json_frames_and_posts_say_what_audio_says(server: ServerProcess) -> None:
    pcm = sound(4, 6 * FRAME)
    frames = (pcm / 32768).reshape(6, FRAME).tolist()
    streamed = results(talk(server, [pcm.tobytes(), CLOSE])[0])
    as_json = results(talk(server, [{"type": "frames", "frames": frames}, CLOSE], "seed=1&encoding=json")[0])
    first = httpx.post(server.url + PATH, json={"frames": frames[:4], "seed": 1}).json()
    second = httpx.post(server.url + PATH, json={"frames": frames[4:], "state": first["state"]}).json()
    assert (first["frame"], second["frame"]) == (4, 6)
    for found in (as_json, [*first["results"], *second["results"]]):
        assert [r["frame"] for r in found] == [r["frame"] for r in streamed]
        np.testing.assert_allclose([r["elbo"] for r in found], [r["elbo"] for r in streamed], rtol=1e-5, atol=1e-4)


def test_the_python_client_filters_as_the_post_does(server: ServerProcess) -> None:
    frames = (sound(4, 6 * FRAME) / 32768).reshape(6, FRAME)
    mask = np.ones_like(frames)
    mask[2] = 0
    said = httpx.post(server.url + PATH, json={"frames": frames.tolist(), "mask": mask.tolist(), "seed": 1, "return": ["posterior"]}).json()
    with ElbowClient(server.url, model="tiny-speech") as client:
        first = client.filter(frames[:4], mask=mask[:4], seed=1, returns="posterior")
        second = client.filter(frames[4:], mask=mask[4:], state=first.state, returns=["posterior"])
    assert (first.version, first.frame, second.frame, second.seed) == ("1", 4, 6, 1)
    assert [frame.steps_used for frame in first.frames] == [2, 2, 0, 2]
    both = [*first.frames, *second.frames]
    np.testing.assert_allclose([frame.elbo for frame in both], [result["elbo"] for result in said["results"]], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(both[5].mu, said["results"][5]["posterior"]["levels"][0]["mu"], rtol=1e-4, atol=1e-4)


def test_a_stream_that_may_pay_for_one_message_at_a_time_comes_to_its_end(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"bob {digest_of('bobs-key')} 200/30\n")
    poor = start_server(ELBOW_KEYS_FILE=str(tmp_path / "keys"))
    frames, stream = collected(poor.url, sound(4, 160 * FRAME), sample_rate=RATE, seed=1, api_key="bobs-key", retries=3)
    assert [frame.frame for frame in frames] == list(range(160))
    assert stream._connections > 2


def test_a_snapshot_goes_on_elsewhere_and_in_no_other_hands(server: ServerProcess, start_server: Callable[..., ServerProcess]) -> None:
    pcm = sound(5, 20 * FRAME + 7)
    whole = results(talk(server, [pcm.tobytes(), CLOSE])[0])
    heard, _ = talk(server, [pcm[: 8 * FRAME + 5].tobytes(), {"type": "snapshot"}, CLOSE])
    state = of(heard, "state")[0]
    assert (state["frame"], state["samples"]) == (8, 8 * FRAME + 5)
    replica = start_server()
    rest = results(talk(replica, [pcm[state["samples"] :].tobytes(), CLOSE], f"state={state['state']}")[0])
    np.testing.assert_allclose([r["elbo"] for r in rest], [r["elbo"] for r in whole[8:]], atol=1e-5, rtol=1e-6)
    for query, message in (
        (f"state={state['state'][:-9]}aaaaaaaaa", "altered"),
        (f"state={state['state']}&seed=5", "cannot change"),
        (f"state={state['state']}&sample_rate=16000", "cannot change"),
    ):
        heard, code = talk(server, [], query)
        assert message in heard[-1]["error"]
        assert code in (1007, 1008)
    reply = httpx.post(server.url + PATH, json={"frames": [[0.0] * FRAME], "state": state["state"]}, headers={"X-API-Key": "mine"})
    assert reply.status_code == 422
    assert reply.json()["code"] == "token_refused"
    assert "another API key" in reply.json()["detail"]
    heard, code = talk(start_server(ELBOW_TOKEN_TTL_S="0.000001"), [{"type": "snapshot"}, CLOSE])
    expired = of(heard, "state")[0]["state"]
    heard, code = talk(server, [], f"state={expired}")
    assert "expired" in heard[-1]["error"]
    assert (heard[-1]["code"], code) == ("token_refused", 1008)


@pytest.mark.parametrize(
    ("query", "messages", "field", "code"),
    [
        ("foo=1", [], "foo", 1007),
        ("steps=99", [], "steps", 1007),
        ("steps=-1", [], "steps", 1007),
        ("steps=two", [], "steps", 1007),
        ("sample_rate=99", [], "sample_rate", 1007),
        ("encoding=mp3", [], "encoding", 1007),
        ("return=everything", [], "return[0]", 1007),
        ("", [{"type": "hello"}], "type", 1007),
        ("seed=1", [{"type": "shout"}], "type", 1007),
        ("seed=1", [{"type": "marker"}], "id", 1007),
        ("seed=1", [{"type": "marker", "id": 1, "more": 2}], "more", 1007),
        ("seed=1", [{"type": "gap", "frames": 0}], "frames", 1007),
        ("seed=1", [{"type": "frames", "frames": [[0.0] * FRAME]}], None, 1003),
        ("seed=1&encoding=json", [b"abcd"], None, 1003),
        ("seed=1&encoding=json", [{"type": "frames", "frames": [[0.0] * 3]}], "frames[0]", 1007),
        ("seed=1&encoding=json", [{"type": "frames", "frames": [[2.0] * FRAME]}], "frames[0][0]", 1007),
        ("seed=1&encoding=pcm_f32le", [np.array([np.nan], "<f4").tobytes()], "audio", 1007),
    ],
)
def test_bad_input_gets_an_error_that_names_it_before_the_close(
    server: ServerProcess, query: str, messages: list[bytes | dict[str, Any]], field: str | None, code: int
) -> None:
    heard, closed = talk(server, messages, query)
    assert heard[-1]["type"] == "error"
    assert heard[-1].get("field") == field
    assert closed == code


def test_the_wrong_model_is_refused_before_the_handshake(server: ServerProcess) -> None:
    async def run() -> None:
        async for _ in FilterStream(server.url, "nobody", sound(0, 100), sample_rate=RATE):
            raise AssertionError

    with pytest.raises(StreamError, match="no model 'nobody'") as caught:
        asyncio.run(run())
    assert caught.value.code == "unknown_model"


def test_silence_and_large_messages_end_a_stream_with_the_reason(start_server: Callable[..., ServerProcess]) -> None:
    strict = start_server(ELBOW_STREAM_IDLE_S="3.0", ELBOW_MAX_STREAMS="1")
    heard, code = talk(strict, [])
    assert (heard[-1]["code"], code) == ("idle", 1008)
    free = 'elbow_streams_live{model="tiny-speech",version="1"} 0.0'
    for _ in range(100):  # the stream has ended; its slot is freed a moment later
        if free in httpx.get(strict.url + "/metrics").text:
            break
        time.sleep(0.05)

    async def two() -> str:
        async with connect(f"ws://127.0.0.1:{strict.port}{PATH}?seed=1") as first:
            await first.recv()
            async with connect(f"ws://127.0.0.1:{strict.port}{PATH}?seed=1") as second:
                return str(json.loads(await second.recv())["code"])

    assert asyncio.run(two()) == "overloaded"


def collected(url: str, source: Any, **options: Any) -> tuple[list[Frame], FilterStream]:
    async def run() -> tuple[list[Frame], FilterStream]:
        stream = FilterStream(url, "tiny-speech", source, **options)
        return [frame async for frame in stream], stream

    return asyncio.run(asyncio.wait_for(run(), 120))


@pytest.mark.parametrize("rate", [pytest.param(RATE, marks=pytest.mark.slow), 11_025])  # with resampling there is more to lose
def test_a_server_killed_in_mid_stream_loses_nothing(start_server: Callable[..., ServerProcess], rate: int, tmp_path: Path) -> None:
    victim = start_server()
    file = write_wav(tmp_path / "speech.wav", sound(6, 4 * rate), rate)
    expected, _ = collected(victim.url, file, seed=7, returns=["kl"])

    async def run() -> tuple[list[Frame], FilterStream]:
        stream, frames = FilterStream(victim.url, "tiny-speech", file, seed=7, returns=["kl"], token_every=30, realtime=True), []
        killed = [False, False]
        async for frame in stream:
            frames.append(frame)
            for i, at in enumerate((100, 300)):
                if frame.frame >= at and not killed[i]:
                    killed[i] = True
                    await asyncio.to_thread(victim.kill)
                    await asyncio.to_thread(victim.start)
        return frames, stream

    frames, stream = asyncio.run(asyncio.wait_for(run(), 120))
    assert [frame.frame for frame in frames] == [frame.frame for frame in expected]
    for name in ("elbo", "kl"):
        np.testing.assert_allclose([f.raw[name] for f in frames], [f.raw[name] for f in expected], atol=1e-5, rtol=1e-5)
    assert stream.summary is not None
    assert stream.summary.connections == 3
    assert stream.summary.frames == len(expected)


def test_at_sigterm_every_stream_gets_its_token_and_goes_on_elsewhere(start_server: Callable[..., ServerProcess]) -> None:
    leaving = start_server()
    pcm = sound(8, 40 * FRAME)
    expected = results(talk(leaving, [pcm.tobytes(), CLOSE])[0])

    async def run() -> tuple[list[Any], int | None]:
        heard = []
        async with connect(f"ws://127.0.0.1:{leaving.port}{PATH}?seed=1") as socket:
            await socket.send(pcm[: 15 * FRAME].tobytes())
            while not results(heard):
                heard.append(json.loads(await socket.recv()))
            leaving.process.terminate()
            heard += await rest_of(socket)
            return heard, socket.close_code

    heard, code = asyncio.run(asyncio.wait_for(run(), 60))
    draining = heard[-1]
    assert (draining["type"], draining["frame"], draining["samples"], code) == ("draining", 15, 15 * FRAME, 1012)
    leaving.process.wait(30)
    leaving.start()
    rest = results(talk(leaving, [pcm[15 * FRAME :].tobytes(), CLOSE], f"state={draining['state']}")[0])
    np.testing.assert_allclose([r["elbo"] for r in rest], [r["elbo"] for r in expected[15:]], atol=1e-5, rtol=1e-6)


def test_the_command_line_streams_a_file(server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from service.bulk import main

    file = write_wav(tmp_path / "speech.wav", sound(6, 10 * FRAME))
    assert main(["stream", str(file), "--model", "tiny-speech", "--url", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("  0.000 s  surprise")
    assert lines[-1].startswith("10 frames, ELBO ")
    assert main(["stream", str(tmp_path / "none.wav"), "--url", server.url]) == 1
    assert "none.wav" in capsys.readouterr().err


def test_static_calls_and_filters_send_each_other_away(server: ServerProcess) -> None:
    reply = httpx.post(server.url + "/v1/models/tiny-speech/encode", json={"inputs": [[0.0] * FRAME]})
    assert reply.status_code == 422
    assert "POST /v1/models/tiny-speech/filter" in reply.json()["detail"]


def test_the_document_and_the_curve_describe_the_filter(server: ServerProcess) -> None:
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    assert "/v1/models/tiny-speech/encode" not in paths
    body = paths["/v1/models/tiny-speech/filter"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["frames"]["items"]["maxItems"] == FRAME
    assert httpx.post(server.url + PATH, json=body["example"]).status_code == 200
    curve = httpx.get(server.url + "/v1/models/tiny-speech/curve").json()
    for row in curve["ms"].values():
        assert row == sorted(row)
        assert row[0] > 0
    metrics = httpx.get(server.url + "/metrics").text
    assert 'elbow_stream_frames_total{model="tiny-speech",version="1"}' in metrics


def test_the_card_of_a_speech_model_has_the_statistics_it_standardises_by(artifact: Artifact) -> None:
    heard = np.concatenate([sound(seed, 4000)[: 4000 // FRAME * FRAME] for seed in range(6)]) / 32768
    assert artifact.card.x.std == pytest.approx(heard.std(), rel=0.2)  # some of the six sounds are for validation
    assert artifact.card.x.mean == pytest.approx(heard.mean(), abs=0.1 * heard.std())
