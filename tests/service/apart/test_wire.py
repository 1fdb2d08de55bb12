"""Frames: whatever pieces they come in, the same messages come out, arrays bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.apart.engine_process import _packed
from service.apart.wire import Unpacker, pack
from service.errors import BackendFailure, InvalidInput, Overloaded
from service.scheduler.job import Ask, Budget, Job, JobResult, StopReason, Timing

MESSAGES = st.lists(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(), st.binary(max_size=50)), min_size=1), max_size=6)


@given(frames=MESSAGES, cut=st.integers(1, 40))
def test_pieces_of_any_size_give_the_messages_in_order(frames: list[list[tuple[str, int, bytes]]], cut: int) -> None:
    stream, unpacker = b"".join(part for frame in frames for part in pack(frame)), Unpacker()
    found = [message for at in range(0, len(stream), cut) for message in unpacker.feed(stream[at : at + cut])]
    assert found == [message for frame in frames for message in frame]


def through(value: object) -> object:
    ((kind, found),) = Unpacker().feed(b"".join(pack([("kind", value)])))
    assert kind == "kind"
    return found


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array([np.nan, -0.0, np.inf]),
        np.zeros((0, 4), np.float32),
        np.float32([[1, 2]]).T,
        np.arange(40_000).reshape(200, 200).T,
    ],
    ids=["integers", "special", "empty", "turned", "large"],
)
def test_arrays_arrive_bit_for_bit(array: np.ndarray) -> None:
    found = through(array)
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_a_job_arrives_whole_without_its_listener() -> None:
    x = np.random.default_rng(0).random((2, 3)).astype(np.float32)
    ones = np.broadcast_to(np.float32(1), x.shape)
    job = Job("m/1", np.array([1, 2], np.uint64), Budget(3, deadline=1.5), Ask(trace=True), x, ones, on_step=print)
    found = through(job)
    assert isinstance(found, Job)
    assert (found.model, found.budget, found.ask, found.mask, found.on_step) == ("m/1", job.budget, job.ask, None, None)
    assert np.array_equal(found.x, x)
    hidden = through(Job("m/1", job.seeds, job.budget, job.ask, x, x > 0.5))
    assert np.array_equal(hidden.mask, x > 0.5)  # type: ignore[attr-defined]


def test_a_result_arrives_whole() -> None:
    result = JobResult(
        elbo=np.array([-1.5]),
        log_likelihood=np.array([np.nan]),
        kl=np.array([[2.0]]),
        steps_used=np.array([3]),
        step=np.array([4]),
        stop_reason=[StopReason.DEGRADED],
        carry={"q.mu": np.ones((1, 2), np.float32)},
        trace=[[1.0, 2.0]],
        timing=Timing(queue_ms=1.0, answered=2.0),
    )
    found = through(result)
    assert isinstance(found, JobResult)
    assert found.stop_reason == [StopReason.DEGRADED]
    assert (found.trace, found.timing, found.log_px) == (result.trace, result.timing, None)
    assert np.array_equal(found.carry["q.mu"], result.carry["q.mu"])


def test_refusals_arrive_with_all_that_a_client_is_told() -> None:
    full, field = through(Overloaded("full", retry_after_s=3.5)), through(InvalidInput.at("steps", "too many"))
    assert (full.detail, full.retry_after_s) == ("full", 3.5)  # type: ignore[attr-defined]
    assert field.fields == (("steps", "too many"),)  # type: ignore[attr-defined]


def test_an_answer_that_cannot_be_sent_is_a_failure_of_its_own() -> None:
    good, bad = ("answered", 1, "fine"), ("answered", 2, lambda: None)
    first, second, third = Unpacker().feed(b"".join(_packed([good, bad, ("returned", 3, lambda: None, None)])))
    assert first == good
    assert (second[:2], type(second[2])) == (("answered", 2), BackendFailure)
    assert (third[:3], type(third[3])) == (("returned", 3, None), BackendFailure)
