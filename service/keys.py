"""API keys: known by their sha256 only, each with a name and perhaps a quota. No keys configured = an open server.

    a line of the file:   NAME SHA256 [ROW_STEPS_PER_SECOND[/BURST]]        # comment

A name may have several lines (a rotation: old and new key); they share one quota, the first line's that states one. State
tokens, sequences and browser tokens are bound to the name, so they outlive a rotation.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.errors import QuotaExceeded

ADMIN = "admin"
BURST_S = 10.0
"""A quota that states no burst saves up so many seconds of its rate."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_QUOTA = re.compile(r"(\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?")
_FIND = 32
_PREFIX = "elbow_"


class Quota:
    """A token bucket of row-steps that may go into debt: a request is let in while anything is left, and pays in full.

    So no request is too large for its quota, and a caller who takes much at once waits longer. Used in the event loop only.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def check(self) -> None:
        """Raises QuotaExceeded, with the time until it is over, when nothing is left."""
        left = self._now()
        if left <= 0.0:
            raise QuotaExceeded(
                f"this key's quota of {self.rate:g} row-steps a second is spent", retry_after_s=max(0.001, (1.0 - left) / self.rate)
            )

    def charge(self, work: float) -> None:
        """Takes `work` row-steps; a negative number gives them back."""
        self._left = min(self.burst, self._now() - work)

    def _now(self) -> float:
        now = self._clock()
        self._left, self._at = min(self.burst, self._left + self.rate * (now - self._at)), now
        return self._left


@dataclass(frozen=True, eq=False)
class Caller:
    """Who asks. `name` is empty on an open server."""

    name: str = ""
    quota: Quota | None = None
    is_admin: bool = False


ANYBODY = Caller()


class KeyRing:
    """The keys of one server.

    Args:
        lines: as in this module's docstring. admin_sha256: digest of the key of the admin routes.

    Raises:
        ValueError: a line that cannot be read, by its number; the digest itself is never repeated.
    """

    def __init__(self, lines: Iterable[str] = (), admin_sha256: str | None = None, clock: Callable[[], float] = time.monotonic):
        self._by_digest: dict[str, tuple[str, Caller]] = {}
        """By the first digits of the digest, so that the whole of it is only ever compared in constant time."""
        self.callers: dict[str, Caller] = {}
        for number, line in enumerate(lines, 1):
            if words := line.partition("#")[0].split():
                self._add(words, f"keys, line {number}", clock)
        self.is_open = not self._by_digest
        self.has_admin = admin_sha256 is not None
        if admin_sha256 is not None:
            if not _DIGEST.fullmatch(admin_sha256):
                raise ValueError("admin key: must be the sha256 of the key, 64 hexadecimal digits (elbow-serve key admin prints both)")
            self._put(admin_sha256, Caller(ADMIN, is_admin=True), "admin key")

    def identify(self, shown: bytes) -> Caller | None:
        """Whose key this is. One hash, one look-up by the hash, and one comparison in constant time."""
        digest = hashlib.sha256(shown).hexdigest()
        found = self._by_digest.get(digest[:_FIND])
        return found[1] if found is not None and hmac.compare_digest(found[0], digest) else None

    def _add(self, words: list[str], where: str, clock: Callable[[], float]) -> None:
        if len(words) not in (2, 3):
            raise ValueError(f"{where}: must be NAME SHA256 [ROW_STEPS_PER_SECOND[/BURST]], has {len(words)} words")
        name, digest = words[:2]
        if not _NAME.fullmatch(name) or name == ADMIN:
            raise ValueError(f"{where}: a name is letters, digits, dots and dashes, 64 at most, and not {ADMIN!r}")
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{where}: the second word must be a sha256, 64 hexadecimal digits in lower case (never the key itself)")
        quota = None if len(words) == 2 else _quota(words[2], where, clock)
        caller = self.callers.get(name)
        if caller is None:
            caller = self.callers[name] = Caller(name, quota)
        elif quota is not None:
            raise ValueError(f"{where}: a name has one quota, on its first line")
        self._put(digest, caller, where)

    def _put(self, digest: str, caller: Caller, where: str) -> None:
        before = self._by_digest.setdefault(digest[:_FIND], (digest, caller))
        if before[1] is not caller or before[0] != digest:
            raise ValueError(f"{where}: this key was given before, to {before[1].name}")


def new_key() -> str:
    """A key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _quota(text: str, where: str, clock: Callable[[], float]) -> Quota:
    found = _QUOTA.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"{where}: the quota must be ROW_STEPS_PER_SECOND or ROW_STEPS_PER_SECOND/BURST, positive numbers, not {text!r}")
    rate = float(found[1])
    return Quota(rate, float(found[2]) if found[2] else BURST_S * rate, clock)
