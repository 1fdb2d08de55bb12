"""The client of filter streams: audio or frames in, one result per frame out, whatever happens to the connection.

    stream = FilterStream("http://127.0.0.1:8000", "speech-filter", "speech.wav")
    async for frame in stream:
        print(frame.frame, frame.surprise)          # nats
    print(stream.summary)

The client keeps the server's last state token and all it has sent since. When the connection breaks, or the server is killed or
drains, it opens a new stream with the token, to whichever server answers, and sends the rest again: no frame is lost, none
comes twice, and the results are those of an unbroken stream. docs/streaming.md has the protocol.

From the shell: `python -m service.client stream FILE.wav` (service/stream_cli.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import wave
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.uri import parse_uri

from service.client_calls import listed
from service.client_replies import Frame

__all__ = ["FilterStream", "Frame", "Source", "StreamError", "Summary", "read_sound"]

T = TypeVar("T")
Source = str | Path | NDArray[Any] | Iterable[NDArray[Any]] | AsyncIterable[NDArray[Any]]

TRY_AGAIN = ("overloaded", "quota_exceeded", "shutting_down", "backend_failure")
CHUNK_S = 0.1
FRAMES_AT_ONCE = 32
UNKNOWN_LENGTH = 0x7FFF0000
"""Bytes promised by the header of a WAV written to a pipe, by ffmpeg (2³² − 1) or sox (about 2³¹), mean nothing from here on."""
KEEP_ALIVE_S = 15.0
MOST_KEPT = 64 << 20
"""Bytes sent and not yet covered by a token, beyond which no more is read from the source."""


class StreamError(Exception):
    """The server refused the stream, or could not be reached again. `code` and `retry_after_s` as in its error message."""

    def __init__(self, code: str, message: str, retry_after_s: float | None = None):
        super().__init__(f"{code}: {message}")
        self.code, self.retry_after_s = code, retry_after_s


@dataclass(frozen=True)
class Summary:
    """Of the whole stream, over all connections: frames, total ELBO in nats, the server's lag; the last token."""

    frames: int
    nats: float
    lag_ms_max: float
    lag_ms_mean: float
    state: str = field(repr=False)
    connections: int = 1


@dataclass(frozen=True, eq=False)
class _Sent:
    """A message of the client: samples (or frames) start … start + count − 1 of the stream."""

    start: int
    count: int
    payload: bytes | str


