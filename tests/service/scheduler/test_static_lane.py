"""What a job's answer is: independent of neighbours, of order, of how it was cut, and true to the exact posterior."""

import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.closed_form import ClosedFormEngine
from service.errors import BackendFailure, DeadlineExceeded, InvalidInput
from service.scheduler.job import Ask, JobResult, StopReason
from tests.service.scheduler.support import X_SIZE, Clock, job, make, rows_of_x, run

FULL = Ask(samples=3, trace=True, importance_samples=40, z=2, mean=True, x=3)


def same(a, b, tolerance=1e-5):
    """Whether two results say the same, to |a − b| ≤ tolerance · max(1, |b|)."""
    assert a.stop_reason == b.stop_reason
    for name in ("elbo", "log_likelihood", "kl", "steps_used", "step", "log_px", "mean", "x"):
        close(getattr(a, name), getattr(b, name), tolerance, name)
    for name in ("carry", "z"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None)
        for key in left or {}:
            close(left[key], right[key], tolerance, f"{name}.{key}")
    assert (a.trace is None) == (b.trace is None)
    for left, right in zip(a.trace or [], b.trace or [], strict=True):
        close(left, right, tolerance, "trace")


def close(a, b, tolerance, name):
    assert (a is None) == (b is None), name
    if a is not None:
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, name
        assert np.all((np.abs(a - b) <= tolerance * np.maximum(1, np.abs(b))) | (np.isnan(a) & np.isnan(b))), name


def take(result, row):
    """The result of one row of a job, as if it had been alone."""
    part = slice(row, row + 1)
    return JobResult(
        **{n: getattr(result, n)[part] for n in ("elbo", "log_likelihood", "kl", "steps_used", "step", "stop_reason")},
        carry={key: value[part] for key, value in result.carry.items()},
        trace=None if result.trace is None else result.trace[part],
        log_px=None if result.log_px is None else result.log_px[part],
        z=None if result.z is None else {key: value[part] for key, value in result.z.items()},
        mean=None if result.mean is None else result.mean[part],
        x=None if result.x is None else result.x[part],
    )


def test_elbo_rises_with_steps_to_the_exact_log_px():
    engine = ClosedFormEngine()
    x = rows_of_x(1)
    results = run(make(engine=engine), *(job(steps=k, x=x, ask=Ask(samples=500)) for k in (0, 1, 5, 30)))
    elbo = [float(result.elbo[0]) for result in results]
    assert elbo[0] < elbo[1] < elbo[2]
    exact = engine.log_px(x, np.ones_like(x))[0]
    assert elbo[-1] == pytest.approx(exact, abs=0.2)
    assert [int(result.steps_used[0]) for result in results] == [0, 1, 5, 30]
    assert all(result.stop_reason == [StopReason.STEPS] for result in results)


def test_trace_has_an_entry_for_every_number_of_steps_and_ends_with_the_elbo():
    result = run(make(), job(3, 6, ask=Ask(samples=4, trace=True)))[0]
    assert [len(trace) for trace in result.trace] == [7, 7, 7]
    assert [trace[-1] for trace in result.trace] == result.elbo.tolist()


def test_elbo_is_log_likelihood_minus_kl():
    result = run(make(), job(4, 3))[0]
    np.testing.assert_allclose(result.elbo, result.log_likelihood - result.kl.sum(axis=1))


def test_without_measure_there_is_no_elbo_and_no_score():
    programs = []
    engine = ClosedFormEngine(fail_on=lambda program, _: bool(programs.append(program)))
    scheduler = make(engine=engine)
    programs.clear()
    result = run(scheduler, job(2, 3, ask=Ask(measure=False)))[0]
    assert np.isnan(result.elbo).all()
    assert set(programs) == {"init", "step"}
    assert result.steps_used.tolist() == [3, 3]


