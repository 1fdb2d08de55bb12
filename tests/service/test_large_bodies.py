"""A large body is parsed beside the event loop: probes and small requests are answered meanwhile."""

import asyncio
import threading
from typing import Any

import pytest

from service.body import OFFLOAD_BYTES, parse_object
from service.routes import infer
from tests.service.conftest import Service


def test_livez_answers_while_a_large_body_is_parsed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def parse_slowly(raw: bytes) -> dict[str, Any]:
        begun.set()
        assert may_end.wait(20), "the event loop stood still: nobody could let the parsing end"
        return parse_object(raw)

    monkeypatch.setattr(infer, "parse_object", parse_slowly)
    large = b'{"inputs": [[' + b", ".join([b"0"] * 784) + b"]]" + b" " * OFFLOAD_BYTES + b"}"

    async def scenario() -> tuple[int, int]:
        path, headers = "/v1/models/digits/encode", {"Content-Type": "application/json"}
        posting = asyncio.create_task(service.http.post(path, content=large, headers=headers))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        alive = await service.http.get("/livez")
        assert not posting.done()
        may_end.set()
        return alive.status_code, (await posting).status_code

    assert service.run(scenario()) == (200, 200)
