"""What routes work with: the parts of the running server, found through the application."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import HTTPConnection, Request

from service.browser_tokens import BrowserTokens
from service.errors import ElbowError, InvalidInput
from service.jobs import Limits
from service.keys import ANYBODY, Caller, KeyRing
from service.oip.sequences import Sequences
from service.oip.statistics import Statistics
from service.repository import Repository, ServedModel
from service.scheduler.job import Job, JobResult
from service.scheduler.static_lane import Counts
from service.streams.lane import StreamCounts
from service.streams.results import Shaper
from service.streams.stream import StreamDoor
from service.streams.tokens import Tokens
from service.telemetry import Call, Metrics


class Scheduling(Protocol):
    """The scheduler, as routes see it."""

    @property
    def alive(self) -> bool:
        """Whether anything is worked on, or was until it was told to stop."""
        ...

    async def submit(self, job: Job) -> JobResult:
        """The job's result; cancelling the call frees its rows at the next tick. Raises ElbowError."""
        ...

    def check_door(self, key: str) -> None:
        """Raises Overloaded or ShuttingDown if any job for this model would be refused now."""
        ...

    def replied(self, job: Job, result: JobResult) -> None:
        """The reply to a job is about to leave."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Refuses new jobs, finishes what it can in time, answers the rest with ShuttingDown. Called again, it can only end earlier."""
        ...

    async def predicted_ms(self, key: str, rows: int, program: str = "step", samples: int = 1) -> float:
        """Milliseconds that one run of `program` takes on so many rows, as measured on this machine."""
        ...

    def stream_lane(self, key: str) -> StreamDoor:
        """Where the streams of a filter go. Raises InvalidInput for a static model."""
        ...

    def stats(self) -> dict[str, Counts]:
        """What has been done so far, per static model."""
        ...

    def stream_stats(self) -> dict[str, tuple[int, StreamCounts]]:
        """Live streams and what has been done so far, per filter."""
        ...


class Live(Protocol):
    """A connection that can be handed over."""

    async def drain(self) -> None:
        """Sends the stream's token, then closes; returns when both have left."""
        ...


def _own_tokens() -> Tokens:
    """Tokens that hold as long as the process."""
    return Tokens(secrets.token_bytes(32), ttl_s=3600.0, max_bytes=65_536)


def _own_browser_tokens() -> BrowserTokens:
    return BrowserTokens(secrets.token_bytes(32), ttl_s=60.0)


@dataclass
class Server:
    """The wired parts of one application (app.py makes it).

    `draining`: no longer ready, still serving. `refusing`: nothing new is taken, what runs is finished.
    """

    scheduler: Scheduling
    repository: Repository
    limits: Limits
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    tokens: Tokens = field(default_factory=_own_tokens)
    connections: set[Live] = field(default_factory=set)
    keys: KeyRing = field(default_factory=KeyRing)
    browser_tokens: BrowserTokens = field(default_factory=_own_browser_tokens)
    draining: bool = False
    refusing: bool = False
    statistics: Statistics = field(default_factory=Statistics)
    sequences: Sequences = field(init=False)
    _shapers: dict[str, Shaper] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sequences = Sequences(self.limits.max_sequences, self.limits.stream_idle_s, self.clock)

    def shaper(self, model: ServedModel) -> Shaper:
        """What makes results of this model's streams."""
        if model.sha256 not in self._shapers:
            self._shapers[model.sha256] = Shaper(model.card)
        return self._shapers[model.sha256]

    def issuer(self, model: ServedModel, state: str | None) -> ServedModel:
        """The version of `model` that issued the token `state`, where it is still loaded; else `model`, which will refuse it."""
        if state is None:
            return model
        return self.repository.issued_by(model.name, self.tokens.issuer(state)) or model

    def charge(self, caller: Caller, work: float) -> None:
        """Takes `work` row-steps off the caller's quota.

        Raises:
            QuotaExceeded: nothing was left.
        """
        if caller.quota is not None:
            caller.quota.check()
            caller.quota.charge(work)
        if caller.name:
            self.metrics.of_key_work(caller.name).inc(work)

    def refund(self, caller: Caller, work: float) -> None:
        """Gives back what was charged for and not done."""
        if caller.quota is not None:
            caller.quota.charge(-work)

    @contextmanager
    def account(self, caller: Caller) -> Iterator[Callable[[float], None]]:
        """Gives what takes so many row-steps, as `charge`; all is given back if what is inside ends in a refusal or a failure."""
        taken = 0.0

        def charge(work: float) -> None:
            nonlocal taken
            self.charge(caller, work)
            taken += work

        try:
            yield charge
        except ElbowError:
            self.refund(caller, taken)
            raise

    async def hand_over_streams(self) -> None:
        """Every live stream gets its token and is closed; new ones are refused from now on."""
        self.draining = self.refusing = True
        await asyncio.gather(*(connection.drain() for connection in list(self.connections)), return_exceptions=True)

    async def stop(self, grace_s: float) -> None:
        """Stops the scheduler; returns when it has stopped. Who asks again may leave it less time, never more."""
        self.draining = self.refusing = True
        await asyncio.shield(self.scheduler.stop(grace_s))


def server_of(connection: HTTPConnection) -> Server:
    server: Server = connection.app.state.server
    return server


def caller_of(connection: HTTPConnection) -> Caller:
    """Who asks, as service/access.py found out."""
    caller: Caller = connection.scope.get("caller", ANYBODY)
    return caller


def key_id_of(connection: HTTPConnection) -> str:
    """Whose request this is: state tokens, and all else that is kept for a client, are bound to it.

    The name of the key; on an open server the hash of whatever key is shown (to a gateway in front, perhaps).
    """
    if name := caller_of(connection).name:
        return name
    shown = connection.headers.get("x-api-key") or connection.headers.get("authorization", "").removeprefix("Bearer ").strip()
    return hashlib.sha256(shown.encode()).hexdigest()[:16] if shown else ""


def static_model_of(request: Request, endpoint: str) -> ServedModel:
    """`model_of` for calls that only a static model answers.

    Raises:
        InvalidInput: the model is a filter.
    """
    model = model_of(request, endpoint)
    if model.card.family != "static":
        raise InvalidInput(f"{model.name} filters sequences: POST /v1/models/{model.name}/filter, or open a WebSocket there")
    return model


def model_of(connection: HTTPConnection, endpoint: str) -> ServedModel:
    """The model and version the path names; from here on the request (or WebSocket) is counted under them.

    Raises:
        UnknownModel: there is no such model or version.
    """
    call: Call = connection.scope["call"]
    call.endpoint = endpoint
    model = server_of(connection).repository.get(connection.path_params["model"], connection.path_params.get("version"))
    call.model, call.version = model.name, model.version
    return model
