"""The scheduler as the HTTP process sees it when it runs in a process of its own: every call becomes a message, every answer settles here.

    submit, feed, … ─► one frame per turn of the event loop ─► engine process ─► one frame per tick ─► futures and portions settled

What must be known at once is told along with the answers: whether a model's line is full, and what its lane has done so far. When
the engine process ends, whoever waits is answered with BackendFailure, and the scheduler is no longer `alive`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from models.artifact import Artifact, Card
from service.apart.wire import PORTION, Message, Unpacker, pack
from service.engine.base import Loaded
from service.errors import BackendFailure, ElbowError, Overloaded, ShuttingDown, UnknownModel
from service.scheduler.job import Job, JobResult, StepEvent, reply_of
from service.scheduler.static_lane import Counts
from service.settings import Settings
from service.streams.lane import StreamCounts, no_lane
from service.streams.stream import Portion, Stream
from service.telemetry import REQUEST_ID

_LOG = logging.getLogger("elbow.apart")
COMMAND: tuple[str, ...] = ("-P", "-m", "service.apart.engine_process")
"""What the interpreter is started with, before the number of the socket (benchmarks/soak.py puts engines that fail in its place)."""
RETRY_AFTER_S = 1.0
EXIT_CODE_S = 0.2
END_S = 5.0
"""For an engine process that was told to stop, and has, to end."""


class RemoteEngine:
    """An engine in the engine process, as the repository holds it until it is added to the scheduler."""

    def __init__(self, scheduler: RemoteScheduler, handle: int, card: Card, name: str, precision: str):
        self._scheduler, self.handle, self.card, self.name, self.precision = scheduler, handle, card, name, precision

    def close(self) -> None:
        with suppress(ElbowError):  # whose process has ended is closed
            self._scheduler.call_and_wait("discard", self.handle)


class RemoteLane:
    """The streams of one filter. `open`, `feed` and `close` run in the event loop.

    `live` counts a stream until the engine process has freed its slot.
    """

    def __init__(self, key: str, capacity: int, scheduler: RemoteScheduler):
        self.key, self.capacity, self.counts = key, capacity, StreamCounts()
        self.retiring, self._scheduler = False, scheduler
        self._numbers: dict[Stream, int] = {}
        self._leaving: set[int] = set()

    @property
    def draining(self) -> bool:
        return self._scheduler.stopping

    @property
    def live(self) -> int:
        return len(self._numbers) + len(self._leaving)

    def open(self, stream: Stream) -> None:
        """Raises as StreamLane does."""
        self._scheduler.refuse_if_over()
        if self.retiring:
            raise UnknownModel(f"{self.key} is being unloaded: open the stream on another version")
        if self.live >= self.capacity:
            raise Overloaded(f"{self.capacity} streams of {self.key} are open, no more are taken", retry_after_s=5.0)
        self._numbers[stream] = self._scheduler.open(self, stream)

    def feed(self, portion: Portion) -> None:
        stream = portion.stream
        if stream.closed:  # nobody waits for it
            return
        stream.waiting += len(portion.x)
        self._scheduler.send_portion(self._numbers[stream], portion)

    def close(self, stream: Stream) -> None:
        """Portions still in line are dropped, nobody waits for them. Closing twice is closing once."""
        if not stream.closed:
            stream.closed = True
            number = self._numbers.pop(stream)
            self._leaving.add(number)
            self._scheduler.send("close", number)

    def left(self, number: int) -> None:
        self._leaving.discard(number)


class RemoteScheduler:
    """Schedules in another process. Made by `start`, in the event loop in which it is used; `call_and_wait` may be called from any
    other thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes]):
        self.process = process
        self.stopping = False
        self._loop = loop
        self._out: list[Message] = []
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._jobs: dict[int, tuple[asyncio.Future[JobResult], Callable[[StepEvent], None] | None]] = {}
        self._portions: dict[int, tuple[int, Portion]] = {}
        """Under way, with the number of their stream."""
        self._full: dict[str, Overloaded | None] = {}
        self._counts: dict[str, Counts] = {}
        self._lanes: dict[str, RemoteLane] = {}
        self._streams: dict[int, tuple[RemoteLane, set[int]]] = {}
        """Of each stream its lane, and the numbers of its portions under way."""
        self._lost: ElbowError | None = None
        self._link: asyncio.WriteTransport | None = None
        self._handlers: dict[str, Callable[..., None]] = {
            "answered": self._answered,
            "event": self._stepped,
            "portion": self._filtered,
            "left": self._left,
            "returned": self._returned,
            "status": self._told,
            "skipped": lambda _: None,
        }

    @classmethod
    async def start(cls, settings: Settings) -> RemoteScheduler:
        """Starts the engine process and waits for it to be ready.

        Raises:
            BackendFailure: it ended before.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            command = [sys.executable, *COMMAND, str(theirs.fileno())]
            # a group of its own: Ctrl-C in a terminal is for the server, which tells it when to stop
            process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0)
        scheduler = cls(loop, process)
        ours.setblocking(False)
        await loop.create_unix_connection(lambda: _Link(scheduler), sock=ours)
        scheduler.send("settings", settings)
        await scheduler.call("ready")
        return scheduler

    @property
    def alive(self) -> bool:
        return self._lost is None or self.stopping

    # Models, from worker threads.

    def build(self, artifact: Artifact) -> RemoteEngine:
        """The artifact's engine, made in the engine process, which opens and verifies it once more.

        Raises:
            ArtifactError: as `build_engine`.
        """
        return self._built(self.call_and_wait("build", artifact.path))

    def build_closed_form(self) -> RemoteEngine:
        return self._built(self.call_and_wait("build_closed_form"))

    def add_model(self, key: str, engine: Loaded) -> None:
        """Makes `engine`, one of ours, serve jobs for `key`. Raises whatever the engine raises when warmed up."""
        assert isinstance(engine, RemoteEngine)
        capacity, counts = self.call_and_wait("add", key, engine.handle)  # of a filter: how many streams it has room for
        self._in_loop(self._added, key, capacity, counts)

    def remove_model(self, key: str) -> None:
        """Refuses new jobs for `key`; its engine is closed after the jobs it has.

        Raises:
            UnknownModel: no such model.
        """
        self._in_loop(self._removed, key)
        self.call_and_wait("remove", key)

    # Jobs, in the event loop.

    async def submit(self, job: Job) -> JobResult:
        """As Scheduler.submit."""
        self.refuse_if_over()
        number, future = self.number(), self._loop.create_future()
        self._jobs[number] = (future, job.on_step)
        self.send("submit", number, job, job.on_step is not None, time.monotonic(), REQUEST_ID.get())
        try:
            return await future
        except asyncio.CancelledError:
            if self._jobs.pop(number, None) is not None:
                self.send("abandon", number)
            raise

    def check_door(self, key: str) -> None:
        """Raises Overloaded or ShuttingDown if a job for `key` would have been refused when the engine process last told."""
        self.refuse_if_over()
        full = self._full.get(key)
        if full is not None:
            raise Overloaded(full.detail, retry_after_s=full.retry_after_s)

    def replied(self, job: Job, result: JobResult) -> None:
        """How long a reply took is learned from by those models whose deadlines are asked for."""
        if job.budget.deadline is not None:
            self.send("replied", job.model, reply_of(job, result, time.monotonic()))

    async def predicted_ms(self, key: str, rows: int, program: str = "step", samples: int = 1) -> float:
        """As Scheduler.predicted_ms."""
        return float(await self.call("predicted_ms", key, rows, program, samples))

    def stats(self) -> dict[str, Counts]:
        """Counts per static model, as of its last answer."""
        return dict(self._counts)

    def stream_lane(self, key: str) -> RemoteLane:
        """As Scheduler.stream_lane."""
        self.refuse_if_over()
        lane = self._lanes.get(key)
        if lane is None:
            raise no_lane(key, key in self._counts)
        return lane

    def stream_stats(self) -> dict[str, tuple[int, StreamCounts]]:
        """Live streams and counts of every filter."""
        return {key: (lane.live, lane.counts) for key, lane in self._lanes.items()}

    async def stop(self, grace_s: float) -> None:
        """As Scheduler.stop; then the engine process ends."""
        self.stopping = True
        try:
            async with asyncio.timeout(grace_s + END_S):
                with suppress(BackendFailure):
                    await self.call("stop", grace_s)
        except TimeoutError:  # it hangs: whoever waits is answered as it ends
            self.process.kill()
        if self._link is not None:
            self._link.close()
        try:
            async with asyncio.timeout(END_S):
                await asyncio.to_thread(self.process.wait)
        except TimeoutError:
            self.process.kill()

    # The link. In the event loop.

    def number(self) -> int:
        return next(self._numbers)

    def send(self, kind: str, *values: Any) -> None:
        """Sends a message, with all others of this turn of the event loop."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append((kind, *values))

    def send_portion(self, stream: int, portion: Portion) -> None:
        if self._lost is not None:
            portion.error = self._lost
            self._loop.call_soon(portion.settle)
            return
        number = self.number()
        self._portions[number] = (stream, portion)
        self._streams[stream][1].add(number)
        self.send("feed", stream, number, portion.x, portion.mask, portion.received, portion.wants_state, portion.request_id)

    async def call(self, name: str, *arguments: Any) -> Any:
        """What a call of EngineProcess gives, or raises."""
        if self._lost is not None:
            raise self._lost
        number = self.number()
        future = self._calls[number] = self._loop.create_future()
        self.send("call", number, name, arguments)
        return await future

    def call_and_wait(self, name: str, *arguments: Any) -> Any:
        """`call` from another thread than the event loop's."""
        return asyncio.run_coroutine_threadsafe(self.call(name, *arguments), self._loop).result()

    def refuse_if_over(self) -> None:
        if self.stopping:
            raise ShuttingDown("the server is shutting down", retry_after_s=RETRY_AFTER_S)
        if self._lost is not None:
            raise self._lost

    def open(self, lane: RemoteLane, stream: Stream) -> int:
        """The number by which both processes know the stream."""
        number = self.number()
        self._streams[number] = (lane, set())
        self.send("open", number, lane.key, stream.spec)
        return number

    def connected(self, link: asyncio.WriteTransport) -> None:
        self._link = link

    def received(self, message: Message) -> None:
        """Something the engine process says."""
        kind, *values = message
        self._handlers[kind](*values)

    def lost(self) -> None:
        """The engine process has ended: nobody is left waiting."""
        error = self._lost = BackendFailure("the engine process has ended: this server must be started anew")
        if not self.stopping:
            with suppress(subprocess.TimeoutExpired):  # its socket closes an instant before it can be asked why
                self.process.wait(EXIT_CODE_S)
            _LOG.critical("the engine process has ended", extra={"exit_code": self.process.poll()})
        self._out, self._link = [], None
        waiting = [*self._calls.values(), *(future for future, _ in self._jobs.values())]
        portions = [portion for _, portion in self._portions.values()]
        for table in (self._calls, self._jobs, self._portions, self._streams):
            table.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        for portion in portions:
            portion.error = error
            portion.settle()

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._link is None or not out:
            return
        try:
            self._link.writelines(pack(out))
        except MemoryError:
            for message in out:
                self._send_alone(message)

    def _send_alone(self, message: Message) -> None:
        """One that cannot be packed fails, and keeps no other from being sent."""
        assert self._link is not None
        try:
            self._link.writelines(pack([message]))
        except MemoryError:
            kind, number, *rest = message
            failure = BackendFailure("there is no memory to hand this over")
            if kind == "submit":
                self._answered(number, failure)
            elif kind == "feed":
                self._filtered(rest[0], (0, 0, [], [], [], [], [], None, failure))
            else:
                raise

    def _answered(self, number: int, outcome: JobResult | ElbowError) -> None:
        future, _ = self._jobs.pop(number, (None, None))
        if future is None or future.done():  # whoever asked has gone
            return
        if isinstance(outcome, JobResult):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _stepped(self, number: int, event: StepEvent) -> None:
        _, on_step = self._jobs.get(number, (None, None))
        if on_step is not None:
            on_step(event)

    def _filtered(self, number: int, values: tuple[Any, ...]) -> None:
        stream, portion = self._portions.pop(number, (0, None))
        if portion is None:  # its stream was closed before
            return
        self._streams[stream][1].discard(number)
        for name, value in zip(PORTION, values, strict=True):
            setattr(portion, name, value)
        portion.settle()

    def _left(self, number: int) -> None:
        lane, portions = self._streams.pop(number)
        lane.left(number)
        for portion in portions:  # dropped: nobody waits for them
            del self._portions[portion]

    def _returned(self, number: int, value: Any, error: Exception | None) -> None:
        future = self._calls.pop(number)
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def _told(self, key: str, full: Overloaded | None, counts: Counts | StreamCounts) -> None:
        if isinstance(counts, StreamCounts):
            if (lane := self._lanes.get(key)) is not None:
                lane.counts = counts
        elif key in self._counts:
            self._full[key], self._counts[key] = full, counts

    def _added(self, key: str, capacity: int | None, counts: Counts) -> None:
        self._removed(key)
        if capacity is None:
            self._counts[key] = counts
        else:
            self._lanes[key] = RemoteLane(key, capacity, self)

    def _removed(self, key: str) -> None:
        self._counts.pop(key, None)
        self._full.pop(key, None)
        if (lane := self._lanes.pop(key, None)) is not None:
            lane.retiring = True

    def _in_loop(self, change: Callable[..., None], *values: Any) -> None:
        """Makes a change in the event loop, where everything here is read, and waits for it."""

        async def made() -> None:
            change(*values)

        asyncio.run_coroutine_threadsafe(made(), self._loop).result()

    def _built(self, engine: tuple[int, Card, str, str]) -> RemoteEngine:
        return RemoteEngine(self, *engine)


class _Link(asyncio.Protocol):
    """Our end of the socket pair."""

    def __init__(self, scheduler: RemoteScheduler):
        self._scheduler, self._unpacker = scheduler, Unpacker()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._scheduler.connected(cast("asyncio.WriteTransport", transport))  # uvloop's are not, but have its methods

    def data_received(self, data: bytes) -> None:
        for message in self._unpacker.feed(data):
            try:
                self._scheduler.received(message)
            except Exception:  # those behind it are answered all the same
                _LOG.exception("an answer could not be handed over")

    def connection_lost(self, exc: Exception | None) -> None:
        self._scheduler.lost()
