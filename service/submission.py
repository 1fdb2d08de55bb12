"""Hands work to the scheduler on behalf of a client who may leave: then it is cancelled, and its rows or slot are free at the next tick."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.deps import Server, caller_of
from service.errors import STATUS, ElbowError, problem
from service.jobs import with_events, work_of
from service.keys import Caller
from service.replies import dump
from service.repository import ServedModel
from service.scheduler.job import Job, JobResult, StepEvent
from service.streams.opening import spec_of
from service.streams.stateless import Frames, settle
from service.streams.stream import Portion, Stream, StreamDoor, StreamSpec
from service.telemetry import Metrics

T = TypeVar("T")
EVENT_STREAM = "text/event-stream"

DRIFT_ROWS = 4
"""Rows of one request whose ELBO is placed among the card's quantiles: enough to see a drift, and nothing at 10,000 rows."""


async def submit(request: Request, server: Server, model: ServedModel, job: Job) -> JobResult:
    """The job's result.

    Raises:
        ClientDisconnect: the client left; the job was cancelled.
        ElbowError: as the scheduler says.
    """
    return await _unless_gone(request, _run(server, model, job, caller_of(request)))


async def filter_alone(request: Request, server: Server, lane: StreamDoor, frames: Frames) -> Portion:
    """The frames of one request, filtered from the state they brought, on a stream that lasts as long as the request.

    Raises:
        ClientDisconnect: the client left; frames not yet filtered were dropped.
        ElbowError: as the lane says.
    """
    (portion,) = await on_streams(request, server, lane, [(spec_of(frames.settings, 0.0, frames.snapshot), frames)])
    return portion


async def on_streams(request: Request, server: Server, lane: StreamDoor, parts: Sequence[tuple[StreamSpec, Frames]]) -> list[Portion]:
    """The frames of one request, each part on a stream of its own that lasts as long as the request. Raises as `filter_alone`."""
    loop = asyncio.get_running_loop()
    streams: list[Stream] = []
    answers: list[asyncio.Future[Portion]] = []
    try:
        for spec, _ in parts:
            answers.append(loop.create_future())
            stream = Stream(spec, settle(answers[-1]), loop)
            lane.open(stream)
            streams.append(stream)
        for stream, (_, frames) in zip(streams, parts, strict=True):
            lane.feed(Portion(stream, frames.x, frames.mask, server.clock(), wants_state=True))
        portions = await _unless_gone(request, asyncio.gather(*answers))
    finally:
        for stream in streams:
            lane.close(stream)
    for portion in portions:
        if portion.error is not None:
            raise portion.error
    return portions


@dataclass(frozen=True)
class Show:
    """How events look: the data of `step` and of `done`."""

    step: Callable[[StepEvent], dict[str, Any]]
    result: Callable[[JobResult], dict[str, Any]]


class EventReply(StreamingResponse):
    """Events as they come. However the reply ends, and be it before its first event was sent, the job ends with it."""

    def __init__(self, frames: AsyncIterator[bytes], running: asyncio.Task[JobResult]):
        super().__init__(frames, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


async def events(request: Request, server: Server, model: ServedModel, job: Job, *, show: Show) -> EventReply:
    """Server-sent events of a job: `step` for every row-step, then `done` with the reply, or `error` with a problem document.

    Returns once the first event is there, so that a refusal at the door is an ordinary error reply.

    Raises:
        ClientDisconnect: the client left before; the job was cancelled.
        ElbowError: as the scheduler says.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[StepEvent | None] = asyncio.Queue()
    job = with_events(job, lambda event: _from_engine_thread(loop, told, event))
    running = asyncio.create_task(_run(server, model, job, caller_of(request)))
    running.add_done_callback(lambda _: told.put_nowait(None))
    try:
        first = await _unless_gone(request, told.get())
    except BaseException:
        running.cancel()
        raise
    if first is None:
        running.result()  # raises what the scheduler refused with

    async def frames() -> AsyncIterator[bytes]:
        event = first
        try:
            while event is not None:
                yield _frame("step", show.step(event))
                event = await told.get()
            result = await running
            last = _frame("done", show.result(result))
            server.scheduler.replied(job, result)
            yield last
        except ElbowError as exc:  # the status line is long gone: the error travels as an event
            server.metrics.refused(exc.code, request.scope["call"], ended=STATUS[type(exc)])
            yield _frame("error", problem(exc, instance=request.url.path, request_id=request.scope["request_id"]))

    return EventReply(frames(), running)


async def _run(server: Server, model: ServedModel, job: Job, caller: Caller) -> JobResult:
    """The job's result, on the caller's account: what was not done is not paid for."""
    work = work_of(job)
    server.charge(caller, work)
    try:
        with _in_flight(server.metrics, model, job.rows):
            result = await server.scheduler.submit(job)
    except ElbowError:
        server.refund(caller, work)
        raise
    if caller.quota is not None:
        server.refund(caller, max(0, job.rows * job.budget.steps - sum(result.steps_used.tolist())))
    _observe(server, model, job, result)
    return result


def _from_engine_thread(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[StepEvent | None], event: StepEvent) -> None:
    loop.call_soon_threadsafe(told.put_nowait, event)


def _frame(event: str, data: dict[str, Any]) -> bytes:
    return b"event: " + event.encode() + b"\ndata: " + dump(data) + b"\n\n"


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """`answer`, for as long as there is somebody to give it to: else it is cancelled. The request's body has been read.

    Raises:
        ClientDisconnect: the client left.
    """
    waiting = asyncio.current_task()
    assert waiting is not None
    watcher = asyncio.create_task(_cancel_when_gone(request.receive, waiting))
    try:
        return await answer
    except asyncio.CancelledError:
        if not watcher.done():
            raise
        waiting.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()


async def _cancel_when_gone(receive: Receive, waiting: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    waiting.cancel()


@contextmanager
def _in_flight(metrics: Metrics, model: ServedModel, rows: int) -> Iterator[None]:
    gauge = metrics.of_model(model.name, model.version).rows_in_flight
    gauge.inc(rows)
    try:
        yield
    finally:
        gauge.dec(rows)


def _observe(server: Server, model: ServedModel, job: Job, result: JobResult) -> None:
    """One observation per request: steps and ELBO as means over its rows. Quantiles are of single rows: of the first few."""
    seen, timing = server.metrics.of_model(model.name, model.version), result.timing
    rows, used, elbos = len(result.stop_reason), result.steps_used.tolist(), result.elbo.tolist()
    steps, elbo = sum(used) / rows, sum(elbos) / rows
    seen.queue_wait.observe(timing.queue_ms / 1e3)
    seen.step_duration.observe(timing.compute_ms / 1e3 / (steps + 1))
    seen.batch_rows.observe(timing.batch_rows)
    seen.steps_used.observe(steps)
    if job.budget.deadline is not None and server.clock() > job.budget.deadline:
        seen.deadline_missed.inc()
    if math.isfinite(elbo):
        seen.negative_elbo.observe(-elbo)
        for row in range(min(rows, DRIFT_ROWS)):
            quantile = None if job.first_step is not None else model.reference.quantile(used[row], elbos[row])
            if quantile is not None:
                seen.elbo_quantile.observe(quantile)
    if result.trace is not None:
        gain = sum(trace[-1] - trace[0] for trace in result.trace) / rows
        if math.isfinite(gain):
            seen.gained(gain)
