"""What the OpenAPI document says of /v2. The request is described for one row, in JSON, so that what fits the schema is answered;
a shape, its data and what follows the head cannot be tied together in a schema. docs/oip.md has the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from service.errors import STATUS
from service.oip.methods import methods_of
from service.oip.wire import HEAD_LENGTH
from service.repository import ServedModel

Json = dict[str, Any]
Problems = Callable[[Iterable[int]], Json]
PARAMETERS = ("steps", "deadline_ms", "tolerance", "elastic", "seed", "samples")
TAG = "Open Inference Protocol"
INTEGER: Json = {"type": "integer"}
TEXT: Json = {"type": "string"}
DURATION: Json = {"type": "object", "required": ["count", "ns"], "properties": {"count": INTEGER, "ns": INTEGER}}


def server_paths() -> Json:
    """Paths that name no model."""
    named = {"type": "object", "required": ["name", "version", "extensions"]}
    return {
        "/v2": {"get": _get("Name, version and extensions of the server.", named, {})},
        "/v2/health/live": {"get": _get("The process works.", {"type": "object", "required": ["live"]}, _not("live"))},
        "/v2/health/ready": {"get": _get("Models are loaded and work is taken.", {"type": "object", "required": ["ready"]}, _not("ready"))},
        "/v2/models": {"get": _get("Names of the models.", {"type": "object", "required": ["models"]}, {})},
        "/v2/models/stats": {"get": _get("Counters of every model.", _statistics(), {})},
    }


def model_paths(model: ServedModel, prefix: str, native: Json, row: Json, problems: Problems) -> Json:
    """Paths of one model (or version) under `prefix`. `native`: the fields of its native body; `row`: one flat row of x."""
    tensors: Json = {"type": "array", "items": {"type": "object", "required": ["name", "shape", "datatype"]}}
    metadata = {
        "type": "object",
        "required": ["name", "versions", "platform", "inputs", "outputs", "methods"],
        "properties": {"name": TEXT, "versions": {"type": "array", "items": TEXT}, "platform": TEXT, "inputs": tensors, "outputs": tensors},
    }
    is_ready = {"type": "object", "required": ["name", "ready"]}
    return {
        prefix: {"get": _get(f"Tensors and methods of {model.name}.", metadata, {})},
        f"{prefix}/ready": {"get": _get(f"{model.name} is loaded and takes work.", is_ready, problems([503]))},
        f"{prefix}/config": {"get": _get(f"{model.name} as a Triton model configuration.", {"type": "object", "required": ["name"]}, {})},
        f"{prefix}/stats": {"get": _get(f"Counters of {model.name}.", _statistics(), {})},
        f"{prefix}/infer": {"post": _infer(model, native, row, problems)},
    }


def _infer(model: ServedModel, native: Json, row: Json, problems: Problems) -> Json:
    card = model.card
    methods = list(methods_of(card))
    x = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {"name": {"const": "x"}, "shape": {"const": [1, *card.x.shape]}, "datatype": {"const": "FP32"}, "data": row},
        "additionalProperties": False,
    }
    parameters = {name: native[name] for name in PARAMETERS if name in native} | {"method": {"enum": methods[:1]}}
    if "seed" in parameters:  # a parameter of the protocol is a single value
        single = [kind for kind in parameters["seed"]["anyOf"] if kind["type"] != "array"]
        parameters["seed"] = {**parameters["seed"], "anyOf": single}
    schema = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"], "description": "comes back with the reply"},
            "parameters": {"type": "object", "properties": parameters, "additionalProperties": False},
            "inputs": {"type": "array", "prefixItems": [x], "minItems": 1, "maxItems": 1, "items": False},
        },
        "additionalProperties": False,
    }
    size = card.x.size
    low = 0.0 if card.x.minimum is None else max(card.x.minimum, 0.0)
    example = {
        "inputs": [{"name": "x", "shape": [1, *card.x.shape], "datatype": "FP32", "data": [low] * size}],
        "parameters": {"steps": card.trained_steps},
    }
    reply = {
        "type": "object",
        "required": ["model_name", "model_version", "parameters", "outputs"],
        "properties": {"model_name": TEXT, "model_version": TEXT, "id": TEXT, "parameters": {"type": "object"}, "outputs": _outputs()},
    }
    description = (
        f"Described here for one row in JSON; any number of rows goes (shape [n, …]), and tensors may follow it as bytes ({HEAD_LENGTH}). "
        f"Methods: {', '.join(methods)}. docs/oip.md has their tensors, compression, and sequences."
    )
    content = {"application/json": {"schema": reply}, "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "summary": f"Run a method of {model.name}.",
        "description": description,
        "tags": [TAG],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}},
        "responses": {
            "200": {"description": "the outputs asked for", "content": content},
            **problems(status for status in STATUS.values() if status != 422),
        },
    }


def _outputs() -> Json:
    data = {"type": "array", "items": {"type": ["number", "string", "null"]}}
    properties = {"name": TEXT, "shape": {"type": "array", "items": INTEGER}, "datatype": TEXT, "data": data}
    return {"type": "array", "items": {"type": "object", "required": ["name", "shape", "datatype"], "properties": properties}}


def _statistics() -> Json:
    shares: Sequence[str] = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    entry = {
        "type": "object",
        "required": ["name", "version", "inference_count", "execution_count", "inference_stats", "batch_stats"],
        "properties": {
            "name": TEXT,
            "version": TEXT,
            **dict.fromkeys(("last_inference", "inference_count", "execution_count"), INTEGER),
            "inference_stats": {"type": "object", "required": list(shares), "properties": dict.fromkeys(shares, DURATION)},
            "batch_stats": {"type": "array"},
        },
    }
    return {"type": "object", "required": ["model_stats"], "properties": {"model_stats": {"type": "array", "items": entry}}}


def _get(summary: str, schema: Json, others: Json) -> Json:
    ok = {"description": summary, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "tags": [TAG], "responses": {"200": ok, **others}}


def _not(what: str) -> Json:
    return {"503": {"description": f"not {what}", "content": {"application/json": {"schema": {"type": "object", "required": [what]}}}}}
