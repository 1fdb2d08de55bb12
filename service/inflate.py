"""Compressed bodies: inflated up to a bound and not a byte further, and replies deflated where a client asks for it."""

from __future__ import annotations

import zlib

from service.body import too_large
from service.errors import BodyTooLarge, MalformedBody, UnsupportedMedia

GZIP, DEFLATE = "gzip", "deflate"
IDENTITY = "identity"
LEAST_BYTES = 1024
"""Smaller replies are sent as they are: the head of a gzip stream alone has 18 bytes, and a packet carries 1,400."""
LEVEL = 1


def check_encoding(header: str | None) -> str:
    """The encoding of a request's body, by its Content-Encoding.

    Raises:
        UnsupportedMedia: it is none of gzip, deflate and identity.
    """
    encoding = (header or IDENTITY).strip().lower()
    if encoding not in (GZIP, DEFLATE, IDENTITY):
        raise UnsupportedMedia(f"content encoding {encoding[:40]!r} is not read here: send gzip, deflate or nothing")
    return encoding


def inflate(raw: bytes, encoding: str, limit: int) -> bytes:
    """The body that was compressed. At most `limit` bytes are made, whatever the body would become.

    Raises:
        BodyTooLarge: it inflates to more. MalformedBody: it is cut short, damaged, or followed by something else.
    """
    if encoding == IDENTITY:
        return raw
    engine = zlib.decompressobj(_window(raw, encoding))
    try:
        body = engine.decompress(raw, limit + 1)
    except zlib.error as exc:
        raise MalformedBody(f"the body is not {encoding}: {exc}") from exc
    if len(body) > limit:
        raise BodyTooLarge(f"inflated, {too_large(limit)}")
    if not engine.eof:
        raise MalformedBody(f"the {encoding} body ends before its end: is it complete?")
    if engine.unused_data:
        raise MalformedBody(f"{len(engine.unused_data)} bytes follow the end of the {encoding} body")
    return body


def accepted_encoding(header: str | None) -> str:
    """Of gzip, deflate and identity, the one that an Accept-Encoding prefers; gzip where it does not care."""
    if not header:
        return IDENTITY
    weights: dict[str, float] = {}
    for entry in header.lower().split(","):
        name, _, parameters = entry.partition(";")
        weights[name.strip()] = _weight(parameters)
    best = max((GZIP, DEFLATE), key=lambda name: weights.get(name, weights.get("*", 0.0)))
    weight = weights.get(best, weights.get("*", 0.0))
    return best if weight > 0 and weight >= weights.get(IDENTITY, 0.0) else IDENTITY


def deflate(body: bytes, encoding: str) -> bytes:
    """`body` in that encoding. `deflate` is a zlib stream, as RFC 9110 has it."""
    engine = zlib.compressobj(LEVEL, zlib.DEFLATED, 31 if encoding == GZIP else 15)
    return engine.compress(body) + engine.flush()


def _window(raw: bytes, encoding: str) -> int:
    """zlib's `wbits`: gzip, a zlib stream, or the bare deflate that some clients send under that name."""
    if encoding == GZIP:
        return 31
    has_zlib_head = len(raw) >= 2 and raw[0] & 15 == 8 and (raw[0] << 8 | raw[1]) % 31 == 0
    return 15 if has_zlib_head else -15


def _weight(parameters: str) -> float:
    name, _, value = parameters.strip().partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0
