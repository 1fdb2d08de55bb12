"""Request ids, one count per request and WebSocket, log lines, and the last net under unforeseen exceptions. Plain ASGI.

At level info there is a line for what the server failed at (5xx, but for the announced 503), at debug one for every request: a line
costs about as much as the surface of a small request.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from http import HTTPStatus
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_response, unforeseen
from service.telemetry import LOG, REQUEST_ID, Call, Metrics
from service.tracing import span_of

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
"""W3C trace context: version, trace id, parent id, flags; later versions may add to it."""
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_HEADS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
INTERNAL = 1011
"""Close code of a WebSocket that ends by a fault of ours."""


class RequestMiddleware:
    """Gives each request its id (the client's X-Request-ID if it is a plain one), echoes it, counts and times the reply.

    A WebSocket is one request: its id is said in the head of the handshake's answer, and it is counted once, when it ends, with the
    status of that answer (101 where it was accepted) or of the problem that ended it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        call = scope["call"] = Call(_request_id(scope))
        scope["request_id"] = call.request_id
        REQUEST_ID.set(call.request_id)
        if (span := span_of(scope)) is not None:
            span.set_attribute("elbow.request_id", call.request_id)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            kind = message["type"]
            if kind in _HEADS:
                status = message.get("status", HTTPStatus.SWITCHING_PROTOCOLS.value)
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.request_id.encode())]
            elif kind == "websocket.close" and status == 0:
                status = HTTPStatus.FORBIDDEN.value  # what a server makes of a close that comes instead of an answer
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            LOG.exception("unforeseen failure", extra={"request_id": call.request_id, "path": scope["path"], **_trace(scope)})
            members = unforeseen(instance=scope["path"], request_id=call.request_id)
            call.problem, call.ended = members["code"], members["status"]
            if status == 0:
                await problem_response(members)(scope, receive, send_with_id)
            elif scope["type"] == "websocket":
                await _break_off(send, members)
        finally:
            seconds = time.perf_counter() - started
            status = call.ended or status
            if scope["type"] == "websocket":
                self.metrics.closed(call, status)
            else:
                self.metrics.answered(call, status, seconds)
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.SERVICE_UNAVAILABLE:
                level = logging.ERROR if status == HTTPStatus.INTERNAL_SERVER_ERROR else logging.WARNING
                LOG.log(level, "request failed", extra=_said_of(scope, call, status, seconds))
            elif LOG.isEnabledFor(logging.DEBUG):
                LOG.debug("request", extra=_said_of(scope, call, status, seconds))


def _said_of(scope: Scope, call: Call, status: int, seconds: float) -> dict[str, Any]:
    """The fields of a request's log line."""
    said = {
        "request_id": call.request_id,
        "method": scope.get("method", "WEBSOCKET"),
        "path": scope["path"],
        "endpoint": call.endpoint,
        "model": call.model,
        "version": call.version,
        "status": status,
        "problem": call.problem,
        "duration_ms": round(seconds * 1e3, 3),
    }
    return {name: value for name, value in said.items() if value != ""} | _trace(scope)


async def _break_off(send: Send, members: dict[str, Any]) -> None:
    """Ends an accepted WebSocket as every abnormal end of a stream is said; its client may have left, or have been told to."""
    said = {"type": "error", "code": members["code"], "error": members["error"], "request_id": members["request_id"]}
    with contextlib.suppress(Exception):
        await send({"type": "websocket.send", "text": orjson.dumps(said).decode()})
        await send({"type": "websocket.close", "code": INTERNAL})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GIVEN_ID.fullmatch(value):
            return bytes(value).decode()
    return secrets.token_hex(16)


def _trace(scope: Scope) -> dict[str, str]:
    """The trace that this request belongs to, as our span has it or the client says; read only when a line is written."""
    if (span := span_of(scope)) is not None:
        context = span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
    for name, value in scope["headers"]:
        if name == b"traceparent" and (found := _TRACEPARENT.fullmatch(value)):
            return {"trace_id": found[1].decode(), "parent_id": found[2].decode()}
    return {}
