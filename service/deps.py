"""What routes work with: the parts of the running server, found through the application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from service.jobs import Limits
from service.repository import Repository, ServedModel
from service.scheduler.job import Job, JobResult
from service.telemetry import Call, Metrics


class Scheduling(Protocol):
    """The scheduler, as routes see it."""

    async def submit(self, job: Job) -> JobResult:
        """The job's result; cancelling the call frees its rows at the next tick. Raises ElbowError."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Refuses new jobs, finishes what it can in time, answers the rest with ShuttingDown."""
        ...

    def predicted_ms(self, key: str, rows: int, program: str = "step", samples: int = 1) -> float:
        """Milliseconds that one run of `program` takes on so many rows, as measured on this machine."""
        ...


@dataclass
class Server:
    """The wired parts of one application (app.py makes it). `draining`: no longer ready, about to stop."""

    scheduler: Scheduling
    repository: Repository
    limits: Limits
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    draining: bool = False
    _stopping: asyncio.Future[None] | None = None

    async def stop(self, grace_s: float) -> None:
        """Stops the scheduler, once, however many ask; returns when it has stopped."""
        if self._stopping is None:
            self.draining = True
            self._stopping = asyncio.ensure_future(self.scheduler.stop(grace_s))
        await asyncio.shield(self._stopping)


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def model_of(request: Request, endpoint: str) -> ServedModel:
    """The model and version the path names; from here on the request is counted under them.

    Raises:
        UnknownModel: there is no such model or version.
    """
    call: Call = request.scope["call"]
    call.endpoint = endpoint
    model = server_of(request).repository.get(request.path_params["model"], request.path_params.get("version"))
    call.model, call.version = model.name, model.version
    return model
