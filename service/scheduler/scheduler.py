"""The scheduler: jobs in from any event loop, one engine thread that ticks, answers back with one call per tick and loop.

    submit ─► door (known model? room? in time?) ─► lane's inbox ─► engine thread: tick, tick, … ─► settle ─► reply

Without `start` there is no thread: `enqueue` and `tick` then drive everything synchronously (tests, tools).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace

from service.engine.base import Engine
from service.errors import BackendFailure, ElbowError, Overloaded, ShuttingDown, UnknownModel
from service.scheduler.job import Job, JobResult, Reply, reply_of
from service.scheduler.lane import Answer, Lane, Loop, choose
from service.scheduler.queue import Ticket
from service.scheduler.static_lane import Counts, StaticLane
from service.scheduler.warm_up import warm_up
from service.streams.lane import StreamCounts, StreamLane, no_lane

_LOG = logging.getLogger("elbow.scheduler")
_AFTER_FAULT_S = 0.05
"""The engine thread's pause after an exception that no lane owned up to, so that one that comes back at once does not fill the log."""
SWITCH_INTERVAL_S = 2e-5
"""After each run of the engine its thread asks for the interpreter back. With Python's 5 ms it waits for whoever else runs to pause;
with this it waits for one request at most (docs/decisions/surface.md has what that is worth)."""
_LARGEST_SHARE = 4
"""A job weighs at most 1/4 of the waiting line, however many rows it has: it trickles in, and must not close the door to others."""


