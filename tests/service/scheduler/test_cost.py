"""The cost model: between buckets a straight line, corrected by what is seen, and its inverse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduler.cost import CostModel


def seeded():
    cost = CostModel()
    for size, seconds in ((1, 1.0), (2, 1.5), (4, 2.5), (8, 5.0)):
        cost.seed("step", size, seconds)
    return cost


def test_what_was_never_seen_costs_nothing_and_holds_everything():
    cost = CostModel()
    assert cost.seconds("step", 5) == 0.0
    assert cost.largest("step", 0.001, 100) == 100


def test_between_buckets_cost_is_a_straight_line_and_beyond_them_in_proportion():
    cost = seeded()
    assert [cost.seconds("step", size) for size in (0, 1, 2, 3, 4, 6, 8, 16)] == [0.0, 1.0, 1.5, 2.0, 2.5, 3.75, 5.0, 10.0]


@given(seconds=st.floats(0.1, 30), limit=st.integers(1, 50))
def test_the_largest_size_fits_and_the_next_one_does_not(seconds, limit):
    cost = CostModel()
    for size, each in ((1, 1.0), (2, 1.96), (4, 3.0), (8, 7.0)):
        cost.seed("step", size, each)
    size = cost.largest("step", seconds, limit)
    assert 1 <= size <= limit
    assert size == 1 or cost.seconds("step", size) <= seconds + 1e-9
    assert size == limit or cost.seconds("step", size + 1) > seconds - 1e-9


def test_a_batch_is_never_so_small_that_batching_is_given_away():
    """1.0, 0.75, 0.62 and 0.62 seconds per row: a batch of four saves a sixth against two, one of eight nothing more."""
    assert seeded().largest("step", 0.1, 100) == 4
    assert seeded().largest("step", 0.1, 3) == 2


def test_what_is_spent_once_per_run_makes_larger_batches_worth_while():
    assert seeded().largest("step", 0.1, 100, fixed=5.0) == 8


def test_observations_move_the_prediction_to_what_is_seen():
    cost = seeded()
    for _ in range(200):
        cost.observe("step", 3, 4.0)
    assert cost.seconds("step", 3) == pytest.approx(4.0, rel=0.01)
    assert cost.seconds("step", 8) == 5.0


def test_pauses_of_the_machine_hardly_move_it():
    """One run in five takes a hundred times as long, because something else had the core."""
    cost = seeded()
    for i in range(500):
        cost.observe("step", 8, 500.0 if i % 5 == 0 else 5.0)
    assert cost.seconds("step", 8) < 6.5


def test_a_size_beyond_those_seen_gets_a_bucket_of_its_own():
    cost = seeded()
    for _ in range(100):
        cost.observe("step", 30, 6.0)
    assert cost.seconds("step", 30) == pytest.approx(6.0, rel=0.05)


def test_only_powers_of_two_are_seeded():
    with pytest.raises(ValueError, match="power of two"):
        CostModel().seed("step", 3, 1.0)
