"""A request of the Open Inference Protocol from its bytes, and its reply to bytes: JSON, or a JSON head with tensors after it.

    head length L (Inference-Header-Content-Length) │ JSON of L bytes │ tensors, in the order of `inputs`

Without the header the whole body is JSON; a length of 0 means that all of it is the one input, raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from models.artifact import XSpec
from service.body import describe, parse_object, whole
from service.errors import InvalidInput
from service.oip.tensors import datatype_of, from_bytes, from_json, to_bytes
from service.replies import dump
from service.schemas import Body, read_body_fields

HEAD_LENGTH = "Inference-Header-Content-Length"
X = "x"
"""The name of a model's observations as an input."""
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES"
]
Dimension = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)]
MAX_TENSORS = 64


class InputTensor(Body):
    """One input: its elements in `data`, or after the head (`binary_data_size`)."""

    name: str
    shape: list[Dimension] = Field(min_length=1, max_length=8)
    datatype: Datatype
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Any = None


class OutputAsk(Body):
    """One output that is wanted."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferBody(Body):
    """The JSON of an inference request."""

    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InputTensor] = Field(default_factory=list, max_length=MAX_TENSORS)
    outputs: list[OutputAsk] | None = Field(None, max_length=MAX_TENSORS)


@dataclass(frozen=True)
class Inference:
    """What a client asks.

    Attributes:
        inputs: by name. outputs: the names wanted, in order; empty: those a method gives by itself.
        binary: per output named, whether it goes after the head; `all_binary` for those not named.
    """

    inputs: dict[str, NDArray[Any]]
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    binary: tuple[bool, ...] = ()
    all_binary: bool = False
    id: str | None = None


def read_inference(raw: bytes, head_length: str | None, x: XSpec) -> Inference:
    """The request in `raw`.

    Args:
        head_length: the header of that name, as it came. x: what a raw body consists of.

    Raises:
        MalformedBody: the head is not JSON.
        InvalidInput: it does not fit, and where.
    """
    length = _head_length(head_length, len(raw))
    if length == 0:
        return Inference({X: _raw_rows(raw, x)}, all_binary=True)
    body = read_body_fields(InferBody, parse_object(raw[:length]))
    inputs, at = {}, length
    for number, tensor in enumerate(body.inputs):
        path = f"inputs[{number}]"
        if tensor.name in inputs:
            raise InvalidInput.at(f"{path}.name", f"{tensor.name[:40]!r} is there twice")
        inputs[tensor.name], at = _tensor(tensor, path, raw, at, head_length is not None)
    if at != len(raw):
        raise InvalidInput(f"{len(raw) - at} bytes follow the tensors that the head names: binary_data_size must add up to the body")
    parameters = dict(body.parameters)
    all_binary = _flag(parameters.pop("binary_data_output", False), "parameters.binary_data_output")
    asked = body.outputs or []
    if len({output.name for output in asked}) < len(asked):
        raise InvalidInput.at("outputs", "names an output twice")
    return Inference(
        inputs=inputs,
        parameters=parameters,
        outputs=tuple(output.name for output in asked),
        binary=tuple(_wants_binary(output, f"outputs[{number}]", all_binary) for number, output in enumerate(asked)),
        all_binary=all_binary,
        id=body.id,
    )


def write_inference(
    inference: Inference, model: tuple[str, str], parameters: dict[str, Any], outputs: dict[str, NDArray[Any]]
) -> tuple[bytes, int | None]:
    """The reply's body, and the length of its head where tensors follow. `model`: its name and version."""
    binary = inference.binary if inference.outputs else (inference.all_binary,) * len(outputs)
    tensors, after = [], []
    for (name, array), is_binary in zip(outputs.items(), binary, strict=True):
        tensor: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype_of(array)}
        if is_binary:
            after.append(to_bytes(array))
            tensor["parameters"] = {"binary_data_size": len(after[-1])}
        else:
            flat = np.ascontiguousarray(array).ravel()
            tensor["data"] = flat.tolist() if flat.dtype.kind == "U" else flat
        tensors.append(tensor)
    reply: dict[str, Any] = {"model_name": model[0], "model_version": model[1]}
    if inference.id is not None:
        reply["id"] = inference.id
    head = dump(reply | {"parameters": parameters, "outputs": tensors})
    return (b"".join([head, *after]), len(head)) if any(binary) else (head, None)


def _head_length(text: str | None, size: int) -> int:
    if text is None:
        return size
    if not (text.isascii() and text.isdigit()) or int(text[:20]) > size or len(text) > 20:
        wanted = f"the length of the JSON head, a whole number from 0 to {size}, the length of the body"
        raise InvalidInput.at(HEAD_LENGTH, f'must be {wanted}, not "{text[:40]}"')
    return int(text)


def _raw_rows(raw: bytes, x: XSpec) -> NDArray[Any]:
    row = 4 * x.size
    if not raw or len(raw) % row:
        raise InvalidInput.at(X, f"a raw body is float32 rows of {row} bytes each, this one has {len(raw)} bytes")
    return np.frombuffer(raw, "<f4").reshape(-1, *x.shape)


def _tensor(tensor: InputTensor, path: str, raw: bytes, at: int, has_head: bool) -> tuple[NDArray[Any], int]:
    """The tensor's array, and where in `raw` the next one begins."""
    if 0 in tensor.shape:
        raise InvalidInput.at(f"{path}.shape", "has a size of 0: send at least one row")
    parameters = dict(tensor.parameters)
    size = parameters.pop("binary_data_size", None)
    for name in parameters:
        raise InvalidInput.at(f"{path}.parameters.{name[:40]}", "is not supported: an input takes binary_data_size only")
    if size is None:
        if tensor.data is None:
            raise InvalidInput.at(f"{path}.data", "is required where no binary_data_size is given")
        return from_json(tensor.data, tensor.datatype, tensor.shape, f"{path}.data"), at
    where = f"{path}.parameters.binary_data_size"
    if tensor.data is not None:
        raise InvalidInput.at(where, "is given beside data: send one of them")
    if not has_head:
        raise InvalidInput.at(where, f"needs the header {HEAD_LENGTH}, the length of the JSON in front of the tensors")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(raw) - at:
        given = describe(size) if isinstance(size, int | float | str | bool) else "something else"
        raise InvalidInput.at(where, f"must be the tensor's bytes in the body, of which {len(raw) - at} are left, not {given}")
    return from_bytes(memoryview(raw)[at : at + size], tensor.datatype, tensor.shape, path), at + size


def _wants_binary(output: OutputAsk, path: str, otherwise: bool) -> bool:
    parameters = dict(output.parameters)
    wanted = parameters.pop("binary_data", otherwise)
    for name in parameters:
        raise InvalidInput.at(f"{path}.parameters.{name[:40]}", "is not supported: an output takes binary_data only")
    return _flag(wanted, f"{path}.parameters.binary_data")


def _flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput.at(path, "must be true or false")
    return value


def check_shape(array: NDArray[Any], shape: Sequence[int], path: str) -> None:
    """`array` has this shape, −1 standing for any size.

    Raises:
        InvalidInput: at `path`.
    """
    if array.ndim != len(shape) or any(wanted not in (-1, size) for wanted, size in zip(shape, array.shape, strict=True)):
        raise InvalidInput.at(path, f"has shape {list(array.shape)}, wanted is {list(shape)} (−1: any)")
