"""A Docker engine with Elbow's image on it, where there is one."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Docker = Callable[..., str]


@pytest.fixture(scope="session")
def docker() -> Docker:
    """docker("ps", "-a"): what the command prints; an error shows what it said."""
    if shutil.which("docker") is None or subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs a Docker engine (`docker version` finds none)")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(["docker", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, f"docker {' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def cpu_image(docker: Docker) -> str:
    """The default target, built from the working tree."""
    docker("build", "--network", "host", "--tag", "elbow-test:cpu", ".")
    return "elbow-test:cpu"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