@settings(max_examples=30, deadline=None)
@given(
    others=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9), st.booleans()), max_size=5),
    place=st.integers(0, 5),
    row=st.integers(0, 2),
    slots=st.sampled_from([8, 16, 64]),
    crowded=st.booleans(),
)
def test_a_row_in_a_crowd_equals_the_row_alone(others, place, row, slots, crowded):
    mine = job(3, 5, seed=77, ask=FULL)
    alone = run(make(), job(1, 5, seed=77 + row, x=mine.x[row : row + 1], ask=FULL))[0]
    jobs = [job(rows, steps, seed=1000 * (i + 1), ask=FULL if full else Ask()) for i, (rows, steps, full) in enumerate(others)]
    jobs.insert(place, mine)
    clock = Clock()
    # A crowded scheduler has ticks that hold one or two rows only.
    delay = (lambda program, size: 0.001 * size) if crowded else None
    results = run(make(clock, ClosedFormEngine(jitter=0.05, delay=delay, sleep=clock.sleep), slots=slots), *jobs)
    assert all(isinstance(result, JobResult) for result in results)
    same(take(results[jobs.index(mine)], row), alone)


def test_the_same_job_twice_gives_the_same_bits_and_another_seed_other_ones():
    x = rows_of_x(2)
    first, second, other = run(make(), job(2, 4, x=x, ask=FULL), job(2, 4, x=x, ask=FULL), job(2, 4, seed=9, x=x, ask=FULL))
    same(first, second, tolerance=0)
    assert not np.any(first.elbo == other.elbo)


@given(first=st.integers(0, 9), second=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_k_steps_and_then_more_by_refine_equal_all_at_once(first, second):
    x = rows_of_x(2)
    scheduler = make()
    whole = run(scheduler, job(2, first + second, x=x))[0]
    part = run(scheduler, job(2, first, x=x))[0]
    rest = run(scheduler, job(2, second, x=x, carry=part.carry, first_step=part.step))[0]
    same(rest, JobResult(**{**vars(whole), "steps_used": np.array([second, second])}), tolerance=0)


def test_more_steps_than_noise_is_made_ahead_for_are_each_fresh():
    """64 steps cross several blocks of noise made ahead; the same by single steps, each its own request."""
    x, scheduler = rows_of_x(1), make()
    whole = run(scheduler, job(1, 40, x=x))[0]
    carry, step = None, np.zeros(1, np.int64)
    for _ in range(40):
        result = run(scheduler, job(1, 1, x=x, carry=carry, first_step=step))[0]
        carry, step = result.carry, result.step
    assert np.array_equal(whole.carry["q0.mu"], carry["q0.mu"])
    assert step.tolist() == [40]


def test_masked_entries_do_not_count():
    engine = ClosedFormEngine()
    x, mask = rows_of_x(1), np.ones((1, X_SIZE), np.float32)
    mask[0, ::2] = 0
    hidden = np.where(mask > 0, x, 5.0).astype(np.float32)
    ask = Ask(samples=200, importance_samples=2000)
    a, b = run(make(engine=engine), job(1, 20, x=x, mask=mask, ask=ask), job(1, 20, x=hidden, mask=mask, ask=ask))
    same(a, b, tolerance=0)
    assert a.log_px[0] == pytest.approx(engine.log_px(x, mask)[0], abs=0.01)


def test_importance_samples_in_pieces_give_log_px():
    engine = ClosedFormEngine()
    x = rows_of_x(3)
    result = run(make(engine=engine), job(3, 2, x=x, ask=Ask(importance_samples=5000)))[0]
    np.testing.assert_allclose(result.log_px, engine.log_px(x, np.ones_like(x)), atol=0.05)


def test_the_size_of_pieces_does_not_change_log_px():
    values = []
    for per_sample in (0.0, 1e-6, 1e-4):
        clock = Clock()
        engine = ClosedFormEngine(delay=lambda _, size, cost=per_sample: cost * size, sleep=clock.sleep)
        values.append(run(make(clock, engine), job(2, 1, ask=Ask(importance_samples=700, samples=600, z=30)))[0])
    for value in values[1:]:
        same(value, values[0], 1e-6)
        np.testing.assert_array_equal(value.log_px, values[0].log_px)
        np.testing.assert_array_equal(value.elbo, values[0].elbo)


def test_many_measuring_samples_are_measured_in_pieces_and_average_the_same():
    x = rows_of_x(2)
    many = run(make(), job(2, 3, x=x, ask=Ask(samples=1000)))[0]
    traced = run(make(), job(2, 3, x=x, ask=Ask(samples=1000, trace=True)))[0]
    np.testing.assert_allclose(many.elbo, traced.elbo, rtol=1e-6)


def test_mean_is_the_decoded_mean_of_the_posterior_and_draws_follow_it():
    result = run(make(engine=ClosedFormEngine()), job(1, 40, ask=Ask(mean=True, z=4000, x=4000)))[0]
    mu, sigma = result.carry["q0.mu"][0], np.exp(result.carry["q0.log_sigma"][0])
    np.testing.assert_allclose(result.mean[0, :4], mu, atol=1e-6)
    np.testing.assert_allclose(result.z["z0"][0].mean(axis=0), mu, atol=5 * sigma.max() / np.sqrt(4000))
    np.testing.assert_allclose(result.z["z0"][0].std(axis=0), sigma, rtol=0.08)
    np.testing.assert_allclose(result.x[0, :, :4].mean(axis=0), mu, atol=0.08)


def test_prior_draws_and_given_z_are_decoded_without_inference():
    prior = run(make(), job(500, 0, prior=True, ask=Ask(z=1, mean=True, x=1, measure=False)))[0]
    assert prior.z["z0"].shape == (500, 1, 4)
    assert abs(prior.z["z0"].mean()) < 0.1
    np.testing.assert_allclose(prior.mean[:, :4], prior.z["z0"][:, 0], atol=1e-6)
    z = {"z0": np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)}
    given_z = run(make(), job(3, 0, z=z, ask=Ask(mean=True, x=2, measure=False)))[0]
    np.testing.assert_allclose(given_z.mean[:, :4], z["z0"], atol=1e-6)
    assert given_z.x.shape == (3, 2, X_SIZE)


