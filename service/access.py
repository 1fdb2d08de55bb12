"""Who may come in: keys, browser tokens, quotas, the server's last minutes, and bodies that never arrive. Plain ASGI, one place.

Every request and every WebSocket passes here before any route. What it leaves behind: `scope["caller"]`. Probes and metrics
are let through, always. Admin routes ask once more (service/routes/admin.py), because an ordinary key opens no admin route.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from service.errors import ClientIdle, ElbowError, Forbidden, ShuttingDown, Unauthorized, error_response
from service.keys import ANYBODY, Caller

if TYPE_CHECKING:
    from service.deps import Server

OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
SUBPROTOCOL, TOKEN_SUBPROTOCOL = "elbow", "elbow-token."
SLOWEST_BODY = 16_384
"""Bytes a second: a body of n bytes gets n / SLOWEST_BODY seconds beyond what every body gets."""
BACK_IN_S = 2.0
"""When a client that was refused by a leaving replica should try again: the balancer has another one by then."""


class AccessMiddleware:
    """Lets a request in, or answers why not.

    Args:
        body_s: what every body gets to arrive, in seconds. origins: of web pages that may open WebSockets, besides our own.
    """

    def __init__(self, app: ASGIApp, body_s: float = 10.0, origins: frozenset[str] = frozenset()):
        self._app, self._body_s, self._origins = app, body_s, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        server: Server = scope["app"].state.server
        try:
            if server.refusing:
                raise ShuttingDown("this server is shutting down: another one has your answer", retry_after_s=BACK_IN_S)
            caller = _caller(scope, server)
            if kind == "websocket":
                self._check_origin(scope)
            if caller.quota is not None and (kind == "websocket" or scope["method"] == "POST"):
                caller.quota.check()
        except ElbowError as error:
            server.metrics.refused(error.code, scope["call"])
            await _refuse(error, scope, receive, send)
            return
        scope["caller"] = caller
        if caller.name:
            server.metrics.of_key(caller.name).inc()
        if kind == "websocket":
            send = _with_subprotocol(scope, send)
        elif not _has_come(receive):
            receive = self._in_time(receive)
        if server.draining:
            send = _closing(send)
        await self._app(scope, receive, send)

    def _in_time(self, receive: Receive) -> Receive:
        """`receive` that loses its patience with a body."""
        loop = asyncio.get_running_loop()
        until, complete = loop.time() + self._body_s, False

        async def receive_in_time() -> Message:
            nonlocal until, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise ClientIdle("the body did not arrive in time: send it faster, or in smaller requests") from None
            complete = not message.get("more_body", False)
            until += len(message.get("body", b"")) / SLOWEST_BODY
            return message

        return receive_in_time

    def _check_origin(self, scope: Scope) -> None:
        """A browser lets any page open a WebSocket to anywhere, and says which page it was: only ours and those allowed may."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or origin in self._origins or "*" in self._origins:
            return
        if urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1"):
            raise Forbidden(f"pages of {origin[:100]} may not open streams here: ELBOW_CORS_ORIGINS names those that may")


def _caller(scope: Scope, server: Server) -> Caller:
    """Who shows which key.

    Raises:
        Unauthorized: none, or one that is not known here.
    """
    keys = server.keys
    token = _take_token(scope) if scope["type"] == "websocket" else ""
    if keys.is_open and not keys.has_admin:
        return ANYBODY
    shown = _shown(scope, keys.is_open)
    if shown:
        caller = keys.identify(shown)
        if caller is not None:
            return caller
        if keys.is_open:
            return ANYBODY
        raise Unauthorized("this API key is not known here")
    if keys.is_open:
        return ANYBODY
    if token:
        caller = keys.callers.get(server.browser_tokens.read(token) or "")
        if caller is not None:
            return caller
        raise Unauthorized("this token is not one of this server's, or has expired: POST /v1/token gives another")
    raise Unauthorized("an API key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY")


def _shown(scope: Scope, is_open: bool) -> bytes:
    """The key in the headers; an open server, whose clients may show what they like to others, does not mind which.

    Raises:
        Unauthorized: the headers hold two different keys, or none where one belongs.
    """
    shown = b""
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            key = value.strip()
        elif name == b"authorization":
            key = value[7:].strip() if value[:7].lower() == b"bearer " else b""
            if not key and not is_open:
                raise Unauthorized("Authorization must be Bearer KEY")
        else:
            continue
        if shown and key != shown and not is_open:
            raise Unauthorized("two different keys are shown: send one")
        shown = key
    return shown


def _take_token(scope: Scope) -> str:
    """A WebSocket's browser token, which is taken out of the query so that no route and no log ever sees it."""
    for protocol in scope.get("subprotocols", ()):
        if protocol.startswith(TOKEN_SUBPROTOCOL):
            return str(protocol.removeprefix(TOKEN_SUBPROTOCOL))
    token, kept = "", []
    for part in scope["query_string"].split(b"&"):
        if part.startswith(b"token="):
            token = part[6:].decode("latin-1")
        else:
            kept.append(part)
    scope["query_string"] = b"&".join(kept)
    return token


def _has_come(receive: Receive) -> bool:
    """Whether the whole body is here already, as uvicorn's cycle knows: most requests need no timer then."""
    return getattr(getattr(receive, "__self__", None), "more_body", True) is False


def _with_subprotocol(scope: Scope, send: Send) -> Send:
    """A browser that offered subprotocols (one of them its token) must be given one of them."""
    if SUBPROTOCOL not in scope.get("subprotocols", ()):
        return send

    async def send_with_subprotocol(message: Message) -> None:
        await send({**message, "subprotocol": SUBPROTOCOL} if message["type"] == "websocket.accept" else message)

    return send_with_subprotocol


def _closing(send: Send) -> Send:
    """While the server prepares to leave, every reply ends its connection, so that the next request goes elsewhere."""

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [header for header in message.get("headers", ()) if header[0] != b"connection"]
            message = {**message, "headers": [*kept, (b"connection", b"close")]}
        await send(message)

    return send_and_close


async def _refuse(error: ElbowError, scope: Scope, receive: Receive, send: Send) -> None:
    request_id = str(scope.get("request_id", ""))
    response = error_response(error, scope["path"], request_id)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)
