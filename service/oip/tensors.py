"""The protocol's datatypes, and tensors between bytes or JSON and numpy arrays. Row-major, little-endian.

What an element may *be* (finite, inside the model's range) is judged by service/arrays.py, as for JSON rows; here only whether
there are as many elements as the shape says, of the kind the datatype says.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.columns import TEXT
from service.errors import InvalidInput

BYTES = "BYTES"
NUMBERS = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
DATATYPE = {"float32": "FP32", "int64": "INT64", TEXT: BYTES}
"""The datatype of a column, by its dtype."""


def from_bytes(data: memoryview, datatype: str, shape: Sequence[int], path: str) -> NDArray[Any]:
    """The tensor in exactly these bytes. BF16 becomes float32, which holds it exactly.

    Raises:
        InvalidInput: too few or too many bytes for the shape, or BYTES whose lengths do not add up.
    """
    count = math.prod(shape)
    if datatype == BYTES:
        return np.array(_texts(data, count, path), object).reshape(shape)
    itemsize = 2 if datatype == "BF16" else np.dtype(NUMBERS[datatype]).itemsize
    if len(data) != count * itemsize:
        message = f"has {len(data)} bytes, {datatype} of shape {list(shape)} has {count * itemsize}"
        raise InvalidInput.at(path, message)
    if datatype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4").reshape(shape)
    if datatype == "BOOL":
        raw = np.frombuffer(data, np.uint8)
        if raw.max(initial=0) > 1:
            raise InvalidInput.at(path, "BOOL is one byte per element, 0 or 1")
        return raw.view(np.bool_).reshape(shape)
    return np.frombuffer(data, NUMBERS[datatype]).reshape(shape)


def from_json(data: Any, datatype: str, shape: Sequence[int], path: str) -> NDArray[Any]:
    """The tensor of a JSON list, flat or nested to the shape.

    Raises:
        InvalidInput: not such a list, or its elements are not of the datatype.
    """
    if datatype == "BF16":
        raise InvalidInput.at(path, "BF16 has no JSON form: send it as binary data, or FP32")
    if not isinstance(data, list):
        raise InvalidInput.at(path, "must be a list of the tensor's elements, flat or nested to its shape")
    if datatype == BYTES:
        if len(data) != math.prod(shape) or not all(isinstance(element, str) for element in data):
            raise InvalidInput.at(path, f"must be a flat list of {math.prod(shape)} strings")
        return np.array(data, object).reshape(shape)
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        array = np.empty(0, object)
    kind = array.dtype.kind
    if kind not in "fiub":
        raise InvalidInput.at(path, "must be numbers, flat or nested to the shape")
    if array.size != math.prod(shape) or array.shape not in ((array.size,), tuple(shape)):
        given = f"{array.size} numbers" if array.ndim == 1 else f"a nest of {' × '.join(map(str, array.shape))}"
        raise InvalidInput.at(path, f"has {given}, the shape {list(shape)} has {math.prod(shape)} elements")
    if datatype == "BOOL" and kind != "b":
        raise InvalidInput.at(path, "must be true or false where the datatype is BOOL")
    if "INT" in datatype:
        _check_integers(array, datatype, path)
    return array.reshape(shape)


def to_bytes(array: NDArray[Any]) -> bytes:
    """The tensor as the binary extension sends it."""
    if array.dtype.kind == "U":
        return b"".join(struct.pack("<I", len(raw)) + raw for raw in (str(text).encode() for text in array.ravel()))
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def datatype_of(array: NDArray[Any]) -> str:
    return BYTES if array.dtype.kind == "U" else DATATYPE[array.dtype.name]


def _check_integers(array: NDArray[Any], datatype: str, path: str) -> None:
    bounds = np.iinfo(NUMBERS[datatype])
    if array.dtype.kind not in "iu" or int(array.min()) < bounds.min or int(array.max()) > bounds.max:
        raise InvalidInput.at(path, f"must be whole numbers from {bounds.min} to {bounds.max}, as {datatype} has")


def _texts(data: memoryview, count: int, path: str) -> list[str]:
    """`count` elements, each a 32-bit length and that many bytes of UTF-8."""
    texts, at = [], 0
    for _ in range(count):
        if at + 4 > len(data):
            break
        (length,) = struct.unpack_from("<I", data, at)
        if at + 4 + length > len(data):
            break
        try:
            texts.append(str(data[at + 4 : at + 4 + length], "utf-8"))
        except UnicodeDecodeError as exc:
            raise InvalidInput.at(path, f"element {len(texts)} is not UTF-8") from exc
        at += 4 + length
    if len(texts) != count or at != len(data):
        raise InvalidInput.at(path, f"must be {count} elements, each a 32-bit length and so many bytes, and nothing after them")
    return texts