def test_a_posterior_alone_can_be_decoded_without_x():
    scheduler = make()
    before = run(scheduler, job(2, 4, ask=Ask(mean=True)))[0]
    after = run(scheduler, job(2, 4, carry=before.carry, first_step=before.step, x=None, prior=False, z=None, ask=Ask(mean=True)))[0]
    same(JobResult(**{**vars(after), **{n: getattr(before, n) for n in ("elbo", "log_likelihood", "kl", "steps_used")}}), before)


def test_a_slot_keeps_nothing_of_the_row_it_held_before():
    """A posterior given without x, and without all of the carry, must not be completed with another client's."""
    scheduler = make(slots=1)
    run(scheduler, job(1, 9))
    result = run(scheduler, job(1, 0, carry={"q0.mu": np.ones((1, 4), np.float32)}, z=None, ask=Ask(importance_samples=5, trace=True)))[0]
    assert result.carry["q0.log_sigma"].tolist() == [[0.0] * 4]
    assert np.isnan(result.elbo).all()
    assert result.trace == [[]]


def test_a_direct_model_answers_any_steps_with_none_and_converged():
    engine = ClosedFormEngine(direct=True)
    result = run(make(engine=engine), job(2, 7, ask=Ask(samples=100, trace=True)))[0]
    assert result.steps_used.tolist() == [0, 0]
    assert result.stop_reason == [StopReason.CONVERGED] * 2
    assert [len(trace) for trace in result.trace] == [1, 1]


def test_a_row_that_turns_non_finite_stops_with_its_last_finite_carry_and_spares_its_neighbours():
    x = rows_of_x(3)
    x[1] = 1e38
    clean = rows_of_x(3)
    result, other = run(make(), job(3, 5, x=x, ask=Ask(trace=True)), job(3, 5, x=clean))
    assert result.stop_reason == [StopReason.STEPS, StopReason.NONFINITE, StopReason.STEPS]
    assert result.steps_used.tolist() == [5, 0, 5]
    assert all(np.isfinite(value).all() for value in result.carry.values())
    same(take(result, 0), JobResult(**{**vars(take(other, 0)), "trace": [result.trace[0]]}))


def test_no_rows_are_answered_with_nothing():
    result = run(make(), job(0, 3))[0]
    assert result.elbo.shape == (0,)


