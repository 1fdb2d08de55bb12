"""One stream: what it was opened with, where it stands, and the messages that wait for their frames to be filtered.

A *portion* is what one message of the client brought: some frames (perhaps none), answered as one, in order. It is made in
the event loop, worked on by the engine thread, and settled in the event loop again, exactly once.

Shapes: n frames of a portion, X entries per frame.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays
from service.scheduler.lane import Loop
from service.telemetry import REQUEST_ID

MESSAGE_S, FRAME_S = 0.1, 1 / 80
"""Audio that usually comes at once; and a frame's length where frames have none."""
PARTS = ("elbo", "surprise", "posterior", "log_likelihood", "kl", "reconstruction", "prediction")


@dataclass(frozen=True)
class StreamSpec:
    """What a stream was opened with, as the server applies it.

    Attributes:
        parts: of PARTS, what results carry. frame_s: real-time length of a frame; 0 = there is none.
        state: where it goes on from, one row each, without the row axis; None = from the beginning. frame: index of its first frame.
        dreams: its frames are drawn from the model instead of filtered; what portions bring only says how many.
    """

    steps: int
    seed: int
    elastic: bool = False
    parts: frozenset[str] = frozenset(("elbo", "surprise"))
    frame_s: float = 0.0
    state: Mapping[str, NDArray[Any]] | None = None
    frame: int = 0
    dreams: bool = False


@dataclass(eq=False, slots=True)
class Portion:
    """Frames of one message and what filtering said of them.

    Attributes:
        x, mask: (n, X); mask None = all observed.
        wants_state: the stream's state after the portion is to be read. about: whatever the connection wants to find again.
        request_id: of the request or WebSocket that brought it, for the log.
        elbo, log_likelihood, kl: nats, one per frame done. steps_used: likewise. shown: per frame, the arrays asked for.
        noise: (frames, uses, S, D) of some frames from `noise_from` on, made when the first one's turn comes.
        state: after the portion, if wanted. error: instead of all this.
    """

    stream: Stream
    x: NDArray[np.float32]
    mask: NDArray[np.float32] | None
    received: float
    wants_state: bool = False
    about: Any = None
    request_id: str = field(default_factory=REQUEST_ID.get)
    due: float = 0.0
    done: int = 0
    first_frame: int = 0
    elbo: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    steps_used: list[int] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    noise: NDArray[np.float32] | None = None
    noise_from: int = 0
    state: Arrays | None = None
    error: Exception | None = None
    settled: bool = False

    @property
    def loop(self) -> Loop | None:
        return self.stream.loop

    def settle(self) -> None:
        """Hands the portion back. Runs in the stream's event loop (or wherever the lane is driven from).

        Raises:
            RuntimeError: it was handed back before: that would be a fault of the lane.
        """
        if self.settled:
            raise RuntimeError("a portion was answered twice")
        self.settled = True
        self.stream.waiting -= len(self.x)
        self.stream.on_done(self)


class StreamDoor(Protocol):
    """Where the streams of a model go: its lane, as those who hold streams see it. All calls may be made in the event loop.

    `draining`: the server is stopping. `live`: streams open. `capacity`: how many may be.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def draining(self) -> bool: ...

    @property
    def live(self) -> int: ...

    def open(self, stream: Stream) -> None:
        """Gives `stream` a slot.

        Raises:
            Overloaded: all slots are taken. ShuttingDown, UnknownModel: no new streams any more.
        """
        ...

    def feed(self, portion: Portion) -> None:
        """Puts a portion in its stream's line; it is settled exactly once, unless the stream is closed before."""
        ...

    def close(self, stream: Stream) -> None:
        """Frees the stream's slot; portions still in line are dropped, nobody waits for them. Closing twice is closing once."""
        ...


class Stream:
    """A live stream. `waiting` counts frames handed in and not yet answered."""

    def __init__(self, spec: StreamSpec, on_done: Callable[[Portion], None], loop: Loop | None):
        self.spec, self.on_done, self.loop = spec, on_done, loop
        self._began: float | None = None
        self._handed_in = 0
        self.shows = spec.dreams or bool(spec.parts & {"posterior", "reconstruction", "prediction"})
        """Whether arrays are wanted of every frame, and not only its nats."""
        self.predicts = "prediction" in spec.parts
        self.slot = -1
        self.frame = spec.frame
        """Index of the next frame to be filtered. Engine thread only."""
        self.waiting = 0
        self.portions: deque[Portion] = deque()
        """In line. Appended in the event loop, popped on the engine thread."""
        self.placed = False
        self.closed = False
        self.failed: Exception | None = None

    def feed(self, portion: Portion) -> None:
        """Puts a portion in line. A portion sent ahead of real time is due when it would have been spoken, else when it came."""
        if self._began is None and len(portion.x):
            self._began = portion.received
        spoken = self._handed_in * self.spec.frame_s
        portion.due = max(portion.received, (self._began or 0.0) + spoken) if self.spec.frame_s else portion.received
        self._handed_in += len(portion.x)
        self.waiting += len(portion.x)
        self.portions.append(portion)

    def left(self) -> None:
        """Its slot is free again. Engine thread."""

    def due(self) -> float:
        """When the next frame is due: the first MESSAGE_S of a portion when it came, the others at the pace of speech, so that a long
        portion does not keep out those that came a little later."""
        portion = self.portions[0]
        return portion.due + max(0.0, portion.done * (self.spec.frame_s or FRAME_S) - MESSAGE_S)

    def lag(self, now: float) -> float:
        """Seconds by which its next frame is behind one that is spoken on from the portion's arrival; without real time: by which it has
        waited for its turn."""
        if not self.portions:
            return -math.inf
        return now - self.portions[0].due - self.portions[0].done * self.spec.frame_s if self.spec.frame_s else now - self.due()
