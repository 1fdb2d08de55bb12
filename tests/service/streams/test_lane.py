"""The lane: results depend on a stream's own frames only, every portion is answered once, and nobody else pays for a lagging one."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.artifact import Arrays, Artifact
from service.engine.base import Slots
from service.engine.onnx import OnnxEngine
from service.errors import BackendFailure, Overloaded, ShuttingDown
from service.streams.lane import StreamLane
from service.streams.stream import Portion, Stream, StreamSpec
from service.telemetry import REQUEST_ID
from tests.service.streams.conftest import FRAME, sound

Frames = NDArray[np.float32]


def frames(seed: int, count: int) -> Frames:
    return (sound(seed, count * FRAME) / 32768).astype(np.float32).reshape(count, FRAME)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Bench:
    """A lane driven by hand."""

    def __init__(self, engine: Any, capacity: int = 8):
        self.clock = Clock()
        self.lane = StreamLane("tiny/1", engine, self.clock, capacity, lambda: None)
        self.done: list[Portion] = []

    def open(self, spec: StreamSpec) -> Stream:
        stream = Stream(spec, self.done.append, None)
        self.lane.open(stream)
        return stream

    def feed(self, stream: Stream, x: Frames, mask: Frames | None = None, wants_state: bool = False) -> Portion:
        portion = Portion(stream, x, mask, self.clock(), wants_state)
        self.lane.feed(portion)
        return portion

    def run(self) -> None:
        while self.lane.has_work():
            self.lane.tick(0.002)
            for portion in self.lane.answered():
                portion.settle()


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> OnnxEngine:
    return OnnxEngine(artifact, threads=1)


@pytest.fixture
def bench(engine: OnnxEngine) -> Bench:
    return Bench(engine)


def elbos(portions: list[Portion]) -> list[float]:
    assert all(portion.error is None for portion in portions)
    return [value for portion in portions for value in portion.elbo]


def alone(engine: OnnxEngine, spec: StreamSpec, x: Frames) -> list[float]:
    bench = Bench(engine)
    portion = bench.feed(bench.open(spec), x)
    bench.run()
    return elbos([portion])


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_stream_among_others_gets_what_it_gets_alone(engine: OnnxEngine, bench: Bench, steps: int) -> None:
    specs = [StreamSpec(steps=steps if i == 2 else 2, seed=i) for i in range(6)]
    streams = [bench.open(spec) for spec in specs]
    portions: list[list[Portion]] = [[] for _ in streams]
    for piece in range(4):
        for i, stream in enumerate(streams):
            portions[i].append(bench.feed(stream, frames(i, 12)[3 * piece : 3 * piece + 3]))
        bench.run()
    for i, spec in enumerate(specs):
        expected = alone(engine, spec, frames(i, 12))
        np.testing.assert_allclose(elbos(portions[i]), expected, atol=1e-4, rtol=1e-5)


def test_what_is_finished_as_it_is_collected_is_answered_though_another_lane_was_served(engine: OnnxEngine, bench: Bench) -> None:
    """Found by the soak: the scheduler asks every lane how urgent it is, which collects; then it served another lane, and this one,
    with nothing left in line, was not asked again. A stream's `close` was answered when another stream had something to say."""
    stream = bench.open(StreamSpec(steps=2, seed=1))
    bench.feed(stream, frames(0, 2))
    bench.run()
    ending = bench.feed(stream, frames(0, 0), wants_state=True)
    assert bench.lane.urgency() == -np.inf
    assert bench.lane.has_work()
    bench.run()
    assert bench.done[-1] is ending


def test_the_fused_program_gives_what_its_parts_give(engine: OnnxEngine, bench: Bench) -> None:
    """`prediction` is only to be had from the parts."""
    fused = alone(engine, StreamSpec(steps=2, seed=1), frames(0, 8))
    stream = bench.open(StreamSpec(steps=2, seed=1, parts=frozenset({"elbo", "prediction", "posterior", "reconstruction"})))
    portion = bench.feed(stream, frames(0, 8))
    bench.run()
    np.testing.assert_allclose(portion.elbo, fused, atol=1e-4, rtol=1e-5)
    assert portion.shown[3]["prediction.mean"].shape == (1, FRAME)
    assert portion.shown[3]["q0.mu"].shape == (4,)


