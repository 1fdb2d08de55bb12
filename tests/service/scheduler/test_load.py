"""Work promised in seconds: who is refused, who gives up steps, and what is kept free for the reply."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.closed_form import ClosedFormEngine
from service.errors import Overloaded, ShuttingDown, UnknownModel
from service.scheduler.job import JobResult, StopReason
from service.scheduler.load import KEPT, Load, kept_steps
from service.scheduler.reserve import Reserve
from tests.service.scheduler.support import Clock, job, make

STEP_S = 0.002
STEPS = 41
"""Not a multiple of the ticks that gather, so that rows are done between two of them."""


def timed(clock, **kwargs):
    """An engine whose step takes 2 ms whatever the batch, and a scheduler on it."""
    engine = ClosedFormEngine(delay=lambda program, _: STEP_S if program == "step" else 0.0001, sleep=clock.sleep)
    return make(clock, engine, **kwargs)


def loaded_to_the_brim(elastic, **kwargs):
    """A scheduler that has just refused, with the tickets it took and the refusal."""
    scheduler = timed(Clock(), max_wait_s=0.05, **kwargs)
    taken = []
    for number in range(100_000):
        try:
            taken.append(scheduler.enqueue(job(1, STEPS, seed=number, elastic=elastic)))
        except Overloaded as exc:
            return scheduler, taken, exc
    raise AssertionError("nothing was ever refused")


def test_the_line_is_bounded_by_the_time_it_takes_and_a_refusal_says_when_to_come_back():
    scheduler, taken, refusal = loaded_to_the_brim(elastic=False)
    assert refusal.retry_after_s >= 0.05
    with pytest.raises(Overloaded):
        scheduler.check_door("m")
    scheduler.drain()
    assert all(ticket.outcome.steps_used.tolist() == [STEPS] for ticket in taken)
    scheduler.check_door("m")  # all work was given back
    assert scheduler._lanes["m"].load.least_s == pytest.approx(0.0, abs=1e-9)


def test_elastic_requests_give_up_steps_before_anybody_is_refused():
    _, exact, _ = loaded_to_the_brim(elastic=False)
    scheduler, elastic, _ = loaded_to_the_brim(elastic=True)
    assert len(elastic) > 2 * len(exact)
    scheduler.drain()
    used = [int(ticket.outcome.steps_used[0]) for ticket in elastic]
    reasons = {ticket.outcome.stop_reason[0] for ticket in elastic}
    assert StopReason.DEGRADED in reasons
    assert min(used) >= kept_steps(STEPS)
    assert all((steps == STEPS) == (ticket.outcome.stop_reason[0] is StopReason.STEPS) for steps, ticket in zip(used, elastic, strict=True))


def test_without_load_elastic_requests_keep_their_steps():
    scheduler = timed(Clock(), max_wait_s=10.0)
    ticket = scheduler.enqueue(job(1, 40, elastic=True))
    scheduler.drain()
    assert ticket.outcome.stop_reason == [StopReason.STEPS]


def test_one_large_job_does_not_close_the_door():
    scheduler = timed(Clock(), max_wait_s=0.05)
    large = scheduler.enqueue(job(2000, 100))
    small = scheduler.enqueue(job(1, 1, seed=9999))
    scheduler.drain()
    assert isinstance(large.outcome, JobResult)
    assert isinstance(small.outcome, JobResult)


def test_rows_that_gather_under_load_are_all_answered_with_what_they_would_get_alone():
    scheduler, taken, _ = loaded_to_the_brim(elastic=False)
    lane = scheduler._lanes["m"]
    gathered = False
    while scheduler.tick():
        gathered |= len(lane._parked) > 0
    assert gathered
    for number, ticket in list(enumerate(taken))[:: max(1, len(taken) // 5)]:
        alone = timed(Clock())
        other = alone.enqueue(job(1, STEPS, seed=number))
        alone.drain()
        assert ticket.outcome.elbo == pytest.approx(other.outcome.elbo, abs=1e-5)


def test_a_row_that_waits_to_be_measured_is_freed_when_its_waiter_goes():
    scheduler, taken, _ = loaded_to_the_brim(elastic=False)
    lane = scheduler._lanes["m"]
    while not len(lane._parked):
        assert scheduler.tick()
    for ticket in taken:
        if ticket.outcome is None:
            scheduler.abandon(ticket)
    scheduler.drain()
    assert all(ticket.outcome is not None for ticket in taken)
    assert not len(lane._parked)
    assert len(lane._rows.free) == lane.slots
    assert lane.load.least_s == pytest.approx(0.0, abs=1e-9)


def test_the_door_is_open_for_unknown_models_and_closed_while_stopping():
    scheduler = timed(Clock())
    scheduler.check_door("nobody")  # its own refusal says more
    with pytest.raises(UnknownModel):
        scheduler.enqueue(job(model="nobody"))
    scheduler._begin_stop(1.0)
    with pytest.raises(ShuttingDown):
        scheduler.check_door("m")


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 128), st.booleans()), max_size=30),
    st.floats(0.01, 10.0),
)
def test_what_is_given_back_leaves_nothing(jobs, max_wait_s):
    load = Load(max_wait_s)
    works = [load.work(rows, steps, elastic, step_s=1e-4, row_s=1e-3) for rows, steps, elastic in jobs]
    for work in works:
        assert 0 < work.least <= work.full <= max_wait_s / 4 + 1e-12
        load.take(work)
        assert load.least_s <= load.full_s + 1e-9
        assert KEPT <= load.share() <= 1.0
    for work in works:
        load.give_back(work)
    assert load.full_s == pytest.approx(0.0, abs=1e-6)
    assert not load.over


def test_an_unbounded_load_is_never_over_and_never_degrades():
    load = Load(math.inf)
    load.take(load.work(10_000, 128, False, 1.0, 1.0))
    assert not load.over
    assert load.share() == 1.0


# What is kept free before a deadline


def test_the_reserve_grows_with_misses_and_shrinks_with_what_was_met():
    reserve, before = Reserve(0.0005), Reserve(0.0005).tail
    reserve.judge(-0.001, now=1.0, stepped=True)
    grown = reserve.tail
    assert grown > before
    reserve.judge(-0.001, now=1.001, stepped=True)  # the same pause of the machine
    assert reserve.tail == grown
    for _ in range(100):
        reserve.judge(0.005, now=2.0, stepped=True)
    assert reserve.tail < grown


def test_a_reply_without_a_step_moves_only_what_the_door_asks_for():
    reserve = Reserve(0.0005)
    tail = reserve.tail
    for number in range(10):
        reserve.judge(-0.001, now=float(number), stepped=False)
    assert reserve.tail == tail
    grown = reserve.door
    assert grown > 0
    for number in range(4000):
        reserve.judge(0.001, now=10.0 + number, stepped=False)
    assert reserve.door == 0.0


def test_the_reserve_settles_at_the_tail_of_what_happens():
    """Replies late by a pause of 0 to 5 ms: some must be missed, about one in 250."""
    reserve, missed = Reserve(0.0005), 0
    count = 40_000
    for number in range(count):
        pause = 0.005 * ((number * 0.618034) % 1.0)
        spare = reserve.tail - pause
        missed += spare < 0.0002 and number > 5000
        reserve.judge(spare, now=float(number), stepped=True)
    assert 0.002 < missed / (count - 5000) < 0.008


def test_a_typical_reply_is_near_the_median_whatever_the_outliers():
    reserve = Reserve(0.0005)
    for number in range(1000):
        reserve.observe(0.1 if number % 20 == 0 else 0.001)
    assert 0.0008 < reserve.typical < 0.002


def test_a_deadline_met_or_missed_at_the_reply_is_learned_from():
    clock = Clock()
    scheduler = timed(clock)
    ticket = scheduler.enqueue(job(1, 128, deadline=clock.now + 0.02, elastic=True))
    scheduler.drain()
    lane = scheduler._lanes["m"]
    before = lane.reserve.tail
    clock.sleep(0.05)  # the event loop was busy elsewhere
    scheduler.replied(ticket.job, ticket.outcome)
    assert lane.reserve.tail > before
    assert lane.reserve.typical > 0.0005
