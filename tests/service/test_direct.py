"""The short way to a busy route answers what the router's way answers, byte for byte, errors included."""

import asyncio
from typing import Any

import pytest

from service import direct
from tests.service.conftest import Service

ROW = [0.5] * 784
PATHS = ("digits/encode", "digits/versions/1/encode", "digits/refine", "nobody/encode", "/encode", "digits/nothing",
         "digits/versions/9/score", "digits/encode/", "versions/versions/1/encode", "digits/versions//encode")  # fmt: skip


def answer(service: Service, method: str, path: str, body: Any) -> tuple[int, Any, Any]:
    headers = {"X-Request-ID": "one"}
    reply = service.run(service.http.request(method, f"/v1/models/{path}", json=body, headers=headers))
    return reply.status_code, reply.headers.multi_items(), reply.content


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("body", [{"inputs": [ROW]}, {"inputs": "none"}, {"inputs": [ROW], "stepz": 3}])
def test_both_ways_answer_alike(service: Service, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: Any) -> None:
    short = answer(service, method, path, body)
    monkeypatch.setattr(direct.DirectRoutes, "_find", lambda *_: None)
    assert short == answer(service, method, path, body)


def test_a_request_that_opentelemetry_follows_takes_the_routers_way() -> None:
    called: list[str] = []

    async def router(scope: Any, receive: Any, send: Any) -> None:
        called.append("router")

    async def endpoint(request: Any) -> Any:
        called.append("endpoint")

    routes = direct.DirectRoutes(router, {"encode": endpoint}, {})
    scope = {"type": "http", "method": "POST", "path": "/v1/models/m/encode", direct.TELEMETRY: object()}
    asyncio.run(routes(scope, None, None))  # type: ignore[arg-type]
    assert called == ["router"]


def test_the_short_way_is_taken(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.app.router, "routes", [])
    assert answer(service, "POST", "digits/encode", {"inputs": [ROW]})[0] == 200
