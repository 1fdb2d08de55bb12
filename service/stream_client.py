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
import random
import wave
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

Source = str | Path | NDArray[Any] | Iterable[NDArray[Any]] | AsyncIterable[NDArray[Any]]

TRY_AGAIN = ("overloaded", "shutting_down", "backend_failure")
CHUNK_S = 0.1
FRAMES_AT_ONCE = 32
MOST_KEPT = 64 << 20
"""Bytes sent and not yet covered by a token, beyond which no more is read from the source."""


class StreamError(Exception):
    """The server refused the stream, or could not be reached again. `code` as in its error message."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, eq=False)
class Frame:
    """What the server said of one frame; what was not asked for is None. Nats. `raw` is the whole result."""

    frame: int
    elbo: float | None
    surprise: float | None
    surprise_quantile: float | None
    steps_used: int
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def mu(self) -> NDArray[np.float32]:
        """(D,), posterior mean; needs `returns=["posterior"]`."""
        return np.asarray(self.raw["posterior"]["levels"][0]["mu"], np.float32)

    @property
    def log_sigma(self) -> NDArray[np.float32]:
        """(D,)."""
        return np.asarray(self.raw["posterior"]["levels"][0]["log_sigma"], np.float32)


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
            iterable of such arrays, for example a microphone.
        sample_rate: of arrays; a file knows its own.
        steps, seed, elastic, returns: as the protocol has them.
        realtime: send at the pace at which the audio was spoken.
        token_every: frames between tokens; what is kept for replay grows with it.
        retries: reconnections in a row without a single new frame. api_key: sent as a bearer token.

    Raises (while iterating):
        StreamError: the server refused the stream, or stayed away.
        ValueError: the source is no sound this client can read.
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
        returns: Sequence[str] = (),
        realtime: bool = False,
        token_every: int = 80,
        retries: int = 8,
        api_key: str | None = None,
    ):
        base = url.rstrip("/")
        for http, ws in (("http://", "ws://"), ("https://", "wss://")):
            base = ws + base.removeprefix(http) if base.startswith(http) else base
        self._url = f"{base}/v1/models/{model}" + (f"/versions/{version}" if version else "") + "/filter"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._settings: dict[str, Any] = {"steps": steps, "seed": seed, "elastic": elastic, "return": list(returns)}
        self._settings = {name: value for name, value in self._settings.items() if value not in (None, [])} | {"token_every": token_every}
        self._source, self._realtime, self._retries = source, realtime, retries
        self._rate = sample_rate
        self.opened: dict[str, Any] = {}
        """The settings as the server applied them."""
        self.summary: Summary | None = None
        self._token: str | None = None
        self._kept: list[_Sent] = []
        self._kept_bytes = 0
        self._whole = False
        self._news = asyncio.Condition()
        self._next = 0
        self._connections = 0

    async def __aiter__(self) -> AsyncIterator[Frame]:
        chunks = self._chunks()
        first = await anext(chunks, None)
        pump = asyncio.create_task(self._pump(first, chunks))
        try:
            attempt = 0
            while self.summary is None:
                before = self._next
                try:
                    async for frame in self._session(pump):
                        yield frame
                    broken = "the server closed the stream"
                except (OSError, ConnectionClosed, InvalidHandshake) as exc:
                    broken = str(exc) or type(exc).__name__
                    if isinstance(exc, InvalidStatus) and exc.response.status_code < 500:
                        raise _refused(exc) from exc
                except StreamError as exc:
                    if exc.code not in TRY_AGAIN:
                        raise
                    broken = str(exc)
                if self.summary is None:
                    attempt = 0 if self._next > before else attempt + 1
                    if attempt > self._retries:
                        raise StreamError("unreachable", f"gave up after {attempt} attempts: {broken}")
                    await asyncio.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
        finally:
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pump

    # One connection.

    async def _session(self, pump: asyncio.Task[None]) -> AsyncIterator[Frame]:
        async with connect(
            self._url, additional_headers=self._headers, compression=None, max_size=None, open_timeout=10, close_timeout=2
        ) as socket:
            self._connections += 1
            await socket.send(orjson.dumps({"type": "open", **self._settings, **({"state": self._token} if self._token else {})}).decode())
            self.opened = _message(await socket.recv(), "opened")
            self._settings["seed"] = self.opened["seed"]  # without a token the stream begins anew, with the same noise
            sender = asyncio.create_task(self._send(socket, int(self.opened["samples"]), pump))
            try:
                async for raw in socket:
                    message = _message(raw)
                    for frame in await self._take(message):
                        yield frame
                    if sender.done() and not sender.cancelled() and sender.exception() is not None:
                        sender.result()
            finally:
                sender.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
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
            return [Frame(r["frame"], r["elbo"], r["surprise"], r["surprise_quantile"], r["steps_used"], r) for r in fresh]
        return []

    async def _covered(self, token: str, samples: int) -> None:
        """What the token's state has consumed need not be kept any more."""
        async with self._news:
            self._token = token
            self._kept = [sent for sent in self._kept if sent.start + sent.count > samples]
            self._kept_bytes = sum(len(sent.payload) for sent in self._kept)
            self._news.notify_all()

    async def _send(self, socket: ClientConnection, position: int, pump: asyncio.Task[None]) -> None:
        """Everything from `position` on, as it comes; then flush and close."""
        while True:
            async with self._news:
                while not (todo := [sent for sent in self._kept if sent.start + sent.count > position]) and not self._whole:
                    if pump.done() and pump.exception() is not None:
                        pump.result()
                    await self._news.wait()
            if not todo:
                break
            for sent in todo:
                if sent.start != position:
                    raise StreamError("protocol", f"the server stands at sample {position}, what is kept begins at {sent.start}")
                await socket.send(sent.payload)
                position += sent.count
        for kind in ("flush", "close"):
            await socket.send(f'{{"type":"{kind}"}}')

    # The source.

    async def _pump(self, first: NDArray[Any] | None, chunks: AsyncIterator[NDArray[Any]]) -> None:
        """Reads the source, no farther ahead than may be kept."""
        start, began = 0, asyncio.get_running_loop().time()
        try:
            chunk = first
            while chunk is not None:
                sent = _Sent(start, len(chunk), _payload(chunk))
                start += sent.count
                if self._realtime and self._rate:
                    await asyncio.sleep(began + start / self._rate - asyncio.get_running_loop().time())
                async with self._news:
                    while self._kept_bytes > MOST_KEPT:
                        await self._news.wait()
                    self._kept.append(sent)
                    self._kept_bytes += len(sent.payload)
                    self._news.notify_all()
                chunk = await anext(chunks, None)
            self._whole = True
        finally:
            async with self._news:
                self._news.notify_all()

    async def _chunks(self) -> AsyncIterator[NDArray[Any]]:
        """The source in messages of about 100 ms; settles sample rate and encoding by the first."""
        source = self._source
        if isinstance(source, str | Path):
            self._rate, source = read_sound(Path(source))
        if isinstance(source, np.ndarray):
            source = _cut(source, self._rate)
        if isinstance(source, AsyncIterable):
            async for chunk in source:
                yield self._known(np.asarray(chunk))
        else:
            for chunk in source:
                yield self._known(np.asarray(chunk))

    def _known(self, chunk: NDArray[Any]) -> NDArray[Any]:
        if chunk.ndim == 2:
            self._settings["encoding"] = "json"
            return chunk
        if chunk.ndim != 1 or chunk.dtype.kind not in "if":
            raise ValueError(f"source: chunks must be (n,) samples or (n, X) frames, not {chunk.dtype} {chunk.shape}")
        if chunk.dtype.kind == "i" and chunk.dtype != np.int16:
            raise ValueError(f"source: integer samples must be int16, not {chunk.dtype}")
        self._settings["encoding"] = "pcm_s16le" if chunk.dtype == np.int16 else "pcm_f32le"
        if self._rate is not None:
            self._settings["sample_rate"] = self._rate
        return chunk