@pytest.mark.parametrize(
    "wrong",
    [
        job(1, 129),
        job(1, -1),
        job(1, 1, ask=Ask(samples=0)),
        job(1, 1, x=np.zeros((1, 3), np.float32)),
        job(2, 1, carry={"q0.mu": np.zeros((1, 4), np.float32)}),
        job(1, 1, carry={"other": np.zeros((1, 4), np.float32)}),
        job(1, 5, first_step=np.array([2**20 - 3])),
        job(1, 5, first_step=np.array([-1])),
        job(2, 0, z={"z0": np.zeros((2, 5), np.float32)}),
        job(2, 0, z={}),
    ],
)
def test_a_job_that_would_spoil_its_batch_is_refused_at_the_door(wrong):
    with pytest.raises(InvalidInput):
        make().enqueue(wrong)


# Tolerance


def test_tolerance_stops_when_the_best_of_four_steps_gained_less():
    engine = ClosedFormEngine()
    result = run(make(engine=engine), job(5, 128, tolerance=0.05, elastic=True, ask=Ask(trace=True)))[0]
    for trace, reason, used in zip(result.trace, result.stop_reason, result.steps_used, strict=True):
        best = np.maximum.accumulate(trace)
        gains = best[4:] - best[:-4]
        assert reason is StopReason.CONVERGED
        assert len(trace) == used + 1 == 5 + int(np.argmax(gains < 0.05))
    assert result.elbo.tolist() == [trace[-1] for trace in result.trace]


def test_tolerance_measures_with_at_least_eight_samples():
    x = rows_of_x(1)
    by_tolerance = run(make(), job(1, 2, x=x, tolerance=1e-9, ask=Ask(samples=1)))[0]
    by_samples = run(make(), job(1, 2, x=x, ask=Ask(samples=8)))[0]
    assert by_tolerance.elbo == by_samples.elbo


# Deadlines


def timed(clock, *, step=0.002, other=0.0001, **kwargs):
    """An engine whose step takes `step` seconds whatever the batch, and a scheduler on it."""
    engine = ClosedFormEngine(delay=lambda program, _: step if program == "step" else other, sleep=clock.sleep)
    return make(clock, engine, **kwargs)


def test_an_elastic_deadline_takes_as_many_steps_as_fit_and_is_met():
    clock = Clock()
    scheduler = timed(clock)
    ticket = scheduler.enqueue(job(1, 128, deadline=clock.now + 0.0201, elastic=True))
    deadline = ticket.job.budget.deadline
    scheduler.drain()
    assert ticket.outcome.stop_reason == [StopReason.DEADLINE]
    assert ticket.outcome.steps_used.tolist() == [9]
    assert clock.now <= deadline


def test_a_deadline_that_zero_steps_cannot_meet_is_refused_at_once():
    clock = Clock()
    scheduler = timed(clock)
    with pytest.raises(DeadlineExceeded, match="0 steps"):
        scheduler.enqueue(job(1, 5, deadline=clock.now + 0.0001, elastic=True))


def test_a_deadline_that_replies_without_a_step_keep_missing_is_refused_but_twice_their_time_never():
    """`init` and `score` take 1 ms each; every third reply leaves 3 ms late."""
    clock = Clock()
    scheduler = timed(clock, step=0.05, other=0.001)
    admitted = 0
    for number in range(400):
        clock.now += 0.1
        with suppress(DeadlineExceeded):
            ticket = scheduler.enqueue(job(1, 5, deadline=clock.now + 0.0045, elastic=True))
            admitted += 1
            scheduler.drain()
            clock.now += 0.0002 if number % 3 else 0.003
            assert ticket.outcome.steps_used.tolist() == [0]
            scheduler.replied(ticket.job, ticket.outcome)
    assert 0 < admitted < 100
    scheduler.enqueue(job(1, 5, deadline=clock.now + 2 * 0.0045, elastic=True))


def test_an_exact_deadline_gets_all_steps_or_nothing():
    clock = Clock()
    scheduler = timed(clock)
    assert run(scheduler, job(1, 5, deadline=clock.now + 0.02))[0].steps_used.tolist() == [5]
    with pytest.raises(DeadlineExceeded, match="5 steps"):
        scheduler.enqueue(job(1, 5, deadline=clock.now + 0.005))


