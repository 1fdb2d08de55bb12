"""What a model says of itself in the protocol's words: metadata, and Triton's model configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from service.columns import Column, columns_of
from service.jobs import Limits
from service.oip.methods import Input, Method, methods_of
from service.oip.tensors import DATATYPE
from service.repository import ServedModel
from service.streams.columns import frame_columns

NAME = "elbow"
EXTENSIONS = ("binary_tensor_data", "parameters", "statistics", "model_configuration", "sequence", "sequence(string_id)")
REPOSITORY = "model_repository"
"""The extension of index, load and unload, which a server has when it has an admin key."""
PLATFORMS = {"onnx": ("onnx_onnxv1", "onnxruntime"), "torchscript": ("pytorch_torchscript", "pytorch")}
"""Engine -> the platform and backend by which clients know it; any other goes by its own name."""


def server_version() -> str:
    try:
        return version(NAME)
    except PackageNotFoundError:  # run from the source tree, not installed
        return "unknown"


def server_metadata(*, has_repository: bool) -> dict[str, Any]:
    return {"name": NAME, "version": server_version(), "extensions": [*EXTENSIONS, *([REPOSITORY] if has_repository else [])]}


def outputs_of(model: ServedModel, method: Method) -> tuple[Column, ...]:
    return frame_columns(model.card) if model.card.family == "filter" else columns_of(method.name, model.card)


def model_metadata(model: ServedModel, versions: Sequence[str]) -> dict[str, Any]:
    """`inputs` and `outputs` are those of the method a request gets without naming one; `methods` has all of them."""
    methods = methods_of(model.card)
    default = next(iter(methods.values()))
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": _platform(model)[0],
        **_tensors(model, default),
        "methods": {name: _tensors(model, method) for name, method in methods.items()},
    }


def model_config(model: ServedModel, limits: Limits) -> dict[str, Any]:
    """The configuration a Triton client reads. Shapes are without the row axis where rows are batched; frames are no batch."""
    platform, backend = _platform(model)
    is_filter = model.card.family == "filter"
    default = next(iter(methods_of(model.card).values()))
    first = 0 if is_filter else 1
    config: dict[str, Any] = {
        "name": model.name,
        "platform": platform,
        "backend": backend,
        "version_policy": {"all": {}},
        "max_batch_size": 0 if is_filter else limits.max_rows,
        "input": [
            {"name": one.name, "data_type": _type(one.datatype), "dims": list(one.shape[first:]), "optional": not one.required}
            for one in default.inputs(model.card)
        ],
        "output": [
            {"name": column.name, "data_type": _type(DATATYPE[column.dtype]), "dims": [-1, *column.shape][first:]}
            for column in outputs_of(model, default)
        ],
        "parameters": {
            "methods": {"string_value": ",".join(methods_of(model.card))},
            "trained_steps": {"string_value": str(model.card.trained_steps)},
            "max_steps": {"string_value": str(model.card.max_steps)},
            "precision": {"string_value": model.precision},
        },
    }
    if is_filter:
        config["sequence_batching"] = {"max_sequence_idle_microseconds": round(limits.stream_idle_s * 1e6)}
    return config


def _tensors(model: ServedModel, method: Method) -> dict[str, Any]:
    return {
        "inputs": [_input(one) for one in method.inputs(model.card)],
        "outputs": [
            {"name": column.name, "datatype": DATATYPE[column.dtype], "shape": [-1, *column.shape]} for column in outputs_of(model, method)
        ],
    }


def _input(one: Input) -> dict[str, Any]:
    return {"name": one.name, "datatype": one.datatype, "shape": list(one.shape), "optional": not one.required}


def _platform(model: ServedModel) -> tuple[str, str]:
    return PLATFORMS.get(model.engine, (model.engine, model.engine))


def _type(datatype: str) -> str:
    return f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}"
