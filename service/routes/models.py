"""GET the models, their cards, and the trade-off curve as measured on this server."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.deps import Server, model_of, server_of
from service.replies import json_response
from service.repository import ServedModel

BATCH_BUCKETS = (1, 8, 64)
SUMMARY = {"name", "version", "family", "description", "x", "likelihood", "trained_steps", "max_steps"}


async def list_models(request: Request) -> Response:
    request.scope["call"].endpoint = "models"
    server = server_of(request)
    return json_response({"models": [_summary(server, model) for model in server.repository.newest()]})


async def show_model(request: Request) -> Response:
    model = model_of(request, "model")
    card = model.card.model_dump(mode="json", exclude={"programs": True, "files": True, "precisions": {"__all__": {"programs"}}})
    return json_response(card | _served(server_of(request), model))


async def show_curve(request: Request) -> Response:
    """ELBO after 0 … K_max steps as validated at export, and milliseconds per batch bucket as measured here."""
    model = model_of(request, "curve")
    curve, ms = model.card.curve, partial(server_of(request).scheduler.predicted_ms, model.key)
    before, after = ("predict", "advance") if model.card.family == "filter" else ("init", "score")
    return json_response(
        {
            "model": model.name,
            "version": model.version,
            "steps": curve.steps,
            "elbo": curve.elbo,
            "elbo_std": curve.elbo_std,
            "ms": {
                str(rows): [round(start + steps * step, 4) for steps in curve.steps]
                for rows in BATCH_BUCKETS
                for start, step in [(await ms(rows, before) + await ms(rows, after), await ms(rows, "step"))]
            },
        }
    )


def _summary(server: Server, model: ServedModel) -> dict[str, Any]:
    return model.card.model_dump(mode="json", include=SUMMARY) | _served(server, model)


def _served(server: Server, model: ServedModel) -> dict[str, Any]:
    return {
        "versions": server.repository.versions(model.name),
        "iterative": model.card.iterative,
        "engine": model.engine,
        "precision": model.precision,
        "precision_cost_nats": model.cost_nats,
        "sha256": model.sha256,
    }


ROUTES = [Route("/v1/models", list_models, methods=["GET"], include_in_schema=False)] + [
    Route(f"/v1/models/{{model}}{version}{suffix}", call, methods=["GET"], include_in_schema=False)
    for version in ("", "/versions/{version}")
    for suffix, call in (("", show_model), ("/curve", show_curve))
]
