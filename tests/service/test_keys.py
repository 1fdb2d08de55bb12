"""Keys are known by their digests, quotas are buckets that may go into debt, browser tokens are short-lived."""

from __future__ import annotations

import pytest

from service.browser_tokens import BrowserTokens
from service.errors import QuotaExceeded
from service.keys import KeyRing, Quota, digest_of, new_key


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_key_is_found_by_its_digest_and_nothing_else_is():
    first, second = new_key(), new_key()
    ring = KeyRing([f"alice {digest_of(first)}", "", "# nobody", f"bob {digest_of(second)} 100/50  # nights only"])
    assert ring.identify(first.encode()).name == "alice"
    assert ring.identify(second.encode()).quota.burst == 50
    assert ring.identify(digest_of(first).encode()) is None
    assert ring.identify(first[:-1].encode()) is None
    assert first not in repr(vars(ring))


def test_no_keys_is_an_open_server_even_with_an_admin_key():
    assert KeyRing().is_open
    ring = KeyRing(admin_sha256=digest_of("root"))
    assert ring.is_open
    assert ring.has_admin
    assert ring.identify(b"root").is_admin


def test_during_a_rotation_both_keys_are_one_caller_with_one_quota():
    ring = KeyRing([f"alice {digest_of('old')} 10", f"alice {digest_of('new')}"])
    assert ring.identify(b"old") is ring.identify(b"new")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["alice"], "line 1: must be NAME SHA256"),
        (["", "alice secret"], "line 2: the second word must be a sha256"),
        (["../etc " + "0" * 64], "a name is letters"),
        (["admin " + "0" * 64], "a name is letters"),
        (["a " + "0" * 64, "b " + "0" * 64], "given before, to a"),
        (["a " + "0" * 64 + " many"], "the quota must be"),
        (["a " + "0" * 64 + " 0"], "the quota must be"),
        (["a " + "0" * 64 + " 5", "a " + "1" * 64 + " 6"], "a name has one quota"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(lines, words):
    with pytest.raises(ValueError, match=words) as error:
        KeyRing(lines)
    assert "0" * 64 not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_quota_lets_in_while_anything_is_left_and_says_when_it_will_be_again(clock):
    quota = Quota(rate=10.0, burst=20.0, clock=clock)
    quota.check()
    quota.charge(70)  # more than the burst: paid for afterwards
    with pytest.raises(QuotaExceeded) as refused:
        quota.check()
    clock.now += refused.value.retry_after_s
    quota.check()
    quota.charge(-1000)  # a refund never saves up more than the burst
    quota.charge(20)
    with pytest.raises(QuotaExceeded):
        quota.check()


def test_a_browser_token_names_its_caller_until_it_expires(clock):
    tokens = BrowserTokens(b"secret", 60.0, clock)
    token = tokens.issue("alice")
    assert tokens.read(token) == "alice"
    assert BrowserTokens(b"other", 60.0, clock).read(token) is None
    bobs = tokens.issue("bob").rpartition(".")[0]
    for forged in ("", ".", "a.b.c.d", token + "x", token.replace("elbowws.", "elbowws.x"), bobs + "." + token.rpartition(".")[2], "é"):
        assert tokens.read(forged) is None
    clock.now += 61
    assert tokens.read(token) is None
