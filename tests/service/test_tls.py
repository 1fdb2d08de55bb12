"""HTTPS and WSS with a certificate made here, everything by flags."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Origin

from tests.service.streams.conftest import free_port
from tests.service.streams.test_server import CLOSE, rest_of, results

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


@pytest.fixture(scope="module")
def server(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, ssl.SSLContext]]:
    """(port, what trusts the certificate)."""
    repository = tmp_path_factory.mktemp("served")
    shutil.copytree(CHECKPOINTS / "jsb-filter" / "1", repository / "jsb-filter" / "1")
    chain, key = certificate
    trust = ssl.create_default_context(cafile=chain)
    port = free_port()
    flags = {"port": port, "repository": repository, "engine": "onnx", "log-level": "error", "tls-cert-file": chain, "tls-key-file": key}
    command = [sys.executable, "-m", "service", "run", *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ELBOW_")} | {"ELBOW_PORT": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        for _ in range(600):
            try:
                httpx.get(f"https://127.0.0.1:{port}/readyz", verify=trust)
                break
            except httpx.TransportError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.05)
        yield port, trust
    finally:
        process.terminate()
        process.wait(30)


def test_requests_go_by_https_and_no_longer_by_http(server: tuple[int, ssl.SSLContext]) -> None:
    port, trust = server
    reply = httpx.post(f"https://127.0.0.1:{port}/v1/models/jsb-filter/filter", json={"frames": [[0.0] * 88]}, verify=trust, timeout=60)
    assert reply.status_code == 200
    with pytest.raises(httpx.ConnectError, match=r"self.signed"):
        httpx.get(f"https://127.0.0.1:{port}/readyz")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/readyz")


def test_streams_go_by_wss_and_know_their_own_page(server: tuple[int, ssl.SSLContext]) -> None:
    port, trust = server

    async def run() -> list[dict[str, object]]:
        uri = f"wss://127.0.0.1:{port}/v1/models/jsb-filter/filter?seed=1"
        async with connect(uri, ssl=trust, origin=Origin(f"https://127.0.0.1:{port}")) as socket:
            await socket.send(json.dumps({"type": "frames", "frames": [[0.0] * 88] * 3}))
            await socket.send(json.dumps(CLOSE))
            return await rest_of(socket)

    heard = asyncio.run(asyncio.wait_for(run(), 60))
    assert [result["frame"] for result in results(heard)] == [0, 1, 2]
    assert heard[-1]["type"] == "closed"


def test_a_certificate_without_its_key_is_refused_at_the_start(certificate: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "service", "run", "--tls-cert-file", str(certificate[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "tls_key_file: give both, or neither" in done.stderr
