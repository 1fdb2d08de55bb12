"""What the GET calls of the OpenAPI document reply with: cards (from the class that reads them), curves, the list of models, probes."""

from __future__ import annotations

from typing import Any

from models.artifact import Card

Json = dict[str, Any]
_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_UNSEEN = ("programs", "files")
"""Of a card: which file holds what is the server's own business."""
_LISTED = ("name", "version", "family", "description", "x", "likelihood", "trained_steps", "max_steps")


def reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def get_schemas() -> Json:
    """Name -> schema: ModelList, ModelSummary, ModelCard and what it is made of, ModelCurve, Live, Ready."""
    card = Card.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    parts: Json = card.pop("$defs")
    fields = {name: field for name, field in card["properties"].items() if name not in _UNSEEN}
    for name in ("ProgramSpec", "FileSpec"):
        del parts[name]
    precision = parts["PrecisionSpec"]
    del precision["properties"]["programs"]
    precision["required"] = [name for name in precision["required"] if name != "programs"]
    served = _served()
    summary = {name: fields[name] for name in _LISTED} | served
    whole = fields | served
    return parts | {
        "ModelList": _object({"models": {"type": "array", "items": reference("ModelSummary")}}),
        "ModelSummary": _object(summary),
        "ModelCard": _object(whole) | {"description": card.get("description", "")},
        "ModelCurve": _curve(),
        "Live": _object({"live": {"type": "boolean"}}),
        "Ready": _object(
            {
                "ready": {"type": "boolean"},
                "models": {"type": "array", "items": _TEXT},
                "failed": {"type": "object", "additionalProperties": _TEXT, "description": "artifacts refused, and why"},
            }
        ),
    }


def _served() -> Json:
    """What the server adds to a card: how it serves the model."""
    return {
        "versions": {"type": "array", "items": _TEXT},
        "iterative": {"type": "boolean"},
        "engine": _TEXT,
        "precision": {"enum": ["float32", "int8"]},
        "precision_cost_nats": _NUMBER,
        "sha256": _TEXT,
    }


def _curve() -> Json:
    numbers: Json = {"type": "array", "items": _NUMBER}
    milliseconds = {"type": "object", "additionalProperties": numbers, "description": "by rows of a batch, on this server"}
    return _object(
        {
            "model": _TEXT,
            "version": _TEXT,
            "steps": {"type": "array", "items": {"type": "integer"}},
            "elbo": numbers | {"description": "nats, validation"},
            "elbo_std": numbers,
            "ms": milliseconds,
        }
    )


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}
