"""Tokens carry a stream's state there and back, and nothing but an untouched one of the same model and caller is read."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from service.errors import TokenRefused
from service.streams.tokens import Snapshot, Tokens

SHA, OTHER = "a" * 64, "b" * 64


def snapshot(size: int = 5) -> Snapshot:
    generator = np.random.default_rng(0)
    state = {"state.h": generator.standard_normal(size).astype(np.float32), "state.z": np.zeros(2, np.float32)}
    audio = {"samples": np.array([801]), "odd": np.array([7], np.uint8), "partial": np.empty(0, np.float32)}
    return Snapshot({"steps": 2, "seed": 2**63, "return": ["elbo"]}, 12, 801, {"frames": 12, "nats": -3.5}, state, audio)


def tokens(now: float = 1000.0, secret: bytes = b"secret", most: int = 4096) -> Tokens:
    return Tokens(secret, ttl_s=60.0, max_bytes=most, clock=lambda: now)


def test_a_token_brings_back_every_bit() -> None:
    given = snapshot()
    found = tokens().read(tokens().issue(given, SHA, "key"), SHA, "key")
    assert (dict(found.settings), found.frame, found.samples, dict(found.summary)) == (given.settings, 12, 801, given.summary)
    for mine, theirs in ((found.state, given.state), (found.audio, given.audio)):
        assert set(mine) == set(theirs)
        for name in theirs:
            np.testing.assert_array_equal(mine[name], theirs[name])
            assert mine[name].dtype == theirs[name].dtype


def test_any_altered_character_is_refused() -> None:
    token = tokens().issue(snapshot(), SHA)
    for place in range(0, len(token), 7):
        altered = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        if base64.urlsafe_b64decode(altered.split(".")[-1] + "==") == base64.urlsafe_b64decode(token.split(".")[-1] + "==") and (
            altered.rpartition(".")[0] == token.rpartition(".")[0]
        ):
            continue  # the last character of base64 has bits that mean nothing
        with pytest.raises(TokenRefused):
            tokens().read(altered, SHA)


@pytest.mark.parametrize(
    ("reader", "sha", "key", "message"),
    [
        (tokens(now=1061.0), SHA, "", "expired 1 s ago"),
        (tokens(), OTHER, "", "another model"),
        (tokens(), SHA, "somebody", "another API key"),
        (tokens(secret=b"other"), SHA, "", "another secret"),
        (tokens(most=100), SHA, "", "at most 100 bytes"),
    ],
)
def test_a_token_of_another_time_model_key_or_secret_is_refused_with_the_reason(reader: Tokens, sha: str, key: str, message: str) -> None:
    with pytest.raises(TokenRefused, match=message):
        reader.read(tokens().issue(snapshot(), SHA), sha, key)


@pytest.mark.parametrize("text", ["", "hello", "elbow1", "elbow1.", "elbow1.x.y", "elbow9.abc.def", "…", "a.b.c"])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(TokenRefused):
        tokens().read(text, SHA)


def test_a_state_too_large_for_a_token_is_said_at_once() -> None:
    with pytest.raises(TokenRefused, match="4096 are allowed"):
        tokens().issue(snapshot(5000), SHA)


def test_what_is_issued_can_be_read_however_well_it_compresses() -> None:
    whole = Snapshot({}, 0, 0, {}, {"h": np.zeros(5000, np.float32)}, {})
    assert tokens().read(tokens().issue(whole, SHA), SHA).state["h"].size == 5000
    with pytest.raises(TokenRefused, match="4096 are allowed"):
        tokens().issue(Snapshot({}, 0, 0, {}, {"h": np.zeros(100_000, np.float32)}, {}), SHA)
