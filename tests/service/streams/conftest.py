"""A tiny speech filter, untrained but real: a VRNN with two refinements per frame, exported by the project's own exporter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact import Artifact
from tests.made_once import made_once

FRAME, RATE, STEPS = 40, 8000, 2


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<repository>/tiny-speech/1: frames of 40 samples at 8 kHz."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    return made_once(tmp_path_factory, "tiny-speech", export_tiny_speech) / "repository"


def export_tiny_speech(folder: Path) -> None:
    import torch

    from models.architecture import FilterArchitecture, IterativeArchitecture, VRNNArchitecture
    from models.catalogue import build_filter
    from training.checkpoint import save_weights
    from training.config import RefinementConfig
    from training.export import export
    from training.sequence_config import SequenceDataConfig, SequenceRunConfig

    sounds = folder / "sounds"
    sounds.mkdir()
    for seed in range(6):
        write_wav(sounds / f"{seed}.wav", sound(seed, 4000))
    net = IterativeArchitecture(("x", "q_layer_norm", "grad_layer_norm"), (16,), highway=True)
    architecture = FilterArchitecture(VRNNArchitecture(FRAME, 4, 12, "gru", (10,), (6,), (8,), (12,)), net)
    model = build_filter(architecture, seed=3)
    model.generative.set_statistics(torch.tensor(0.0), torch.tensor(0.1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.nn.init.normal_(model.inference.heads.weight, std=0.2)
    data = SequenceDataConfig(f"audio:{sounds}", frames=FRAME, frame_size=FRAME)
    run = SequenceRunConfig("tiny-speech", architecture, data, RefinementConfig(steps=STEPS))
    save_weights(folder / "run", model, run, {"epoch": 0})
    export(folder / "run", folder / "repository", "tiny-speech", "1", rows=24)


@pytest.fixture(scope="session")
def artifact(repository: Path) -> Artifact:
    return Artifact.open(repository / "tiny-speech" / "1")


def sound(seed: int, samples: int) -> NDArray[np.int16]:
    """Something like speech: a few harmonics that come and go, and noise."""
    generator = np.random.default_rng(seed)
    t = np.arange(samples) / RATE
    voiced = sum(np.sin(2 * np.pi * 110 * k * t + generator.uniform(0, 6)) / k for k in range(1, 6))
    envelope = np.abs(np.sin(2 * np.pi * 2.5 * t))
    return np.asarray(6000 * (0.3 * envelope * voiced + 0.02 * generator.standard_normal(samples)), np.int16)


def write_wav(file: Path, samples: NDArray[np.int16], rate: int = RATE) -> Path:
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class ServerProcess:
    """`elbow-serve run` on a port of its own; may be killed and started again."""

    def __init__(self, repository: Path, port: int, **environment: str):
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._environment = {
            **os.environ,
            "ELBOW_REPOSITORY": str(repository),
            "ELBOW_PORT": str(port),
            "ELBOW_TOKEN_SECRET": "secret of the tests",
            "ELBOW_ENGINE_PROCESS": "on",
            "ELBOW_LOG_LEVEL": "error",
            **environment,
        }
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "service", "run"], env=self._environment)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/readyz", timeout=1).read()
                return
            except OSError:
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.05)
        raise AssertionError("the server is not ready after 30 s")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture(scope="session")
def start_server(repository: Path) -> Iterator[Callable[..., ServerProcess]]:
    """start_server(**environment): a fresh server process."""
    servers: list[ServerProcess] = []

    def start(**environment: str) -> ServerProcess:
        servers.append(ServerProcess(repository, free_port(), **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """One server that tests share and leave alive."""
    return start_server()
