"""One WebSocket, from open to close: messages in, portions to the lane, results out (docs/streaming.md has the protocol).

Everything here runs in the event loop. Reading stops while too many frames wait for the server, or too many bytes for the client, so
that one who sends faster than the server computes, or reads slower than it answers, is slowed down by its own connection and no buffer
grows. Many frames in one message (a long gap) are handed in piece by piece by the same rule.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from service import arrays
from service.deps import Server, caller_of
from service.errors import (
    STATUS,
    BackendFailure,
    BodyTooLarge,
    ClientIdle,
    ElbowError,
    InvalidInput,
    Overloaded,
    QuotaExceeded,
    RetryLater,
    ShuttingDown,
    TokenRefused,
    WrongMessageKind,
)
from service.repository import ServedModel
from service.streams.opening import Opened, from_query, open_with
from service.streams.stream import Portion, Stream, StreamDoor
from service.streams.tokens import Snapshot
from service.telemetry import LOG, Call

RESTART, UNSUPPORTED, BAD_PAYLOAD, POLICY, TOO_BIG, INTERNAL, TRY_LATER = 1012, 1003, 1007, 1008, 1009, 1011, 1013
CLOSE_CODES: dict[type[ElbowError], int] = {
    TokenRefused: POLICY,
    ClientIdle: POLICY,
    WrongMessageKind: UNSUPPORTED,
    BodyTooLarge: TOO_BIG,
    BackendFailure: INTERNAL,
    Overloaded: TRY_LATER,
    QuotaExceeded: TRY_LATER,
    ShuttingDown: RESTART,
}
MOST_WAITING = 400
"""Frames handed in and not answered, beyond which no more is read (5 s of audio at 80 frames a second). A message without any counts
as one. What brings more at once is answered in pieces of `PIECE`."""
PIECE = MOST_WAITING // 2
MOST_UNSENT = 1 << 20
"""Bytes of answers that the client has not taken, beyond which no more is read."""
MOST_GAP = 100_000
MOST_ID = 1024
"""Characters of a marker's id."""


@dataclass(frozen=True)
class _About:
    """Why a portion was made: what to send when it is done, and what a token must repeat of the input."""

    what: str
    samples: int = 0
    audio: dict[str, Any] | None = None
    id: Any = None


@dataclass(frozen=True)
class _Rest:
    """Frames of a message that came at `received` and are not handed in yet; x, mask: (n, X)."""

    x: NDArray[np.float32]
    mask: NDArray[np.float32] | None
    received: float


