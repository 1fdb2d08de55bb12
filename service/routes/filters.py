"""Sequences: POST …/filter takes some frames and a state; the WebSocket at the same path streams them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from service import arrays, replies
from service.body import in_worker_if_large, parse_object, read_body
from service.deps import Server, caller_of, key_id_of, model_of, server_of
from service.errors import ElbowError, error_response
from service.repository import ServedModel
from service.schemas import FilterBody, read_body_fields
from service.streams.connection import Connection
from service.streams.opening import checked_steps, refuse_foreign, spec_of
from service.streams.stream import Portion, Stream
from service.streams.tokens import Snapshot


async def filter_frames(request: Request) -> Response:
    """Stateless: the frames in the body, from the state in the body, and the next state back."""
    server = server_of(request)
    began = server.clock()
    model = model_of(request, "filter")
    lane = server.scheduler.stream_lane(model.key)
    raw = await read_body(request, server.limits.max_body_bytes)
    key_id = key_id_of(request)

    def prepare() -> tuple[dict[str, Any], Snapshot | None, Any, Any]:
        body = read_body_fields(FilterBody, parse_object(raw))
        x = arrays.read_rows(body.frames, "frames", model.card.x, server.limits.max_rows)
        mask = None if body.mask is None else arrays.read_mask(body.mask, model.card.x, len(x)).reshape(len(x), -1)
        snapshot = None if body.state is None else server.tokens.read(body.state, model.sha256, key_id)
        return _settings(body, model, snapshot), snapshot, x.reshape(len(x), -1), mask

    settings, snapshot, x, mask = await in_worker_if_large(len(raw), prepare)
    server.charge(caller_of(request), len(x) * (1 + settings["steps"]))
    done: asyncio.Future[Portion] = asyncio.get_running_loop().create_future()
    stream = Stream(spec_of(settings, 0.0, snapshot), _settle(done), asyncio.get_running_loop())
    lane.open(stream)
    try:
        fed = server.clock()
        lane.feed(Portion(stream, x, mask, fed, wants_state=True))
        portion = await done
    finally:
        lane.close(stream)
    if portion.error is not None:
        raise portion.error
    return replies.json_response(_reply(server, model, portion, settings, snapshot, key_id, (began, fed)))


def _settings(body: FilterBody, model: ServedModel, snapshot: Snapshot | None) -> dict[str, Any]:
    before = {} if snapshot is None else dict(snapshot.settings)
    if snapshot is not None:
        refuse_foreign(snapshot)
    steps = body.steps if body.steps is not None else before.get("steps", model.card.trained_steps)
    return {
        "sample_rate": model.card.x.sample_rate,
        "encoding": "json",
        "steps": checked_steps(steps, model.card),
        "seed": before.get("seed", 0) if body.seed is None else body.seed,
        "elastic": bool(body.elastic),
        "token_every": 0,
        "return": list(dict.fromkeys(("elbo", "surprise", *body.parts))),
    }


def _settle(done: asyncio.Future[Portion]) -> Any:
    def settle(portion: Portion) -> None:
        if not done.done():
            done.set_result(portion)

    return settle


def _reply(
    server: Server,
    model: ServedModel,
    portion: Portion,
    settings: dict[str, Any],
    snapshot: Snapshot | None,
    key_id: str,
    times: tuple[float, float],
) -> dict[str, Any]:
    assert portion.state is not None
    before = dict(snapshot.summary) if snapshot else {"frames": 0, "nats": 0.0, "lag_ms_max": 0.0, "lag_ms_sum": 0.0}
    summary = before | {"frames": before["frames"] + len(portion.x), "nats": before["nats"] + float(np.nansum(portion.elbo))}
    frame = portion.first_frame + len(portion.x)
    after = Snapshot(settings, frame, frame, summary, portion.state)
    now = server.clock()
    return {
        "model": model.name,
        "version": model.version,
        "seed": settings["seed"],
        "results": server.shaper(model).results(portion, portion.stream.spec),
        "frame": frame,
        "state": server.tokens.issue(after, model.sha256, key_id),
        "timing": {"filter_ms": 1e3 * (now - times[1]), "total_ms": 1e3 * (now - times[0])},
    }


async def filter_stream(socket: WebSocket) -> None:
    """The WebSocket: refused with a problem document before it is accepted, with an `error` message after."""
    server: Server = socket.app.state.server
    try:
        model = server.repository.get(socket.path_params["model"], socket.path_params.get("version"))
        lane = server.scheduler.stream_lane(model.key)
    except ElbowError as error:
        server.metrics.refusals.labels(error.code).inc()
        await socket.send_denial_response(error_response(error, socket.url.path, str(socket.scope.get("request_id", ""))))
        return
    await socket.accept()
    connection = Connection(socket, server, model, lane, key_id_of(socket))
    server.connections.add(connection)
    await connection.serve()


ROUTES = [
    route
    for version in ("", "/versions/{version}")
    for route in (
        Route(f"/v1/models/{{model}}{version}/filter", filter_frames, methods=["POST"], name="filter", include_in_schema=False),
        WebSocketRoute(f"/v1/models/{{model}}{version}/filter", filter_stream, name="stream"),
    )
]
