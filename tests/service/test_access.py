"""Who may come in: with keys and without, over HTTP; what two callers may know of each other; bodies that do not arrive."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from service.app import create_app
from service.errors import Overloaded
from service.keys import KeyRing, digest_of
from service.settings import Settings

ALICE, BOB, ADMIN = {"Authorization": "Bearer alices-key"}, {"X-API-Key": "bobs-key"}, {"X-API-Key": "root"}
BODY = {"inputs": [[0.0] * 784], "steps": 3}


@pytest.fixture
def ring():
    lines = [f"alice {digest_of('alices-key')}", f"bob {digest_of('bobs-key')} 0.001/10"]
    return KeyRing(lines, admin_sha256=digest_of("root"))


@pytest.fixture
def keyed(serve, make_card, ring):
    return serve(make_card("digits"), keys=ring)


@pytest.mark.parametrize("headers", [ALICE, BOB, ADMIN, {"authorization": "bearer alices-key"}])
def test_a_known_key_comes_in_by_either_header(keyed, headers):
    assert keyed.post("digits/encode", BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"X-API-Key": ""}, {"X-API-Key": "nobodys"}, {"Authorization": "Basic alices-key"}, {"Authorization": "Bearer "}]
)
@pytest.mark.parametrize("path", ["/v1/models", "/openapi.json", "/docs", "/", "/nowhere", "/livez/", "//livez", "/metrics/../v1/models"])
def test_without_a_known_key_nothing_but_probes_and_metrics_answers(keyed, headers, path):
    reply = keyed.get(path, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["code"] == "unauthorized"
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    assert keyed.scheduler.jobs == []


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_and_metrics_need_no_key(keyed, path):
    assert keyed.get(path).status_code == 200


def test_an_open_server_asks_nobody(service):
    assert service.get("/v1/models").status_code == 200
    assert service.get("/v1/models", headers={"X-API-Key": "whatever"}).status_code == 200


def test_a_quota_is_spent_by_its_owner_alone_and_says_when_to_come_back(keyed):
    replies = [keyed.post("digits/encode", BODY, headers=BOB) for _ in range(5)]  # 4 row-steps each, 10 saved up
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429, 429]
    assert replies[-1].json()["code"] == "quota_exceeded"
    assert int(replies[-1].headers["retry-after"]) >= 1
    assert keyed.post("digits/encode", BODY, headers=ALICE).status_code == 200
    assert keyed.get("/v1/models", headers=BOB).status_code == 200


def test_what_was_refused_or_not_done_is_not_paid_for(keyed, ring):
    quota = ring.callers["bob"].quota
    keyed.scheduler.fault = Overloaded("full", retry_after_s=1.0)
    keyed.post("digits/encode", BODY, headers=BOB)
    keyed.post("digits/encode", {"inputs": "x"}, headers=BOB)
    assert quota._left == pytest.approx(10.0, abs=0.01)


def test_the_metrics_tell_callers_by_name_and_never_by_key(keyed):
    keyed.post("digits/encode", BODY, headers=ALICE)
    keyed.post("digits/encode", BODY, headers={"X-API-Key": "nobodys"})
    text = keyed.get("/metrics").text
    assert 'elbow_key_requests_total{key="alice"} 1.0' in text
    assert 'elbow_key_row_steps_total{key="alice"} 4.0' in text
    assert 'elbow_refusals_total{reason="unauthorized"} 1.0' in text
    assert "alices-key" not in text
    assert "nobodys" not in text


def test_a_browser_token_is_given_to_keys_only(keyed):
    issued = keyed.run(keyed.http.post("/v1/token", headers=ALICE))
    assert issued.status_code == 200
    assert issued.json().keys() == {"token", "expires_in_s"}
    assert issued.headers["cache-control"] == "no-store"
    assert keyed.run(keyed.http.post("/v1/token")).status_code == 401
    assert keyed.run(keyed.http.post("/v1/token", headers=ADMIN)).status_code == 403
    token = issued.json()["token"]
    assert keyed.get(f"/v1/models?token={token}").status_code == 401  # it opens sockets, nothing else
    assert keyed.get("/v1/models", headers={"X-API-Key": token}).status_code == 401


def test_a_server_that_refuses_says_when_and_ends_the_connection(keyed):
    keyed.app.state.server.draining = keyed.app.state.server.refusing = True
    reply = keyed.post("digits/encode", BODY, headers=ALICE)
    assert (reply.status_code, reply.headers["connection"]) == (503, "close")
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["code"] == "shutting_down"
    assert keyed.get("/livez").status_code == 200


def test_a_server_that_drains_still_serves_and_ends_each_connection(service):
    service.app.state.server.draining = True
    reply = service.post("digits/encode", BODY)
    assert (reply.status_code, reply.headers["connection"]) == (200, "close")


def test_a_body_that_does_not_arrive_gets_408(serve, make_card, monkeypatch):
    service = serve(make_card("digits"))
    monkeypatch.setattr("service.access.SLOWEST_BODY", 1e9)
    sent = []

    async def never():
        await asyncio.sleep(3600)

    async def call():
        middleware = service.app.build_middleware_stack()
        scope = {"type": "http", "method": "POST", "path": "/v1/models/digits/encode", "headers": [], "query_string": b""}
        scope["app"] = service.app
        await middleware(scope, never, lambda message: asyncio.sleep(0, sent.append(message)))

    service.app.user_middleware[1].kwargs["body_s"] = 0.05
    service.run(call())
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert b'"code":"idle"' in sent[1]["body"]


def test_pages_of_other_sites_may_call_only_where_allowed(tmp_path):
    asked = {"Origin": "https://lab.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    common = {"closed_form": True, "repository": tmp_path, "keys": f"a {digest_of('k')}"}

    async def call(method, headers, **settings):
        app = create_app(Settings(**common, **settings))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, "/v1/models", headers=headers)

    assert "access-control-allow-origin" not in asyncio.run(call("OPTIONS", asked)).headers
    allowed = {"cors_origins": "https://lab.example, https://other.example"}
    assert asyncio.run(call("OPTIONS", asked, **allowed)).headers["access-control-allow-origin"] == "https://lab.example"
    told = asyncio.run(call("GET", {"Origin": "https://lab.example"}, **allowed))
    assert (told.status_code, told.headers["access-control-allow-origin"]) == (401, "https://lab.example")
    other = asyncio.run(call("GET", {"Origin": "https://evil.example", "X-API-Key": "k"}, **allowed))
    assert other.status_code == 200
    assert "access-control-allow-origin" not in other.headers
