"""The live streams of one model, stepped together: one frame of each ready stream per tick.

    portions in ─► ready streams, oldest due first ─► slice of the tick's budget ─► frame_K (or predict, step × k, advance) ─► portions out

A stream's state stays in its engine slot from its first frame to its last. What a stream asks of its steps is exact; an
elastic one takes fewer when it lags. Results depend on nothing but the stream's own frames, seed and steps: noise is keyed by
(seed, frame, step), and programs never mix rows.

Shapes: R rows of a tick, S samples, D latent size, X entries per frame.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays
from service.engine.base import Engine, Outputs
from service.errors import BackendFailure, ElbowError, InvalidInput, Overloaded, ShuttingDown, UnknownModel
from service.noise import Purpose
from service.scheduler.cost import CostModel
from service.streams.frame_noise import FRAME, FrameNoise
from service.streams.stream import Portion, Stream
from service.telemetry import named

_LOG = logging.getLogger("elbow.streams")
WARM_UP_CALLS, LARGEST_WARM_UP = 3, 256
LATE_S = 0.1
"""An elastic stream gives up half of its steps for every so many seconds that it lags."""
URGENT_S = 0.02
"""A frame counts as due this long after it was spoken, when lanes compete."""


def no_lane(key: str, is_static: bool) -> ElbowError:
    """Why there is no lane of streams by this key."""
    if is_static:
        return InvalidInput(f"{key} is a static model: POST encode, refine, reconstruct, score or generate")
    return UnknownModel(f"no model {key!r} is loaded")


class StreamCounts:
    """What the lane has done so far; read by the metrics."""

    def __init__(self) -> None:
        self.ticks = self.frames = self.steps = self.degraded = self.nonfinite = 0


class StreamLane:
    """Implements `Lane` for a filter. `open` and `feed` may be called from any thread, all else runs on the engine thread.

    Args:
        capacity: streams that may be open at once.
        wake: called when there is new work.
    """

    def __init__(self, key: str, engine: Engine, clock: Callable[[], float], capacity: int, wake: Callable[[], None]):
        self.key, self.engine, self.cost = key, engine, CostModel()
        self.passed_over, self.last_served, self.retiring, self.draining = 0, 0, False, False
        self.counts = StreamCounts()
        self._clock, self._wake = clock, wake
        self._noise = FrameNoise(engine.card, engine.draws_noise)
        self.capacity = capacity = engine.allocate(capacity)
        self._free = list(range(capacity - 1, -1, -1))
        self._door = threading.Lock()
        self._streams: set[Stream] = set()
        self._ready: set[Stream] = set()
        self._fed: deque[Stream] = deque()
        self._leaving: deque[Stream] = deque()
        self._out: list[Portion] = []
        self._crowded = False
        """Whether some stream with a frame waits for another tick: only then do those without real time lag."""
        self._state = [spec.name for spec in engine.card.state]

    # Any thread.

    def open(self, stream: Stream) -> None:
        """Gives `stream` a slot.

        Raises:
            Overloaded: all slots are taken. ShuttingDown: no new streams any more.
        """
        with self._door:
            if self.draining:
                raise ShuttingDown("the server is shutting down", retry_after_s=1.0)
            if self.retiring:
                raise UnknownModel(f"{self.key} is being unloaded: open the stream on another version")
            if not self._free:
                raise Overloaded(f"{self.capacity} streams of {self.key} are open, no more are taken", retry_after_s=5.0)
            stream.slot = self._free.pop()
            self._streams.add(stream)

    def feed(self, portion: Portion) -> None:
        """Puts a portion in its stream's line."""
        portion.stream.feed(portion)
        self._fed.append(portion.stream)
        self._wake()

    def close(self, stream: Stream) -> None:
        """Frees the stream's slot; portions still in line are dropped, nobody waits for them. Closing twice is closing once."""
        if not stream.closed:
            stream.closed = True
            self._leaving.append(stream)
            self._wake()

    @property
    def live(self) -> int:
        return len(self._streams)

    # The engine thread.

    def has_work(self) -> bool:
        return bool(self._fed or self._leaving or self._ready or self._out)

    def in_use(self) -> bool:
        """A stream finishes on the version it began with, however long it lasts."""
        with self._door:  # one that has seen the lane before it retired is in by now
            return bool(self._streams) or self.has_work()

    def urgency(self) -> float:
        self._collect()
        if self._out:  # a portion without frames is finished as it is collected, and whoever waits for it need not wait for others
            return -math.inf
        return min((stream.due() for stream in self._ready), default=math.inf) + URGENT_S

    def answered(self) -> list[Portion]:
        out, self._out = self._out, []
        return out

    def tick(self, budget_s: float) -> None:
        self._collect()
        if not self._ready:
            return
        self.counts.ticks += 1
        now = self._clock()
        groups: dict[tuple[int, bool, bool], list[Stream]] = {}
        for stream in self._slice(budget_s):
            groups.setdefault((self._steps(stream, now), stream.predicts, stream.spec.dreams), []).append(stream)
        for (steps, predicts, dreams), streams in groups.items():
            try:
                if dreams:
                    self._dream(streams)
                else:
                    self._run(streams, steps, predicts)
            except Exception as exc:
                self._fail_batch(streams, exc)

    def request_ids(self) -> list[str]:
        return _requests_of(self._ready)

    def fail_all(self, error: Exception) -> None:
        self._collect()
        for stream in list(self._streams):
            self._fail(stream, error)

    def warm_up(self) -> None:
        """Runs every program on batches of 1, 2, 4, … rows and notes the fastest run of each as its cost."""
        card, size = self.engine.card, 1
        while size <= min(max(LARGEST_WARM_UP, self.engine.warm_up_rows), self.capacity):
            rows = np.arange(size, dtype=np.intp)
            self._load_begin(rows)
            for program in ("predict", "init", "step", "advance", FRAME):
                if program not in card.programs:
                    continue
                given = self._noise.blank(program, size)
                blank = np.zeros((size, *card.x.shape), np.float32)
                seconds = []
                for _ in range(WARM_UP_CALLS):
                    started = self._clock()
                    guard = "log_likelihood" if program in ("advance", FRAME) else None
                    outputs = self.engine.run_rows(program, rows, {**given, "x": blank, "mask": np.ones_like(blank)}, guard)
                    if guard is not None:
                        np.asarray(outputs[guard])  # waits for the device
                    seconds.append(self._clock() - started)
                self.cost.seed(program, size, min(seconds))
            size *= 2

    def _collect(self) -> None:
        while self._leaving:
            self._leave(self._leaving.popleft())
        while self._fed:
            stream = self._fed.popleft()
            if stream.closed or stream.failed is not None:
                self._fail(stream, stream.failed)
            elif stream.portions:
                self._ready.add(stream)
                self._without_frames(stream)

    def _leave(self, stream: Stream) -> None:
        with self._door:
            if stream in self._streams:
                self._streams.remove(stream)
                self._free.append(stream.slot)
                stream.left()
        self._ready.discard(stream)
        stream.portions.clear()

    def _slice(self, budget_s: float) -> list[Stream]:
        """The ready streams whose frames fit the tick, those due first in front."""
        most = self.cost.largest(FRAME if FRAME in self.engine.card.programs else "step", budget_s, len(self._ready))
        self._crowded = most < len(self._ready)
        return list(self._ready) if most >= len(self._ready) else sorted(self._ready, key=Stream.due)[:most]

    def _steps(self, stream: Stream, now: float) -> int:
        """The steps its next frame gets."""
        if stream.spec.dreams:
            return 0
        if not stream.spec.elastic or not (self._crowded or stream.spec.frame_s):
            return stream.spec.steps
        return stream.spec.steps >> max(0, int(stream.lag(now) / LATE_S))

    def _without_frames(self, stream: Stream) -> None:
        """Finishes the portions in front that have no frame left: markers, snapshots, bytes that completed none."""
        while stream.portions and stream.portions[0].done == len(stream.portions[0].x):
            try:
                self._finish(stream, stream.portions[0])
            except Exception as exc:  # the portion is still in line: it gets its answer there
                self._fail_batch([stream], exc)
                return
            stream.portions.popleft()
        if not stream.portions:
            self._ready.discard(stream)

    def _finish(self, stream: Stream, portion: Portion) -> None:
        if len(portion.x) == 0:
            portion.first_frame = stream.frame
        if portion.wants_state:
            self._place(stream)
            rows = self.engine.read_rows(np.array([stream.slot], np.intp), self._state)
            portion.state = {name: value[0].copy() for name, value in rows.items()}
        self._out.append(portion)

    def _fail_batch(self, streams: list[Stream], error: Exception) -> None:
        """Streams with a frame in a batch that raised end with the failure, and the log says why, once; the lane lives on."""
        extra = {"model": self.key, "streams": len(streams), "request_ids": _requests_of(streams)}
        _LOG.error("frames failed", exc_info=error, extra=extra)
        failure = BackendFailure(f"the engine failed on {self.key}: {error}")
        failure.__cause__ = error
        for stream in streams:
            self._fail(stream, failure)

    def _fail(self, stream: Stream, error: Exception | None) -> None:
        stream.failed = error
        while stream.portions:
            portion = stream.portions.popleft()
            if error is not None:
                portion.error = error
                self._out.append(portion)
        self._ready.discard(stream)

    def _place(self, stream: Stream) -> None:
        """Writes the stream's first state into its slot, once."""
        if stream.placed:
            return
        stream.placed = True
        slot = np.array([stream.slot], np.intp)
        if stream.spec.state is None:
            self._load_begin(slot)
        else:
            self.engine.load_rows(slot, {name: stream.spec.state[name][None] for name in self._state})

    def _load_begin(self, slots: NDArray[np.intp]) -> None:
        begin = self.engine.begin
        self.engine.load_rows(slots, {name: np.repeat(begin[name][None], len(slots), 0) for name in self._state})

    def _run(self, streams: list[Stream], steps: int, predicts: bool) -> None:
        """One frame of each of `streams`, all with so many steps."""
        for stream in streams:
            self._place(stream)
        portions = [stream.portions[0] for stream in streams]
        slots = np.array([stream.slot for stream in streams], np.intp)
        x = np.stack([portion.x[portion.done] for portion in portions])
        mask = np.ones_like(x)
        for row, portion in enumerate(portions):
            if portion.mask is not None:
                mask[row] = portion.mask[portion.done]
        started = self._clock()
        shows = any(stream.shows for stream in streams)
        shown, outputs = self._programs(slots, {"x": x, "mask": mask}, portions, steps, predicts, shows)
        log_likelihood = outputs["log_likelihood"].astype(np.float64)  # waits for a device: its time is what is measured
        if not predicts:
            self._observe(steps, len(streams), self._clock() - started)
        kl = outputs["kl"].astype(np.float64).reshape(len(streams), -1).sum(1)
        self.counts.nonfinite += int(np.count_nonzero(~np.isfinite(log_likelihood - kl)))
        used = np.where(mask.any(1), steps, 0)
        self.counts.steps += int(used.sum())
        self.counts.degraded += sum(1 for stream, one in zip(streams, used.tolist(), strict=True) if one and steps < stream.spec.steps)
        self._put_down(streams, log_likelihood, kl, used, shown)

    def _put_down(
        self,
        streams: list[Stream],
        log_likelihood: NDArray[np.float64],
        kl: NDArray[np.float64],
        used: NDArray[np.int64],
        shown: Mapping[str, NDArray[Any]],
    ) -> None:
        """Writes a frame of each of `streams` into its portion, and moves on to the next."""
        self.counts.frames += len(streams)
        rows = zip(streams, (log_likelihood - kl).tolist(), log_likelihood.tolist(), kl.tolist(), used.tolist(), strict=True)
        for row, (stream, one_elbo, one_log_likelihood, one_kl, one_used) in enumerate(rows):
            portion = stream.portions[0]
            if portion.done == 0:
                portion.first_frame = stream.frame
            portion.elbo.append(one_elbo)
            portion.log_likelihood.append(one_log_likelihood)
            portion.kl.append(one_kl)
            portion.steps_used.append(one_used)
            if stream.shows:
                portion.shown.append({name: value[row] for name, value in shown.items()})
            portion.done += 1
            stream.frame += 1
            if portion.done == len(portion.x):
                self._without_frames(stream)

    def _dream(self, streams: list[Stream]) -> None:
        """The next frame of each, drawn from the model: z from the prediction, x from p(x|z), and the state moves on with both."""
        for stream in streams:
            self._place(stream)
        slots = np.array([stream.slot for stream in streams], np.intp)
        seeds = np.array([stream.spec.seed for stream in streams], np.uint64)
        frames = np.array([stream.frame for stream in streams], np.int64)
        card, engine = self.engine.card, self.engine
        # λ is the prediction now, so by the same noise `advance` draws the very z whose x this is
        predicted = engine.run_rows("predict", slots, self._noise.predict(seeds, frames))
        parameters = {name: predicted[name][:, :1] for name in card.likelihood.parameters}
        x = engine.run("sample_x", {**parameters, **self._noise.sample_x(seeds, frames)})["x"][:, 0]
        given = {"x": x, "mask": np.ones_like(x), **self._noise.advance(seeds, frames, Purpose.PRIOR)}
        outputs = engine.run_rows("advance", slots, given, guard="log_likelihood")
        log_likelihood, kl = (outputs[name].astype(np.float64).reshape(len(streams), -1).sum(1) for name in ("log_likelihood", "kl"))
        self._put_down(streams, log_likelihood, kl, np.zeros(len(streams), np.int64), {"x": x, "mean": predicted["mean"][:, 0]})

    def _programs(
        self, slots: NDArray[np.intp], given: Arrays, portions: list[Portion], steps: int, predicts: bool, shows: bool
    ) -> tuple[Arrays, Outputs]:
        """What may be shown of each row (nothing, unless `shows`), and the outputs that measure it."""
        card, engine = self.engine.card, self.engine
        predicted: Outputs = {}
        if steps == card.trained_steps and FRAME in card.programs and not predicts:
            outputs = engine.run_rows(FRAME, slots, {**given, **self._noise.ahead(portions)}, guard="log_likelihood")
        else:
            seeds = np.array([portion.stream.spec.seed for portion in portions], np.uint64)
            frames = np.array([portion.stream.frame for portion in portions], np.int64)
            predicted = engine.run_rows("predict", slots, self._noise.predict(seeds, frames))
            if "init" in card.programs:
                engine.run_rows("init", slots, given)
            for step in range(steps if "step" in card.programs else 0):
                engine.run_rows("step", slots, {**given, **self._noise.step(seeds, frames, step)})
            outputs = engine.run_rows("advance", slots, {**given, **self._noise.advance(seeds, frames)}, guard="log_likelihood")
        if not shows:
            return {}, outputs
        shown: Arrays = {f"prediction.{name}": value for name, value in predicted.items()}
        shown |= {f"reconstruction.{name}": value for name, value in outputs.items() if name not in ("log_likelihood", "kl", "trace")}
        shown |= engine.read_rows(slots, [array for level in card.levels for array in level.parameters.values()])
        return shown, outputs

    def _observe(self, steps: int, rows: int, seconds: float) -> None:
        if steps == self.engine.card.trained_steps and FRAME in self.engine.card.programs:
            self.cost.observe(FRAME, rows, seconds)


def _requests_of(streams: Iterable[Stream]) -> list[str]:
    """Who brought the portions in front. Engine thread only, which alone takes portions away."""
    return named(stream.portions[0].request_id for stream in streams if stream.portions)
