"""How many speech streams two cores carry in real time, what a stream weighs, and a frame beside eager PyTorch.

    python benchmarks/streams.py [--artifact REPOSITORY/NAME/VERSION] [--limit-ms 100] [--seconds 10]

The package must be installed with its `train` extra. Without --artifact the run `speech-large` (2.0 M weights, VRNN with one
refinement per frame) is trained for --train seconds on speech16k, exported by the project's own commands and kept under runs/streams.

1. A server process (`elbow-serve run`, its defaults) and a load generator, one asyncio process, share the machine. Every
   stream sends 16 kHz PCM of real speech, 80 frames a second in 100 ms messages, out of phase with the others, and gets ELBO and
   surprise of every frame. Lag: from the send of a message to the receipt of its last frame's result; messages of the first
   second are not counted. The number of streams is doubled, then bisected, while the 99th percentile stays below the limit.
2. Memory of a stream: resident size of the server with 200 streams less that without, over 200.
3. One frame at batch 1: the engine's fused program, the same through TorchScript, and the model in eager PyTorch, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _report import artifact_name, keep, table
from _served import resident_mb
from _timing import time_in_turn

from models.artifact import Artifact
from training.data.sequence_catalogue import load_sequences

RATE, FRAME, MESSAGE = 16_000, 200, 1600
"""Samples: a second, a frame, a message."""
WARM_UP_S = 1.0
MEMORY_STREAMS = 200


def speech(data: str | None) -> bytes:
    """Half a minute of real speech, 16-bit PCM."""
    x = load_sequences("speech16k", data).valid.joined.reshape(-1)[: 30 * RATE]
    return (np.clip(x, -1, 1) * 32767).astype("<i2").tobytes()


class Caller(asyncio.Protocol):
    """One stream's side of a WebSocket, with as little Python as will do: the generator shares the server's cores.

    Client frames must be masked; a mask of zeros leaves the payload as it is.
    """

    def __init__(self, path: str, pcm: bytes):
        step = 2 * MESSAGE
        self._messages = [_frame(0x82, pcm[at : at + step]) for at in range(0, len(pcm) - step, step)]
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._buffer, self._upgraded = b"", False
        self.sent: list[float] = []
        self.answered: list[float] = []
        loop = asyncio.get_running_loop()
        self._now, self.opened, self.closed = loop.time, loop.create_future(), loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request.encode())

    def data_received(self, data: bytes) -> None:
        now, buffer, at = self._now(), self._buffer + data, 0
        if not self._upgraded:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = buffer
                return
            if b" 101 " not in buffer[:end]:
                raise RuntimeError(f"refused: {buffer!r}")
            self._upgraded, at = True, end + 4
        while len(buffer) - at >= 4:
            size, head = buffer[at + 1], 2
            if size == 126:
                size, head = int.from_bytes(buffer[at + 2 : at + 4]), 4
            elif size == 127:
                size, head = int.from_bytes(buffer[at + 2 : at + 10]), 10
            if len(buffer) - at < head + size:
                break
            said = buffer[at + head : at + head + 17]
            if said == b'{"type":"results"':
                self.answered.append(now)
            elif said[:16] == b'{"type":"opened"':
                self.opened.set_result(None)
            elif said[:15] == b'{"type":"error"':
                raise RuntimeError(buffer[at + head : at + head + size].decode())
            at += head + size
        self._buffer = buffer[at:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    async def speak(self, offset: float, until: float) -> None:
        """Sends in real time until then, and closes when everything was answered."""
        await self.opened
        begin = self._now() + offset
        while self._now() < until:
            await asyncio.sleep(max(0.0, begin + len(self.sent) * MESSAGE / RATE - self._now()))
            self.transport.write(self._messages[len(self.sent) % len(self._messages)])
            self.sent.append(self._now())
        self.transport.write(_frame(0x81, b'{"type":"close"}'))
        await self.closed


def _frame(kind: int, payload: bytes) -> bytes:
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2)
    return bytes([kind]) + length + bytes(4) + payload


async def load(port: int, name: str, streams: int, seconds: float, pcm: bytes, on_top: Any = None) -> tuple[float, float, int]:
    """99th percentile and median of the lag in ms, and frames answered."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.005 * streams + WARM_UP_S + seconds
    callers, tasks = [], []
    for i in range(streams):
        path = f"/v1/models/{name}/filter?encoding=pcm_s16le&sample_rate={RATE}&seed={i}"
        _, caller = await loop.create_connection(partial(Caller, path, pcm[2 * FRAME * (i % 50) :]), "127.0.0.1", port)
        callers.append(caller)
        tasks.append(asyncio.create_task(caller.speak((i % 97) / 970, until)))
        await asyncio.sleep(0.005)
    if on_top is not None:
        await asyncio.sleep(seconds / 2)
        on_top()
    await asyncio.gather(*tasks)
    for caller in callers:
        if len(caller.answered) != len(caller.sent):
            raise RuntimeError(f"{len(caller.sent)} messages sent, {len(caller.answered)} answered")
    pairs = [(a, b) for caller in callers for a, b in zip(caller.sent, caller.answered, strict=True)]
    lags = [b - a for a, b in pairs if until - seconds <= a < until]
    return float(np.percentile(lags, 99)) * 1e3, float(np.median(lags)) * 1e3, len(pairs) * MESSAGE // FRAME


