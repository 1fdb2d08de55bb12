"""From the bytes of a request to a JSON object: limits while reading, one parse, and an error that says where it broke.

The only place that knows content types; what it returns is plain Python (dict, list, str, float, int, bool, None).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from service.errors import BodyTooLarge, InvalidInput, MalformedBody, UnsupportedMedia

T = TypeVar("T")

OFFLOAD_BYTES = 256 * 1024
"""Bodies larger than this are parsed in a worker thread, so that the event loop keeps answering probes and small requests."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body's bytes, refused as soon as more than `limit` of them are announced or have come.

    Raises:
        UnsupportedMedia: the content type is not JSON, or the body is compressed.
        BodyTooLarge: by Content-Length, or counted while reading a chunked body.
        ClientDisconnect: the client left before the body was complete.
    """
    _check_headers(request, limit)
    return await read_bytes(request, limit)


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body whatever it holds, refused as soon as more than `limit` bytes have come.

    Raises:
        BodyTooLarge, ClientDisconnect: as `read_body`.
    """
    receive, chunks, size = request.receive, [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(too_large(limit))
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        MalformedBody: not JSON; the message has line and column, or the path of a NaN.
        InvalidInput: JSON, but not an object.
    """
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise _malformed(raw, exc) from exc
    if not isinstance(parsed, dict):
        raise InvalidInput(f"the body must be a JSON object, not {describe(parsed)}")
    return parsed


async def in_worker_if_large(size: int, work: Callable[[], T]) -> T:
    """Runs `work` here, or in a worker thread when it is to chew `size` > OFFLOAD_BYTES."""
    return await asyncio.to_thread(work) if size > OFFLOAD_BYTES else work()


def whole(value: object) -> object:
    """2.0 as 2: in JSON they are the same number. Everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**64 else value


def describe(value: object) -> str:
    """A JSON value in words, short enough for a message."""
    match value:
        case str():
            return f'the string "{value[:40]}{"…" if len(value) > 40 else ""}"'
        case list():
            return "a list"
        case dict():
            return "an object"
        case int() if abs(value) >= 2**63:  # JSON has them, orjson writes them no more
            return f"{value:.6g}"
        case _:
            return orjson.dumps(value).decode()


def _check_headers(request: Request, limit: int) -> None:
    headers = _headers(request)
    content_type = headers.get(b"content-type", b"application/json").decode("latin-1").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedMedia(f"content type {content_type!r} is not read here: send Content-Type: application/json")
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding != "identity":
        raise UnsupportedMedia(f"content encoding {encoding!r} is not read here: send the body uncompressed")
    _check_length(headers.get(b"content-length", b"0"), limit)


def check_announced(request: Request, limit: int) -> None:
    """Refuses a body by its Content-Length, before any of it is read.

    Raises:
        BodyTooLarge: it announces more than `limit` bytes.
    """
    _check_length(_headers(request).get(b"content-length", b"0"), limit)


def _headers(request: Request) -> dict[bytes, bytes]:
    """All headers as they came, the first of each name: one pass, where Starlette's mapping takes one per look."""
    return dict(reversed(request.scope["headers"]))


def _check_length(announced: bytes, limit: int) -> None:
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(too_large(limit))


def too_large(limit: int) -> str:
    return f"the body is larger than this server's {limit} bytes: send fewer rows per request"


def _malformed(raw: bytes, exc: orjson.JSONDecodeError) -> MalformedBody:
    """Says what is wrong; NaN and Infinity, which other JSON parsers let through, are found and named by path."""
    if not raw.strip():
        return MalformedBody("the body is empty: send a JSON object")
    if "depth limit" in str(exc):
        return MalformedBody(f"the JSON is nested too deeply: {exc}")
    if any(word in raw for word in (b"NaN", b"Infinity", b"e", b"E")):
        try:
            path, value = next(_nonfinite(json.loads(raw), ""))
        except (ValueError, RecursionError, StopIteration):
            pass
        else:
            shown = "NaN" if math.isnan(value) else "an infinite number"
            message = f"{shown} is not a JSON number; values must be finite (hide what is missing with mask)"
            return MalformedBody(f"{path or 'body'}: {message}", fields=[(path, message)])
    return MalformedBody(f"the body is not JSON: {exc}")


def _nonfinite(value: object, path: str) -> Iterator[tuple[str, float]]:
    """Paths of the numbers that are NaN or infinite, in order."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from _nonfinite(element, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, element in value.items():
            yield from _nonfinite(element, f"{path}.{key}" if path else str(key))
