"""Rows shared out over threads: every row once, in order, whatever their number; errors come when nobody is at work any more."""

import threading
import time

import numpy as np
import pytest

from service.engine.crew import LEAST_ROWS, Crew


@pytest.fixture(params=[1, 2, 3])
def crew(request):
    made = Crew(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("rows", [0, 1, LEAST_ROWS, 2 * LEAST_ROWS - 1, 2 * LEAST_ROWS, 3 * LEAST_ROWS + 1, 100])
def test_every_row_is_computed_once_and_stands_in_its_place(crew, rows):
    x = np.arange(rows * 2.0).reshape(rows, 2)
    seen = []

    def call(feeds):
        seen.append(len(feeds["x"]))
        return [feeds["x"] + feeds["y"][:, None], feeds["y"]]

    total, y = crew.run(call, {"x": x, "y": np.arange(rows)})

    np.testing.assert_array_equal(total, x + np.arange(rows)[:, None])
    np.testing.assert_array_equal(y, np.arange(rows))
    assert sum(seen) == rows
    assert len(seen) == 1 or min(seen) >= LEAST_ROWS


def test_each_thread_has_a_part_of_its_own():
    meeting, names = threading.Barrier(3, timeout=30), []

    def call(feeds):
        meeting.wait()  # only three at once get past this
        names.append(threading.current_thread().name)
        return [feeds["x"]]

    crew = Crew(3)
    crew.run(call, {"x": np.zeros((30, 1))})
    crew.close()

    assert len(set(names)) == 3


@pytest.mark.parametrize("bad", [0, 20])
def test_an_error_is_raised_when_no_thread_is_in_the_call_any_more(bad):
    working = []

    def call(feeds):
        working.append(1)
        try:
            if bad in feeds["x"]:
                raise RuntimeError("this part")
            time.sleep(0.05)
            return [feeds["x"]]
        finally:
            working.pop()

    crew = Crew(2)
    with pytest.raises(RuntimeError, match="this part"):
        crew.run(call, {"x": np.arange(21)})
    assert not working
    np.testing.assert_array_equal(crew.run(lambda feeds: [feeds["x"]], {"x": np.arange(21)})[0], np.arange(21))
    crew.close()
