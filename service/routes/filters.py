"""Sequences: POST …/filter takes some frames and a state; the WebSocket at the same path streams them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from service import replies
from service.body import in_worker_if_large, parse_object, read_body
from service.deps import Server, caller_of, key_id_of, model_of, server_of
from service.errors import ElbowError, error_response
from service.repository import ServedModel
from service.schemas import DreamBody, FilterBody, read_body_fields
from service.streams.connection import Connection
from service.streams.dreams import dream_result, dream_spec, read_dreams
from service.streams.stateless import FRESH, Frames, read_frames, snapshot_after
from service.streams.stream import Portion
from service.submission import filter_alone, on_streams


async def filter_frames(request: Request) -> Response:
    """Stateless: the frames in the body, from the state in the body, and the next state back."""
    with server_of(request).account(caller_of(request)) as charge:
        return await _filtered(request, charge)


async def _filtered(request: Request, charge: Callable[[float], None]) -> Response:
    server = server_of(request)
    began = server.clock()
    model = model_of(request, "filter")
    server.scheduler.stream_lane(model.key)  # refuses a static model before its body is read
    raw = await read_body(request, server.limits.max_body_bytes)
    key_id = key_id_of(request)

    def prepare() -> tuple[ServedModel, Frames]:
        body = read_body_fields(FilterBody, parse_object(raw))
        chosen = model if "version" in request.path_params else server.issuer(model, body.state)
        return chosen, read_frames(body, chosen, server.tokens, key_id, server.limits.max_rows)

    model, frames = await in_worker_if_large(len(raw), prepare)
    charge(len(frames.x) * (1 + frames.settings["steps"]))
    portion = await filter_alone(request, server, server.scheduler.stream_lane(model.key), frames)
    return await in_worker_if_large(_size([portion]), lambda: replies.json_response(_reply(server, model, portion, frames, key_id, began)))


def _size(portions: Sequence[Portion]) -> int:
    """Bytes of the arrays in a reply."""
    return sum(len(portion.shown) * sum(value.nbytes for value in portion.shown[0].values()) for portion in portions if portion.shown)


def _reply(server: Server, model: ServedModel, portion: Portion, frames: Frames, key_id: str, began: float) -> dict[str, Any]:
    after = snapshot_after(portion, frames.settings, frames.snapshot.summary if frames.snapshot else FRESH)
    now = server.clock()
    return {
        "model": model.name,
        "version": model.version,
        "precision": model.precision,
        "seed": frames.settings["seed"],
        "results": server.shaper(model).results(portion, portion.stream.spec),
        "frame": after.frame,
        "state": server.tokens.issue(after, model.sha256, key_id),
        "timing": {"filter_ms": 1e3 * (now - portion.received), "total_ms": 1e3 * (now - began)},
    }


async def dream(request: Request) -> Response:
    """`generate` of a filter: whole sequences, drawn from the model."""
    server = server_of(request)
    with server.account(caller_of(request)) as charge:
        began = server.clock()
        model = model_of(request, "generate")
        lane = server.scheduler.stream_lane(model.key)
        body = read_body_fields(DreamBody, parse_object(await read_body(request, server.limits.max_body_bytes)))
        chosen = model if "version" in request.path_params else server.issuer(model, body.state)
        if chosen is not model:
            lane = server.scheduler.stream_lane(chosen.key)
        key_id = key_id_of(request)
        dreams = read_dreams(body, chosen, server.tokens, key_id, server.limits.max_rows, lane.capacity)
        charge(body.count * body.frames)
        portions = await on_streams(request, server, lane, [(dream_spec(frames), frames) for frames in dreams])
    head = {"model": chosen.name, "version": chosen.version, "precision": chosen.precision, "seed": dreams[0].settings["seed"]}

    def reply() -> Response:
        results = [dream_result(p, frames, chosen, server.tokens, key_id) for p, frames in zip(portions, dreams, strict=True)]
        return replies.json_response({**head, "results": results, "timing": {"total_ms": 1e3 * (server.clock() - began)}})

    return await in_worker_if_large(_size(portions), reply)


async def filter_stream(socket: WebSocket) -> None:
    """The WebSocket: refused with a problem document before it is accepted, with an `error` message after."""
    server = server_of(socket)
    try:
        model = model_of(socket, "stream")
        lane = server.scheduler.stream_lane(model.key)
    except ElbowError as error:
        server.metrics.refused(error.code, socket.scope["call"])
        await socket.send_denial_response(error_response(error, socket.url.path, socket.scope["request_id"]))
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
