"""The cpu image and the compose file on a real Docker engine: `pytest -m docker tests/deploy/test_docker.py`.

Host networking, so that the tests also run on an engine without a bridge. The GPU image is docs/deploy.md's: it takes gigabytes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
Docker = Callable[..., str]
MOST_ADDED_BYTES = 200e6
MOST_START_S = 5.0
READ_ONLY = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "host")
SHIPPED = {"jsb-filter/1", "mnist-direct/1", "mnist-iterative/1", "speech-filter/1"}


@pytest.fixture
def container(docker: Docker, cpu_image: str, free_port: int) -> Iterator[tuple[str, str]]:
    """(name, url) of the image running with a read-only root and no capability at all; ready."""
    name = f"elbow-test-{uuid.uuid4().hex[:8]}"
    docker("run", "--detach", "--name", name, *READ_ONLY, "--env", f"ELBOW_PORT={free_port}", cpu_image)
    try:
        until_ready(f"http://127.0.0.1:{free_port}")
        yield name, f"http://127.0.0.1:{free_port}"
    finally:
        docker("rm", "--force", name)


def test_the_image_adds_at_most_200_megabytes_to_its_base(docker: Docker, cpu_image: str) -> None:
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    size, base_size = (int(docker("image", "inspect", "--format", "{{.Size}}", image)) for image in (cpu_image, base))
    assert size - base_size <= MOST_ADDED_BYTES


def test_the_image_has_neither_torch_nor_pip_nor_the_training_code(docker: Docker, cpu_image: str) -> None:
    code = "import importlib.util as u; print([name for name in ('torch', 'pip', 'training') if u.find_spec(name)])"
    assert docker("run", "--rm", "--network", "none", "--entrypoint", "python", cpu_image, "-c", code) == "[]"


def test_the_configuration_of_the_image(docker: Docker, cpu_image: str) -> None:
    config = json.loads(docker("image", "inspect", "--format", "{{json .Config}}", cpu_image))
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["elbow-serve"]
    assert "ORT_DISABLE_TELEMETRY=1" in config["Env"]
    assert config["Healthcheck"]["Test"][0] == "CMD"


def test_it_serves_within_five_seconds(docker: Docker, cpu_image: str, free_port: int) -> None:
    """The best of three starts: what the image needs, not what else this machine does."""
    name, times = f"elbow-test-{uuid.uuid4().hex[:8]}", []
    for _ in range(3):
        started = time.monotonic()
        docker("run", "--detach", "--name", name, *READ_ONLY, "--env", f"ELBOW_PORT={free_port}", cpu_image)
        try:
            until_ready(f"http://127.0.0.1:{free_port}")
            times.append(time.monotonic() - started)
        finally:
            docker("rm", "--force", name)
    assert min(times) < MOST_START_S


def test_it_answers_with_a_read_only_root_and_no_capability(docker: Docker, container: tuple[str, str]) -> None:
    name, url = container
    assert set(httpx.get(f"{url}/readyz").json()["models"]) == SHIPPED
    assert_answers(url)
    assert docker("exec", name, "python", "-c", "import os; print(os.getuid(), os.getgid())") == "10001 10001"
    assert docker("diff", name) == ""
    assert '"ready":true' in docker("exec", name, "python", "/opt/health.py")


def test_every_shipped_artifact_passes_its_parity_inside(docker: Docker, container: tuple[str, str]) -> None:
    name, _ = container
    for model in SHIPPED:
        assert "largest error" in docker("exec", name, "elbow-serve", "check", f"/models/{model}")


def test_sigterm_ends_it_cleanly(docker: Docker, container: tuple[str, str]) -> None:
    name, _ = container
    docker("stop", "--time", "30", name)
    state = json.loads(docker("inspect", "--format", "{{json .State}}", name))
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    assert "Finished server process" in subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True).stderr


def test_mounted_models_take_the_place_of_the_shipped_ones(docker: Docker, cpu_image: str, free_port: int) -> None:
    name = f"elbow-test-{uuid.uuid4().hex[:8]}"
    mount = f"{ROOT}/checkpoints/mnist-direct:/models/mnist-direct:ro"
    setting = ("--env", f"ELBOW_PORT={free_port}", "--tmpfs", "/models", "--volume", mount)
    docker("run", "--detach", "--name", name, *READ_ONLY, *setting, cpu_image)
    try:
        until_ready(f"http://127.0.0.1:{free_port}")
        assert httpx.get(f"http://127.0.0.1:{free_port}/readyz").json()["models"] == ["mnist-direct/1"]
    finally:
        docker("rm", "--force", name)


def test_compose_comes_up_healthy_and_answers(docker: Docker, cpu_image: str, free_port: int, tmp_path: Path) -> None:
    """docker-compose.yml as it is, but on the host's network and on a port of its own."""
    compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if subprocess.run([*compose, "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs docker-compose or the compose plugin")
    file: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = file["services"]["elbow"]
    del service["ports"]
    service |= {"network_mode": "host", "image": cpu_image, "build": {**service["build"], "context": str(ROOT), "network": "host"}}
    service["environment"] = {**service["environment"], "ELBOW_PORT": str(free_port)}
    (tmp_path / "docker-compose.yml").write_text(yaml.safe_dump(file))
    command = [*compose, "--project-name", f"elbow-test-{uuid.uuid4().hex[:8]}", "--file", str(tmp_path / "docker-compose.yml")]
    try:
        subprocess.run([*command, "up", "--detach", "--build", "elbow"], check=True, capture_output=True)
        name = subprocess.run([*command, "ps", "--quiet", "elbow"], check=True, capture_output=True, text=True).stdout.strip()
        until = time.monotonic() + 60
        while (health := docker("inspect", "--format", "{{.State.Health.Status}}", name)) != "healthy":
            assert time.monotonic() < until, f"{health}: {docker('logs', name)}"
            time.sleep(0.5)
        assert_answers(f"http://127.0.0.1:{free_port}")
        config = json.loads(docker("inspect", "--format", "{{json .HostConfig}}", name))
        assert (config["ReadonlyRootfs"], config["CapDrop"]) == (True, ["ALL"])
    finally:
        subprocess.run([*command, "down", "--volumes"], check=True, capture_output=True)


def until_ready(url: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, f"{url} is not ready after 60 s"
        time.sleep(0.05)


def assert_answers(url: str) -> None:
    """A real digit through the shipped model: eight steps are worth more than none."""
    digit = (np.load(ROOT / "tests/data/mnist_sample.npz")["valid"][0].ravel() / 255).tolist()
    body = {"inputs": [digit], "steps": 8, "return": ["elbo", "trace"]}
    (row,) = httpx.post(f"{url}/v1/models/mnist-iterative/encode", json=body, timeout=30).raise_for_status().json()["results"]
    assert row["steps_used"] == 8
    assert row["elbo"] > row["trace"][0]