class Connection:
    """Serves one accepted WebSocket."""

    def __init__(self, socket: WebSocket, server: Server, model: ServedModel, lane: StreamDoor, key_id: str):
        self._socket, self._server, self._model, self._lane, self._key_id = socket, server, model, lane, key_id
        self._call: Call = socket.scope["call"]
        self._loop = asyncio.get_running_loop()
        self._shaper = server.shaper(model)
        self._outgoing: deque[bytes] = deque()
        self._unsent = 0
        self._waiting = 0
        self._rest: deque[_Rest] = deque()
        self._token_due = self._pushing = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closing: int | None = None
        self._frames, self._nats, self._lag_max, self._lag_sum = 0, 0.0, 0.0, 0.0
        self._json_frames = 0
        self._alive = server.clock()
        """When the client last said or took something, or the server still owed it an answer."""
        self._drained: asyncio.Event | None = None
        self._stream: Stream | None = None
        self._opened: Opened | None = None

    async def serve(self) -> None:
        """Until the client or the server ends it. Every abnormal end is said in an `error` message before the close."""
        writer = asyncio.create_task(self._write())
        idle = self._loop.call_later(self._server.limits.stream_idle_s, self._check_idle, asyncio.current_task())
        try:
            try:
                await self._open()
                await self._read()
            except asyncio.CancelledError:
                if self._closing is None:
                    raise
                task = asyncio.current_task()
                if task is not None:  # `_check_idle` has said why
                    task.uncancel()
                await asyncio.wait([writer], timeout=self._server.limits.drain_s)  # it may be that nothing is taken
                return
            except ElbowError as error:
                self._refuse(error)
            except WebSocketDisconnect:
                self._closing = self._closing or 1000
                return
            self._news.set()
            await writer
        finally:
            idle.cancel()
            writer.cancel()
            self._server.connections.discard(self)
            if self._stream is not None:
                self._lane.close(self._stream)

    async def drain(self) -> None:
        """Hands the stream over: its token, then close 1012. Returns when the client has both."""
        if self._stream is None:
            self._refuse(ShuttingDown("the server is shutting down"))
            return
        if self._drained is None:
            self._drained = asyncio.Event()
            if not self._rest and not self._pushing:
                self._say_draining()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), self._server.limits.drain_s)

    def _say_draining(self) -> None:
        self._feed(_About("draining", *self._place()), wants_state=True)

    # Opening.

    async def _open(self) -> None:
        given = from_query(self._socket.query_params) if self._socket.query_params else self._parse(await self._receive())
        if "version" not in self._socket.path_params and isinstance(given.get("state"), str):
            self._model = self._server.issuer(self._model, given["state"])
            self._lane, self._shaper = self._server.scheduler.stream_lane(self._model.key), self._server.shaper(self._model)
        opened = open_with(given, self._model, self._server.tokens, self._key_id)
        stream = Stream(opened.spec, self._done, self._loop)
        self._lane.open(stream)
        self._stream, self._opened = stream, opened
        if opened.snapshot is not None:
            summary = opened.snapshot.summary
            self._frames, self._nats = int(summary["frames"]), float(summary["nats"])
            self._lag_max, self._lag_sum = float(summary["lag_ms_max"]), float(summary["lag_ms_sum"])
            self._json_frames = opened.snapshot.samples if opened.audio is None else 0
        card = self._model.card
        self._send(
            {
                "type": "opened",
                "model": card.name,
                "version": card.version,
                "model_sample_rate": card.x.sample_rate,
                "frame_size": card.x.size,
                **opened.settings,
                "frame": opened.spec.frame,
                "samples": self._place()[0],
                "limits": {"message_bytes": self._server.limits.max_message_bytes, "idle_s": self._server.limits.stream_idle_s},
            }
        )

    def _parse(self, message: str | bytes) -> dict[str, Any]:
        if isinstance(message, bytes):
            raise WrongMessageKind('the first message must be text, {"type": "open", …}, unless the settings come in the query')
        try:
            parsed = orjson.loads(message)
        except orjson.JSONDecodeError as exc:
            raise InvalidInput(f"a text message must be JSON: {exc}") from exc
        if not isinstance(parsed, dict) or not isinstance(parsed.get("type"), str):
            raise InvalidInput.at("type", 'a text message is an object with a "type"')
        return parsed

    # Reading.

    async def _receive(self) -> str | bytes:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        self._alive = self._server.clock()
        data: str | bytes | None = message.get("text")
        if data is None:
            data = message["bytes"]
        if len(data) > self._server.limits.max_message_bytes:
            raise BodyTooLarge(f"a message has at most {self._server.limits.max_message_bytes} bytes, this one {len(data)}: cut it")
        return data

    async def _read(self) -> None:
        while self._closing is None:
            if not self._room.is_set():
                await self._room.wait()
                continue
            if self._rest:
                self._hand_in_piece()
                if self._drained is not None and not self._rest:
                    self._say_draining()
                continue
            data = await self._receive()
            if self._drained is not None:
                continue  # it will be replayed to the next server
            if isinstance(data, bytes):
                await self._audio(data)
                continue
            message = self._parse(data)
            kind = message.pop("type")
            handler = HANDLERS.get(kind)
            if handler is None:
                raise InvalidInput.at("type", f'"{kind[:40]}" is unknown: one of {", ".join(HANDLERS)}')
            keys, act = handler
            for name in message:
                if name not in keys:
                    raise InvalidInput.at(name, f"is no key of {kind}, which takes {', '.join(keys) or 'none'}")
            if act(self, message):
                return

    async def _audio(self, data: bytes) -> None:
        audio = self._must_be_open().audio
        if audio is None:
            raise WrongMessageKind('this stream was opened with encoding "json": send {"type": "frames", "frames": [[…]]} as text')
        if audio.is_heavy(len(data)):
            self._pushing = True  # its state is not to be looked at
            try:
                frames = await asyncio.to_thread(audio.push, data)
            finally:
                self._pushing = False
        else:
            frames = audio.push(data)
        if len(frames):
            self._hand_in(frames, None)
        elif self._drained is not None:
            self._say_draining()

    def _on_frames(self, message: dict[str, Any]) -> bool:
        opened, x = self._must_be_open(), self._model.card.x
        if opened.audio is not None:
            raise WrongMessageKind(f'this stream was opened with encoding "{opened.settings["encoding"]}": send audio as binary messages')
        frames = arrays.read_rows(message.get("frames"), "frames", x, MOST_WAITING)
        mask = message.get("mask")
        self._json_frames += len(frames)
        self._hand_in(
            frames.reshape(len(frames), -1), None if mask is None else arrays.read_mask(mask, x, len(frames)).reshape(len(frames), -1)
        )
        return False

    def _on_gap(self, message: dict[str, Any]) -> bool:
        count = message.get("frames")
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_GAP:
            raise InvalidInput.at("frames", f"must be a whole number between 1 and {MOST_GAP}")
        self._on_flush({})
        lost = np.broadcast_to(np.float32(0), (count, self._model.card.x.size))  # takes no memory, however many
        self._hand_in(lost, lost)
        return False

    def _on_flush(self, message: dict[str, Any]) -> bool:
        opened = self._must_be_open()
        if opened.audio is not None:
            x, mask = opened.audio.flush()
            if len(x):
                self._hand_in(x, mask)
        return False

    def _on_marker(self, message: dict[str, Any]) -> bool:
        name = message.get("id")
        if not isinstance(name, str | int) or (isinstance(name, str) and len(name) > MOST_ID):
            raise InvalidInput.at("id", f"a marker has an id, a string of at most {MOST_ID} characters or a whole number")
        self._feed(_About("marker", id=message["id"]))
        return False

    def _on_snapshot(self, message: dict[str, Any]) -> bool:
        self._feed(_About("state", *self._place()), wants_state=True)
        return False

    def _on_keep_alive(self, message: dict[str, Any]) -> bool:
        return False

    def _on_close(self, message: dict[str, Any]) -> bool:
        self._feed(_About("closed", *self._place()), wants_state=True)
        return True

    def _hand_in(self, x: NDArray[np.float32], mask: NDArray[np.float32] | None) -> None:
        """Before more is read, `_read` gives all of it to the lane."""
        self._server.charge(caller_of(self._socket), self._price(len(x)))
        self._rest.append(_Rest(x, mask, self._server.clock()))

    def _hand_in_piece(self) -> None:
        rest = self._rest.popleft()
        x, mask = rest.x, rest.mask
        if len(x) > MOST_WAITING:
            self._rest.appendleft(_Rest(x[PIECE:], None if mask is None else mask[PIECE:], rest.received))
            x, mask = x[:PIECE], None if mask is None else mask[:PIECE]
        every, before = self._must_be_open().settings["token_every"], self._accepted
        self._token_due |= bool(every) and (before + len(x)) // every > before // every
        due = self._token_due and not self._rest  # a token stands at a message's end: the client cannot send half a gap again
        self._token_due &= not due
        self._feed(_About("results", *self._place(with_audio=due)), x, mask, wants_state=due, received=rest.received)

    def _price(self, frames: int) -> int:
        assert self._stream is not None
        return frames * (1 + self._stream.spec.steps)

    @property
    def _accepted(self) -> int:
        assert self._stream is not None
        return self._frames + self._stream.waiting

    def _place(self, with_audio: bool = True) -> tuple[int, dict[str, Any] | None]:
        """Input samples (or JSON frames) taken so far, and the state of the input."""
        opened = self._must_be_open()
        if opened.audio is None:
            return self._json_frames, None
        return opened.audio.samples, opened.audio.state() if with_audio else None

    def _must_be_open(self) -> Opened:
        assert self._opened is not None
        return self._opened

    def _feed(self, about: _About, x: Any = None, mask: Any = None, *, wants_state: bool = False, received: float | None = None) -> None:
        assert self._stream is not None
        if x is None:
            x = np.empty((0, self._model.card.x.size), np.float32)
        self._waiting += max(1, len(x))
        self._make_room()
        received = self._server.clock() if received is None else received
        self._lane.feed(Portion(self._stream, x, mask, received, wants_state, about, self._call.request_id))

    # Answering.

    def _done(self, portion: Portion) -> None:
        """The lane has finished a portion."""
        self._waiting -= max(1, len(portion.x))
        self._alive = self._server.clock()
        try:
            self._answer(portion)
        except ElbowError as error:
            self._refuse(error)
        except Exception:
            LOG.exception("an answer to a stream could not be made")
            self._refuse(BackendFailure("the answer could not be made"))
        self._make_room()

    def _answer(self, portion: Portion) -> None:
        if portion.error is not None:
            self._server.refund(caller_of(self._socket), self._price(len(portion.x)))
            self._refuse(portion.error if isinstance(portion.error, ElbowError) else BackendFailure("the engine failed"))
            return
        about: _About = portion.about
        if len(portion.x):
            self._report(portion, about)
        if about.what == "marker":
            self._send({"type": "marker", "id": about.id})
        elif portion.wants_state:
            self._hand_over(portion, about)

    def _report(self, portion: Portion, about: _About) -> None:
        lag_ms = 1e3 * (self._server.clock() - portion.received)
        self._frames += len(portion.x)
        self._nats += float(np.nansum(portion.elbo))
        self._lag_max, self._lag_sum = max(self._lag_max, lag_ms), self._lag_sum + lag_ms * len(portion.x)
        self._server.metrics.stream_lag.observe(lag_ms / 1e3)
        assert self._stream is not None
        results = self._shaper.results(portion, self._stream.spec)
        if (surprise := results[0]["surprise_quantile"]) is not None:
            self._server.metrics.of_model(self._model.name, self._model.version).elbo_quantile.observe(1 - surprise)
        self._send(
            {
                "type": "results",
                "first_frame": portion.first_frame,
                "results": results,
                "samples": about.samples,
                "lag_ms": round(lag_ms, 3),
            }
        )

    def _hand_over(self, portion: Portion, about: _About) -> None:
        """What goes with a token: `state` by request or in time, the summary at the end, `draining` at shutdown."""
        assert portion.state is not None
        frame = portion.first_frame + len(portion.x)
        summary = {"frames": self._frames, "nats": self._nats, "lag_ms_max": self._lag_max, "lag_ms_sum": self._lag_sum}
        snapshot = Snapshot(self._must_be_open().settings, frame, about.samples, summary, portion.state, about.audio or {})
        token = self._server.tokens.issue(snapshot, self._model.sha256, self._key_id)
        self._server.metrics.tokens_issued.inc()
        if about.what == "closed":
            mean = self._lag_sum / self._frames if self._frames else 0.0
            said = {"frames": self._frames, "nats": self._nats, "lag_ms_max": round(self._lag_max, 3), "lag_ms_mean": round(mean, 3)}
            self._send({"type": "closed", **said, "state": token})
            self._end(1000)
        else:
            what = "state" if about.what == "results" else about.what
            self._send({"type": what, "frame": frame, "samples": about.samples, "state": token})
            if what == "draining":
                self._end(RESTART)

    def _refuse(self, error: ElbowError) -> None:
        """The first problem ends the stream and is counted; others (of portions that were in line with it) are the same end."""
        if self._closing is not None:
            return
        if self._rest:
            self._server.refund(caller_of(self._socket), self._price(sum(len(rest.x) for rest in self._rest)))
            self._rest.clear()
        self._server.metrics.refused(error.code, self._call, ended=STATUS[type(error)])
        message: dict[str, Any] = {"type": "error", "code": error.code, "error": error.detail, "request_id": self._call.request_id}
        if error.fields:
            message["field"] = error.fields[0][0]
        if isinstance(error, RetryLater):
            message["retry_after_s"] = error.retry_after_s
        self._send(message)
        self._end(CLOSE_CODES.get(type(error), BAD_PAYLOAD))

    def _send(self, message: dict[str, Any]) -> None:
        if self._closing is None:
            self._outgoing.append(orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY))
            self._unsent += len(self._outgoing[-1])
            self._make_room()
            self._news.set()

    def _end(self, code: int) -> None:
        if self._closing is None:
            self._closing = code
            self._room.set()
            self._news.set()

    def _make_room(self) -> None:
        """Reading stops beyond what may wait, and goes on when half of it is gone."""
        full = max(self._waiting / MOST_WAITING, self._unsent / MOST_UNSENT)
        if full <= 0.5 or self._closing is not None:
            self._room.set()
        elif full > 1:
            self._room.clear()

    async def _write(self) -> None:
        """Sends what there is, in order; closes after the last message."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._outgoing:
                    message = self._outgoing.popleft()
                    await self._socket.send({"type": "websocket.send", "text": message.decode()})
                    self._unsent -= len(message)
                    self._alive = self._server.clock()
                    self._make_room()
                if self._closing is not None:
                    break
            if self._socket.application_state is WebSocketState.CONNECTED:
                await self._socket.close(self._closing)
        except (WebSocketDisconnect, RuntimeError, OSError) as exc:
            LOG.debug("a stream's client left while it was answered", extra={"request_id": self._call.request_id, "reason": str(exc)})
        finally:
            self._end(1000)  # nobody takes anything any more: whoever waits to read waits no longer
            if self._drained is not None:
                self._drained.set()

    def _check_idle(self, task: asyncio.Task[None] | None) -> None:
        """Ends the reading task when nothing was heard for long, else looks again later. A client that waits for the server is not idle."""
        if task is None or task.done() or self._closing is not None:
            return
        now, patience = self._server.clock(), self._server.limits.stream_idle_s
        if self._waiting:
            self._alive = now
        left = self._alive + patience - now
        if left > 0:
            self._loop.call_later(left, self._check_idle, task)
            return
        what = "taken of what was answered" if self._unsent else "heard"
        self._refuse(ClientIdle(f"nothing was {what} for {patience:.0f} s: send keep_alive to stay, and read the answers"))
        task.cancel()


Handler = tuple[tuple[str, ...], Callable[[Connection, dict[str, Any]], bool]]
HANDLERS: dict[str, Handler] = {
    "frames": (("frames", "mask"), Connection._on_frames),
    "gap": (("frames",), Connection._on_gap),
    "flush": ((), Connection._on_flush),
    "marker": (("id",), Connection._on_marker),
    "snapshot": ((), Connection._on_snapshot),
    "keep_alive": ((), Connection._on_keep_alive),
    "close": ((), Connection._on_close),
}
"""Text message -> the keys it may have, and what is done; True ends the reading."""
