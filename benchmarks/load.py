"""Elbow under load beside the servers a team would else take: one run on one machine with its load generator.

    benchmarks/peers/install.sh runs/peers                      # once: an environment per peer
    python benchmarks/load.py --search [--only PEER ...]        # tries each peer's batching settings, keeps the best
    python benchmarks/load.py [--peers runs/peers] [--seconds 8] [--rounds 3] [--only elbow PEER ...]

`wrk -t1 -c32` (https://github.com/wg/wrk, in Debian) sends one-row requests made of binarised MNIST digits for 1, 1, 2, 2, 4, 4, 8
and 16 steps of the shipped model, in turn; everyone returns mu, log_sigma and the ELBO after the last step, as JSON, from the same
ONNX programs in ONNX Runtime with one thread per operator. Each round starts every server anew and alone; one
second of load before counts for nothing. Figures are medians over rounds; errors are counted and should be 0.

Last, Elbow with one client that wants 8 steps, beside the engine's own time for them (init, 8 steps, score at batch 1) in the same
round: the difference is what scheduler and surface add.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _report import RESULTS, artifact_name, keep, table
from _servers import HERE, Contender, Settings, contenders, running

from models.artifact import Artifact
from service.engine.onnx import OnnxEngine
from training.data.catalogue import load

BUDGETS, CLIENTS, THREADS = (1, 1, 2, 2, 4, 4, 8, 16), 32, 1
REQUESTS, WARM_UP_S, SEARCH_S, ALONE_S, ALONE_STEPS = 512, 1.0, 3.0, 3.0, 8
Figures = dict[str, float]


def digits(data: str | None) -> list[list[int]]:
    """Validation digits, each pixel drawn once with its grey value as probability."""
    grey = load("mnist", data).valid.reshape(-1, 784)[:REQUESTS]
    return (np.random.default_rng(0).random(grey.shape) < grey / 255.0).astype(int).tolist()


def check(contender: Contender, port: int, x: list[list[int]]) -> float:
    """Mean ELBO of some digits after 4 steps: a server that computes something else must not be timed.

    Raises:
        RuntimeError: the reply lacks something.
    """
    elbos = []
    for seed, row in enumerate(x[:32]):
        mu, log_sigma, elbo = contender.ask(port, row, 4, seed)
        if len(mu) != len(log_sigma) or not np.isfinite([*mu, *log_sigma, elbo]).all():
            raise RuntimeError(f"{contender.name}: not a posterior: {mu}, {log_sigma}, {elbo}")
        elbos.append(elbo)
    return statistics.fmean(elbos)


def generate(port: int, requests: Path, clients: int, seconds: float) -> Figures:
    """Runs wrk and returns what load.lua prints."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "10s"]
    command += ["-s", str(HERE / "load.lua"), f"http://127.0.0.1:{port}", "--", str(requests)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: Figures = json.loads(printed.strip().splitlines()[-1])
    return figures | {"requests_per_s": (figures["requests"] - figures["refused"]) / figures["seconds"]}


class Bench:
    """The parts that every measurement needs."""

    def __init__(self, artifact: Path, peers: Path, data: str | None, folder: Path):
        self.artifact, self.peers, self._folder = artifact, peers, folder
        self.x = digits(data)

    def measure(self, contender: Contender, settings: Settings, seconds: float) -> tuple[Figures, Figures | None]:
        """A server started anew under load; for Elbow also one client alone. A port that a client of the last server still holds may be
        one that this server wants for itself: it gets two more tries."""
        for _ in range(2):
            try:
                return self._measure(contender, settings, seconds)
            except RuntimeError as exc:
                print(f"{contender.name}: once more, after {str(exc)[:100]}", file=sys.stderr)
        return self._measure(contender, settings, seconds)

    def _measure(self, contender: Contender, settings: Settings, seconds: float) -> tuple[Figures, Figures | None]:
        port = _free_port()
        with running(contender, self.artifact, self.peers, port, settings, THREADS):
            elbo = check(contender, port, self.x)
            mixed = self._requests(contender, BUDGETS)
            generate(port, mixed, CLIENTS, WARM_UP_S)
            figures = generate(port, mixed, CLIENTS, seconds) | {"elbo_4_steps": elbo}
            if contender.name != "elbow":
                return figures, None
            alone = self._requests(contender, (ALONE_STEPS,))
            before = self._engine_ms()
            one = generate(port, alone, 1, ALONE_S)
            engine = statistics.fmean((before, self._engine_ms()))
        return figures, {"p50_ms": one["p50_ms"], "engine_ms": engine, "overhead_ms": one["p50_ms"] - engine}

    def _requests(self, contender: Contender, budgets: tuple[int, ...]) -> Path:
        file = self._folder / f"{contender.name}-{len(budgets)}"
        requests = (contender.request(row, budgets[i % len(budgets)], i) for i, row in enumerate(self.x))
        file.write_bytes(b"".join(b"%d\n%b\n" % (len(request), request) for request in requests))
        return file

    def _engine_ms(self) -> float:
        """The engine's own time for one row: init, 8 steps and score, median of many calls."""
        artifact = Artifact.open(self.artifact)
        engine, reference = OnnxEngine(artifact, threads=THREADS), artifact.reference()
        total = 0.0
        for program, times in (("init", 1), ("step", ALONE_STEPS), ("score", 1)):
            wanted = {tensor.name: tensor.dtype for tensor in artifact.card.programs[program].inputs}
            arrays = {name: reference[program][0][name][:1].astype(dtype) for name, dtype in wanted.items()}
            seconds = []
            for _ in range(200):
                started = time.perf_counter()
                engine.run(program, arrays)
                seconds.append(time.perf_counter() - started)
            total += times * statistics.median(seconds)
        return 1e3 * total


def search(bench: Bench, chosen: list[Contender]) -> None:
    """Tries every setting of each peer for some seconds and keeps the one with the highest throughput."""
    file = RESULTS / "load-search.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rows = []
    for contender in chosen:
        tried: list[dict[str, Any]] = [{"settings": s, **_tried(bench, contender, s)} for s in contender.settings]
        best = max(tried, key=lambda one: one["requests_per_s"])
        kept[contender.name] = {"best": best["settings"], "tried": tried}
        rows += [[contender.name, _say(t["settings"]), t["requests_per_s"], t["p50_ms"], t["p99_ms"], t is best] for t in tried]
    print(table(("server", "settings", "requests/s", "p50 ms", "p99 ms", "best"), rows))
    print(f"kept in {keep('load-search', {name: kept[name] for name in kept if isinstance(kept[name], dict) and 'best' in kept[name]})}")


def _tried(bench: Bench, contender: Contender, settings: Settings) -> Figures:
    """Nothing at all for a setting with which the server does not start."""
    try:
        return bench.measure(contender, settings, SEARCH_S)[0]
    except RuntimeError as exc:
        print(exc, file=sys.stderr)
        return {"requests_per_s": 0.0, "p50_ms": 0.0, "p99_ms": 0.0}


def compare(bench: Bench, chosen: list[Contender], seconds: float, rounds: int) -> None:
    file = RESULTS / "load-search.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    settings = {c.name: found[c.name]["best"] if c.name in found else c.settings[0] for c in chosen}
    measured: dict[str, list[Figures]] = {contender.name: [] for contender in chosen}
    alone: list[Figures] = []
    for _ in range(rounds):
        for contender in chosen:
            figures, one = bench.measure(contender, settings[contender.name], seconds)
            measured[contender.name].append(figures)
            print(
                f"{contender.name}: {figures['requests_per_s']:.0f} requests/s, p99 {figures['p99_ms']:.0f} ms", file=sys.stderr, flush=True
            )
            alone += [one] if one else []
    medians = {name: _medians(figures) for name, figures in measured.items()}
    columns = ("requests_per_s", "p50_ms", "p99_ms", "max_ms", "elbo_4_steps", "refused", "broken")
    print(table(("server", *columns, "settings"), [[n, *(m[c] for c in columns), _say(settings[n])] for n, m in medians.items()]))
    results: dict[str, Any] = {"artifact": artifact_name(bench.artifact), "budgets": BUDGETS, "clients": CLIENTS, "seconds": seconds}
    results |= {"settings": settings, "medians": medians, "rounds": measured}
    peers = {name: median for name, median in medians.items() if name != "elbow"}
    if "elbow" in medians and peers:
        best = max(peers, key=lambda name: peers[name]["requests_per_s"])
        ratio = {figure: medians["elbow"][figure] / peers[best][figure] for figure in ("requests_per_s", "p99_ms")}
        results |= {"best_peer": best, "against_best_peer": ratio}
        print(f"elbow / {best}: {ratio['requests_per_s']:.2f} x its requests/s, {ratio['p99_ms']:.2f} x its p99")
    if alone:
        one = _medians(alone)
        results["alone"] = {"median": one, "rounds": alone}
        print(f"one client, {ALONE_STEPS} steps: {one['p50_ms']:.2f} ms, the engine alone {one['engine_ms']:.2f} ms:"
              f" {one['overhead_ms']:.2f} ms more")  # fmt: skip
    print(f"kept in {keep('load', results)}")


def _medians(figures: list[Figures]) -> Figures:
    return {name: statistics.median(one[name] for one in figures) for name in figures[0]}


def _say(settings: Settings) -> str:
    return " ".join(f"{name}={value:g}" for name, value in settings.items()) or "defaults"


def _free_port() -> int:
    """A port whose two successors are most likely free too: some peers want three."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=HERE.parent / "checkpoints" / "mnist-iterative" / "1")
    parser.add_argument("--peers", type=Path, default=HERE.parent / "runs" / "peers", help="folder of the peers' environments")
    parser.add_argument("--data", help="folder with MNIST; default ELBOW_DATA")
    parser.add_argument("--seconds", type=float, default=8.0, help="of load per server and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="SERVER", help="elbow, litserve, pytriton, mlserver, bentoml, ray")
    parser.add_argument("--search", action="store_true", help="search the peers' settings instead")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("load.py needs wrk: apt-get install wrk")
    every = contenders(args.artifact.resolve().parts[-2])
    chosen = [contender for contender in every if not args.only or contender.name in args.only]
    missing = [c.name for c in chosen if c.name != "elbow" and not (args.peers / c.name / "bin" / "python").exists()]
    if missing:
        print(f"not installed under {args.peers}, left out: {', '.join(missing)} (benchmarks/peers/install.sh)", file=sys.stderr)
    chosen = [contender for contender in chosen if contender.name not in missing]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.artifact.resolve(), args.peers, args.data, Path(folder))
        if args.search:
            search(bench, [contender for contender in chosen if contender.name != "elbow"])
        else:
            compare(bench, chosen, args.seconds, args.rounds)


if __name__ == "__main__":
    main()
