"""The OpenAPI document: one concrete path per loaded model and call, with that model's exact lengths and bounds.

FastAPI would describe `/v1/models/{model}/encode` once for all; a client reads more from `/v1/models/mnist-iterative/encode`
whose `inputs` take exactly 784 numbers in [0, 1] and whose `steps` end at 128. The paths with `/versions/{version}` follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from models.artifact import Card, XSpec
from service import schemas
from service.access import OPEN_PATHS
from service.arrays import LARGEST
from service.errors import FRAMEWORK_CODES, PROBLEM_JSON, STATUS
from service.jobs import MAX_DIRECT_STEPS, Limits
from service.oip import openapi as oip
from service.openapi_get import get_schemas, reference
from service.posterior import last_step
from service.repository import ServedModel
from service.routes.infer import ENDPOINTS, Endpoint
from service.tensor_bodies import NPY, NPZ, RAW

Json = dict[str, Any]
ARRAYS = (
    f"Rows may also come as {RAW} (little-endian float32, row after row) or {NPY}, the other fields in the query; "
    f"replies are arrays where Accept asks for {NPZ}, {NPY} or {RAW}, with `columns` in the query (docs/oip.md)."
)


def describe_api(models: Sequence[ServedModel], newest: Sequence[ServedModel], limits: Limits, *, needs_key: bool = False) -> Json:
    """The document for the models loaded now: `newest` without, all of `models` with the version in the path."""
    paths: Json = {}
    for model in newest:
        paths |= _model_paths(model, f"/v1/models/{model.name}", limits) | _oip_paths(model, f"/v2/models/{model.name}", limits)
    for model in models:
        version = f"{model.name}/versions/{model.version}"
        paths |= _model_paths(model, f"/v1/models/{version}", limits) | _oip_paths(model, f"/v2/models/{version}", limits)
    paths["/v1/models"] = {"get": _get("ModelList", "The models served here.", tag="models")}
    paths |= oip.server_paths()
    for path, schema, summary in (("/livez", "Live", "The process works."), ("/readyz", "Ready", "Models are loaded and work is taken.")):
        probe = _get(schema, summary, tag="health")
        why = "Not ready: no model is loaded, or the server leaves." if path == "/readyz" else "The engine thread has ended: start it anew."
        probe["responses"]["503"] = probe["responses"]["200"] | {"description": why}
        paths[path] = {"get": probe | {"security": []}}
    paths["/v1/token"] = {"post": _token()}
    text: Json = {"200": {"description": "text"}}
    paths["/metrics"] = {"get": {"summary": "Prometheus metrics.", "tags": ["health"], "security": [], "responses": text}}
    for path, operations in paths.items():  # what service/access.py does to every call
        for operation in operations.values():
            if path in OPEN_PATHS:
                operation["security"] = []
            else:
                operation["responses"] = _problems((401,)) | operation["responses"]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Elbow",
            "version": "1",
            "description": "Posterior inference whose cost the client chooses. ELBOs and likelihoods are in nats per row.",
        },
        "paths": paths,
        "components": {
            "schemas": {**get_schemas(), "Problem": _problem(), "Result": _result(), "Posterior": _posterior_out()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}] if needs_key else [],
    }


def _model_paths(model: ServedModel, prefix: str, limits: Limits) -> Json:
    paths: Json = {
        prefix: {"get": _get("ModelCard", f"The card of {model.name}.", tag=model.name)},
        f"{prefix}/curve": {"get": _get("ModelCurve", "ELBO against steps and milliseconds on this server.", tag=model.name)},
    }
    if model.card.family == "filter":
        paths[f"{prefix}/filter"] = {"post": _filter(model, limits)}
        paths[f"{prefix}/generate"] = {"post": _dream(model, limits)}
        return paths
    for endpoint in ENDPOINTS:
        paths[f"{prefix}/{endpoint.name}"] = {"post": _post(endpoint, model, limits)}
    return paths


def _oip_paths(model: ServedModel, prefix: str, limits: Limits) -> Json:
    body = schemas.FilterBody if model.card.family == "filter" else schemas.EncodeBody
    fields = _body_schema(body, model.card, limits)["properties"]
    flat = _row(model.card.x)
    return oip.model_paths(model, prefix, fields, flat["anyOf"][0] if "anyOf" in flat else flat, _problems)


def _filter(model: ServedModel, limits: Limits) -> Json:
    """The stateless call; what the WebSocket at the same path speaks is in docs/streaming.md."""
    card = model.card
    schema = schemas.FilterBody.model_json_schema(by_alias=True)
    fields: Json = schema["properties"]
    rows = {"minItems": 1, "maxItems": limits.max_rows}
    fields["frames"] |= {"type": "array", "items": _row(card.x), **rows}
    fields["mask"] |= {"type": ["array", "null"], "items": _row(card.x, mask=True), **rows}
    fields["steps"]["anyOf"][0]["maximum"] = card.max_steps if card.iterative else MAX_DIRECT_STEPS
    number: Json = {"type": ["number", "null"]}
    result = {
        "type": "object",
        "required": ["frame", "elbo", "surprise", "surprise_quantile", "steps_used"],
        "properties": {
            **{name: {"type": "integer"} for name in ("frame", "steps_used")},
            **{name: number for name in ("elbo", "surprise", "surprise_quantile", "log_likelihood", "kl")},
            "stop_reason": {"enum": ["degraded", "nonfinite"]},
            **{name: {"type": "object"} for name in ("posterior", "reconstruction", "prediction")},
        },
    }
    text: Json = {"type": "string"}
    reply = {
        "type": "object",
        "required": ["model", "version", "precision", "seed", "results", "frame", "state", "timing"],
        "properties": {
            **{name: text for name in ("model", "version", "precision", "state")},
            **{name: {"type": "integer"} for name in ("seed", "frame")},
            "results": {"type": "array", "items": result},
            "timing": {"type": "object"},
        },
    }
    low = 0.0 if card.x.minimum is None else max(card.x.minimum, 0.0)
    example = {"frames": [[low] * card.x.size], "steps": card.trained_steps, "seed": 0}
    return {
        "summary": inspect.getdoc(schemas.FilterBody),
        "tags": [model.name],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}},
        "responses": {
            "200": {"description": "one result per frame, and the next state", "content": {"application/json": {"schema": reply}}},
            **_problems(STATUS.values()),
        },
    }


def _dream(model: ServedModel, limits: Limits) -> Json:
    """`generate` of a filter."""
    schema = schemas.DreamBody.model_json_schema(by_alias=True)
    for name in ("count", "frames"):
        schema["properties"][name]["maximum"] = limits.max_rows
    text: Json = {"type": "string"}
    frames: Json = {"type": "array", "items": _vector(model.card.x.size, {"type": ["number", "null"]})}
    fields: Json = {"frame": {"type": "integer"}, "frames": frames, "mean": frames, "state": text}
    result = {"type": "object", "required": list(fields), "properties": fields}
    head: Json = {**{name: text for name in ("model", "version", "precision")}, "seed": {"type": "integer"}}
    reply_fields: Json = {**head, "results": {"type": "array", "items": result}, "timing": {"type": "object"}}
    reply = {"type": "object", "required": list(reply_fields), "properties": reply_fields}
    return {
        "summary": inspect.getdoc(schemas.DreamBody),
        "tags": [model.name],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": {"count": 2, "frames": 8, "seed": 0}}},
        },
        "responses": {
            "200": {"description": "one result per sequence", "content": {"application/json": {"schema": reply}}},
            **_problems(STATUS.values()),
        },
    }


def _post(endpoint: Endpoint, model: ServedModel, limits: Limits) -> Json:
    content: Json = {"application/json": {"schema": _reply_schema()}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {"type": "string", "description": "event: step per row and step, then event: done"}}
    if endpoint.arrays:
        content |= {media: {"schema": {"type": "string", "format": "binary"}} for media in (NPZ, NPY, RAW)}
    return {
        "summary": inspect.getdoc(endpoint.body),
        **({"description": ARRAYS} if endpoint.arrays else {}),
        "tags": [model.name],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _body_schema(endpoint.body, model.card, limits),
                    "example": _example(endpoint.name, model.card),
                }
            },
        },
        "responses": {"200": {"description": "one result per row, in order", "content": content}, **_problems(STATUS.values())},
    }


def _body_schema(body: type[schemas.Body], card: Card, limits: Limits) -> Json:
    """The pydantic schema with the parts that only the card and the limits know filled in."""
    schema = body.model_json_schema(by_alias=True)
    fields: Json = schema["properties"]
    rows = {"minItems": 1, "maxItems": limits.max_rows}
    exact = {
        "inputs": {"type": "array", "items": _row(card.x), **rows},
        "mask": {"type": ["array", "null"], "items": _row(card.x, mask=True), **rows},
        "posterior": {"type": "array", "items": _posterior_in(card), **rows},
        "between": {"type": ["array", "null"], "items": _posterior_in(card), "minItems": 2, "maxItems": 2},
        "seed": {"anyOf": [_seed(), {"type": "array", "items": _seed(), **rows}]},
    }
    for name in fields.keys() & exact.keys():
        if name != "seed" or not fields[name].keys() & {"type", "anyOf"}:  # generate and filter have one seed, as their bodies say
            fields[name] |= exact[name]
    if body is schemas.ReconstructBody:
        for name in ("inputs", "posterior"):
            fields[name]["type"] = ["array", "null"]
        null, array = {"type": "null"}, {"type": "array"}
        nothing_else = {name: null for name in ("inputs", "mask", "steps", "tolerance")}
        schema["oneOf"] = [
            {"required": ["inputs"], "properties": {"inputs": array, "posterior": null}},
            {"required": ["posterior"], "properties": {"posterior": array, **nothing_else}},
        ]
    most = card.max_steps if card.iterative else MAX_DIRECT_STEPS
    bounds = {
        "steps": ("anyOf", most),
        "deadline_ms": ("anyOf", limits.max_deadline_ms),
        "samples": ("", limits.max_importance_samples if body is schemas.ScoreBody else limits.max_samples),
        "count": ("", limits.max_rows),
    }
    for name, (kind, maximum) in bounds.items():
        if name in fields:
            (fields[name][kind][0] if kind else fields[name])["maximum"] = maximum
    return schema


def _row(x: XSpec, mask: bool = False) -> Json:
    low, high = (-LARGEST if x.minimum is None else x.minimum), (LARGEST if x.maximum is None else x.maximum)
    number: Json = {"enum": [0, 1, False, True]} if mask else {"type": ["number", "boolean"], "minimum": low, "maximum": high}
    flat = _vector(x.size, number)
    if len(x.shape) == 1:
        return flat
    nested = number
    for size in reversed(x.shape):
        nested = _vector(size, nested)
    return {"anyOf": [flat, nested]}


def _vector(size: int, items: Json) -> Json:
    return {"type": "array", "items": items, "minItems": size, "maxItems": size}


def _seed() -> Json:
    return {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}


def _posterior_in(card: Card) -> Json:
    levels = [
        {
            "type": "object",
            "required": sorted(level.parameters),
            "properties": {
                **{name: _vector(level.size, {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}) for name in level.parameters},
                "kl": {"type": ["number", "null"]},
            },
            "additionalProperties": False,
        }
        for level in card.levels
    ]
    return {
        "type": "object",
        "required": ["step", "levels"],
        "properties": {
            "step": {"type": "integer", "minimum": 0, "maximum": last_step(card)},
            "levels": {"type": "array", "prefixItems": levels, "minItems": len(levels), "maxItems": len(levels), "items": False},
            "carry": {"type": ["string", "null"]},
        },
        "additionalProperties": False,
    }


def _example(call: str, card: Card) -> Json:
    if call == "generate":
        return {"count": 2, "seed": 0}
    low = 0.0 if card.x.minimum is None else max(card.x.minimum, 0.0)
    example: Json = {"inputs": [[low] * card.x.size], "steps": card.trained_steps}
    if call == "refine":
        flat = [{name: [0.0] * level.size for name in level.parameters} for level in card.levels]
        example["posterior"] = [{"step": 0, "levels": flat}]
    return example


def _get(schema: str, summary: str, tag: str) -> Json:
    content = {"application/json": {"schema": reference(schema)}}
    refusals = () if tag == "health" else (401, 404, 503)
    return {"summary": summary, "tags": [tag], "responses": {"200": {"description": summary, "content": content}, **_problems(refusals)}}


def _token() -> Json:
    schema = {
        "type": "object",
        "required": ["token", "expires_in_s"],
        "properties": {"token": {"type": "string"}, "expires_in_s": {"type": "number"}},
    }
    summary = "A short-lived token with which a browser opens WebSockets (`?token=`, or the subprotocol `elbow-token.<token>`)."
    content = {"application/json": {"schema": schema}}
    return {
        "summary": summary,
        "tags": ["access"],
        "responses": {"200": {"description": "a token", "content": content}, **_problems((401, 403, 408, 429, 503))},
    }


def _problems(statuses: Any) -> Json:
    codes = {status: sorted(_codes_of(status)) for status in sorted(set(statuses))}
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(status): {"description": ", ".join(names), "content": content} for status, names in codes.items()}


def _codes_of(status: int) -> list[str]:
    return [error.code for error, code in STATUS.items() if code == status]


def _problem() -> Json:
    text: Json = {"type": "string"}
    codes = {error.code for error in STATUS} | {*FRAMEWORK_CODES.values(), "internal"}
    item = {"type": "object", "properties": {"field": text, "message": text}, "required": ["field", "message"]}
    return {
        "type": "object",
        "description": "RFC 9457 problem document",
        "required": ["type", "title", "status", "detail", "instance", "error", "code", "request_id"],
        "properties": {
            **{name: text for name in ("type", "title", "detail", "instance", "error", "request_id")},
            "status": {"type": "integer"},
            "code": {"type": "string", "enum": sorted(codes)},
            "retry_after_s": {"type": "number"},
            "errors": {"type": "array", "items": item},
        },
    }


def _posterior_out() -> Json:
    numbers = {"type": "array", "items": {"type": "number"}}
    level = {"type": "object", "properties": {"mu": numbers, "log_sigma": numbers, "kl": {"type": ["number", "null"]}}}
    return {
        "type": "object",
        "properties": {"step": {"type": "integer"}, "levels": {"type": "array", "items": level}, "carry": {"type": "string"}},
    }


def _result() -> Json:
    number: Json = {"type": ["number", "null"]}
    return {
        "type": "object",
        "properties": {
            **{name: number for name in ("elbo", "log_likelihood", "kl", "log_px", "elbo_quantile")},
            "steps_used": {"type": "integer"},
            "stop_reason": {"enum": ["steps", "deadline", "converged", "degraded", "nonfinite", "optimum"]},
            "posterior": {"$ref": "#/components/schemas/Posterior"},
            "trace": {"type": "array", "items": number},
            "reconstruction": {"type": "object"},
            "z": {"type": "object"},
        },
    }


def _reply_schema() -> Json:
    timing = {name: {"type": "number"} for name in ("queue_ms", "compute_ms", "predicted_ms")} | {"batch_rows": {"type": "integer"}}
    return {
        "type": "object",
        "required": ["model", "version", "precision", "seed", "results", "timing"],
        "properties": {
            "model": {"type": "string"},
            "version": {"type": "string"},
            "precision": {"enum": ["float32", "int8"]},
            "seed": {},
            "results": {"type": "array", "items": {"$ref": "#/components/schemas/Result"}},
            "timing": {"type": "object", "properties": timing},
        },
    }
