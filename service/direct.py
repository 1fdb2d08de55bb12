"""The busiest calls by the shortest way: a POST to one of the inference routes is found by its path's parts, not by trying patterns.

The routes themselves stay in the router, for everything but speed: other methods, odd paths, and OpenTelemetry, which wants to
see the router choose. What a direct call skips is FastAPI's: its dependencies, form limits and exit stack, which these
routes have no use for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.tracing import TELEMETRY

Endpoint = Callable[[Request], Awaitable[Response]]


class DirectRoutes:
    """Innermost middleware: calls `/v1/models/{model}[/versions/{version}]/{name}` itself.

    Args:
        endpoints: name -> what answers. handlers: the application's exception handlers, which hold here as they do inside.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint], handlers: Mapping[Any, Any]):
        self._app, self._endpoints = app, endpoints
        self._guarded = ExceptionMiddleware(self._call, handlers=handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._find(scope) if scope["type"] == "http" and scope["method"] == "POST" and TELEMETRY not in scope else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["endpoint"] = endpoint
        await self._guarded(scope, receive, send)

    def _find(self, scope: Scope) -> Endpoint | None:
        """The endpoint, with `path_params` set as the router sets them."""
        match scope["path"].split("/"):
            case ["", "v1", "models", model, name] if model:
                params = {"model": model}
            case ["", "v1", "models", model, "versions", version, name] if model and version:
                params = {"model": model, "version": version}
            case _:
                return None
        if scope.get("root_path") or (endpoint := self._endpoints.get(name)) is None:
            return None
        scope["path_params"] = params
        return endpoint

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        response = await scope["endpoint"](request)
        await response(scope, receive, send)
