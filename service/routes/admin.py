"""The repository, behind the admin key: what there is, load, unload, reload; natively, and as the Open Inference Protocol has it.

Without an admin key configured there are no such routes (404); an ordinary key is refused (403).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.body import parse_object, read_body, read_bytes
from service.deps import Server, caller_of, server_of
from service.errors import Forbidden, Unauthorized
from service.oip.requests import load_named, read_repository_parameters
from service.replies import json_response
from service.schemas import Body, read_body_fields

MAX_BODY_BYTES = 65_536
Act = Callable[[Request, Server], Awaitable[object]]


class VersionBody(Body):
    """Which model, and which version of it."""

    name: str = Field(description="the model's folder in the repository")
    version: str | None = Field(None, description="one version; null: the newest there is (load), or all that are loaded (unload)")


async def index(request: Request, server: Server) -> object:
    return {"models": await asyncio.to_thread(server.repository.index)}


async def load(request: Request, server: Server) -> object:
    body = read_body_fields(VersionBody, parse_object(await read_body(request, MAX_BODY_BYTES)))
    model = await asyncio.to_thread(server.repository.load, body.name, body.version)
    return {"name": model.name, "version": model.version, "sha256": model.sha256}


async def unload(request: Request, server: Server) -> object:
    body = read_body_fields(VersionBody, parse_object(await read_body(request, MAX_BODY_BYTES)))
    return {"unloaded": await asyncio.to_thread(server.repository.unload, body.name, body.version)}


async def reload(request: Request, server: Server) -> object:
    """Follows the folder now: new versions in, removed ones out. What was refused is in the index, with the reason."""
    await asyncio.to_thread(server.repository.refresh)
    return await index(request, server)


async def v2_index(request: Request, server: Server) -> object:
    rows: Any = await asyncio.to_thread(server.repository.index)
    raw = await read_bytes(request, MAX_BODY_BYTES)
    only_ready = bool(raw) and parse_object(raw).get("ready") is True
    return [row for row in rows if row["state"] == "READY" or not only_ready]


async def v2_load(request: Request, server: Server) -> object:
    read_repository_parameters(await read_bytes(request, MAX_BODY_BYTES))
    await asyncio.to_thread(load_named, server.repository, request.path_params["model"])
    return {}


async def v2_unload(request: Request, server: Server) -> object:
    read_repository_parameters(await read_bytes(request, MAX_BODY_BYTES))
    await asyncio.to_thread(server.repository.unload, request.path_params["model"])
    return {}


def _route(path: str, method: str, act: Act) -> Route:
    async def call(request: Request) -> Response:
        request.scope["call"].endpoint = "admin"
        server = server_of(request)
        if not server.keys.has_admin:
            raise HTTPException(404)
        caller = caller_of(request)
        if not caller.is_admin:
            if caller.name:
                raise Forbidden("this takes the admin key")
            raise Unauthorized("this takes the admin key: send Authorization: Bearer KEY, or X-API-Key: KEY")
        return json_response(await act(request, server))

    return Route(path, call, methods=[method], include_in_schema=False)


ROUTES = [
    _route("/admin/repository", "GET", index),
    _route("/admin/repository/load", "POST", load),
    _route("/admin/repository/unload", "POST", unload),
    _route("/admin/repository/reload", "POST", reload),
    _route("/v2/repository/index", "POST", v2_index),
    _route("/v2/repository/models/{model}/load", "POST", v2_load),
    _route("/v2/repository/models/{model}/unload", "POST", v2_unload),
]
