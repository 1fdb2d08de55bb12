"""Whatever happens, every waiter is answered exactly once; and nobody waits for a neighbour's steps."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.closed_form import ClosedFormEngine
from service.errors import BackendFailure, DeadlineExceeded, ElbowError, Overloaded, ShuttingDown, UnknownModel
from service.scheduler.job import Ask, JobResult
from service.scheduler.lane import choose
from service.scheduler.scheduler import Scheduler
from service.scheduler.static_lane import JobAbandoned
from service.telemetry import MOST_NAMED, REQUEST_ID
from tests.service.scheduler.support import Clock, job, make, run

ASKS = (Ask(), Ask(measure=False), Ask(trace=True), Ask(importance_samples=30, mean=True), Ask(z=2, x=5))


def per_row(clock, seconds=0.0005, **kwargs):
    """A scheduler on an engine whose step takes so long per row: four rows fill a tick of two milliseconds."""
    delay = lambda program, size: seconds * size if program == "step" else 1e-5  # noqa: E731
    return make(clock, ClosedFormEngine(delay=delay, sleep=clock.sleep), **kwargs)


def is_empty(scheduler):
    lane = scheduler._running[0]
    return not lane.has_work() and lane.weight_waiting == 0 and lane._order.jobs == 0 and lane.counts.rows_waiting == 0


# Exactly once


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 12), st.sampled_from(range(len(ASKS))), st.booleans(), st.booleans()),
        min_size=1,
        max_size=10,
    ),
    abandoned=st.sets(st.integers(0, 9)),
    failing=st.sets(st.integers(0, 40), max_size=3),
    ticks_before=st.integers(0, 6),
    stop=st.booleans(),
    slots=st.sampled_from([8, 16]),
)
def test_every_job_is_answered_exactly_once(*, jobs, abandoned, failing, ticks_before, stop, slots):
    """Under cancellation, engine failures and shutdown at random; `Ticket.answer` raises at a second answer."""
    clock, calls = Clock(), iter(range(10**9))
    armed = []
    engine = ClosedFormEngine(
        jitter=0.1, delay=lambda _, size: 1e-4 * size, sleep=clock.sleep, fail_on=lambda *_: bool(armed) and next(calls) in failing
    )
    scheduler = make(clock, engine, slots=slots)
    armed.append(True)
    tickets = []
    for i, (rows, steps, ask, elastic, generate) in enumerate(jobs):
        prior = generate and ASKS[ask].z > 0
        tickets.append(scheduler.enqueue(job(rows, steps, seed=100 * i, ask=ASKS[ask], elastic=elastic, prior=prior)))
        if i % 3 == 0:
            scheduler.tick()
    for _ in range(ticks_before):
        scheduler.tick()
    for i in abandoned & set(range(len(tickets))):
        scheduler.abandon(tickets[i])
    if stop:
        scheduler._begin_stop(0.003)
    scheduler.drain()
    for ticket in tickets:
        assert isinstance(ticket.outcome, JobResult | BackendFailure | ShuttingDown | JobAbandoned)
        assert not isinstance(ticket.outcome, JobAbandoned) or ticket.abandoned
        if isinstance(ticket.outcome, JobResult):
            assert all(len(getattr(ticket.outcome, name)) == ticket.job.rows for name in ("elbo", "step", "stop_reason"))
    assert is_empty(scheduler)
    if not stop:
        armed.clear()
        assert isinstance(run(scheduler, job(slots, 3))[0], JobResult), "every slot came back"


@pytest.mark.parametrize("program", ["init", "step", "score", "decode", "posterior_sample", "sample_x"])
def test_an_engine_failure_is_answered_to_everyone_in_the_batch_and_the_lane_lives_on(program):
    broken = []
    engine = ClosedFormEngine(fail_on=lambda name, _: name in broken)
    scheduler = make(engine=engine)
    broken.append(program)
    full = Ask(x=2, mean=True)
    outcomes = run(scheduler, job(2, 3, ask=full), job(3, 3, ask=full))
    assert all(isinstance(outcome, BackendFailure) and isinstance(outcome.__cause__, RuntimeError) for outcome in outcomes)
    assert is_empty(scheduler)
    broken.clear()
    assert isinstance(run(scheduler, job(2, 3, ask=full))[0], JobResult)


def test_a_failed_batch_spares_jobs_that_were_not_in_it():
    broken = []
    scheduler = make(engine=ClosedFormEngine(fail_on=lambda name, _: name in broken))
    long, short = scheduler.enqueue(job(1, 50)), scheduler.enqueue(job(1, 50, ask=Ask(trace=True)))
    scheduler.tick()
    broken.append("score")
    scheduler.tick()
    broken.clear()
    scheduler.drain()
    assert isinstance(long.outcome, JobResult)
    assert isinstance(short.outcome, BackendFailure)


def asked_by(request_id, scheduler, *jobs):
    """The tickets of jobs that one request brings."""
    before = REQUEST_ID.set(request_id)
    tickets = [scheduler.enqueue(one) for one in jobs]
    REQUEST_ID.reset(before)
    return tickets


@pytest.mark.parametrize("program", ["init", "step", "score", "decode"])
def test_the_log_says_once_per_failed_batch_why_and_whose(program, caplog):
    broken = []
    scheduler = make(engine=ClosedFormEngine(fail_on=lambda name, _: name in broken))
    broken.append(program)
    asked_by("a", scheduler, job(2, 3, ask=Ask(mean=True)), job(1, 3, ask=Ask(mean=True)))
    asked_by("b", scheduler, job(1, 3, ask=Ask(mean=True)))
    scheduler.drain()
    (line,) = caplog.records
    assert (line.name, line.levelname, line.message) == ("elbow.scheduler", "ERROR", "a batch failed")
    assert (line.model, line.jobs, line.request_ids) == ("m", 3, ["a", "b"])
    assert "fail" in str(line.exc_info[1])
    assert line.exc_info[2] is not None


def test_the_log_names_a_few_of_many_requests(caplog):
    broken = []
    scheduler = make(engine=ClosedFormEngine(fail_on=lambda name, _: name in broken))
    broken.append("step")
    for one in range(3 * MOST_NAMED):
        asked_by(f"request {one}", scheduler, job(1, 3))
    scheduler.drain()
    (line,) = caplog.records
    assert line.jobs == 3 * MOST_NAMED
    assert line.request_ids == [f"request {one}" for one in range(MOST_NAMED)]


def test_a_fault_of_the_scheduler_itself_is_answered_too_and_the_log_says_whose(monkeypatch, caplog):
    scheduler = make()
    (ticket,) = asked_by("mine", scheduler, job(1, 3))
    monkeypatch.setattr(scheduler._running[0], "_refine", lambda _: 1 / 0)
    scheduler.drain()
    assert isinstance(ticket.outcome, BackendFailure)
    assert is_empty(scheduler)
    (line,) = caplog.records
    assert (line.message, line.model, line.request_ids) == ("a tick failed", "m", ["mine"])
    assert line.exc_info[0] is ZeroDivisionError


# Fairness


def test_a_one_step_job_beside_long_ones_is_done_in_the_tick_it_enters():
    clock = Clock()
    scheduler = per_row(clock)
    long = [scheduler.enqueue(job(1, 64, seed=i)) for i in range(32)]
    for _ in range(11):
        scheduler.tick()
    for i in range(10):
        short = scheduler.enqueue(job(1, 1, seed=100 + i))
        scheduler.tick()
        assert isinstance(short.outcome, JobResult)
    assert all(ticket.outcome is None for ticket in long)


@pytest.mark.parametrize("big", [job(10_000, 8), job(1, 1, ask=Ask(importance_samples=200_000))], ids=["10,000 rows", "200,000 samples"])
def test_a_huge_job_does_not_hold_up_small_ones(big):
    clock = Clock()
    delay = lambda program, size: {"step": 2e-4, "score": 1e-5}.get(program, 1e-6) * size  # noqa: E731
    scheduler = make(clock, ClosedFormEngine(delay=delay, sleep=clock.sleep), slots=64)
    huge = scheduler.enqueue(big)
    for _ in range(5):
        scheduler.tick()
    for i in range(20):
        short, started = scheduler.enqueue(job(1, 1, seed=10**6 + i)), clock.now
        while short.outcome is None:
            scheduler.tick()
        assert clock.now - started < 0.01
    assert huge.outcome is None


def test_jobs_share_by_request_not_by_row():
    """Beside a job of 40 rows, a one-row job of 20 steps gets about half of the places, not one in 41."""
    clock = Clock()
    scheduler = per_row(clock)
    big = scheduler.enqueue(job(40, 64))
    scheduler.tick()
    small, ticks = scheduler.enqueue(job(1, 20, seed=500)), 0
    while small.outcome is None:
        scheduler.tick()
        ticks += 1
    assert ticks <= 25
    assert big.outcome is None


def test_newcomers_do_not_starve_a_long_job():
    clock = Clock()
    scheduler = per_row(clock)
    long, ticks = scheduler.enqueue(job(1, 30)), 0
    while long.outcome is None:
        for i in range(3):  # as many one-step jobs at every tick as fit into it
            scheduler.enqueue(job(1, 1, seed=1000 + 10 * ticks + i))
        scheduler.tick()
        ticks += 1
        assert ticks < 200
    scheduler.drain()


def test_deadlines_go_first_but_take_at_most_half_of_a_crowded_tick():
    clock = Clock()
    scheduler = per_row(clock)
    patient = [scheduler.enqueue(job(1, 16, seed=i)) for i in range(8)]
    urgent = [scheduler.enqueue(job(1, 16, seed=50 + i, deadline=clock.now + 10)) for i in range(8)]
    while any(ticket.outcome is None for ticket in urgent):
        scheduler.tick()
    done = [scheduler._running[0]._rows.done[slot] for slot, t in enumerate(scheduler._running[0]._rows.tickets) if t in patient]
    assert all(steps > 0 for steps in done)
    scheduler.drain()


def test_models_take_turns_and_an_earlier_deadline_goes_first():
    clock = Clock()
    scheduler = Scheduler(clock=clock)
    order = []
    for key in ("a", "b"):
        note = lambda program, _, key=key: bool(order.append(key)) if program == "step" else False  # noqa: E731
        scheduler.add_model(key, ClosedFormEngine(fail_on=note))
    order.clear()
    tickets = [scheduler.enqueue(job(1, 6, model=key)) for key in ("a", "a", "b")]
    scheduler.drain()
    assert order == ["a", "b"] * 6
    order.clear()
    tickets = [scheduler.enqueue(job(1, 6, model="a")), scheduler.enqueue(job(1, 3, model="b", deadline=clock.now + 1))]
    scheduler.drain()
    assert order[:3] == ["b"] * 3
    assert all(isinstance(ticket.outcome, JobResult) for ticket in tickets)


# The door


def test_a_full_line_refuses_with_the_time_to_come_back():
    clock = Clock()
    scheduler = per_row(clock, queue_rows=20, slots=8)
    tickets = [scheduler.enqueue(job(1, 10, seed=i)) for i in range(20)]
    with pytest.raises(Overloaded) as refused:
        scheduler.enqueue(job(1, 10))
    assert refused.value.retry_after_s >= 0.1
    scheduler.tick()
    tickets.append(scheduler.enqueue(job(1, 10)))
    scheduler.drain()
    assert all(isinstance(ticket.outcome, JobResult) for ticket in tickets)


def test_a_job_larger_than_the_line_is_taken_and_does_not_close_the_door():
    scheduler = make(queue_rows=64, slots=16)
    big = scheduler.enqueue(job(1000, 2))
    small = scheduler.enqueue(job(1, 2))
    scheduler.drain()
    assert isinstance(big.outcome, JobResult)
    assert isinstance(small.outcome, JobResult)


def test_unknown_and_removed_models_are_refused_and_a_removed_one_finishes_its_jobs_first():
    scheduler = make()
    with pytest.raises(UnknownModel):
        scheduler.enqueue(job(model="other"))
    ticket, closed = scheduler.enqueue(job(1, 5)), []
    scheduler._running[0].engine.close = lambda: closed.append(True)
    scheduler.remove_model("m")
    with pytest.raises(UnknownModel):
        scheduler.enqueue(job())
    assert not closed
    scheduler.drain()
    assert isinstance(ticket.outcome, JobResult)
    assert closed == [True]


def test_a_replaced_model_finishes_its_jobs_while_the_new_one_takes_over():
    scheduler = make(engine=ClosedFormEngine(rate=0.5))
    old = scheduler.enqueue(job(1, 20))
    scheduler.tick()
    scheduler.add_model("m", ClosedFormEngine(rate=0.1))
    new = scheduler.enqueue(job(1, 1))
    scheduler.drain()
    assert isinstance(old.outcome, JobResult)
    assert isinstance(new.outcome, JobResult)
    assert len(scheduler._running) == 1


def test_predictions_come_from_the_warm_up():
    clock = Clock()
    scheduler = per_row(clock)
    assert asyncio.run(scheduler.predicted_ms("m", 4)) == pytest.approx(2.0)
    assert asyncio.run(scheduler.predicted_ms("m", 128)) == pytest.approx(64.0)
    ticket = scheduler.enqueue(job(1, 10))
    scheduler.drain()
    assert ticket.outcome.timing.predicted_ms == pytest.approx(5.5, abs=0.1)
    assert ticket.outcome.timing.compute_ms == pytest.approx(5.0, abs=0.1)
    assert scheduler.stats()["m"].steps == 10


# With the thread


def test_jobs_from_an_event_loop_are_answered():
    async def main():
        scheduler = Scheduler()
        scheduler.add_model("m", ClosedFormEngine())
        scheduler.start()
        results = await asyncio.gather(*(scheduler.submit(job(1 + i % 3, i % 7, seed=i)) for i in range(60)))
        await scheduler.stop(5.0)
        with pytest.raises(ShuttingDown):
            await scheduler.submit(job())
        return results

    results = asyncio.run(main())
    assert [result.steps_used.tolist() for result in results] == [[i % 7] * (1 + i % 3) for i in range(60)]


def test_a_cancelled_waiter_frees_its_rows():
    async def main():
        scheduler = make()
        task = asyncio.create_task(scheduler.submit(job(5, 100)))
        await asyncio.sleep(0)
        scheduler.tick()
        assert scheduler.stats()["m"].rows_in_flight == 5
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        scheduler.tick()
        assert scheduler.stats()["m"].rows_in_flight == 0
        assert scheduler.stats()["m"].jobs_abandoned == 1
        assert is_empty(scheduler)

    asyncio.run(main())


def test_cancelling_at_any_moment_beside_the_engine_thread_leaves_nothing_behind():
    async def main():
        rng = np.random.default_rng(0)
        scheduler = Scheduler(slots=32)
        scheduler.add_model("m", ClosedFormEngine())
        scheduler.start()
        tasks = [asyncio.create_task(scheduler.submit(job(1 + i % 4, i % 9, seed=i, ask=ASKS[i % len(ASKS)]))) for i in range(300)]
        for task in rng.permutation(np.array(tasks, object)):
            await asyncio.sleep(0)
            if rng.random() < 0.4:
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        empty = await scheduler.submit(job(32, 2))
        counts = scheduler.stats()["m"]
        await scheduler.stop(1.0)
        return outcomes, empty, counts

    outcomes, last, counts = asyncio.run(main())
    assert all(isinstance(outcome, JobResult | asyncio.CancelledError) for outcome in outcomes)
    assert last.steps_used.tolist() == [2] * 32
    assert counts.jobs_done + counts.jobs_abandoned == 301
    assert counts.rows_waiting == counts.jobs_failed == 0


def test_stop_answers_everyone_within_its_grace():
    async def main():
        scheduler = Scheduler()
        scheduler.add_model("m", ClosedFormEngine(delay=lambda program, _: 0.01 if program == "step" else 0.0))
        scheduler.start()
        tasks = [asyncio.create_task(scheduler.submit(job(1, steps, seed=steps, elastic=steps == 100))) for steps in (1, 100, 128)]
        await asyncio.sleep(0.05)
        await scheduler.stop(0.1)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    short, elastic, exact = asyncio.run(main())
    assert short.steps_used.tolist() == [1]
    assert elastic.stop_reason == ["degraded"]
    assert isinstance(exact, ShuttingDown)


def test_errors_reach_the_waiter_as_themselves():
    async def main():
        scheduler = Scheduler()
        broken = []
        scheduler.add_model("m", ClosedFormEngine(fail_on=lambda *_: bool(broken)))
        broken.append(True)
        scheduler.start()
        outcomes = await asyncio.gather(
            scheduler.submit(job()), scheduler.submit(job(model="none")), scheduler.submit(job(steps=1000)), return_exceptions=True
        )
        await scheduler.stop(1.0)
        return outcomes

    outcomes = asyncio.run(main())
    assert all(isinstance(outcome, ElbowError) for outcome in outcomes)
    assert [outcome.code for outcome in outcomes] == ["backend_failure", "unknown_model", "invalid_input"]


def test_seeds_beyond_63_bits_are_seeds():
    one, other = run(make(), *(job(1, 2, x=np.ones((1, 8), np.float32), seed=seed) for seed in (2**64 - 2, 2**63)))
    assert one.elbo != other.elbo


def slow_scores(clock):
    delay = lambda program, size: {"score": 1e-5, "init": 2e-5}.get(program, 1e-6) * size  # noqa: E731
    return make(clock, ClosedFormEngine(delay=delay, sleep=clock.sleep))


def test_a_large_job_alone_fills_its_ticks():
    scheduler = slow_scores(Clock())
    ticket, ticks = scheduler.enqueue(job(500, 2)), 0
    while ticket.outcome is None:
        scheduler.tick()
        ticks += 1
    assert ticks <= 500 / 50 + 10  # half of a tick of two milliseconds holds 50 rows' init


def test_final_stages_of_a_job_with_a_deadline_do_not_hold_up_those_without():
    clock = Clock()
    scheduler = slow_scores(clock)
    scheduler.enqueue(job(15, 1, ask=Ask(importance_samples=2000), deadline=clock.now + 500))
    for _ in range(5):
        scheduler.tick()
    started = clock.now
    run_on(scheduler, scheduler.enqueue(job(1, 1, seed=99, ask=Ask(mean=True))))
    assert clock.now - started < 0.03


def test_final_stages_end_when_their_exact_deadline_has_passed():
    clock = Clock()
    scheduler = slow_scores(clock)
    ask = Ask(importance_samples=2000)
    deadline = clock.now + 0.3  # one of them alone takes 0.2 s
    tickets = [scheduler.enqueue(job(10, 1, seed=100 * i, ask=ask, deadline=deadline)) for i in range(4)]
    scheduler.drain()
    assert sum(isinstance(ticket.outcome, DeadlineExceeded) for ticket in tickets) >= 2
    assert clock.now < deadline + 0.02


def run_on(scheduler, ticket):
    while ticket.outcome is None:
        scheduler.tick()


def test_no_lane_starves_beside_any_number_of_urgent_ones():
    lanes = [SimpleNamespace(has_work=lambda: True, passed_over=0, last_served=0, due=i) for i in range(9)]
    lanes[8].due = math.inf
    served = []
    for tick in range(300):
        chosen = choose(lanes, lambda lane: lane.due)
        chosen.last_served = tick
        served.append(lanes.index(chosen))
    assert served.count(8) >= 300 // 12


def test_someone_who_left_before_his_job_was_taken_in_is_not_worked_for():
    scheduler = make()
    ticket = scheduler.enqueue(job(1, 50))
    lane = scheduler._lanes["m"]
    received = lane._receive
    entered = list(lane.inbox)
    lane.inbox.clear()

    def late():  # it comes between the look at the inbox and the look at who has left
        received()
        lane.inbox.extend(entered)
        entered.clear()

    lane._receive = late
    ticket.abandoned = lane.someone_left = True
    scheduler.drain()
    assert isinstance(ticket.outcome, JobAbandoned)
    assert lane.counts.steps == 0
