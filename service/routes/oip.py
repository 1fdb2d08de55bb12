"""/v2: the Open Inference Protocol for clients that speak it (docs/oip.md). Health, metadata, configuration, statistics; infer."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.deps import Server, server_of
from service.errors import ShuttingDown
from service.oip import metadata
from service.oip.metadata import model_config, model_metadata
from service.oip.requests import named_model
from service.replies import json_response
from service.repository import ServedModel
from service.routes import oip_infer
from service.routes.health import is_ready, live_response


async def server_metadata(request: Request) -> Response:
    request.scope["call"].endpoint = "v2"
    return json_response(metadata.server_metadata(has_repository=server_of(request).keys.has_admin))


async def live(request: Request) -> Response:
    request.scope["call"].endpoint = "v2-health"
    return live_response(server_of(request))


async def ready(request: Request) -> Response:
    request.scope["call"].endpoint = "v2-health"
    ready = is_ready(server_of(request))
    response = json_response({"ready": ready})
    response.status_code = 200 if ready else 503
    return response


async def list_models(request: Request) -> Response:
    request.scope["call"].endpoint = "v2-models"
    return json_response({"models": [model.name for model in server_of(request).repository.newest()]})


async def show_metadata(request: Request) -> Response:
    model = named_model(request, "v2-model")
    return json_response(model_metadata(model, server_of(request).repository.versions(model.name)))


async def model_ready(request: Request) -> Response:
    model = named_model(request, "v2-model")
    if server_of(request).draining:
        raise ShuttingDown("the server is shutting down")
    return json_response({"name": model.name, "ready": True})


async def show_config(request: Request) -> Response:
    return json_response(model_config(named_model(request, "v2-model"), server_of(request).limits))


async def show_statistics(request: Request) -> Response:
    """Of the version named, or of all versions of the model."""
    model, server = named_model(request, "v2-stats"), server_of(request)
    versions = [model.version] if "version" in request.path_params else server.repository.versions(model.name)
    return json_response({"model_stats": [_statistics(server, server.repository.get(model.name, version)) for version in versions]})


async def show_all_statistics(request: Request) -> Response:
    request.scope["call"].endpoint = "v2-stats"
    server = server_of(request)
    return json_response({"model_stats": [_statistics(server, model) for model in server.repository.all()]})


async def infer(request: Request) -> Response:
    return await oip_infer.infer(request, named_model(request, "v2-infer"))


def _statistics(server: Server, model: ServedModel) -> dict[str, Any]:
    if model.card.family == "filter":
        counts: Any = server.scheduler.stream_stats().get(model.key, (0, None))[1]
        inferences = counts.frames if counts else 0
    else:
        counts = server.scheduler.stats().get(model.key)
        inferences = counts.rows_done if counts else 0
    return server.statistics.shown(model.name, model.version, inferences, counts.ticks if counts else 0)


_OF_MODEL = (
    ("/infer", infer, "POST"),
    ("", show_metadata, "GET"),
    ("/ready", model_ready, "GET"),
    ("/config", show_config, "GET"),
    ("/stats", show_statistics, "GET"),
)

ROUTES = [
    *(
        Route(f"/v2/models/{{model}}{version}{suffix}", call, methods=[method], include_in_schema=False)
        for suffix, call, method in _OF_MODEL[:1]
        for version in ("", "/versions/{version}")
    ),
    Route("/v2/models/stats", show_all_statistics, methods=["GET"], include_in_schema=False),  # before a model of that name
    *(
        Route(f"/v2/models/{{model}}{version}{suffix}", call, methods=[method], include_in_schema=False)
        for suffix, call, method in _OF_MODEL[1:]
        for version in ("", "/versions/{version}")
    ),
    Route("/v2", server_metadata, methods=["GET"], include_in_schema=False),
    Route("/v2/", server_metadata, methods=["GET"], include_in_schema=False),
    Route("/v2/health/live", live, methods=["GET"], include_in_schema=False),
    Route("/v2/health/ready", ready, methods=["GET"], include_in_schema=False),
    Route("/v2/models", list_models, methods=["GET"], include_in_schema=False),
]
