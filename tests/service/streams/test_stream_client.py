"""The client of streams against a server that is scripted: sources that wait or fail, refusals that say when to come back, sound files."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
import wave
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from service.bulk import main
from service.stream_client import FilterStream, Frame, StreamError, read_sound

RATE, FRAME = 8000, 40
PIECE = np.zeros(4 * FRAME, np.int16)


class Scripted:
    """Answers every 40 samples, or every row of a message, as one frame, by the protocol; keeps what it heard.

    `budget` of frames and then, each time it has refused, one more message; `refusals` are said instead of `opened`, one per connection.
    """

    def __init__(self, *, idle_s: float = 60.0, budget: int = 10**9, rate: int | None = RATE, refusals: tuple[dict[str, Any], ...] = ()):
        self.idle_s, self.budget, self.rate, self.refusals = idle_s, budget, rate, list(refusals)
        self.opened: list[dict[str, Any]] = []
        self.heard: list[dict[str, Any] | bytes] = []
        self.results = asyncio.Event()
        self.connections = 0

    async def __call__(self, socket: ServerConnection) -> None:
        self.connections += 1
        opened = json.loads(await socket.recv())
        self.opened.append(opened)

        async def say(kind: str, **members: Any) -> None:
            await socket.send(json.dumps({"type": kind, **members}))

        if self.refusals:
            await say("error", error="come back", **self.refusals.pop(0))
            return
        samples = int(opened.get("state", 0))
        frame = self.frames(samples)
        limits = {"message_bytes": 2**20, "idle_s": self.idle_s}
        rates = {"model_sample_rate": self.rate, "sample_rate": self.rate, "frame_size": FRAME}
        await say("opened", seed=1, samples=samples, frame=frame, limits=limits, **rates)
        summary = {"nats": 0.0, "lag_ms_max": 0.0, "lag_ms_mean": 0.0}
        async for raw in socket:
            message: Any = json.loads(raw) if isinstance(raw, str) else raw
            self.heard.append(message)
            if isinstance(message, bytes) or message["type"] == "frames":
                samples += len(message) // 2 if isinstance(message, bytes) else len(message["frames"])
                first, frame = frame, self.frames(samples)
                if self.budget <= 0:
                    self.budget = 1
                    await say("error", code="quota_exceeded", error="spent", retry_after_s=0.01)
                    return
                self.budget -= frame - first
                results = [
                    {"frame": i, "elbo": -1.0, "surprise": 1.0, "surprise_quantile": 0.5, "steps_used": 1} for i in range(first, frame)
                ]
                await say("results", first_frame=first, results=results, samples=samples, lag_ms=0.0)
                self.results.set()
            elif message["type"] == "snapshot":
                await say("state", frame=frame, samples=samples, state=str(samples))
            elif message["type"] == "close":
                await say("closed", frames=frame, state=str(samples), **summary)
                return

    def frames(self, samples: int) -> int:
        return samples // FRAME if self.opened[-1]["encoding"] != "json" else samples

    def kinds(self) -> list[str]:
        return ["audio" if isinstance(message, bytes) else message["type"] for message in self.heard]


async def collect(
    server: Scripted,
    source: Any,
    process: Callable[[ServerConnection, Request], Awaitable[Response | None]] | None = None,
    seen: Callable[[Frame], None] = lambda frame: None,
    **options: Any,
) -> list[Frame]:
    async with serve(server, "127.0.0.1", 0, process_request=process, close_timeout=0.2) as listening:
        port = listening.sockets[0].getsockname()[1]
        frames = []
        try:
            async with asyncio.timeout(10) as patience:
                async for frame in FilterStream(f"http://127.0.0.1:{port}", "m", source, **options):
                    frames.append(frame)
                    seen(frame)
        finally:
            assert not patience.expired()
        return frames


def heard(server: Scripted, source: Any, **options: Any) -> list[Frame]:
    return asyncio.run(collect(server, source, **options))


def test_what_the_source_raises_in_mid_stream_is_raised_at_once() -> None:
    """When all that was sent is answered and the server has nothing more to say."""
    answered = asyncio.Event()

    async def failing() -> AsyncIterator[Any]:
        yield PIECE
        await answered.wait()
        raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        heard(Scripted(), failing(), seen=lambda frame: frame.frame == 3 and answered.set())


@pytest.mark.parametrize("failure", [TimeoutError("too long"), OSError("no such device"), StreamError("overloaded", "another stream")])
def test_a_source_that_fails_as_a_connection_does_is_not_tried_again(failure: Exception) -> None:
    server = Scripted()

    async def failing() -> AsyncIterator[Any]:
        yield PIECE
        await server.results.wait()
        raise failure

    with pytest.raises(type(failure), match=str(failure)):
        heard(server, failing(), retries=0)
    assert server.connections == 1


@pytest.mark.parametrize(("later", "words"), [(PIECE.astype(np.int32), "must be int16, not int32"), (PIECE / 2, "goes on as pcm_f32le")])
def test_a_later_chunk_of_another_kind_is_refused_by_name(later: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        heard(Scripted(), [PIECE, later])


def test_keep_alive_is_said_while_the_source_pauses() -> None:
    server = Scripted(idle_s=0.2)

    async def pausing() -> AsyncIterator[Any]:
        yield PIECE
        while "keep_alive" not in server.kinds():
            await asyncio.sleep(0.01)
        yield PIECE

    assert len(heard(server, pausing())) == 8
    assert server.kinds()[-3:] == ["audio", "flush", "close"]


def test_a_plain_iterable_that_waits_holds_up_nobody() -> None:
    """A microphone that hands out the second chunk only after the first one is answered."""
    answered = threading.Event()

    def microphone() -> Iterator[Any]:
        yield PIECE
        assert answered.wait(5)
        yield PIECE

    class Telling(Scripted):
        async def __call__(self, socket: ServerConnection) -> None:
            waiting = asyncio.create_task(self.results.wait())
            waiting.add_done_callback(lambda _: answered.set())
            await super().__call__(socket)

    assert len(heard(Telling(), microphone())) == 8


def test_a_plain_iterable_that_waits_for_ever_does_not_keep_the_program() -> None:
    stuck = threading.Event()

    def microphone() -> Iterator[Any]:
        yield PIECE
        stuck.wait(60)

    began = time.monotonic()
    with pytest.raises(StreamError, match="invalid_input"):
        heard(Scripted(refusals=({"code": "invalid_input"},)), microphone())
    stuck.set()
    assert time.monotonic() - began < 30


def test_what_a_plain_iterable_raises_is_raised() -> None:
    def failing() -> Iterator[Any]:
        yield PIECE
        raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        heard(Scripted(), failing())


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between attempts, which are not waited for."""
    asked: list[float] = []
    monkeypatch.setattr("service.stream_client.random.uniform", lambda low, high: 1.0)

    async def wait(stream: FilterStream, pump: asyncio.Task[None], seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr(FilterStream, "_wait", wait)
    return asked


@pytest.mark.parametrize("code", ["overloaded", "quota_exceeded"])
def test_a_refusal_that_says_when_to_come_back_is_obeyed(waits: list[float], code: str) -> None:
    server = Scripted(refusals=({"code": code, "retry_after_s": 7.0},) * 2)
    assert len(heard(server, PIECE)) == 4
    assert waits == [7.0, 7.0]


def test_refusals_that_bring_nothing_new_end_the_stream(waits: list[float]) -> None:
    server = Scripted(refusals=({"code": "quota_exceeded", "retry_after_s": 7.0},) * 9)
    with pytest.raises(StreamError, match="gave up after 3 attempts: quota_exceeded: come back"):
        heard(server, PIECE, retries=2)


def test_a_refused_handshake_is_tried_again_as_its_header_says(waits: list[float]) -> None:
    refusals = [
        Response(HTTPStatus.TOO_MANY_REQUESTS, "", Headers({"Retry-After": "3"}), b'{"code": "quota_exceeded", "detail": "spent"}'),
        Response(HTTPStatus.SERVICE_UNAVAILABLE, "", Headers(), b'{"code": "overloaded", "detail": "full", "retry_after_s": 0.5}'),
    ]

    async def process(socket: ServerConnection, request: Request) -> Response | None:
        return refusals.pop(0) if refusals else None

    assert len(asyncio.run(collect(Scripted(), PIECE, process))) == 4
    assert waits == [3.0, 0.5]


def test_a_quota_of_one_message_at_a_time_is_enough(waits: list[float]) -> None:
    """What is sent twice is paid twice: without a token after every message a small quota would go to the same frames for ever."""
    server = Scripted(budget=8)
    frames = heard(server, np.zeros(20 * len(PIECE), np.int16), sample_rate=1600, retries=1)
    assert [frame.frame for frame in frames] == list(range(80))
    assert server.connections > 3


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f4", ">f8", "<f2"])
def test_samples_may_have_any_byte_order(dtype: str) -> None:
    server = Scripted()
    values = np.arange(80)
    heard(server, values.astype(dtype) if "i" in dtype else (values / 128).astype(dtype))
    sent = b"".join(message for message in server.heard if isinstance(message, bytes))
    assert np.array_equal(np.frombuffer(sent, "<i2" if "i" in dtype else "<f4") * (1 if "i" in dtype else 128), values)


@pytest.mark.parametrize("source", [np.array([[None]]), np.array([["a"]]), np.array([[1j]])])
def test_frames_that_are_no_numbers_are_refused_by_name(source: Any) -> None:
    with pytest.raises(ValueError, match="source: chunks must be"):
        heard(Scripted(), source)


@pytest.mark.parametrize(("source", "pace"), [(np.zeros(1600, np.int16), RATE), (np.zeros((40, FRAME)), RATE / FRAME)])
def test_the_pace_of_an_array_without_a_rate_is_the_models(monkeypatch: pytest.MonkeyPatch, source: Any, pace: float) -> None:
    paces: list[float] = []
    found = FilterStream._pace

    async def noted(stream: FilterStream, first: Any) -> float:
        paces.append(await found(stream, first))
        return paces[-1]

    monkeypatch.setattr(FilterStream, "_pace", noted)
    assert len(heard(Scripted(), source, realtime=True)) == 40
    assert paces == [pace]


def test_frames_without_a_rate_have_no_pace() -> None:
    with pytest.raises(ValueError, match="realtime: this model's frames are no audio"):
        heard(Scripted(rate=None), np.zeros((4, 3)), realtime=True)


def test_a_single_part_is_asked_for_by_its_name() -> None:
    server = Scripted()
    heard(server, PIECE, returns="posterior")
    assert server.opened[0]["return"] == ["posterior"]


@pytest.mark.parametrize("url", ["127.0.0.1:8077", "http://127.0.0.1:abc", ""])
def test_an_address_that_is_none_is_a_line_and_no_traceback(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", str(tmp_path / "speech.wav"), "--url", url]) == 1
    assert capsys.readouterr().err.startswith("elbow: url: must be like http://")


def wav(file: Path, channels: int = 1, width: int = 2) -> bytes:
    with wave.open(str(file), "wb") as out:
        out.setparams((channels, width, RATE, 0, "NONE", ""))
        out.writeframes(np.arange(100 * channels, dtype=f"<i{width}").tobytes())
    return file.read_bytes()


@pytest.mark.parametrize(("channels", "width"), [(1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("kept", [1, 2, 3, 10, 20, 38, 40, 44, 45, 100, 101, 199, 243])
def test_a_sound_that_is_cut_short_is_refused_by_name(tmp_path: Path, channels: int, width: int, kept: int) -> None:
    file = tmp_path / "speech.wav"
    file.write_bytes(wav(file, channels, width)[:kept])
    with pytest.raises(ValueError, match=r"speech\.wav: " + ("is cut short" if kept >= 10 else "")):
        read_sound(file)


def test_an_empty_sound_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "speech.wav").touch()
    with pytest.raises(ValueError, match=r"speech\.wav: is empty"):
        read_sound(tmp_path / "speech.wav")


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000])
def test_a_sound_written_to_a_pipe_promises_nothing(tmp_path: Path, length: int) -> None:
    file = tmp_path / "speech.wav"
    data = bytearray(wav(file))
    data[4:8] = data[40:44] = struct.pack("<I", length)
    file.write_bytes(data)
    rate, samples = read_sound(file)
    assert (rate, samples.tolist()) == (RATE, list(range(100)))