def test_a_stream_goes_on_from_its_state(engine: OnnxEngine, bench: Bench) -> None:
    spec = StreamSpec(steps=2, seed=9)
    first = bench.feed(bench.open(spec), frames(3, 10)[:6], wants_state=True)
    bench.run()
    assert first.state is not None
    second = bench.feed(bench.open(StreamSpec(steps=2, seed=9, state=first.state, frame=6)), frames(3, 10)[6:])
    bench.run()
    np.testing.assert_allclose(elbos([first, second]), alone(engine, spec, frames(3, 10)), atol=1e-5, rtol=1e-6)


def test_other_seeds_and_steps_give_other_results(engine: OnnxEngine) -> None:
    base = alone(engine, StreamSpec(steps=2, seed=1), frames(0, 5))
    assert alone(engine, StreamSpec(steps=2, seed=1), frames(0, 5)) == base
    assert alone(engine, StreamSpec(steps=2, seed=2), frames(0, 5)) != base
    assert alone(engine, StreamSpec(steps=3, seed=1), frames(0, 5)) != base


def test_lost_frames_take_no_steps_and_the_stream_goes_on(engine: OnnxEngine, bench: Bench) -> None:
    stream = bench.open(StreamSpec(steps=2, seed=1))
    mask = np.ones((4, FRAME), np.float32)
    mask[1:3] = 0
    portion = bench.feed(stream, frames(0, 4), mask)
    bench.run()
    assert portion.steps_used == [2, 0, 0, 2]
    assert portion.log_likelihood[1] == 0.0
    assert np.isfinite(portion.elbo).all()


def test_an_elastic_stream_that_lags_gives_up_steps_and_an_exact_one_never(bench: Bench) -> None:
    exact, elastic = (bench.open(StreamSpec(steps=4, seed=1, elastic=e, frame_s=0.005)) for e in (False, True))
    portions = [bench.feed(stream, frames(0, 2)) for stream in (exact, elastic)]
    bench.clock.now += 0.25  # more than two tenths of a second late: a quarter of the steps
    bench.run()
    assert portions[0].steps_used == [4, 4]
    assert portions[1].steps_used == [1, 1]
    assert bench.lane.counts.degraded == 2


def noted_run(monkeypatch: pytest.MonkeyPatch, note: Callable[[list[Stream]], None]) -> None:
    plain = StreamLane._run

    def noted(self: StreamLane, streams: list[Stream], steps: int, predicts: bool) -> None:
        note(streams)
        plain(self, streams, steps, predicts)

    monkeypatch.setattr(StreamLane, "_run", noted)


@pytest.mark.parametrize("frame_s", [0.0125, 0.0])
def test_a_long_message_is_no_reason_to_give_up_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch, frame_s: float) -> None:
    def slow(streams: list[Stream]) -> None:
        bench.clock.now += 0.01

    noted_run(monkeypatch, slow)
    portion = bench.feed(bench.open(StreamSpec(steps=2, seed=1, elastic=True, frame_s=frame_s)), frames(0, 60))
    bench.run()
    assert portion.steps_used == [2] * 60


def test_without_real_time_an_elastic_stream_gives_up_steps_while_others_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.lane.cost, "largest", lambda *_: 1)
    elastic, other = (bench.feed(bench.open(StreamSpec(steps=2, seed=seed, elastic=seed == 1)), frames(0, 2)) for seed in (1, 2))
    bench.clock.now += 0.15
    bench.run()
    assert elastic.steps_used == [1, 1]
    assert other.steps_used == [2, 2]


