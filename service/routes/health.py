"""Probes, metrics and the front page."""

from __future__ import annotations

from html import escape

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from service.deps import Server, server_of
from service.replies import json_response
from service.telemetry import METRICS_CONTENT_TYPE

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Elbow</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:3rem auto;padding:0 1rem}}code{{background:#eee}}</style></head>
<body><h1>Elbow</h1>
<p>Posterior inference whose cost you choose: POST rows to <code>/v1/models/&lt;name&gt;/encode</code> and say how many
refinement <code>steps</code> they are worth.</p>
<ul>{models}</ul>
<p><a href="/docs">All calls</a> · <a href="/openapi.json">OpenAPI</a> · <a href="/v1/models">models as JSON</a> ·
<a href="/metrics">metrics</a></p></body></html>
"""


def live_response(server: Server) -> Response:
    response = json_response({"live": server.scheduler.alive})
    response.status_code = 200 if server.scheduler.alive else 503
    return response


async def live(request: Request) -> Response:
    """503 when the engine thread has ended by itself: the process answers, and will never work again."""
    request.scope["call"].endpoint = "livez"
    return live_response(server_of(request))


def is_ready(server: Server) -> bool:
    """Whether what comes now is worked on."""
    return bool(server.repository.all()) and server.scheduler.alive and not server.draining


async def ready(request: Request) -> Response:
    """200 while at least one model is served, by a live engine thread, and the server is not draining; lists the artifacts refused."""
    request.scope["call"].endpoint = "readyz"
    server = server_of(request)
    models = [model.key for model in server.repository.all()]
    response = json_response({"ready": is_ready(server), "models": models, "failed": server.repository.failures})
    response.status_code = 200 if is_ready(server) else 503
    return response


async def metrics(request: Request) -> Response:
    request.scope["call"].endpoint = "metrics"
    server = server_of(request)
    server.metrics.ready.set(is_ready(server))
    return Response(server.metrics.render(), headers={"Content-Type": METRICS_CONTENT_TYPE})


async def front_page(request: Request) -> Response:
    request.scope["call"].endpoint = "front"
    items = [
        f'<li><a href="/v1/models/{escape(model.name)}">{escape(model.name)}</a> {escape(model.card.description)}</li>'
        for model in server_of(request).repository.newest()
    ]
    return HTMLResponse(PAGE.format(models="\n".join(items) or "<li>no model is loaded</li>"))


ROUTES = [
    Route("/livez", live, methods=["GET"], include_in_schema=False),
    Route("/readyz", ready, methods=["GET"], include_in_schema=False),
    Route("/metrics", metrics, methods=["GET"], include_in_schema=False),
    Route("/", front_page, methods=["GET"], include_in_schema=False),
]
