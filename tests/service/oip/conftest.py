"""A live server with shipped models, in a thread of this process: a static one, a filter, and the exact stand-in."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).parents[3]
MODELS = ("mnist-iterative", "jsb-filter")


class LiveServer:
    """uvicorn with the command line's protocol settings, on a port of its own."""

    def __init__(self, settings: Settings):
        self.app = create_app(settings)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.address, self.url = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, http="httptools", access_log=False, log_config=None, server_header=False))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()
        until = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server is not ready after 60 s"
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self.socket.close()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    repository = tmp_path_factory.mktemp("oip")
    for name in MODELS:
        shutil.copytree(ROOT / "checkpoints" / name / "1", repository / name / "1")
    settings = Settings(
        repository=repository,
        engine="onnx",
        engine_process="off",  # tests reach into the engine
        closed_form=True,
        threads=1,
        drain_s=1.0,
        max_body_bytes=2**20,
        max_sequences=4,
    )
    server = LiveServer(settings)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """(4, 784) binarised digits."""
    with np.load(ROOT / "tests/data/mnist_sample.npz") as sample:
        pixels = sample["valid"].reshape(-1, 784)[:4]
    return (np.random.default_rng(0).random(pixels.shape) < pixels / 255).astype(np.float32)


@pytest.fixture(scope="session")
def chorale() -> np.ndarray:
    """(12, 88) frames of a piano roll: four voices that move."""
    frames = np.zeros((12, 88), np.float32)
    for time_, frame in enumerate(frames):
        frame[[24 + time_ % 3, 36, 40 + time_ % 2, 47]] = 1
    return frames
