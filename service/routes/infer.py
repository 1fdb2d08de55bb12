"""POST encode, refine, reconstruct, score, generate: parse, submit, shape. Plain Starlette routes: nothing per request but this.

Every call also exists with /versions/{version}; encode and refine also stream (`Accept: text/event-stream`); encode, reconstruct
and score also take and give arrays (service/routes/arrays.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service import jobs, replies, schemas
from service.body import in_worker_if_large, parse_object, read_body
from service.deps import Server, model_of, server_of, static_model_of
from service.errors import InvalidInput
from service.repository import ServedModel
from service.routes.arrays import array_call, speaks_arrays
from service.routes.filters import dream
from service.scheduler.job import Job, JobResult
from service.submission import EVENT_STREAM, Show, events, submit


def refuse_query(request: Request) -> None:
    """A call in JSON has its fields in the body.

    Raises:
        InvalidInput: something is in the query, where it would be overlooked.
    """
    for name in request.query_params:
        raise InvalidInput.at(name[:40], "is in the query: with JSON in and out it belongs in the body (columns: with arrays only)")


@dataclass(frozen=True)
class Endpoint:
    """One call: its body, how a body becomes a job, how a result becomes a reply, and whether it streams."""

    name: str
    body: type[schemas.Body]
    job: Callable[[Any, ServedModel, jobs.Limits, float], Job]
    reply: Callable[[ServedModel, JobResult, Any], dict[str, Any]]
    streams: bool = False
    arrays: bool = False
    """Whether rows and replies may be arrays instead of JSON (service/tensor_bodies.py)."""
    of_filter: Callable[[Request], Awaitable[Response]] | None = None
    """What answers the same call of a filter; None: nothing does."""

    async def __call__(self, request: Request) -> Response:
        if self.arrays and speaks_arrays(request):
            return await array_call(self, request)
        server = server_of(request)
        arrival = server.clock()
        if request.scope["query_string"]:
            refuse_query(request)
        if self.of_filter is not None and model_of(request, self.name).card.family == "filter":
            return await self.of_filter(request)
        model = static_model_of(request, self.name)
        server.scheduler.check_door(model.key)
        raw = await read_body(request, server.limits.max_body_bytes)

        def prepare() -> tuple[Any, Job]:
            body = schemas.read_body_fields(self.body, parse_object(raw))
            return body, self.job(body, model, server.limits, arrival)

        body, job = await in_worker_if_large(len(raw), prepare)
        return await self.answer(request, server, model, body, job)

    async def answer(self, request: Request, server: Server, model: ServedModel, body: Any, job: Job) -> Response:
        """The reply in JSON, or its events."""
        if self.streams and EVENT_STREAM in request.headers.get("accept", ""):
            show = Show(partial(replies.step_event, model, parts=body.parts), lambda result: self.reply(model, result, body))
            return await events(request, server, model, job, show=show)
        result = await submit(request, server, model, job)
        response = await in_worker_if_large(replies.size(result), lambda: replies.json_response(self.reply(model, result, body)))
        server.scheduler.replied(job, result)
        return response


def _encode_reply(model: ServedModel, result: JobResult, body: schemas.EncodeBody) -> dict[str, Any]:
    return replies.encode_reply(model, result, body.seed, body.parts)


def _reconstruct_reply(model: ServedModel, result: JobResult, body: schemas.ReconstructBody) -> dict[str, Any]:
    return replies.reconstruct_reply(model, result, body.seed)


def _score_reply(model: ServedModel, result: JobResult, body: schemas.ScoreBody) -> dict[str, Any]:
    return replies.score_reply(model, result, body.seed)


def _generate_job(body: schemas.GenerateBody, model: ServedModel, limits: jobs.Limits, arrival: float) -> Job:
    return jobs.generate_job(body, model, limits)


ENDPOINTS = (
    Endpoint("encode", schemas.EncodeBody, jobs.encode_job, _encode_reply, streams=True, arrays=True),
    Endpoint("refine", schemas.RefineBody, jobs.refine_job, _encode_reply, streams=True),
    Endpoint("reconstruct", schemas.ReconstructBody, jobs.reconstruct_job, _reconstruct_reply, arrays=True),
    Endpoint("score", schemas.ScoreBody, jobs.score_job, _score_reply, arrays=True),
    Endpoint("generate", schemas.GenerateBody, _generate_job, lambda m, r, body: replies.generate_reply(m, r, body.seed), of_filter=dream),
)


def _route(path: str, endpoint: Endpoint) -> Route:
    async def call(request: Request) -> Response:  # Starlette takes functions as request -> response, other callables as ASGI
        return await endpoint(request)

    return Route(path, call, methods=["POST"], name=endpoint.name, include_in_schema=False)


ROUTES = [
    _route(f"/v1/models/{{model}}{version}/{endpoint.name}", endpoint) for endpoint in ENDPOINTS for version in ("", "/versions/{version}")
]