@contextmanager
def server(repository: Path) -> Any:
    """(port, process) of a fresh server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "ELBOW_REPOSITORY": str(repository), "ELBOW_PORT": str(port), "ELBOW_LOG_LEVEL": "error"}
    environment["ELBOW_TOKEN_SECRET"] = "benchmark"
    environment["ELBOW_MAX_STREAMS"] = "2048"
    process = subprocess.Popen([sys.executable, "-m", "service", "run"], env=environment)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def largest(repository: Path, name: str, limit_ms: float, seconds: float, pcm: bytes) -> tuple[int, list[dict[str, float]]]:
    """The largest number of streams within the limit, and every number tried."""
    tried: list[dict[str, float]] = []

    def fits(streams: int) -> bool:
        with server(repository) as (port, _):
            p99, median, frames = asyncio.run(load(port, name, streams, seconds, pcm))
        tried.append({"streams": streams, "p99_ms": p99, "median_ms": median, "frames": frames})
        print(f"  {streams} streams: p99 {p99:.1f} ms, median {median:.1f} ms", flush=True)
        return p99 < limit_ms

    low, high = 0, 100
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(10, low // 20):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, tried


def memory_kb(repository: Path, name: str, pcm: bytes) -> float:
    with server(repository) as (port, process):
        asyncio.run(load(port, name, 1, 1.0, pcm))  # what the first stream ever allocates is not a stream's
        before, seen = 1024 * resident_mb(process.pid), []
        asyncio.run(load(port, name, MEMORY_STREAMS, 4.0, pcm, lambda: seen.append(1024 * resident_mb(process.pid))))
    return (seen[0] - before) / MEMORY_STREAMS


def frame_times(path: Path) -> dict[str, float]:
    """µs of one frame at batch 1."""
    import torch

    from models.filtering import filter_frame
    from service.engine.onnx import OnnxEngine
    from service.engine.torchscript import TorchScriptEngine
    from training.checkpoint import load_filter

    torch.set_num_threads(1)
    artifact = Artifact.open(path)
    card = artifact.card
    inputs, _ = artifact.reference()["frame_K"]
    one = {name: value[-1:] for name, value in inputs.items()}
    engines = {"onnx": OnnxEngine(artifact, threads=1), "torchscript": TorchScriptEngine(artifact, threads=1)}
    calls = {name: (lambda engine=engine: engine.run("frame_K", one)) for name, engine in engines.items()}
    model, _, _ = load_filter(path)
    tensors = {name: torch.from_numpy(value) for name, value in one.items()}
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}

    def eager() -> object:
        with torch.no_grad():
            steps = [(tensors["noise0"][:, k],) for k in range(card.trained_steps)]
            return filter_frame(model.generative, model.inference, state, tensors["x"], tensors["mask"], steps, (tensors["noise_advance"],))

    return time_in_turn({**calls, "eager": eager}, 5.0)


def trained(folder: Path, seconds: float, data: str | None) -> Path:
    """The benchmark's own model: trained and exported once."""
    target = folder / "repository" / "speech-large" / "1"
    if not target.exists():
        from training.__main__ import main

        extra = ["--data", data] if data else []
        run = str(folder / "run")
        if main(["train", "speech-large", "--seconds", str(seconds), "--output", run, "--threads", "1", *extra]):
            raise SystemExit("training failed")
        if main(["export", run, "--to", str(folder / "repository"), "--name", "speech-large", "--rows", "2000", *extra]):
            raise SystemExit("export failed")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--limit-ms", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--train", type=float, default=60.0)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "streams")
    parser.add_argument("--data", help="folder of data sets (default: as elbow-train finds them)")
    args = parser.parse_args()
    path = args.artifact or trained(args.runs, args.train, args.data)
    artifact, pcm = Artifact.open(path), speech(args.data)
    name = artifact.card.name
    weights = sum(int(np.prod(value.shape)) for value in artifact.weights().values())
    with tempfile.TemporaryDirectory() as folder:  # a repository with this model alone
        (Path(folder) / name).mkdir()
        (Path(folder) / name / artifact.card.version).symlink_to(path.resolve())
        times = frame_times(path)
        streams, tried = largest(Path(folder), name, args.limit_ms, args.seconds, pcm)
        kb = memory_kb(Path(folder), name, pcm)
    rows = [[row["streams"], row["p99_ms"], row["median_ms"]] for row in sorted(tried, key=lambda row: row["streams"])]
    print(
        f"{name}, {weights / 1e6:.2f} M weights, {artifact.card.trained_steps} refinement per frame, load generator on the same two cores"
    )
    print(table(("streams", "p99 ms", "median ms"), rows))
    print(f"most streams with p99 < {args.limit_ms:.0f} ms: {streams}; resident per stream: {kb:.1f} KB")
    print(table(("one frame, batch 1", "µs", "/ eager"), [[n, t, t / times["eager"]] for n, t in times.items()]))
    found = {
        "artifact": artifact_name(path),
        "weights": weights,
        "streams": streams,
        "tried": tried,
        "kb_per_stream": kb,
        "frame_us": times,
    }
    print(f"kept in {keep('streams', {**found, 'limit_ms': args.limit_ms, 'seconds': args.seconds})}")


if __name__ == "__main__":
    main()
