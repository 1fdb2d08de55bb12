"""schemathesis with all its checks against a live server: the service answers as its OpenAPI document says, with keys and without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.keys import digest_of
from tests.service.streams.conftest import ServerProcess, free_port

pytestmark = pytest.mark.timeout(900)
CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
LIMITS = {
    "ELBOW_MAX_ROWS": "40",  # lists at their bounds are sent by the hundred: they need not be long
    "ELBOW_MAX_IMPORTANCE_SAMPLES": "500",
    "ELBOW_MAX_WAIT_S": "60",  # nothing is refused because the machine is busy: no 503 is excused
}


@pytest.fixture(scope="module", params=["open", "keyed"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """(address, arguments that show the key) of a server with the exact stand-in and a filter."""
    pytest.importorskip("schemathesis")
    repository = tmp_path_factory.mktemp("served")
    shutil.copytree(CHECKPOINTS / "jsb-filter" / "1", repository / "jsb-filter" / "1")
    keys, shown = {}, []
    if request.param == "keyed":
        keys = {"ELBOW_KEYS": f"tester {digest_of('key-of-the-test')}"}
        shown = ["--header", "X-API-Key: key-of-the-test"]
    process = ServerProcess(repository, free_port(), ELBOW_CLOSED_FORM="1", ELBOW_ENGINE="onnx", **LIMITS, **keys)
    yield process.url, shown
    assert process.process.poll() is None, "the server ended"
    process.stop()


@pytest.mark.parametrize("examples", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_every_check_of_schemathesis_passes(server: tuple[str, list[str]], examples: int, tmp_path: Path) -> None:
    url, shown = server
    (tmp_path / "schemathesis.toml").write_text(f"hooks = {json.dumps(str(HOOKS))}\n")
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--checks", "all", "--seed", "1", *shown]
    command += ["--max-examples", str(examples), "--workers", "1", "--no-color", "--continue-on-failure"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert "Stateful" in done.stdout  # all four phases: examples, coverage, fuzzing, stateful
