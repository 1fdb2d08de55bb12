"""The image's health check, run as the image runs it: by an interpreter of its own, with nothing of ours importable."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "deploy/docker/health.py"


class Readiness(BaseHTTPRequestHandler):
    """Answers /readyz with the status the test wants."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b'{"ready":true}' if self.status == 200 else b'{"ready":false}')

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Readiness)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def check(port: int, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "ELBOW_PORT": str(port), **environment}
    return subprocess.run([sys.executable, "-I", CHECK], env=environment, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (500, 1)])
def test_healthy_means_ready(port: int, status: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Readiness, "status", status)
    done = check(port)
    assert (done.returncode, done.stderr) == (expected, "")
    assert '"ready":' in done.stdout


def test_a_proxy_is_not_asked_for_the_containers_own_port(port: int) -> None:
    assert check(port, http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9").returncode == 0


def test_nobody_there_is_unhealthy_and_says_so(free_port: int) -> None:
    done = check(free_port)
    assert done.returncode == 1
    assert f"http://127.0.0.1:{free_port}/readyz" in done.stdout


def test_a_server_with_tls_is_asked_by_tls(port: int) -> None:
    done = check(port, ELBOW_TLS_CERT_FILE="/some.pem")
    assert done.returncode == 1  # this one does not speak it
    assert done.stdout.startswith(f"https://127.0.0.1:{port}/readyz")
