"""Elbow and its peers as load.py sees them: how each is started, with which settings, asked with which bytes, and how it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START_S = 90.0
Settings = Mapping[str, float]
Answer = tuple[list[float], list[float], float]
"""mu, log_sigma and the ELBO of one row."""


@dataclass(frozen=True)
class Contender:
    """One server.

    Attributes:
        path: what is posted to; ready: what answers 200 once it serves.
        body: (x, steps, seed) -> JSON; answer: JSON of the reply -> Answer.
        settings: what --search tries; the first is the default.
    """

    name: str
    path: str
    ready: str
    body: Callable[[list[int], int, int], Any]
    answer: Callable[[Any], Answer]
    settings: Sequence[Settings]

    def request(self, x: list[int], steps: int, seed: int) -> bytes:
        """A whole HTTP request."""
        body = json.dumps(self.body(x, steps, seed), separators=(",", ":")).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def ask(self, port: int, x: list[int], steps: int, seed: int) -> Answer:
        body = json.dumps(self.body(x, steps, seed)).encode()
        url = f"http://127.0.0.1:{port}{self.path}"
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return self.answer(json.load(reply))


def _v2_body(x: list[int], steps: int, seed: int) -> Any:
    inputs = (("x", "FP32", x), ("steps", "INT32", [steps]))
    return {"inputs": [{"name": name, "shape": [1, len(data)], "datatype": kind, "data": data} for name, kind, data in inputs]}


def _v2_answer(reply: Any) -> Answer:
    mu, log_sigma, (elbo,) = (next(o["data"] for o in reply["outputs"] if o["name"] == name) for name in ("mu", "log_sigma", "elbo"))
    return mu, log_sigma, elbo


def _bento_answer(reply: Any) -> Answer:
    (row,) = reply
    size = len(row) // 2
    return row[:size], row[size : 2 * size], row[-1]


def _elbow_answer(reply: Any) -> Answer:
    (row,) = reply["results"]
    (level,) = row["posterior"]["levels"]
    return level["mu"], level["log_sigma"], row["elbo"]


def _plain_body(x: list[int], steps: int, seed: int) -> Any:
    return {"inputs": [x], "steps": steps}


def _plain_answer(reply: Any) -> Answer:
    return reply["mu"], reply["log_sigma"], reply["elbo"]


def _grid(windows_ms: tuple[float, float, float], one: int = 1) -> list[Settings]:
    """One worker (`one`: how the peer says that) with room for every client, then smaller batches, then a worker per core."""
    usual, short, long = windows_ms
    alone = [(one, 32, usual), (one, 32, short), (one, 32, long), (one, 16, usual)]
    return [{"workers": w, "batch": b, "window-ms": ms} for w, b, ms in (*alone, (2, 16, usual), (2, 16, short))]


def contenders(model: str) -> list[Contender]:
    """Elbow first. `model`: its name there."""
    plain = (_plain_body, _plain_answer)
    return [
        Contender(
            "elbow",
            f"/v1/models/{model}/encode",
            "/readyz",
            lambda x, steps, seed: {"inputs": [x], "steps": steps, "seed": seed},
            _elbow_answer,
            [{}],
        ),
        Contender("litserve", "/encode", "/health", *plain, _grid((5, 1, 15))),
        Contender("pytriton", "/v2/models/encode/infer", "/v2/models/encode/ready", _v2_body, _v2_answer, _grid((2, 0, 10))),
        Contender("mlserver", "/v2/models/encode/infer", "/v2/models/encode/ready", _v2_body, _v2_answer, _grid((5, 1, 20), one=0)),
        Contender(
            "bentoml",
            "/encode",
            "/readyz",
            lambda x, steps, seed: {"inputs": [[*x, steps]]},
            _bento_answer,
            _grid((200, 50, 1000)),
        ),
        Contender("ray", "/encode", "/-/healthz", *plain, _grid((5, 1, 15))),
    ]


@contextmanager
def running(contender: Contender, artifact: Path, peers: Path, port: int, settings: Settings, threads: int) -> Iterator[None]:
    """The server as a process group of its own, ready; gone afterwards, with everything it started.

    Raises:
        RuntimeError: it did not become ready, with the end of what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ELBOW_")} | {"ORT_DISABLE_TELEMETRY": "1"}
    if contender.name == "elbow":
        command = [sys.executable, "-m", "service", "run"]
        environment |= {"ELBOW_PORT": str(port), "ELBOW_REPOSITORY": str(artifact.parents[1]), "PYTHONPATH": str(HERE.parent)}
        environment |= {f"ELBOW_{name.upper()}": str(value) for name, value in settings.items()}
    else:
        python = (peers / contender.name / "bin" / "python").absolute()
        options = {"artifact": artifact.absolute(), "port": port, "threads": threads, **settings}
        script = str(HERE / "peers" / f"with_{contender.name}.py")
        command = [str(python), script, *(f"--{option}={value}" for option, value in options.items())]
        environment["PATH"] = f"{python.parent}:{environment.get('PATH', '')}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, cwd=HERE.parent, stdout=log, stderr=log, start_new_session=True)
        try:
            if not _ready(server, f"http://127.0.0.1:{port}{contender.ready}"):
                log.seek(0)
                raise RuntimeError(f"{contender.name} did not start with {dict(settings)}:\n{log.read()[-2000:].decode(errors='replace')}")
            yield
        finally:
            _end(server)


def _ready(server: subprocess.Popen[bytes], url: str) -> bool:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """Asks the server to end, which ends what it started (some leave shared memory behind otherwise); then makes all of it."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(15.0)
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    server.wait()
    time.sleep(0.5)
