"""A server process over a repository that tests may change while it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.streams.conftest import ServerProcess, free_port, repository

__all__ = ["repository"]


@pytest.fixture
def folder(tiny_repository: Path, repository: Path, tmp_path: Path) -> Path:
    """A repository with iterative/1 (20 numbers a row) and tiny-speech/1, to be changed at will."""
    shutil.copytree(tiny_repository / "iterative" / "1", tmp_path / "served" / "iterative" / "1")
    shutil.copytree(repository / "tiny-speech" / "1", tmp_path / "served" / "tiny-speech" / "1")
    return tmp_path / "served"


def add_version(folder: Path, name: str, version: str) -> Path:
    """The same weights as version 1, as another version: its card, and so its hash, differ."""
    made = folder / name / version
    shutil.copytree(folder / name / "1", folder / name / f".{version}")
    card = folder / name / f".{version}" / "artifact.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"version": version}))
    (folder / name / f".{version}").rename(made)
    return made


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., ServerProcess]]:
    """start(**environment): a server of `folder`."""
    servers: list[ServerProcess] = []

    def start(**environment: str) -> ServerProcess:
        servers.append(ServerProcess(folder, free_port(), **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