class FilterStream:
    """One stream, to be iterated over once.

    Args:
        url: http(s) or ws(s) address of the server. model, version: which filter.
        source: a sound file; samples, (n,) int16 or float32 in −1…1; frames, (n, X), for other models; or an (asynchronous)
            iterable of such arrays, for example a microphone. A plain iterable is read in a thread of its own, so it may wait.
        sample_rate: of arrays; a file knows its own; default: the model's.
        steps, seed, elastic, returns: as the protocol has them.
        realtime: send at the pace at which the audio was spoken.
        token_every: frames between tokens; what is kept for replay grows with it.
        retries: reconnections in a row that brought nothing new; each waits as long as the server says. api_key: sent as a bearer token.

    Raises:
        ValueError: the url is none of a server.

    Raises (while iterating):
        StreamError: the server refused the stream, or stayed away.
        ValueError: the source is no sound this client can read, or `realtime` is asked of frames that have no rate.
        Whatever the source raises, at once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        source: Source,
        *,
        version: str | None = None,
        sample_rate: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        elastic: bool | None = None,
        returns: str | Sequence[str] = (),
        realtime: bool = False,
        token_every: int = 80,
        retries: int = 8,
        api_key: str | None = None,
    ):
        base = url.rstrip("/")
        for http, ws in (("http://", "ws://"), ("https://", "wss://")):
            base = ws + base.removeprefix(http) if base.startswith(http) else base
        self._url = f"{base}/v1/models/{model}" + (f"/versions/{version}" if version else "") + "/filter"
        try:
            parse_uri(self._url)
        except (InvalidURI, ValueError) as exc:
            raise ValueError(f"url: must be like http://127.0.0.1:8000 (or https, ws, wss), not {url!r}") from exc
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._settings: dict[str, Any] = {"steps": steps, "seed": seed, "elastic": elastic, "return": listed(returns)}
        self._settings = {name: value for name, value in self._settings.items() if value not in (None, [])} | {"token_every": token_every}
        self._source, self._realtime, self._retries = source, realtime, retries
        self._rate = sample_rate
        self.opened: dict[str, Any] = {}
        """The settings as the server applied them."""
        self.summary: Summary | None = None
        self._answered = asyncio.Event()
        """The server has said what it applies."""
        self._token: str | None = None
        self._token_samples = 0
        self._kept: list[_Sent] = []
        self._kept_bytes = 0
        self._frugal = False
        """Whether every message is waited for, because frames sent twice are paid twice."""
        self._news = asyncio.Condition()
        self._next = 0
        self._connections = 0

    async def __aiter__(self) -> AsyncIterator[Frame]:
        chunks = self._chunks()
        pump: asyncio.Task[None] | None = None
        try:
            first = await anext(chunks, None)
            pump = asyncio.create_task(self._pump(first, chunks))
            attempt = 0
            while self.summary is None:
                before, told = (self._next, self._token_samples), None
                try:
                    async for frame in self._session(pump):
                        yield frame
                    broken = "the server closed the stream"
                except (OSError, ConnectionClosed, InvalidHandshake) as exc:
                    broken = str(exc) or type(exc).__name__
                    if isinstance(exc, InvalidStatus):
                        refused = _refused(exc)
                        if exc.response.status_code < 500 and refused.code not in TRY_AGAIN:
                            raise refused from exc
                        broken, told = str(refused), refused.retry_after_s
                except StreamError as exc:
                    if exc.code not in TRY_AGAIN:
                        raise
                    broken, told = str(exc), exc.retry_after_s
                    self._frugal |= exc.code == "quota_exceeded"
                if self.summary is None:
                    if pump.done():
                        pump.result()
                    attempt = 0 if (self._next, self._token_samples) != before else attempt + 1
                    if attempt > self._retries:
                        raise StreamError("unreachable", f"gave up after {attempt} attempts: {broken}")
                    await self._wait(
                        pump, min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0) if told is None else told * random.uniform(1.0, 1.2)
                    )
        finally:
            if pump is not None:
                pump.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await pump
            await chunks.aclose()

    async def _wait(self, pump: asyncio.Task[None], seconds: float) -> None:
        """Until the next attempt; what the source raises meanwhile is raised."""
        now = asyncio.get_running_loop().time
        end = now() + seconds
        await asyncio.wait([pump], timeout=seconds)
        if pump.done():
            pump.result()
        await asyncio.sleep(end - now())

    # One connection.

    async def _session(self, pump: asyncio.Task[None]) -> AsyncIterator[Frame]:
        async with connect(
            self._url, additional_headers=self._headers, compression=None, max_size=None, open_timeout=10, close_timeout=2
        ) as socket:
            self._connections += 1
            await socket.send(orjson.dumps({"type": "open", **self._settings, **({"state": self._token} if self._token else {})}).decode())
            self.opened = _message(await socket.recv(), "opened")
            self._settings["seed"] = self.opened["seed"]  # without a token the stream begins anew, with the same noise
            self._answered.set()
            sender = asyncio.create_task(self._send(socket, int(self.opened["samples"]), pump))
            try:
                while (raw := await _heard(socket, sender)) is not None:
                    for frame in await self._take(_message(raw)):
                        yield frame
            finally:
                sender.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):  # `_heard` has raised it
                    await sender

    async def _take(self, message: dict[str, Any]) -> list[Frame]:
        """The new frames in a message; tokens and the summary are noted."""
        kind = message["type"]
        if kind in ("state", "draining"):
            await self._covered(message["state"], message["samples"])
        elif kind == "closed":
            said = {name: message[name] for name in ("frames", "nats", "lag_ms_max", "lag_ms_mean", "state")}
            self.summary = Summary(**said, connections=self._connections)
        elif kind == "results":
            fresh = [result for result in message["results"] if result["frame"] >= self._next]
            if fresh:
                self._next = fresh[-1]["frame"] + 1
            return [Frame.parse(result) for result in fresh]
        return []

    async def _covered(self, token: str, samples: int) -> None:
        """What the token's state has consumed need not be kept any more."""
        async with self._news:
            self._token, self._token_samples = token, samples
            self._kept = [sent for sent in self._kept if sent.start + sent.count > samples]
            self._kept_bytes = sum(len(sent.payload) for sent in self._kept)
            self._news.notify_all()

    async def _send(self, socket: ClientConnection, position: int, pump: asyncio.Task[None]) -> None:
        """Everything from `position` on, as it comes, and that the client is there while nothing does; then flush and close."""
        patience = min(KEEP_ALIVE_S, self.opened.get("limits", {}).get("idle_s", 60.0) / 4)
        with contextlib.suppress(ConnectionClosed):  # `_heard` meets it too, after what the server said before it
            while not pump.done() or self._after(position):
                if not (todo := await self._todo(position, pump, patience)):
                    if not pump.done():
                        await socket.send('{"type":"keep_alive"}')
                    continue
                for sent in todo:
                    if sent.start != position:
                        raise StreamError("protocol", f"the server stands at sample {position}, what is kept begins at {sent.start}")
                    await socket.send(sent.payload)
                    position += sent.count
                    if self._frugal:
                        await socket.send('{"type":"snapshot"}')
                        await self._until_covered(position)
        if pump.done():
            pump.result()
            with contextlib.suppress(ConnectionClosed):
                for kind in ("flush", "close"):
                    await socket.send(f'{{"type":"{kind}"}}')

    def _after(self, position: int) -> list[_Sent]:
        return [sent for sent in self._kept if sent.start + sent.count > position]

    async def _todo(self, position: int, pump: asyncio.Task[None], patience: float) -> list[_Sent]:
        """What is to be sent, as soon as there is any; nothing when `patience` or the source is at its end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience), self._news:
                await self._news.wait_for(lambda: self._after(position) or pump.done())
        return self._after(position)

    async def _until_covered(self, position: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._token_samples >= position)

    # The source.

    async def _pump(self, first: NDArray[Any] | None, chunks: AsyncIterator[NDArray[Any]]) -> None:
        """Reads the source, no farther ahead than may be kept."""
        now, start = asyncio.get_running_loop().time, 0
        try:
            pace = await self._pace(first) if self._realtime and first is not None else None
            chunk, began = first, now()
            while chunk is not None:
                sent = _Sent(start, len(chunk), _payload(chunk))
                start += sent.count
                if pace is not None:
                    await asyncio.sleep(began + start / pace - now())
                async with self._news:
                    while self._kept_bytes > MOST_KEPT:
                        await self._news.wait()
                    self._kept.append(sent)
                    self._kept_bytes += len(sent.payload)
                    self._news.notify_all()
                chunk = await anext(chunks, None)
        finally:
            async with self._news:
                self._news.notify_all()

    async def _pace(self, first: NDArray[Any]) -> float:
        """Samples, or frames, a second; the model's own where none is given, and always of frames.

        Raises:
            ValueError: the model's frames have no rate.
        """
        if first.ndim == 1 and self._rate:
            return self._rate
        await self._answered.wait()
        rate = self.opened["model_sample_rate"]
        if not rate:
            raise ValueError("realtime: this model's frames are no audio and have no rate: leave it out")
        return float(rate) if first.ndim == 1 else rate / self.opened["frame_size"]

    async def _chunks(self) -> AsyncGenerator[NDArray[Any]]:
        """The source in messages of about 100 ms; settles sample rate and encoding by the first."""
        source = self._source
        if isinstance(source, str | Path):
            self._rate, source = read_sound(Path(source))
        if isinstance(source, np.ndarray):
            for chunk in _cut(source, self._rate):
                yield self._known(chunk)
            return
        if isinstance(source, AsyncIterable):
            async for chunk in source:
                yield self._known(np.asarray(chunk))
            return
        async with contextlib.aclosing(_in_thread(source)) as waited_for:
            async for chunk in waited_for:
                yield self._known(np.asarray(chunk))

    def _known(self, chunk: NDArray[Any]) -> NDArray[Any]:
        """The chunk, in this machine's byte order.

        Raises:
            ValueError: it is neither samples nor frames, or not of the kind that came before.
        """
        if chunk.ndim not in (1, 2) or chunk.dtype.kind not in ("fiub" if chunk.ndim == 2 else "if"):
            raise ValueError(f"source: chunks must be (n,) samples or (n, X) frames, not {chunk.dtype} {chunk.shape}")
        chunk = chunk.astype(chunk.dtype.newbyteorder("="), copy=False)
        if chunk.ndim == 1 and chunk.dtype.kind == "i" and chunk.dtype != np.int16:
            raise ValueError(f"source: integer samples must be int16, not {chunk.dtype}")
        encoding = "json" if chunk.ndim == 2 else "pcm_s16le" if chunk.dtype == np.int16 else "pcm_f32le"
        if self._settings.setdefault("encoding", encoding) != encoding:
            raise ValueError(f"source: began as {self._settings['encoding']} and goes on as {encoding} ({chunk.dtype} {chunk.shape})")
        if chunk.ndim == 1 and self._rate is not None:
            self._settings["sample_rate"] = self._rate
        return chunk


def read_sound(file: Path) -> tuple[int, NDArray[Any]]:
    """Sample rate and mono samples: WAV by the standard library, other formats by libsndfile if `soundfile` is installed.

    Raises:
        ValueError: it cannot be read, or is a WAV that ends before its header says.
    """
    try:
        with wave.open(str(file)) as sound:
            if sound.getsampwidth() == 2:
                channels, promised = sound.getnchannels(), sound.getnframes()
                data = sound.readframes(min(promised, file.stat().st_size))
                size = 2 * channels * promised
                if len(data) < size < UNKNOWN_LENGTH:
                    raise ValueError(f"{file}: is cut short: its header promises {size} bytes of sound, {len(data)} are there")
                samples = np.frombuffer(data[: len(data) - len(data) % (2 * channels)], "<i2")
                return sound.getframerate(), samples if channels == 1 else samples.reshape(-1, channels).mean(1).astype(np.int16)
    except (wave.Error, EOFError):
        pass
    except OSError as exc:
        raise ValueError(f"{file}: {exc.strerror or exc}") from exc
    _refuse_cut(file)
    try:
        import soundfile
    except ImportError as exc:
        raise ValueError(f"{file}: not a 16-bit WAV file; `pip install soundfile` to read other formats") from exc
    try:
        data, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except Exception as exc:  # libsndfile's errors have no common base in all versions
        raise ValueError(f"{file}: {exc}") from exc
    return int(rate), np.clip(data.mean(1), -1, 1)


def _refuse_cut(file: Path) -> None:
    """Raises ValueError if it is a WAV file that has fewer bytes than its first chunk says; libsndfile reads what there is."""
    with file.open("rb") as handle:
        head = handle.read(12)
    promised, there = int.from_bytes(head[4:8], "little") + 8, file.stat().st_size
    if not head:
        raise ValueError(f"{file}: is empty")
    is_wav = head[:4] == b"RIFF" and b"WAVE".startswith(head[8:])
    if is_wav and there + 1 < promised < UNKNOWN_LENGTH:  # the byte that fills up the last chunk is often left out
        raise ValueError(f"{file}: is cut short: its header promises {promised} bytes, {there} are there")


async def _in_thread(source: Iterable[T]) -> AsyncGenerator[T]:
    """The items of an iterable that may wait, one at a time, from a thread of its own; it ends with the program, however long it waits."""
    loop, asked, end = asyncio.get_running_loop(), queue.SimpleQueue[asyncio.Future[Any] | None](), object()

    def settle(answer: asyncio.Future[Any], item: Any, failure: BaseException | None) -> None:
        if answer.done():
            return
        if failure is None:
            answer.set_result(item)
        else:
            answer.set_exception(failure)

    def read() -> None:
        items, item, failure = None, end, None
        while (answer := asked.get()) is not None:
            try:
                items = iter(source) if items is None else items
                item = next(items, end)
            except BaseException as exc:  # told to who asked
                failure = exc
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(settle, answer, item, failure)

    threading.Thread(target=read, name="elbow-source", daemon=True).start()
    try:
        while True:
            asked.put(answer := loop.create_future())
            if (item := await answer) is end:
                return
            yield item
    finally:
        asked.put(None)


async def _heard(socket: ClientConnection, sender: asyncio.Task[None]) -> str | bytes | None:
    """The server's next message, None after its last. What made the sender fail, so also what the source raises, is raised at once."""
    receiving = asyncio.create_task(socket.recv())
    try:
        if not sender.done():
            await asyncio.wait([receiving, sender], return_when=asyncio.FIRST_COMPLETED)
        if sender.done() and not receiving.done():
            sender.result()
        return await receiving
    except ConnectionClosedOK:
        return None
    finally:
        receiving.cancel()


