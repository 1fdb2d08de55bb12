"""The engine process: the scheduler and its engines, asked over a socket by the HTTP process that started it.

    python -m service.apart.engine_process FD      (service/apart/remote.py starts it)

The main thread reads messages and puts jobs in line, the engine thread ticks, calls that take long (building an engine, warming it up,
stopping) run in threads of their own. It ignores the signals that a terminal sends to every process: it ends when it was told to
stop and the HTTP process has hung up, when that process is gone, or when its engine thread has died.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before anything can import onnxruntime, which else writes into the home folder

from models.artifact import Artifact, ArtifactError
from service.apart.wire import PORTION, Message, Part, Unpacker, pack
from service.building import builder_of, closed_form, scheduler_of
from service.engine.base import Engine
from service.errors import BackendFailure, ElbowError, Overloaded
from service.scheduler.job import Job, JobResult, StepEvent
from service.scheduler.queue import Ticket
from service.scheduler.scheduler import SWITCH_INTERVAL_S
from service.settings import Settings
from service.signing import signer_of_settings
from service.streams.lane import StreamLane
from service.streams.stream import Portion, Stream, StreamSpec
from service.telemetry import REQUEST_ID, configure_logging

_LOG = logging.getLogger("elbow.apart")
READ_BYTES = 2**18
REPORT_S = 0.1
AT_ONCE = frozenset({"ready", "predicted_ms"})
"""Calls that take no time, and get no thread."""


class Outbox:
    """What leaves for the HTTP process. As a `Loop` it settles answers at once, on the engine thread: to settle is to put in here.

    A frame is written by whoever made it as far as the socket takes it without waiting, and the rest by a thread of its own: the
    engine never waits for a reader.
    """

    def __init__(self, link: socket.socket):
        self._link = link
        self.tell: Callable[[], None] = _nothing
        """Puts in what should be known beside the answers of a tick."""
        self._messages: list[Message] = []
        self._unsent: deque[Part] = deque()
        self._lock, self._sending = threading.Lock(), threading.Lock()
        """Of the messages, and, around it, of the order in which frames are made and leave."""
        self._more = threading.Condition(self._lock)
        threading.Thread(target=self._send_rest, name="elbow-outbox", daemon=True).start()

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        callback(*args)
        self.tell()
        self.flush()

    def put(self, *message: Any) -> None:
        """Leaves with the next `flush`."""
        with self._lock:
            self._messages.append(message)

    def send(self, *message: Any) -> None:
        self.put(*message)
        self.flush()

    def flush(self) -> None:
        with self._sending:
            with self._lock:
                messages, self._messages = self._messages, []
                waits = bool(self._unsent)
            if not messages:
                return
            parts = _packed(messages)  # who has something to put in need not wait for this
            while parts and not waits:
                try:
                    sent = self._link.send(parts[0], socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except OSError:  # nobody is there any more
                    return
                waits = sent < len(parts[0])
                parts = [memoryview(parts[0])[sent:], *parts[1:]] if waits else parts[1:]
            if parts:
                with self._lock:
                    self._unsent.extend(parts)
                    self._more.notify()

    def _send_rest(self) -> None:
        while True:
            with self._more:
                while not self._unsent:
                    self._more.wait()
                part = self._unsent[0]
            try:
                self._link.sendall(part)
            except OSError:
                return
            with self._lock:
                self._unsent.popleft()


def _packed(messages: list[Message]) -> list[Part]:
    """One frame; what cannot be sent becomes a failure of its own, and keeps nobody else from being answered."""
    try:
        return pack(messages)
    except Exception:
        _LOG.exception("a message could not be packed", extra={"kinds": [kind for kind, *_ in messages]})
    return pack([message if _fits(message) else _failed(message) for message in messages])


def _fits(message: Message) -> bool:
    try:
        pack([message])
    except Exception:
        return False
    return True


def _failed(message: Message) -> Message:
    """What whoever waits for this one is told instead."""
    kind, number, *_ = message
    failure = BackendFailure("the engine process could not send its answer")
    return {
        "answered": (kind, number, failure),
        "portion": (kind, number, _portion_failed(failure)),
        "returned": (kind, number, None, failure),
    }.get(kind, ("skipped", number))


def _portion_failed(error: ElbowError) -> tuple[Any, ...]:
    return (0, 0, [], [], [], [], [], None, error)


def _nothing() -> None:
    """Until somebody has something to tell."""


class RemoteTicket(Ticket):
    """A job of the HTTP process: its answer is put in the outbox."""

    __slots__ = ("number", "owner")

    def __init__(self, owner: EngineProcess, number: int, job: Job, arrived: float):
        super().__init__(job, arrived)
        self.owner, self.number, self.loop = owner, number, owner.outbox

    def settle(self) -> None:
        self.owner.answered(self, self.outcome)


class RemoteStream(Stream):
    """A stream of the HTTP process."""

    def __init__(self, owner: EngineProcess, number: int, lane: StreamLane, spec: StreamSpec):
        super().__init__(spec, owner.filtered, owner.outbox)
        self.owner, self.number, self.lane = owner, number, lane

    def left(self) -> None:
        self.owner.outbox.send("left", self.number)


class EngineProcess:
    """Does what the HTTP process asks for. `handle` runs on the main thread."""

    def __init__(self, settings: Settings, outbox: Outbox):
        self.outbox = outbox
        self._scheduler, self._build, self._signer = scheduler_of(settings), builder_of(settings), signer_of_settings(settings)
        self._engines: dict[int, Engine] = {}
        self._handles = itertools.count()
        self._tickets: dict[int, RemoteTicket] = {}
        self._streams: dict[int, RemoteStream] = {}
        self._refused: dict[int, ElbowError] = {}
        """Streams that could not be opened, and why."""
        self._telling = threading.Lock()
        self._full: dict[str, bool] = {}
        """What the HTTP process was last told of each static model."""
        self._touched: set[str] = set()
        """Models that something was answered of since then."""
        self.outbox.tell = self._tell
        self._handlers: dict[str, Callable[..., None]] = {
            "submit": self._submit,
            "abandon": self._abandon,
            "replied": self._scheduler.learn,
            "open": self._open,
            "feed": self._feed,
            "close": self._close,
            "call": self._call,
        }
        self._calls: dict[str, Callable[..., Any]] = {
            "ready": lambda: None,
            "build": self._built,
            "build_closed_form": lambda: self._kept(closed_form()),
            "add": self._add,
            "remove": self._scheduler.remove_model,
            "discard": self._discard,
            "predicted_ms": self._scheduler.cost_ms,
            "stop": lambda grace_s: asyncio.run(self._scheduler.stop(grace_s)),
        }

    def start(self) -> None:
        self._scheduler.start()
        threading.Thread(target=self._report, name="elbow-report", daemon=True).start()

    def handle(self, message: Message) -> None:
        kind, *values = message
        self._handlers[kind](*values)

    # Told by the scheduler, on the engine thread.

    def answered(self, ticket: RemoteTicket, outcome: JobResult | BaseException | None) -> None:
        if self._tickets.pop(ticket.number, None) is None:
            return  # nobody waits for it any more
        if not isinstance(outcome, JobResult | ElbowError):
            outcome = BackendFailure(f"the scheduler failed on {ticket.job.model}: {outcome}")
        self.outbox.put("answered", ticket.number, outcome)
        self._touched.add(ticket.job.model)

    def filtered(self, portion: Portion) -> None:
        stream = portion.stream
        assert isinstance(stream, RemoteStream)
        if portion.error is not None and not isinstance(portion.error, ElbowError):
            portion.error = BackendFailure(f"the lane of {stream.lane.key} failed: {portion.error}")
        self.outbox.put("portion", portion.about, tuple(getattr(portion, name) for name in PORTION))
        self._touched.add(stream.lane.key)

    # Asked by the HTTP process.

    def _submit(self, number: int, job: Job, events: bool, arrived: float, request_id: str) -> None:
        REQUEST_ID.set(request_id)
        if events:
            object.__setattr__(job, "on_step", lambda event: self._stepped(number, event))
        ticket = self._tickets[number] = RemoteTicket(self, number, job, arrived)
        try:
            self._scheduler.take_in(ticket)
        except ElbowError as refusal:
            self.answered(ticket, refusal)
        except Exception as exc:
            _LOG.exception("a job could not be taken in", extra={"model": job.model, "request_ids": [request_id]})
            self.answered(ticket, BackendFailure(f"the scheduler failed on {job.model}: {exc}"))
        if self._full.get(job.model, False) != (self._scheduler.full(job.model) is not None):
            self._touched.add(job.model)
        if self._touched:
            self._tell()
        self.outbox.flush()

    def _stepped(self, number: int, event: StepEvent) -> None:
        self.outbox.send("event", number, event)

    def _abandon(self, number: int) -> None:
        if (ticket := self._tickets.pop(number, None)) is not None:
            self._scheduler.abandon(ticket)

    def _open(self, number: int, key: str, spec: StreamSpec) -> None:
        try:
            stream = self._streams[number] = RemoteStream(self, number, self._scheduler.stream_lane(key), spec)
        except ElbowError as refusal:  # the model went while the message was on its way
            self._refused[number] = refusal
            return
        with suppress(ElbowError):  # a slot that is just being freed: its first frames will have it
            stream.lane.open(stream)

    def _feed(self, number: int, portion: int, x: Any, mask: Any, received: float, wants_state: bool, request_id: str) -> None:
        if number in self._refused:
            self.outbox.send("portion", portion, _portion_failed(self._refused[number]))
            return
        stream = self._streams[number]
        made = Portion(stream, x, mask, received, wants_state, portion, request_id)
        try:
            if stream.slot < 0:
                stream.lane.open(stream)
        except ElbowError as refusal:
            made.error = refusal
            self.filtered(made)
            self.outbox.flush()
            return
        stream.lane.feed(made)

    def _close(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        self._refused.pop(number, None)
        if stream is None or stream.slot < 0:
            self.outbox.send("left", number)
        if stream is not None:
            stream.lane.close(stream)

    def _call(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name in AT_ONCE:
            self._answer_call(number, name, arguments)
            return
        threading.Thread(target=self._answer_call, args=(number, name, arguments), name=f"elbow-{name}", daemon=True).start()

    def _answer_call(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        value, error = None, None  # type: Any, Exception | None
        try:
            value = self._calls[name](*arguments)
        except (ElbowError, ArtifactError) as exc:
            error = exc
        except Exception as exc:  # of a library, perhaps, that the HTTP process has not loaded
            _LOG.exception("a call failed", extra={"call": name})
            error = RuntimeError(f"{type(exc).__name__}: {exc}")
        self.outbox.send("returned", number, value, error)

    def _built(self, path: Any) -> tuple[int, Any, str, str]:
        return self._kept(self._build(Artifact.open(path, self._signer)))

    def _kept(self, engine: Engine) -> tuple[int, Any, str, str]:
        handle = next(self._handles)
        self._engines[handle] = engine
        return handle, engine.card, engine.name, engine.precision

    def _add(self, key: str, handle: int) -> tuple[int | None, Any]:
        engine = self._engines[handle]
        self._scheduler.add_model(key, engine)
        del self._engines[handle]  # it is the scheduler's now
        with self._telling:
            self._full[key] = False
        return self._scheduler.capacity(key), self._scheduler.counts(key)

    def _discard(self, handle: int) -> None:
        if (engine := self._engines.pop(handle, None)) is not None:
            engine.close()

    def _tell(self) -> None:
        """Puts out what the HTTP process should know of the models that something was answered of."""
        with self._telling:
            touched, self._touched = self._touched, set()
            for key in touched:
                self._put_status(key)

    def _report(self) -> None:
        """Tells what long work has done so far, until the engine thread ends; if nobody stopped it, the process ends with it."""
        told: dict[str, Any] = {}
        while not self._scheduler.wait(REPORT_S):
            for key in (*self._scheduler.stats(), *self._scheduler.stream_stats()):
                with self._telling:
                    counts, full = self._scheduler.counts(key), self._scheduler.full(key)
                    if counts is not None and (vars(counts) != told.get(key) or self._full.get(key, False) != (full is not None)):
                        told[key] = vars(counts)
                        self._put_status(key)
            self.outbox.flush()
        if not self._scheduler.stopping:
            os._exit(1)

    def _put_status(self, key: str) -> None:
        """What is told last is what holds: looked up and put in under one lock."""
        counts = self._scheduler.counts(key)
        if counts is not None:
            full: Overloaded | None = self._scheduler.full(key)
            self._full[key] = full is not None
            self.outbox.put("status", key, full, counts)


def main(link: socket.socket) -> None:
    """Serves until the other end of `link` is closed; then the process ends, whatever its threads still do: nobody is left to tell."""
    code = 1
    try:
        _serve(link)
        code = 0
    except ConnectionResetError:  # it was closed with answers in it that nobody will read
        code = 0
    except BaseException:
        _LOG.critical("the engine process ends", exc_info=True)
    finally:
        os._exit(code)


def _serve(link: socket.socket) -> None:
    # SIGTTOU: a terminal may stop those in its background who write to it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    unpacker, outbox = Unpacker(), Outbox(link)
    process: EngineProcess | None = None
    while data := link.recv(READ_BYTES):
        for message in unpacker.feed(data):
            if process is None:
                settings: Settings = message[1]
                configure_logging(settings.log_level)
                process = EngineProcess(settings, outbox)
                process.start()
                continue
            try:
                process.handle(message)
            except Exception:
                _LOG.exception("a message could not be handled", extra={"kind": message[0]})


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
