"""Request ids, one log line and one count per request, and the last net under unforeseen exceptions. Plain ASGI."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_response, unforeseen
from service.telemetry import LOG, Call, Metrics
from service.tracing import span_of

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
"""W3C trace context: version, trace id, parent id, flags; later versions may add to it."""
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class RequestMiddleware:
    """Gives each request its id (the client's X-Request-ID if it is a plain one), echoes it, counts and times the reply."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        call = scope["call"] = Call(_request_id(scope))
        scope["request_id"] = call.request_id
        if (span := span_of(scope)) is not None:
            span.set_attribute("elbow.request_id", call.request_id)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            LOG.exception("unforeseen failure", extra={"request_id": call.request_id, "path": scope["path"], **_trace(scope)})
            if status == 0:
                reply = problem_response(unforeseen(instance=scope["path"], request_id=call.request_id))
                await reply(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            self.metrics.answered(call, status, seconds)
            if LOG.isEnabledFor(logging.DEBUG):
                LOG.debug(
                    "request",
                    extra={
                        "request_id": call.request_id,
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "duration_ms": round(seconds * 1e3, 3),
                        **_trace(scope),
                    },
                )


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
