"""Rows as bytes instead of JSON, on the native calls: raw float32 or .npy in, arrays out where `Accept` asks.

    Content-Type: application/octet-stream   rows of little-endian float32, one after the other; all of it observed
    Content-Type: application/x-npy          an .npy file, rows first; its header is bounded, and nothing in it is ever unpickled
    Accept: application/x-npz                every column of the call in an uncompressed .npz (service/columns.py)
    Accept: application/x-npy, application/octet-stream     one column: the one that `columns` names, else the call's first

With rows as bytes the call's other fields come in the query; so does `columns`, which takes the place of `return` where arrays are
wanted. Arrays pass the checks that JSON rows pass (service/arrays.py), with the same messages.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
import orjson
from numpy.lib import format as npy
from numpy.typing import NDArray
from starlette.datastructures import QueryParams
from starlette.responses import Response

from models.artifact import Card, XSpec
from service.columns import Column, chosen, columns_of
from service.errors import InvalidInput, MalformedBody
from service.repository import ServedModel
from service.scheduler.job import JobResult
from service.schemas import Body

RAW, NPY, NPZ = "application/octet-stream", "application/x-npy", "application/x-npz"
MAX_NPY_HEADER = 1024
"""Bytes: an array of numbers needs 118; numpy parses the header as a Python literal, which a long one could make slow."""
BODY_FIELDS = ("inputs", "mask", "posterior")
HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
UNREADABLE = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, TokenError, UserWarning)
"""What numpy's reader may raise on bytes that are no header: it evaluates a literal, then tries to repair it by its tokens."""


def rows_of(raw: bytes, media: str, x: XSpec) -> NDArray[Any]:
    """The rows in a body, not yet judged.

    Raises:
        MalformedBody: not an .npy file. InvalidInput: not a whole number of rows, or not an array of numbers.
    """
    return _read_npy(raw) if media == NPY else _read_raw(raw, x)


def fields_of(query: QueryParams, kind: type[Body]) -> dict[str, Any]:
    """The query as the JSON fields it stands for: numbers, true, false and null as such, `return` and seeds by commas.

    Raises:
        InvalidInput: a name is there twice, or belongs in the body.
    """
    fields: dict[str, Any] = {}
    for name, text in query.multi_items():
        if name in fields:
            raise InvalidInput.at(name, "is there twice in the query")
        if name in BODY_FIELDS:
            raise InvalidInput.at(name, "is no query parameter: it is the body, or needs a JSON body")
        known = {field.alias or key for key, field in kind.model_fields.items()}
        if name == "return" and name in known:
            fields[name] = [part for part in text.split(",") if part]
        elif name == "seed" and "," in text:
            fields[name] = [_value(part) for part in text.split(",")]
        else:
            fields[name] = _value(text)
    return fields


def wanted_media(accept: str) -> str | None:
    """Of the three, the one that an Accept header names first; None: JSON."""
    named = (entry.partition(";")[0].strip().lower() for entry in accept.split(","))
    first = next((media for media in named if media in (RAW, NPY, NPZ, "application/json", "application/*", "*/*")), None)
    return first if first in (RAW, NPY, NPZ) else None


def wanted_columns(media: str, call: str, card: Card, names: str | None) -> list[Column]:
    """The columns of the reply: those that `names` lists by commas, or the call's own; one of them where `media` holds no more.

    Raises:
        InvalidInput: a name is unknown, or there are too many.
    """
    columns = chosen(columns_of(call, card), [] if names is None else names.split(","), "columns")
    if media == NPZ:
        return columns
    if names is not None and len(columns) > 1:
        raise InvalidInput.at("columns", f"{media} holds one array: name one column, or accept {NPZ}")
    return columns[:1]


def array_response(media: str, columns: Sequence[Column], model: ServedModel, result: JobResult) -> Response:
    arrays = {column.name: column.value(model, result) for column in columns}
    timing = result.timing
    headers = {
        "X-Elbow-Model": f"{model.name}/{model.version}",
        "X-Elbow-Precision": model.precision,
        "Server-Timing": f"queue;dur={timing.queue_ms:.4f}, compute;dur={timing.compute_ms:.4f}",
    }
    if media == NPZ:
        return Response(_npz(arrays), headers=headers, media_type=NPZ)
    ((name, array),) = arrays.items()
    headers |= {"X-Elbow-Column": name, "X-Elbow-Dtype": array.dtype.str, "X-Elbow-Shape": ",".join(map(str, array.shape))}
    return Response(_npy(array) if media == NPY else array.tobytes(), headers=headers, media_type=media)


def _read_raw(raw: bytes, x: XSpec) -> NDArray[Any]:
    row = 4 * x.size
    if not raw or len(raw) % row:
        raise InvalidInput.at("inputs", f"the body has {len(raw)} bytes: rows of this model are {x.size} float32 numbers, {row} bytes each")
    return np.frombuffer(raw, "<f4").reshape(-1, *x.shape)


def _read_npy(raw: bytes) -> NDArray[Any]:
    """By numpy's reader of the header; the elements are a view of the body, so a header that promises more allocates nothing."""
    file = io.BytesIO(raw)
    try:
        version = npy.read_magic(file)
        if version not in HEADER_READERS:
            raise MalformedBody(f"the body is an .npy file of version {version}: save it as 1.0 or 2.0")
        shape, is_fortran, dtype = HEADER_READERS[version](file, max_header_size=MAX_NPY_HEADER)
    except UNREADABLE as exc:
        raise MalformedBody(f"the body is not an .npy file: {str(exc)[:200]}") from exc
    if dtype.hasobject or dtype.kind not in "fiub":
        raise InvalidInput.at("inputs", f"the .npy file holds {str(dtype)[:40]}: only numbers are read here")
    left = len(raw) - file.tell()
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != left:
        raise InvalidInput.at("inputs", f"the .npy header promises shape {list(shape)} of {dtype}, {left} bytes follow it")
    if not left:
        raise InvalidInput.at("inputs", "is empty: send at least one row")
    flat = np.frombuffer(raw, dtype, offset=file.tell())
    return flat.reshape(shape[::-1]).T if is_fortran else flat.reshape(shape)


def _value(text: str) -> Any:
    """The JSON value a query parameter stands for; text that is none stays text, which no field takes."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return value if isinstance(value, int | float | bool | None) else text


def _npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # as in bulk.py: its own keyword makes the others look like booleans
    return file.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
