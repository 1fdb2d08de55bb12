"""What the OpenAPI document says of /v2 is true of the service."""

from __future__ import annotations

import httpx
import pytest


def test_every_example_is_answered_by_the_live_server(live):
    document = httpx.get(f"{live.url}/openapi.json", timeout=60).json()
    infer = {path: one["post"] for path, one in document["paths"].items() if path.startswith("/v2/") and "post" in one}
    assert len(infer) == 6  # three models, each with and without its version
    for path, operation in infer.items():
        example = operation["requestBody"]["content"]["application/json"]["example"]
        reply = httpx.post(live.url + path, json=example, timeout=60)
        assert reply.status_code == 200, reply.text
        answered = {"200", "400", "401", "403", "404", "408", "413", "415", "429", "431", "500", "503", "504"}
        assert set(operation["responses"]) == answered


def test_every_get_is_answered_with_the_members_it_promises(live):
    document = httpx.get(f"{live.url}/openapi.json", timeout=60).json()
    paths = [path for path, one in document["paths"].items() if path.startswith("/v2") and "get" in one]
    assert {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/stats", "/v2/models/jsb-filter/config"} <= set(paths)
    for path in paths:
        reply = httpx.get(live.url + path, timeout=60)
        schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert reply.status_code == 200
        assert set(schema["required"]) <= set(reply.json())


@pytest.mark.parametrize("call", ["encode", "reconstruct", "score"])
def test_replies_as_arrays_are_described(service, call):
    content = service.get("/openapi.json").json()["paths"][f"/v1/models/digits/{call}"]["post"]["responses"]["200"]["content"]
    assert {"application/x-npz", "application/x-npy", "application/octet-stream"} <= set(content)
