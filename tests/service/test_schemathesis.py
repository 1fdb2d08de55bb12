"""schemathesis with all its checks against a live server: the service answers as its OpenAPI document says, with keys and without."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.keys import digest_of
from tests.service.streams.conftest import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EXAMPLES = 30
CONFIG = """
# a deadline that cannot be met (504) and a full line (503) are announced refusals, not faults
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
# what JSON Schema cannot say between two fields (as many seeds as rows) is refused with 422, on /v2 with 400
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 400, 401, 403, 404, 422, 429, 503, 504]
"""


@pytest.fixture(params=["open", "keyed"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, arguments that show the key)."""
    pytest.importorskip("schemathesis")
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ELBOW_")} | {
        "ELBOW_PORT": str(port),
        "ELBOW_CLOSED_FORM": "1",
        "ELBOW_REPOSITORY": str(tmp_path),
        "ELBOW_LOG_LEVEL": "error",
    }
    shown: list[str] = []
    if request.param == "keyed":
        environment["ELBOW_KEYS"] = f"tester {digest_of('key-of-the-test')}"
        shown = ["--header", "X-API-Key: key-of-the-test"]
    process = subprocess.Popen([sys.executable, "-m", "service", "run"], env=environment)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/readyz")
                break
            except httpx.TransportError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", shown
        assert process.poll() is None, "the server ended"
    finally:
        process.terminate()
        process.wait(30)


def test_every_check_of_schemathesis_passes(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, shown = server
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--checks", "all", "--seed", "1", *shown]
    command += ["--max-examples", str(EXAMPLES), "--phases", "examples,coverage,fuzzing", "--workers", "1", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
