"""State tokens: a stream's whole state, signed, so that any replica with the same secret and artifact can continue it.

    elbow1.<payload>.<HMAC-SHA256>        payload = zlib(header length, JSON header, raw arrays), both parts base64url

The header binds the state to the artifact's hash and to the caller's key, and says until when it holds. Nothing in a token is
believed before its signature was checked, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import TokenRefused

INFLATED = 8
"""Bytes of a token uncompressed, at most, for each that it may have itself."""
PREFIX = "elbow1"


@dataclass(frozen=True)
class Snapshot:
    """Where a stream stands.

    Attributes:
        settings: what the stream was opened with, as the server applied it.
        frame: index of the next frame. samples: input samples (or frames) inside the state.
        summary: what `closed` will report so far.
        state: the model's state arrays, one row each; audio: the input's own arrays (service/streams/audio.py).
    """

    settings: Mapping[str, Any]
    frame: int
    samples: int
    summary: Mapping[str, float]
    state: Mapping[str, NDArray[Any]]
    audio: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Tokens:
    """Issues and reads tokens.

    Args:
        secret: shared by all replicas. ttl_s: how long a token holds. max_bytes: of a token, as text. clock: seconds since 1970.
    """

    def __init__(self, secret: bytes, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.time):
        self._secret, self._ttl_s, self._max_bytes, self._clock = secret, ttl_s, max_bytes, clock

    def issue(self, snapshot: Snapshot, artifact_sha256: str, key_id: str = "") -> str:
        """A token of `snapshot`, bound to the artifact and the caller's key.

        Raises:
            TokenRefused: the state is larger than a token may be.
        """
        arrays = {f"state/{name}": value for name, value in snapshot.state.items()}
        arrays |= {f"audio/{name}": value for name, value in snapshot.audio.items()}
        header = {
            "artifact": artifact_sha256,
            "key": key_id,
            "expires": self._clock() + self._ttl_s,
            "settings": dict(snapshot.settings),
            "frame": snapshot.frame,
            "samples": snapshot.samples,
            "summary": dict(snapshot.summary),
            "arrays": [[name, str(value.dtype), list(value.shape)] for name, value in arrays.items()],
        }
        head = json.dumps(header, separators=(",", ":")).encode()
        raw = struct.pack("<I", len(head)) + head + b"".join(np.ascontiguousarray(value).tobytes() for value in arrays.values())
        payload = f"{PREFIX}.{_text(zlib.compress(raw, 1))}"
        token = f"{payload}.{_text(self._signature(payload))}"
        if len(token) > self._max_bytes or len(raw) > INFLATED * self._max_bytes:
            size = f"{len(token)} bytes ({len(raw)} uncompressed)"
            raise TokenRefused(
                f"state: the stream's token has {size}, {self._max_bytes} are allowed on this server ({INFLATED} times as many)"
            )
        return token

    def read(self, token: str, artifact_sha256: str, key_id: str = "") -> Snapshot:
        """The snapshot in `token`.

        Raises:
            TokenRefused: it is no token, was altered, has expired, or belongs to another artifact or key.
        """
        payload, _, signature = token.rpartition(".")
        if len(token) > self._max_bytes:
            raise TokenRefused(f"state: a token has at most {self._max_bytes} bytes here, this one {len(token)}")
        if not payload.startswith(f"{PREFIX}."):
            raise TokenRefused(f"state: not a state token of this version ({PREFIX}): send one as a reply returned it")
        if not hmac.compare_digest(_bytes(signature), self._signature(payload)):
            raise TokenRefused("state: the token was altered, or signed by a server with another secret")
        try:
            raw = _inflated(_bytes(payload.removeprefix(f"{PREFIX}.")), INFLATED * self._max_bytes)
            (length,) = struct.unpack_from("<I", raw)
            header = json.loads(raw[4 : 4 + length])
        except (struct.error, ValueError, zlib.error) as exc:
            raise TokenRefused("state: the token cannot be read") from exc
        if header["expires"] < self._clock():
            raise TokenRefused(f"state: the token expired {self._clock() - header['expires']:.0f} s ago; open a new stream")
        if header["artifact"] != artifact_sha256:
            raise TokenRefused("state: the token belongs to another model or version; open the stream on the model that issued it")
        if header["key"] != key_id:
            raise TokenRefused("state: the token belongs to another API key")
        arrays = _arrays(header["arrays"], raw[4 + length :])
        parts = {
            side: {name.removeprefix(f"{side}/"): value for name, value in arrays.items() if name.startswith(f"{side}/")}
            for side in ("state", "audio")
        }
        return Snapshot(header["settings"], header["frame"], header["samples"], header["summary"], parts["state"], parts["audio"])

    def issuer(self, token: str) -> str | None:
        """The hash of the artifact that `token` belongs to; None if it is no token of ours, as `read` will say."""
        payload, _, signature = token.rpartition(".")
        if len(token) > self._max_bytes or not hmac.compare_digest(_bytes(signature), self._signature(payload)):
            return None
        try:
            raw = _inflated(_bytes(payload.removeprefix(f"{PREFIX}.")), INFLATED * self._max_bytes)
            (length,) = struct.unpack_from("<I", raw)
            return str(json.loads(raw[4 : 4 + length])["artifact"])
        except (struct.error, ValueError, KeyError, zlib.error):
            return None

    def _signature(self, payload: str) -> bytes:
        return hmac.new(self._secret, payload.encode("utf-8", "replace"), hashlib.sha256).digest()


def _arrays(specs: list[list[Any]], raw: bytes) -> dict[str, NDArray[Any]]:
    arrays, at = {}, 0
    for name, dtype, shape in specs:
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(raw, dtype, count, at).reshape(shape)
        at += arrays[name].nbytes
    return arrays


def _inflated(data: bytes, most: int) -> bytes:
    engine = zlib.decompressobj()
    raw = engine.decompress(data, most)
    if engine.unconsumed_tail:
        raise ValueError("larger than a token may be")
    return raw


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (binascii.Error, UnicodeEncodeError, ValueError):
        return b""