def read_sound(file: Path) -> tuple[int, NDArray[Any]]:
    """Sample rate and mono samples: WAV by the standard library, other formats by libsndfile if `soundfile` is installed.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with wave.open(str(file)) as sound:
            if sound.getsampwidth() == 2:
                samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
                channels = sound.getnchannels()
                return sound.getframerate(), samples if channels == 1 else samples.reshape(-1, channels).mean(1).astype(np.int16)
    except (wave.Error, EOFError):
        pass
    except OSError as exc:
        raise ValueError(f"{file}: {exc.strerror or exc}") from exc
    try:
        import soundfile
    except ImportError as exc:
        raise ValueError(f"{file}: not a 16-bit WAV file; `pip install soundfile` to read other formats") from exc
    try:
        data, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except Exception as exc:  # libsndfile's errors have no common base in all versions
        raise ValueError(f"{file}: {exc}") from exc
    return int(rate), np.clip(data.mean(1), -1, 1)


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
        raise StreamError(message["code"], message["error"])
    if wanted is not None and message["type"] != wanted:
        raise StreamError("protocol", f"expected {wanted}, got {message['type']}")
    return message


def _refused(exc: InvalidStatus) -> StreamError:
    try:
        problem = orjson.loads(exc.response.body or b"{}")
    except orjson.JSONDecodeError:
        problem = {}
    return StreamError(problem.get("code", "refused"), problem.get("detail", f"HTTP {exc.response.status_code}"))