def test_an_exact_deadline_missed_on_the_way_is_answered_with_an_error():
    clock = Clock()
    slow = {"step": 0.001}
    engine = ClosedFormEngine(delay=lambda program, _: slow.get(program, 0.0), sleep=clock.sleep)
    scheduler = make(clock, engine)
    ticket = scheduler.enqueue(job(1, 10, deadline=clock.now + 0.05))
    slow["step"] = 0.01
    scheduler.drain()
    assert isinstance(ticket.outcome, DeadlineExceeded)


def test_a_job_whose_deadline_passes_in_line_is_answered_without_work():
    clock = Clock()
    scheduler = timed(clock, slots=8)
    others = [scheduler.enqueue(job(8, 50)) for _ in range(2)]
    scheduler.tick()
    late = scheduler.enqueue(job(1, 50, deadline=clock.now + 0.01, elastic=True))
    scheduler.drain()
    assert isinstance(late.outcome, DeadlineExceeded)
    assert all(isinstance(other.outcome, JobResult) for other in others)


# Load


def test_elastic_rows_make_room_when_others_wait_and_say_so():
    scheduler = make(slots=8)
    long = [scheduler.enqueue(job(1, 100, seed=i, elastic=True)) for i in range(8)]
    scheduler.tick()
    late = scheduler.enqueue(job(1, 1, seed=50))
    scheduler.tick()
    scheduler.tick()
    assert isinstance(late.outcome, JobResult)
    reasons = [ticket.outcome.stop_reason[0] for ticket in long if ticket.outcome is not None]
    assert reasons == [StopReason.DEGRADED]
    scheduler.drain()
    assert all(ticket.outcome.steps_used[0] >= 1 for ticket in long)


def test_exact_rows_keep_their_steps_under_load():
    scheduler = make(slots=8)
    results = run(scheduler, *(job(3, 20, seed=10 * i) for i in range(12)))
    assert all(result.steps_used.tolist() == [20] * 3 for result in results)


# Events


def test_events_tell_the_best_so_far_of_every_row_after_every_step():
    events = []
    result = run(make(engine=ClosedFormEngine(jitter=0.4)), job(2, 6, on_step=events.append, ask=Ask(trace=True, samples=4)))[0]
    for row in (0, 1):
        mine = [event for event in events if event.row == row]
        assert [event.step for event in mine] == list(range(7))
        assert [event.elbo for event in mine] == result.trace[row]
        assert [event.best_elbo for event in mine] == np.maximum.accumulate(result.trace[row]).tolist()
        assert mine[-1].best_step == int(np.argmax(result.trace[row])) == result.step[row]
        assert all(np.array_equal(result.carry[name][row], value) for name, value in mine[-1].carry.items())
    assert result.steps_used.tolist() == [6, 6]


def test_the_elbo_of_the_best_is_scored_again_and_unbiased():
    """Over many rows, the reported ELBO of the best step equals the exact one on average; the one that made it the best does not."""
    engine = ClosedFormEngine(jitter=0.3)
    rows = 1000
    x, events = rows_of_x(rows), {}
    result = run(make(engine=engine), job(rows, 24, x=x, on_step=lambda event: events.update({event.row: event})))[0]
    exact = engine.elbo(x, np.ones_like(x), result.carry["q0.mu"], result.carry["q0.log_sigma"])
    picked = np.array([events[row].best_elbo for row in range(rows)])
    error = result.elbo - exact
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(rows)
    assert (picked - exact).mean() > 5 * error.std() / math.sqrt(rows)


def test_the_reported_elbo_of_plain_replies_is_unbiased():
    engine = ClosedFormEngine(jitter=0.3)
    x = rows_of_x(1000)
    result = run(make(engine=engine), job(1000, 64, x=x, ask=Ask(samples=8)))[0]
    error = result.elbo - engine.elbo(x, np.ones_like(x), result.carry["q0.mu"], result.carry["q0.log_sigma"])
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(1000)


def test_a_listener_that_raises_fails_its_own_job_only():
    def listen(event):
        raise ValueError("no")

    bad, good = run(make(), job(1, 3, on_step=listen), job(1, 3))
    assert isinstance(bad, BackendFailure)
    assert isinstance(good, JobResult)
