"""Sequences: a filter's stream kept open between requests, found again by its `sequence_id`.

They live on one replica and end after some idle time; every reply carries the state as a token, which any replica takes at
`sequence_start`. A sequence belongs to the API key that began it and stays on the model version it began with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from service.errors import ElbowError, InvalidInput, Overloaded, ShuttingDown
from service.repository import ServedModel
from service.schemas import FilterBody
from service.streams.opening import checked_steps, spec_of
from service.streams.stateless import FRESH, Frames, snapshot_after
from service.streams.stream import Portion, Stream, StreamDoor
from service.streams.tokens import Snapshot

MAX_ID = 128
AT_HAND = frozenset({"log_likelihood", "kl"})
"""Parts of a result that cost nothing: any request of a sequence may ask for them. The others are chosen at its start."""


@dataclass(frozen=True)
class SequenceId:
    """Which sequence: the caller's key, the model and version as the path names them, and the client's own id."""

    key_id: str
    model: str
    version: str | None
    id: int | str

    def __str__(self) -> str:
        return f"{self.id!r} of {self.model}"


@dataclass(frozen=True)
class SequenceControl:
    """What the request parameters say about sequences; `id` None: the request stands alone."""

    id: int | str | None = None
    start: bool = False
    end: bool = False


@dataclass(eq=False)
class Sequence:
    """A live sequence. `waiting`: the requests in line, in order."""

    name: SequenceId
    model: ServedModel
    lane: StreamDoor
    settings: Mapping[str, Any]
    stream: Stream
    summary: Mapping[str, float]
    last_used: float
    waiting: set[asyncio.Future[tuple[Portion, Snapshot]]] = field(default_factory=set)


def read_control(parameters: dict[str, Any]) -> SequenceControl:
    """Takes the sequence parameters out of `parameters`.

    Raises:
        InvalidInput: one of them is not what the protocol says.
    """
    identity = parameters.pop("sequence_id", None)
    flags = {name: parameters.pop(name, False) for name in ("sequence_start", "sequence_end")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InvalidInput.at(f"parameters.{name}", "must be true or false")
    if identity is not None:
        is_number = isinstance(identity, int) and not isinstance(identity, bool) and 0 <= identity < 2**64
        if not is_number and not (isinstance(identity, str) and len(identity) <= MAX_ID):
            message = f"must be a whole number below 2**64, or a string of at most {MAX_ID} characters"
            raise InvalidInput.at("parameters.sequence_id", message)
    if identity in (None, 0, ""):
        if any(flags.values()):
            raise InvalidInput.at("parameters.sequence_id", "is required with sequence_start or sequence_end, and not 0 or empty")
        return SequenceControl()
    return SequenceControl(identity, flags["sequence_start"], flags["sequence_end"])


class Sequences:
    """The live sequences of one server. All of it runs in the event loop.

    Args:
        most: live at once. idle_s: after so long without a request one ends. clock: monotonic seconds.
    """

    def __init__(self, most: int, idle_s: float, clock: Callable[[], float]):
        self._most, self._idle_s, self._clock = most, idle_s, clock
        self._live: dict[SequenceId, Sequence] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._live)

    def start(self, name: SequenceId, model: ServedModel, lane: StreamDoor, frames: Frames) -> Sequence:
        """A fresh sequence, in place of one of that name if there is one.

        Raises:
            Overloaded: as many as there may be are live. ShuttingDown: no new ones any more.
        """
        self.expire()
        replaced = self._live.get(name)
        if replaced is not None:
            self._close(replaced, InvalidInput.at("parameters.sequence_start", f"another request began sequence {name} anew"))
        if len(self._live) >= self._most:
            raise Overloaded(f"{self._most} sequences are live, no more are taken: end some", retry_after_s=5.0)
        summary = frames.snapshot.summary if frames.snapshot else FRESH
        spec = spec_of(frames.settings, 0.0, frames.snapshot)
        stream = Stream(replace(spec, parts=spec.parts | AT_HAND), self._answered, asyncio.get_running_loop())
        lane.open(stream)
        sequence = self._live[name] = Sequence(name, model, lane, frames.settings, stream, summary, self._clock())
        self._wait_for_idle()
        return sequence

    def find(self, name: SequenceId) -> Sequence:
        """The live sequence of that name.

        Raises:
            InvalidInput: there is none. ShuttingDown: it cannot go on here.
        """
        self.expire()
        sequence = self._live.get(name)
        if sequence is None:
            message = (
                f"sequence {name} is not live here: begin it with sequence_start (and go on from the parameter state of its last reply); "
                f"a sequence ends after {self._idle_s:g} s without a request"
            )
            raise InvalidInput.at("parameters.sequence_id", message)
        if sequence.lane.draining:
            raise ShuttingDown("the server is shutting down: go on elsewhere from the parameter state of the last reply", retry_after_s=1.0)
        return sequence

    def check_kept(self, sequence: Sequence, body: FilterBody) -> None:
        """What was chosen at the start stays.

        Raises:
            InvalidInput: the request says otherwise.
        """
        if body.state is not None:
            raise InvalidInput.at("parameters.state", "is taken with sequence_start only: the server has the state of a live sequence")
        given = {"steps": None if body.steps is None else checked_steps(body.steps, sequence.model.card)}
        given |= {"seed": body.seed, "elastic": body.elastic}
        for name, value in given.items():
            if value is not None and value != sequence.settings[name]:
                message = f"the sequence has {sequence.settings[name]}, chosen at its start, which cannot change to {value} on its way"
                raise InvalidInput.at(f"parameters.{name}", message)
        for part in body.parts:
            if part in ("posterior", "reconstruction", "prediction") and part not in sequence.stream.spec.parts:
                raise InvalidInput.at("outputs", f"{part} was not among the outputs at sequence_start: name it there")

    async def filter(self, sequence: Sequence, frames: Frames, *, last: bool) -> tuple[Portion, Snapshot]:
        """Filters the frames after those before them; `last` ends the sequence.

        Raises:
            ElbowError: what the lane says; the sequence has ended then.
        """
        done: asyncio.Future[tuple[Portion, Snapshot]] = asyncio.get_running_loop().create_future()
        sequence.waiting.add(done)
        sequence.last_used = self._clock()
        if last:
            self._live.pop(sequence.name, None)
        portion = Portion(sequence.stream, frames.x, frames.mask, self._clock(), wants_state=True, about=(sequence, done))
        sequence.lane.feed(portion)
        try:
            return await done
        except ElbowError:
            self._close(sequence, InvalidInput.at("parameters.sequence_id", f"sequence {sequence.name} has failed: begin it anew"))
            raise
        finally:
            sequence.waiting.discard(done)
            sequence.last_used = self._clock()
            if last:  # portions are answered in order: nobody waits behind this one
                sequence.lane.close(sequence.stream)

    def expire(self) -> None:
        """Ends the sequences that were idle for too long."""
        before = self._clock() - self._idle_s
        for sequence in [one for one in self._live.values() if not one.waiting and one.last_used <= before]:
            self._close(sequence, None)

    def _answered(self, portion: Portion) -> None:
        """Runs when the lane hands a portion back: in order, so summaries add up."""
        sequence, done = portion.about
        if portion.error is not None:
            if not done.done():
                done.set_exception(portion.error)
            return
        snapshot = snapshot_after(portion, sequence.settings, sequence.summary)
        sequence.summary = snapshot.summary
        if not done.done():
            done.set_result((portion, snapshot))

    def _close(self, sequence: Sequence, reason: ElbowError | None) -> None:
        """Frees the slot; requests still in line are refused for `reason`."""
        if self._live.get(sequence.name) is sequence:
            del self._live[sequence.name]
        for done in sequence.waiting:
            if not done.done() and reason is not None:
                done.set_exception(reason)
        sequence.lane.close(sequence.stream)

    def _wait_for_idle(self) -> None:
        """Looks again when the first sequence can have been idle for long enough, as long as any lives."""
        if self._timer is not None or not self._live:
            return
        now = self._clock()
        first = min(now if sequence.waiting else sequence.last_used for sequence in self._live.values()) + self._idle_s
        self._timer = asyncio.get_running_loop().call_later(max(first - now, 0.01), self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self.expire()
        self._wait_for_idle()
