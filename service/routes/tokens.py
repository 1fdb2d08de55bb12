"""POST /v1/token: whoever holds a key gets a short-lived token, for the WebSockets of a page that must not know the key."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.deps import caller_of, server_of
from service.errors import Forbidden
from service.replies import json_response


async def issue(request: Request) -> Response:
    """The token, and for how many seconds it opens sockets. On an open server it opens what is open anyway."""
    request.scope["call"].endpoint = "token"
    server, caller = server_of(request), caller_of(request)
    if caller.is_admin:
        raise Forbidden("tokens are issued to API keys: the admin key opens no streams for browsers")
    server.metrics.browser_tokens_issued.inc()
    response = json_response({"token": server.browser_tokens.issue(caller.name), "expires_in_s": server.browser_tokens.ttl_s})
    response.headers["Cache-Control"] = "no-store"
    return response


ROUTES = [Route("/v1/token", issue, methods=["POST"], name="token", include_in_schema=False)]