@pytest.mark.parametrize("frame_s", [0.0, 0.005])
def test_a_long_portion_does_not_keep_out_a_frame_that_comes_a_little_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, frame_s: float
) -> None:
    order: list[int] = []
    noted_run(monkeypatch, lambda streams: order.extend(stream.spec.seed for stream in streams))
    monkeypatch.setattr(bench.lane.cost, "largest", lambda *_: 1)
    for seed in (1, 2, 3):
        bench.feed(bench.open(StreamSpec(steps=1, seed=seed, frame_s=frame_s)), frames(0, 60))
    bench.clock.now += 0.02
    bench.feed(bench.open(StreamSpec(steps=1, seed=9, frame_s=0.0125)), frames(1, 1))
    bench.run()
    assert order.index(9) < 90
    assert len(order) == 181


def test_what_was_sent_ahead_of_real_time_waits_for_what_is_due(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    noted_run(monkeypatch, lambda streams: order.extend(stream.spec.seed for stream in streams))
    monkeypatch.setattr(bench.lane.cost, "largest", lambda *_: 1)
    bulk, live = (bench.open(StreamSpec(steps=2, seed=seed, frame_s=0.005)) for seed in (1, 2))
    bench.feed(bulk, frames(0, 20))
    bench.feed(bulk, frames(0, 20))  # spoken 0.1 s later
    bench.clock.now += 0.01
    bench.feed(live, frames(1, 3))
    bench.run()
    assert order == [1] * 20 + [2] * 3 + [1] * 20


def test_no_more_streams_than_slots_and_a_closed_one_makes_room(bench: Bench) -> None:
    streams = [bench.open(StreamSpec(steps=2, seed=i)) for i in range(8)]
    with pytest.raises(Overloaded, match="8 streams"):
        bench.open(StreamSpec(steps=2, seed=9))
    portion = bench.feed(streams[0], frames(0, 3))
    bench.lane.close(streams[0])
    bench.lane.close(streams[0])
    bench.run()
    assert not portion.settled  # nobody waits for it
    fresh = bench.feed(bench.open(StreamSpec(steps=2, seed=3)), frames(1, 4))
    bench.run()
    assert bench.lane.live == 8
    np.testing.assert_allclose(elbos([fresh]), alone(bench.lane.engine, StreamSpec(steps=2, seed=3), frames(1, 4)), atol=1e-5)  # type: ignore[arg-type]


def test_a_frame_that_turns_out_not_finite_is_said_and_the_state_before_it_stays(engine: OnnxEngine) -> None:
    broken = Spoiled(engine, at=3)
    bench = Bench(broken)
    portion = bench.feed(bench.open(StreamSpec(steps=2, seed=1)), frames(0, 6))
    bench.run()
    assert np.isfinite(portion.elbo).tolist() == [True, True, True, False, True, True]
    assert bench.lane.counts.nonfinite == 1


class Spoiled:
    """An engine whose n-th fused frame is not finite, in every output."""

    def __init__(self, engine: OnnxEngine, at: int):
        self._engine, self._left = engine, at
        self.begin, self.card, self.name = engine.begin, engine.card, "spoiled"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_rows(self, program: str, slots: Slots, noise: Mapping[str, NDArray[Any]], guard: str | None = None) -> Arrays:
        if program == "frame_K":
            self._left -= 1
            if self._left == -1:
                noise = {**noise, "noise0": np.full_like(noise["noise0"], np.nan)}
                noise["noise_advance"] = np.full_like(noise["noise_advance"], np.nan)
        return self._engine.run_rows(program, slots, noise, guard)


class Failing(Spoiled):
    """An engine that raises now and then."""

    def __init__(self, engine: OnnxEngine, chance: Callable[[], bool]):
        super().__init__(engine, -10)
        self._fails = chance

    def run_rows(self, program: str, slots: Slots, noise: Mapping[str, NDArray[Any]], guard: str | None = None) -> Arrays:
        self._may_fail()
        return self._engine.run_rows(program, slots, noise, guard)

    def read_rows(self, slots: Slots, names: list[str]) -> Arrays:
        self._may_fail()
        return self._engine.read_rows(slots, names)

    def load_rows(self, slots: Slots, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._may_fail()
        self._engine.load_rows(slots, arrays)

    def _may_fail(self) -> None:
        if self._fails():
            raise RuntimeError("the engine broke")


@pytest.mark.parametrize("count", [3, 0])
def test_the_log_says_once_why_frames_failed_and_whose(engine: OnnxEngine, caplog: pytest.LogCaptureFixture, count: int) -> None:
    """With no frame it is the reading of the state that fails, in whichever call collects: the other lanes live on, too."""
    bench = Bench(Failing(engine, lambda: True))
    for name in ("a", "b"):
        before = REQUEST_ID.set(name)
        bench.feed(bench.open(StreamSpec(steps=2, seed=1)), frames(0, count), wants_state=True)
        REQUEST_ID.reset(before)
    bench.lane.urgency()
    bench.run()
    assert all(isinstance(portion.error, BackendFailure) for portion in bench.done)
    assert len(bench.done) == 2
    lines = caplog.records
    assert {(line.name, line.levelname, line.message, line.model) for line in lines} == {
        ("elbow.streams", "ERROR", "frames failed", "tiny/1")
    }
    assert [sorted(line.request_ids) for line in lines] == ([["a", "b"]] if count else [["a"], ["b"]])
    assert all(line.exc_info and line.exc_info[0] is RuntimeError for line in lines)


def test_a_state_that_cannot_be_read_fails_its_own_stream_only(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The portion had left the line already, so nobody answered it; and its neighbours in the batch failed with it."""
    broken = Failing(engine, lambda: False)
    bench = Bench(broken)
    asks, other = (bench.feed(bench.open(StreamSpec(steps=2, seed=1)), frames(0, 2), wants_state=wants) for wants in (True, False))
    monkeypatch.setattr(broken, "read_rows", lambda *_: 1 / 0)
    bench.run()
    assert isinstance(asks.error, BackendFailure)
    assert asks.settled
    assert len(elbos([other])) == 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_every_portion_of_a_stream_that_stays_is_answered_exactly_once(engine: OnnxEngine, seed: int) -> None:
    """Under random feeding, leaving, engine failure and shutdown; a second answer raises in `settle`."""
    chance = random.Random(seed)
    bench = Bench(Failing(engine, lambda: chance.random() < 0.02))
    live: dict[Stream, list[Portion]] = {}
    left: set[Stream] = set()
    for turn in range(60):
        act = chance.random()
        if act < 0.3 and bench.lane.live < 8 and turn < 50:
            live[bench.open(StreamSpec(steps=chance.choice([0, 1, 2]), seed=turn))] = []
        elif act < 0.8 and live:
            stream = chance.choice(list(live))
            if stream not in left:
                live[stream].append(bench.feed(stream, frames(0, chance.choice([0, 1, 3])), wants_state=chance.random() < 0.3))
        elif act < 0.85 and live:
            stream = chance.choice(list(live))
            left.add(stream)
            bench.lane.close(stream)
        if chance.random() < 0.5:
            bench.lane.tick(0.002)
            for portion in bench.lane.answered():
                portion.settle()
    if chance.random() < 0.5:
        bench.run()
    bench.lane.draining = True
    with pytest.raises(ShuttingDown):
        bench.open(StreamSpec(steps=1, seed=0))
    bench.lane.fail_all(ShuttingDown("over"))
    for portion in bench.lane.answered():
        portion.settle()
    for stream, portions in live.items():
        if stream not in left:
            assert all(portion.settled for portion in portions)
            assert all(p.error is None or isinstance(p.error, BackendFailure | ShuttingDown) for p in portions)
            assert stream.waiting == 0


def test_a_stream_that_opens_while_its_lane_retires_is_seen(bench: Bench) -> None:
    """Between its look at `retiring` and its place among the streams, the scheduler may look whether the lane is in use."""
    looked: list[bool] = []

    class Free(list[int]):
        def pop(self, *_: Any) -> int:
            bench.lane.retiring = True
            looker = threading.Thread(target=lambda: looked.append(bench.lane.in_use()))
            looker.start()
            looker.join(0.1)
            return 0

    bench.lane._free = Free([0])
    stream = bench.open(StreamSpec(steps=1, seed=1))
    while not looked:
        time.sleep(0.001)
    assert looked == [True]
    portion = bench.feed(stream, frames(0, 2))
    bench.run()
    assert portion.settled
