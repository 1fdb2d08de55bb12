"""Whatever a lane raises, everybody who waits is answered once and the engine thread lives; if it ends, the process says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from service.errors import BackendFailure, ShuttingDown
from service.scheduler.scheduler import Scheduler
from service.streams.stream import Portion, Stream, StreamSpec
from tests.service.scheduler.support import job, make
from tests.service.streams.small_filter import SmallFilter, X, small_card


class Waiter:
    """A stream of "f", and what came back."""

    def __init__(self, scheduler: Scheduler, key: str = "f"):
        self.lane = scheduler.stream_lane(key)
        self.done: list[Portion] = []
        self.stream = Stream(StreamSpec(steps=0, seed=1), self.done.append, None)
        self.lane.open(self.stream)

    def feed(self, frames: int, *, wants_state: bool = False) -> Portion:
        portion = Portion(self.stream, np.zeros((frames, X), np.float32), None, 0.0, wants_state)
        self.lane.feed(portion)
        return portion


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """Models "m" and "f"; without an event loop, so answers are settled as the lane gives them."""
    scheduler = make(streams=8)
    monkeypatch.setattr(scheduler, "_settle", lambda lane: [answer.settle() for answer in lane.answered()])
    scheduler.add_model("f", SmallFilter())
    return scheduler


def broken(scheduler: Scheduler) -> set[str]:
    engine: Any = scheduler.stream_lane("f").engine
    methods: set[str] = engine.broken
    return methods


@pytest.mark.parametrize("frames", [0, 1])
@pytest.mark.parametrize("method", ["read_rows", "load_rows"])
def test_a_portion_whose_state_cannot_be_read_is_answered_with_those_behind_it(scheduler: Scheduler, method: str, frames: int) -> None:
    """A portion was taken out of line before its state was read: it was in nobody's hands when that raised."""
    failing, other = Waiter(scheduler), Waiter(scheduler)
    broken(scheduler).add(method)
    portions = [failing.feed(frames, wants_state=True), failing.feed(0)]
    if method == "read_rows":
        other.feed(2)
    scheduler.drain()
    assert failing.done == portions
    assert all(isinstance(portion.error, BackendFailure) for portion in portions)
    assert [portion.error for portion in other.done] == [None] * len(other.done)
    broken(scheduler).clear()
    later = Waiter(scheduler)
    later.feed(1, wants_state=True)
    scheduler.drain()
    assert later.done[0].state is not None


def test_a_lane_that_raises_as_it_says_how_urgent_it_is_is_answered_and_the_others_live(scheduler: Scheduler) -> None:
    ticket, waiter = scheduler.enqueue(job(1, 3)), Waiter(scheduler)
    portion = waiter.feed(1)
    waiter.lane.urgency = lambda: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    scheduler.drain()
    assert ticket.outcome is not None
    assert waiter.done == [portion]
    assert isinstance(portion.error, BackendFailure)


def test_a_job_that_cannot_be_taken_in_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make()
    lane: Any = scheduler._running[0]
    ticket = scheduler.enqueue(job(2, prior=True))
    monkeypatch.setattr(lane._stages, "needed", lambda _: 1 / 0)
    scheduler.drain()
    assert isinstance(ticket.outcome, BackendFailure)


def threaded(scenario: Callable[[Scheduler], Awaitable[None]]) -> None:
    async def run() -> None:
        scheduler = Scheduler(streams=8)
        scheduler.add_model("f", SmallFilter())
        scheduler.start()
        try:
            await asyncio.wait_for(scenario(scheduler), 10)
        finally:
            await scheduler.stop(1.0)

    asyncio.run(run())


async def answer(waiter: Waiter, frames: int = 1) -> Portion:
    waiter.stream.loop = asyncio.get_running_loop()
    done: asyncio.Future[Portion] = waiter.stream.loop.create_future()
    waiter.stream.on_done = done.set_result
    waiter.feed(frames, wants_state=True)
    return await asyncio.wait_for(done, 5)


def test_the_engine_thread_survives_an_engine_that_cannot_be_closed_and_a_fault_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scheduler: Scheduler) -> None:
        engine = SmallFilter()
        engine.broken.add("close")
        scheduler.add_model("g", engine)
        scheduler.remove_model("g")
        plain, faults = scheduler._close_retired, [1, 1]
        monkeypatch.setattr(scheduler, "_close_retired", lambda: faults.pop() / 0 if faults else plain())
        assert (await answer(Waiter(scheduler))).error is None
        assert scheduler.alive

    threaded(scenario)


def test_an_engine_thread_that_ends_answers_everybody_and_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(budget_s: float) -> None:
        raise SystemExit

    async def scenario(scheduler: Scheduler) -> None:
        waiter, idle = Waiter(scheduler), Waiter(scheduler)
        monkeypatch.setattr(waiter.lane, "tick", end)
        assert isinstance((await answer(waiter)).error, BackendFailure)
        while scheduler.alive:
            time.sleep(0.001)
        assert isinstance((await answer(idle)).error, BackendFailure)
        for refused in (lambda: scheduler.stream_lane("f"), lambda: scheduler.check_door("f")):
            with pytest.raises(BackendFailure, match="anew"):
                refused()
        with pytest.raises(BackendFailure, match="anew"):
            await scheduler.submit(job(1, 1, model="f"))

    threaded(scenario)


def test_a_stopped_scheduler_is_no_dead_one_and_knows_its_models_no_more() -> None:
    """A body that arrived after `stop` was told 404: no such model."""

    async def run() -> None:
        scheduler = Scheduler(streams=8)
        scheduler.add_model("f", SmallFilter())
        scheduler.start()
        await scheduler.stop(1.0)
        assert scheduler.alive
        with pytest.raises(ShuttingDown) as refused:
            scheduler.stream_lane("f")
        assert refused.value.retry_after_s > 0

    asyncio.run(run())


def test_probes_say_when_the_engine_thread_has_ended(serve: Callable[..., Any]) -> None:
    service = serve(small_card())
    paths = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
    assert [service.get(path).status_code for path in paths] == [200] * 4
    service.scheduler.alive = False
    assert [service.get(path).status_code for path in paths] == [503] * 4
    assert service.get("/livez").json() == {"live": False}
    assert "elbow_ready 0.0" in service.get("/metrics").text