def _cut(values: NDArray[Any], rate: int | None) -> Iterable[NDArray[Any]]:
    size = FRAMES_AT_ONCE if values.ndim == 2 else max(1, int((rate or 16_000) * CHUNK_S))
    return (values[i : i + size] for i in range(0, len(values), size))


def _payload(chunk: NDArray[Any]) -> bytes | str:
    if chunk.ndim == 2:
        return orjson.dumps({"type": "frames", "frames": chunk.astype(np.float32)}, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return chunk.astype("<i2" if chunk.dtype == np.int16 else "<f4").tobytes()


def _message(raw: str | bytes, wanted: str | None = None) -> dict[str, Any]:
    message: dict[str, Any] = orjson.loads(raw)
    if message["type"] == "error":
        raise StreamError(message["code"], message["error"], message.get("retry_after_s"))
    if wanted is not None and message["type"] != wanted:
        raise StreamError("protocol", f"expected {wanted}, got {message['type']}")
    return message


def _refused(exc: InvalidStatus) -> StreamError:
    try:
        problem = orjson.loads(exc.response.body or b"{}")
    except orjson.JSONDecodeError:
        problem = {}
    after = exc.response.headers.get("Retry-After", "")
    told = problem.get("retry_after_s", float(after) if after.isdecimal() else None)
    return StreamError(problem.get("code", "refused"), problem.get("detail", f"HTTP {exc.response.status_code}"), told)