class Scheduler:
    """Schedules jobs on the models it was given.

    Args:
        clock: monotonic seconds; deadlines of jobs are on this clock.
        queue_rows: rows that may wait, per model, before new jobs are refused.
        slots: rows in flight, per model. streams: open at once, per filter.
        tick_s: how long a tick should take at most.
        reply_s: kept free before a deadline, for the way back to the client.
        retry_after_s: least time after which a refused client should come back.
        max_wait_s: work, in seconds, that may be promised per model before new jobs are refused (load.py).
        lane: what serves a model (benchmarks/schedule.py puts request-level batching in its place).
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        queue_rows: int = 4096,
        slots: int = 1024,
        streams: int = 1024,
        tick_s: float = 0.002,
        reply_s: float = 0.0005,
        retry_after_s: float = 0.1,
        max_wait_s: float = math.inf,
        lane: type[StaticLane] = StaticLane,
    ):
        self._clock, self._queue_rows, self._slots, self._tick_s, self._reply_s = clock, queue_rows, slots, tick_s, reply_s
        self._retry_after_s, self._max_wait_s, self._lane = retry_after_s, max_wait_s, lane
        self._streams = streams
        self._lanes: dict[str, StaticLane] = {}
        self._stream_lanes: dict[str, StreamLane] = {}
        self._running: list[Lane] = []
        """Also lanes that were removed and still have jobs. Replaced, never changed in place: two threads read it."""
        self._door = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._stop_at = float("inf")
        self._ticks = 0
        self._held: list[Answer] = []
        """Answers that will be handed over when the engine next runs for long."""
        self._ended: ElbowError | None = None
        """Why nothing is worked on any more: what everybody is answered who comes yet."""
        self._ending = threading.Lock()

    # Life.

    def start(self) -> None:
        """Starts the engine thread."""
        if self._thread is not None:
            raise RuntimeError("the scheduler was already started")
        self._thread = threading.Thread(target=self._loop, name="elbow-engine", daemon=True)
        self._thread.start()

    async def stop(self, grace_s: float) -> None:
        """Refuses new jobs, finishes what it can within `grace_s` seconds and answers the rest with ShuttingDown.

        Elastic rows that had a step give up the others (`degraded`). Called again, it may end earlier, never later.
        """
        self._begin_stop(grace_s)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        else:
            self.drain()
        for lane in self._running:
            _close(lane)
        self._running, self._lanes, self._stream_lanes = [], {}, {}

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def alive(self) -> bool:
        """False when the engine thread has ended though nobody stopped it: only a fresh process helps."""
        return self._ended is None or self._stopping

    def wait(self, seconds: float) -> bool:
        """Waits at most so long for the engine thread to end; whether it has, whatever the reason."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def drain(self) -> None:
        """Ticks until there is nothing left to do, or until the grace of `stop` is over."""
        while self.tick():
            if self._clock() >= self._stop_at:
                break
        if self._stopping:
            self._fail_rest(ShuttingDown("the server is shutting down", retry_after_s=self._retry_after_s))

    # Models.

    def add_model(self, key: str, engine: Engine) -> None:
        """Makes `engine` serve jobs for `key`: slots, warm-up and cost are measured here, in the calling thread.

        A model of the same key is replaced: jobs it has are finished by it. Raises whatever the engine raises when warmed up.
        """
        static: StaticLane | None = None
        streams: StreamLane | None = None
        if engine.card.family == "filter":
            streams = StreamLane(key, engine, self._clock, self._streams, self._awake)
            streams.warm_up()
        else:
            static = self._lane(key, engine, self._clock, self._slots, self._tick_s, self._reply_s, self._max_wait_s)
            static.hand_over = self._hand_over
            warm_up(engine, static.cost, self._clock, self._slots)
        with self._door:
            for replaced in (self._lanes.pop(key, None), self._stream_lanes.pop(key, None)):
                if replaced is not None:
                    replaced.retiring = True
            if static is not None:
                self._lanes[key] = static
                self._running = [*self._running, static]
            if streams is not None:
                self._stream_lanes[key] = streams
                self._running = [*self._running, streams]

    def remove_model(self, key: str) -> None:
        """Refuses new jobs for `key`; its engine is closed, on the engine thread, after the jobs it has.

        Raises:
            UnknownModel: no such model.
        """
        with self._door:
            lane: Lane | None = self._lanes.pop(key, None) or self._stream_lanes.pop(key, None)
            if lane is None:
                raise UnknownModel(f"no model {key!r} is loaded")
            lane.retiring = True
        self._wake.set()

    # Jobs.

    async def submit(self, job: Job) -> JobResult:
        """Waits for the result of `job`. Cancelling this frees the job's rows at the next tick.

        Raises:
            InvalidInput: the job does not fit the model.
            UnknownModel: the model is not loaded.
            Overloaded: too many rows wait already; with `retry_after_s`.
            ShuttingDown: the server is stopping.
            DeadlineExceeded: the deadline cannot be, or was not, met.
            BackendFailure: the engine failed.
        """
        ticket = Ticket(job, self._clock())
        ticket.loop = asyncio.get_running_loop()
        ticket.future = ticket.loop.create_future()
        self.take_in(ticket)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            self.abandon(ticket)
            raise

    def check_door(self, key: str) -> None:
        """Raises Overloaded or ShuttingDown if any job for `key` would be refused now: asked before its body is read and parsed."""
        self._refuse_if_over()
        if (refusal := self.full(key)) is not None:
            raise refusal

    def full(self, key: str) -> Overloaded | None:
        """Why a job of one row would find no room at `key` now."""
        lane = self._lanes.get(key)
        return None if lane is None else self._no_room(lane, 1)

    def take_in(self, ticket: Ticket) -> None:
        """Puts a job in its model's line; its answer will be settled in the ticket's loop. Raises as `submit` does at the door."""
        job = ticket.job
        lane = self._lanes.get(job.model)
        if lane is not None:
            lane.prepare(ticket, ticket.arrived)
        with self._door:
            self._refuse_if_over()
            if lane is None or lane.retiring:
                lane = self._lanes.get(job.model)
            if lane is None:
                raise UnknownModel(f"no model {job.model!r} is loaded")
            weight = min(job.rows, self._queue_rows // _LARGEST_SHARE)
            if (refusal := self._no_room(lane, weight)) is not None:
                raise refusal
            ticket.weight = weight
            lane.load.take(ticket.work)
            lane.weight_in += weight
            lane.inbox.append(ticket)
        if not self._wake.is_set() or self._ended is not None:
            self._awake()

    def replied(self, job: Job, result: JobResult) -> None:
        """The reply is about to leave: how long it took since the scheduler's answer is learned from."""
        self.learn(job.model, reply_of(job, result, self._clock()))

    def learn(self, key: str, reply: Reply) -> None:
        """`replied` for callers that say when it was."""
        lane = self._lanes.get(key)
        if lane is not None and math.isfinite(reply.answered):
            lane.replied(reply)

    def enqueue(self, job: Job) -> Ticket:
        """`submit` for callers without an event loop: the answer appears as the ticket's `outcome`. Raises as `submit` does at the door."""
        ticket = Ticket(job, self._clock())
        self.take_in(ticket)
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """The waiter has gone: its rows are freed at the next tick."""
        ticket.abandoned = True
        for lane in self._running:
            if isinstance(lane, StaticLane) and lane.key == ticket.job.model:
                lane.someone_left = True
        self._wake.set()

    def tick(self) -> bool:
        """One tick of the lane whose turn it is; False if there was nothing to do. On the engine thread only."""
        self._close_retired()
        lane = choose(self._running, self._urgency)
        if lane is None:
            return False
        self._ticks += 1
        lane.last_served = self._ticks
        if self._held and not _will_step(lane):
            self._hand_over()
        try:
            lane.tick(self._tick_s)
        except Exception as exc:
            self._fail_lane(lane, exc)
        self._settle(lane)
        return True

    # What is known of the models.

    def counts(self, key: str) -> Counts | StreamCounts | None:
        """Counts of a model, as of now; None where there is none of that key."""
        lane = self._lanes.get(key) or self._stream_lanes.get(key)
        return None if lane is None else copy(lane.counts)

    def stats(self) -> dict[str, Counts]:
        """Counts per loaded model, as of now."""
        return {key: replace(lane.counts) for key, lane in list(self._lanes.items())}

    async def predicted_ms(self, key: str, rows: int, program: str = "step", samples: int = 1) -> float:
        """As `cost_ms`."""
        return self.cost_ms(key, rows, program, samples)

    def capacity(self, key: str) -> int | None:
        """Streams of a filter that may be open at once; None for any other key."""
        lane = self._stream_lanes.get(key)
        return None if lane is None else lane.capacity

    def cost_ms(self, key: str, rows: int, program: str = "step", samples: int = 1) -> float:
        """Milliseconds that one run of `program` takes on so many rows (and samples, for programs that take samples).

        Raises:
            UnknownModel: no such model.
        """
        lane = self._lanes.get(key) or self._stream_lanes.get(key)
        if lane is None:
            raise UnknownModel(f"no model {key!r} is loaded")
        return 1e3 * lane.cost.seconds(program, rows * samples)

    def stream_lane(self, key: str) -> StreamLane:
        """Where the streams of a filter go.

        Raises:
            UnknownModel: no such model. InvalidInput: it is no filter. ShuttingDown: the server is stopping.
        """
        self._refuse_if_over()  # first: once stopped there are no lanes, and every model would seem unknown
        lane = self._stream_lanes.get(key)
        if lane is None:
            raise no_lane(key, key in self._lanes)
        return lane

    def stream_stats(self) -> dict[str, tuple[int, StreamCounts]]:
        """Live streams and counts of every loaded filter."""
        return {key: (lane.live, copy(lane.counts)) for key, lane in list(self._stream_lanes.items())}

    # Inside.

    def _awake(self) -> None:
        """There is something to do. Where the engine thread has ended, it is to answer whoever came a moment too late."""
        self._wake.set()
        if self._ended is not None:
            self._fail_rest(self._ended)

    def _refuse_if_over(self) -> None:
        if self._stopping:
            raise ShuttingDown("the server is shutting down", retry_after_s=self._retry_after_s)
        if self._ended is not None:
            raise self._ended

    def _no_room(self, lane: StaticLane, weight: int) -> Overloaded | None:
        waiting, load = lane.weight_waiting, lane.load
        if waiting + weight > self._queue_rows:
            why = f"{waiting} rows wait for {lane.key}, {self._queue_rows} may"
        elif load.over:
            why = f"{lane.key} has {load.least_s:.1f} s of work to do, {load.max_wait_s:g} s may wait"
        else:
            return None
        return Overloaded(why, retry_after_s=max(self._retry_after_s, load.least_s))

    def _loop(self) -> None:
        over: ElbowError = BackendFailure("the engine thread has ended: this process must be started anew")
        try:
            self._tick_until_stopped()
            over = ShuttingDown("the server is shutting down", retry_after_s=self._retry_after_s)
        except BaseException:
            _LOG.critical("the engine thread has ended", exc_info=True)
        finally:
            self._ended = over
            self._fail_rest(over)

    def _tick_until_stopped(self) -> None:
        while True:
            self._wake.clear()
            try:
                worked = self.tick()
            except Exception:  # of no lane's work, or `tick` would have answered it
                _LOG.exception("a tick failed")
                time.sleep(_AFTER_FAULT_S)
                worked = True
            if worked:
                if self._clock() >= self._stop_at:
                    break
            elif self._stopping:
                break
            else:
                self._wake.wait()

    def _urgency(self, lane: Lane) -> float:
        """As the lane says; one that fails at saying so is served at once, for its answers to leave."""
        try:
            return lane.urgency()
        except Exception as exc:
            self._fail_lane(lane, exc)
            return -math.inf

    def _fail_lane(self, lane: Lane, cause: Exception) -> None:
        """A fault of ours: every waiter still gets an answer, and the other lanes live on."""
        _LOG.error("a tick failed", exc_info=cause, extra={"model": lane.key, "request_ids": lane.request_ids()})
        failure = BackendFailure(f"the scheduler failed on {lane.key}: {cause}")
        failure.__cause__ = cause
        lane.fail_all(failure)

    def _begin_stop(self, grace_s: float) -> None:
        with self._door:
            self._stopping = True
            self._stop_at = min(self._stop_at, self._clock() + grace_s)
        for lane in self._running:
            lane.draining = True
        self._wake.set()

    def _fail_rest(self, error: Exception) -> None:
        with self._ending:  # the engine thread at its end, and who comes after it
            for lane in self._running:
                try:
                    lane.fail_all(error)
                except Exception:
                    _LOG.exception("the rest of %s could not be answered", lane.key)
                self._held.extend(lane.answered())
            self._hand_over()

    def _close_retired(self) -> None:
        if not any(lane.retiring for lane in self._running):
            return
        with self._door:  # no job can enter a lane between the look and the close
            over = [lane for lane in self._running if lane.retiring and not lane.in_use()]
            self._running = [lane for lane in self._running if lane not in over]
        for lane in over:
            _close(lane)

    def _settle(self, lane: Lane) -> None:
        """Hands over what the lane has answered: at once, or, where a step follows, when that step runs.

        Whoever is told wakes up and takes the interpreter for a while. Beside a step this costs nothing; before it, with rows
        to admit, the engine thread would stand still. An answer with a deadline waits for nothing.
        """
        answers = lane.answered()
        self._held.extend(answers)
        if self._held and not (_will_step(lane) and all(_patient(answer) for answer in answers)):
            self._hand_over()

    def _hand_over(self) -> None:
        """One call per event loop, however many jobs were answered."""
        if not self._held:
            return
        by_loop: dict[Loop, list[Answer]] = {}
        for answer in self._held:
            if answer.loop is not None:
                by_loop.setdefault(answer.loop, []).append(answer)
        self._held = []
        for loop, answers in by_loop.items():
            try:
                loop.call_soon_threadsafe(_settle_all, answers)
            except RuntimeError:  # the loop was closed: nobody is left to tell
                _LOG.debug("an event loop was closed before %d answers reached it", len(answers))


def _will_step(lane: Lane) -> bool:
    return isinstance(lane, StaticLane) and lane.will_step


def _patient(answer: Answer) -> bool:
    return isinstance(answer, Ticket) and answer.deadline == math.inf


def _close(lane: Lane) -> None:
    try:
        lane.engine.close()
    except Exception:
        _LOG.exception("the engine of %s could not be closed", lane.key)


def _settle_all(answers: list[Answer]) -> None:
    for answer in answers:
        try:
            answer.settle()
        except Exception:  # those behind it are answered all the same
            _LOG.exception("an answer could not be handed over")
