"""The waiting line: who is next, how many at once, and an answer only once."""

import pytest

from service.scheduler.job import JobResult
from service.scheduler.queue import Ticket, WaitingLine
from tests.service.scheduler.support import job


def ticket(rows=1, deadline=None):
    made = Ticket(job(rows), 0.0)
    if deadline is not None:
        made.deadline = deadline
    return made


def line_of(*tickets):
    line = WaitingLine()
    for one in tickets:
        line.add(one)
    return line


def test_deadlines_go_first_then_the_oldest():
    a, b, c, d = ticket(), ticket(deadline=9.0), ticket(deadline=3.0), ticket()
    line = line_of(a, b, c, d)
    assert [taken for taken, _, _ in line.take(3, 0)] == [c, b, a]
    assert [taken for taken, _, _ in line.take(3, 0)] == [d]
    assert not line


def test_a_large_job_leaves_the_reserve_to_others_first_rows():
    big, small = ticket(100), ticket(2)
    line = line_of(big, small)
    assert line.take(16, 4) == [(big, 0, 12), (small, 0, 1)]
    assert line.take(3, 4) == []
    assert line.take(10, 4) == [(big, 12, 15), (small, 1, 2)]


def test_two_large_jobs_share_what_is_free():
    a, b = ticket(100), ticket(100)
    line = line_of(a, b)
    line.take(3, 1)
    taken = {id(t): end - first for t, first, end in line.take(21, 1)}
    assert taken == {id(a): 10, id(b): 10}


def test_a_large_job_with_a_deadline_trickles_in_too():
    big = ticket(10, deadline=1.0)
    line = line_of(big)
    assert [line.take(4, 0) for _ in range(3)] == [[(big, 0, 4)], [(big, 4, 8)], [(big, 8, 10)]]
    assert not line


def test_answered_tickets_are_skipped():
    a, b, c = ticket(), ticket(deadline=1.0), ticket()
    line = line_of(a, b, c)
    for gone in (a, b):
        gone.answer(RuntimeError("gone"))
    assert line.take(5, 0) == [(c, 0, 1)]
    line = line_of(*(other := [ticket(), ticket(deadline=2.0)]))
    for gone in other:
        gone.answer(RuntimeError("gone"))
    line.forget_answered()
    assert not line


def test_a_second_answer_is_a_fault():
    one = ticket()
    one.answer(RuntimeError("first"))
    with pytest.raises(RuntimeError, match="twice"):
        one.answer(RuntimeError("second"))
    assert not isinstance(one.outcome, JobResult)


def test_a_large_job_with_a_deadline_leaves_half_of_the_places_to_those_without():
    urgent, a, b = ticket(1000, deadline=1e6), ticket(3), ticket(100)
    line = line_of(urgent, a, b)
    taken = {id(t): end - first for t, first, end in line.take(16, 2)}
    assert taken == {id(urgent): 8, id(a): 3, id(b): 3}
    for _ in range(4):
        assert {t: end - first for t, first, end in line.take(16, 2)}[b] >= 6


def test_a_single_place_goes_to_deadlines_every_other_time():
    urgent, a = ticket(1000, deadline=1e6), ticket(1000)
    line = line_of(urgent, a)
    line.take(4, 0)
    first = [line.take(1, 0)[0][0] for _ in range(10)]
    assert first.count(urgent) == first.count(a) == 5


def test_places_that_others_leave_go_to_deadlines():
    urgent, a = ticket(10, deadline=1e6), ticket(1)
    assert sum(end - first for _, first, end in line_of(urgent, a).take(16, 0)) == 11
