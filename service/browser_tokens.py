"""Short-lived tokens for browsers, which cannot put a key into a WebSocket's headers.

    elbowws.<base64url name>.<expiry, seconds since 1970>.<HMAC-SHA256 of what is before, base64url>

Whoever holds a key fetches one (POST /v1/token) and opens the socket with `?token=…`, or with the subprotocols `elbow` and
`elbow-token.<token>`. It names its caller, opens sockets only, and holds for a minute or so.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable

PREFIX = "elbowws"


class BrowserTokens:
    """Issues and reads them.

    Args:
        secret: shared by all replicas; a key of its own is derived from it, so that no other signature of ours fits here.
        ttl_s: how long a token holds. clock: seconds since 1970.
    """

    def __init__(self, secret: bytes, ttl_s: float, clock: Callable[[], float] = time.time):
        self._key = hmac.digest(secret, b"elbow browser tokens", "sha256")
        self.ttl_s, self._clock = ttl_s, clock

    def issue(self, name: str) -> str:
        payload = f"{PREFIX}.{_text(name.encode())}.{int(self._clock() + self.ttl_s)}"
        return f"{payload}.{self._sign(payload)}"

    def read(self, token: str) -> str | None:
        """The caller's name; None for anything but a token of ours that still holds."""
        payload, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(payload).encode()):
            return None
        _, name, expires = payload.split(".")
        if int(expires) < self._clock():
            return None
        try:
            return base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
        except (binascii.Error, UnicodeDecodeError):
            return None

    def _sign(self, payload: str) -> str:
        return _text(hmac.new(self._key, payload.encode("utf-8", "replace"), hashlib.sha256).digest())


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
