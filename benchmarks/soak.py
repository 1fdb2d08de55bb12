"""A million requests and two thousand streams with faults injected: the counts add up, memory and descriptors stay.

    python benchmarks/soak.py [--requests 1000000] [--cycles 2000] [--clients 16] [--fail-every 1000]

Faults, drawn by a fixed seed: bodies that are not JSON or do not fit, unknown models, wrong media types (4 %); clients that leave with a
request half or wholly sent (2 %); bodies whose second half never comes (one in 5,000: 408); streams dropped with frames under way, or
told that a frame does not fit; and an engine that raises on every 1,000th step and frame (_soak_server.py: nothing that ships can do this).

The soak runs in legs of 5 %. After each, nobody is connected, nothing is under way, and it is compared: statuses that clients of `encode`
saw with those that the server counted, to the last one; bodies that never came; problem codes, jobs and frames within what those
who left may have had. Memory and descriptors are taken there too.

A million requests should take about a quarter of an hour on two quiet cores (estimated from processor time: 1.0 and 1.2 ms for each of the
server's two busy threads, 0.14 ms of the clients, while six other processes shared the cores), several times as long on busy ones.

At the end:

    counts        every leg added up
    memory        resident set after the last leg within 2 % or 5 MB of that after the leg that ends at 10 %
    descriptors   as many open as then

Ctrl-C ends the leg where it stands; it counts as far as it went. The same command goes on: the state is under --state, and the server is
left running, because memory can only be judged within one process (it ends by itself after 15 idle minutes). If the soak itself
was killed, the leg under way is not counted, as nobody knows what its clients saw. If the server is gone, the counts go on with
another, the result says how often that happened, and memory is that of the last process, judged from its own 10 %.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from _report import keep
from _served import ROOT, Pool, descriptors, resident_mb
from _soak_load import Leg

FULL, LEGS, IDLE_S = 1_000_000, 20, 900
SETTLE_S = 1.5
_SAMPLE = re.compile(r"^(\w+?)(?:\{(.*)\})? ([-+.\deE]+)$", re.MULTILINE)
HELD = ("elbow_rows_in_flight", "elbow_streams_live", "elbow_scheduler_rows_waiting", "elbow_scheduler_rows_in_flight")


class State:
    """What is kept between runs: the legs that are done, and the server they ran on."""

    def __init__(self, folder: Path, requests: int, cycles: int, fail_every: int):
        self.folder, self.file, self._fail_every = folder, folder / "state.json", fail_every
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
        except OSError:
            raise SystemExit(f"another soak works in {folder}: its clients would be counted as ours") from None
        fresh: dict[str, Any] = {"requests": requests, "cycles": cycles, "legs": [], "server": None, "servers": 0}
        self.kept = json.loads(self.file.read_text()) if self.file.exists() else fresh
        if (self.kept["requests"], self.kept["cycles"]) != (requests, cycles):
            other = f"{self.kept['requests']} requests and {self.kept['cycles']} cycles"
            raise SystemExit(f"{self.file} is of a soak of {other}: remove it first")

    def save(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.kept, indent=1))
        partial.rename(self.file)

    def total(self, name: str) -> int:
        return sum(leg[name] for leg in self.kept["legs"])

    def server(self) -> tuple[int, int]:
        """(port, pid) of the server that the last run left, if it lives, else of a fresh one."""
        known = self.kept["server"]
        if known is not None and _is_ready(known["port"]) and Path(f"/proc/{known['pid']}").exists():
            return known["port"], known["pid"]
        port, pid = _start(self.folder, self._fail_every)
        self.kept |= {"server": {"port": port, "pid": pid}, "servers": self.kept["servers"] + 1}
        self.save()
        return port, pid


def _start(folder: Path, fail_every: int) -> tuple[int, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "ELBOW_REPOSITORY": str(ROOT / "checkpoints"),
        "ELBOW_PORT": str(port),
        "ELBOW_ENGINE": "onnx",
        "ELBOW_BODY_S": "2",
        "ELBOW_LOG_LEVEL": "error",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(Path(__file__).with_name("_soak_server.py")), str(fail_every), str(IDLE_S)]
    with (folder / "server.log").open("ab") as log:  # a session of its own: Ctrl-C is for the clients
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 120
    while not _is_ready(port):
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the server did not start: see {folder / 'server.log'}")
        time.sleep(0.1)
    return port, process.pid


def _is_ready(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def counted(port: int) -> Counter[str]:
    """The server's counters and gauges that must add up: `name{labels}` -> value."""
    pool = Pool(port)
    text = (await pool.get("/metrics")).decode()
    pool.close()
    wanted = ("elbow_requests_total", "elbow_refusals_total", "elbow_scheduler_jobs", "elbow_stream_frames_total", *HELD)
    return Counter({f"{name}{{{labels}}}": float(value) for name, labels, value in _SAMPLE.findall(text) if name.startswith(wanted)})


def disagreements(leg: dict[str, Any], before: Counter[str], after: Counter[str]) -> list[str]:
    """Where a leg's clients and the server differ."""
    wrong: list[str] = list(leg["odd"])
    grown = Counter({name: value - before[name] for name, value in after.items()})
    by_code: dict[str, Counter[str]] = {"encode": Counter(), "score": Counter()}
    for name, value in grown.items():
        labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
        if name.startswith("elbow_requests_total") and labels["endpoint"] in by_code:
            by_code[labels["endpoint"]][labels["code"]] += round(value)
    for endpoint, seen in (("encode", leg["seen"]), ("score", leg["slow"])):
        for status in sorted({*by_code[endpoint], *seen}):
            times = seen.get(status, 0)
            wrong += _outside(f"{endpoint} answered {status}", by_code[endpoint][status], times, times)
    if set(leg["slow"]) - {"408"}:
        wrong.append(f"bodies that never came were answered {leg['slow']}")
    wrong += [f"{times} streams: {end}" for end, times in leg["streams"].items() if end.startswith(("lost", "odd", "refused"))]
    gone = sum(leg["left"].values())
    unsure = gone + sum(leg["slow"].values()) + leg["cycles"]
    for code, seen in leg["codes"].items():
        wrong += _outside(f"refusals by {code}", grown[f'elbow_refusals_total{{reason="{code}"}}'], seen, seen + unsure)
    ok, failed = leg["seen"].get("200", 0), leg["codes"].get("backend_failure", 0)
    wrong += _outside("jobs done", _sum(grown, "elbow_scheduler_jobs_done_total"), ok, ok + gone)
    late = leg["codes"].get("deadline_exceeded", 0)
    wrong += _outside("jobs failed", _sum(grown, "elbow_scheduler_jobs_failed_total"), failed, failed + gone + late)
    wrong += _outside("jobs abandoned", _sum(grown, "elbow_scheduler_jobs_abandoned_total"), 0, gone)
    wrong += _outside("frames", _sum(grown, "elbow_stream_frames_total"), leg["frames"], leg["frames"] + leg["frames_sent"])
    wrong += [f"{name} is {value:g} when nothing is under way" for name, value in after.items() if name.startswith(HELD) and value]
    return wrong


def _sum(counts: Counter[str], name: str) -> float:
    return sum(value for key, value in counts.items() if key.startswith(f"{name}{{"))


def _outside(what: str, value: float, least: float, most: float) -> list[str]:
    return [] if least <= value <= most else [f"{what}: the server counted {value:g}, it should be {least:g} to {most:g}"]


def _show(done: int, of: int, leg: Leg) -> None:
    print(f"\r{done + leg.done:9d} of {of} {dict(leg.seen)}", end="", flush=True)


async def soak(state: State, clients: int) -> bool:
    """Runs legs until all is done, True, or until Ctrl-C."""
    kept, stop = state.kept, asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    port, pid = state.server()
    size, cycles = -(-kept["requests"] // LEGS), -(-kept["cycles"] // LEGS)
    await asyncio.sleep(SETTLE_S)  # whatever a killed soak left under way ends
    before = await counted(port)
    while not stop.is_set() and (state.total("done") < kept["requests"] or state.total("cycles") < kept["cycles"]):
        done, begun = state.total("done"), time.monotonic()
        todo = min(size, max(kept["requests"] - done, 64)), max(0, min(cycles, kept["cycles"] - state.total("cycles")))
        leg = Leg(port, *todo, clients, len(kept["legs"]), stop)
        await leg.run(partial(_show, done, kept["requests"]))
        await asyncio.sleep(SETTLE_S)
        after = await counted(port)
        found = leg.counts() | {"seconds": round(time.monotonic() - begun, 1), "odd": leg.odd[:5], "pid": pid}
        found |= {"resident_mb": round(resident_mb(pid), 2), "descriptors": descriptors(pid)}
        found["wrong"] = disagreements(found, before, after)
        kept["legs"].append(found)
        state.save()
        before = after
        rate, so_far = found["done"] / found["seconds"], f"{state.total('done'):9d} of {kept['requests']}, {state.total('cycles')} streams"
        held = f"{found['resident_mb']:.1f} MB, {found['descriptors']} descriptors"
        print(f"\r{so_far}; {rate:.0f}/s; {held}; {'; '.join(found['wrong']) or 'all adds up'}", flush=True)
    return not stop.is_set()


def verdict(kept: dict[str, Any]) -> list[str]:
    """What does not hold."""
    legs = kept["legs"]
    wrong = [f"leg {number}: {text}" for number, leg in enumerate(legs) for text in leg["wrong"]]
    wrong += [f"leg {number}: {leg['seen']['lost']} requests were lost" for number, leg in enumerate(legs) if leg["seen"].get("lost")]
    last = [leg for leg in legs if leg["pid"] == legs[-1]["pid"]]
    served, early = 0, last[0]
    for leg in last:
        served, early = served + leg["done"], leg
        if served >= sum(leg["done"] for leg in last) / 10:
            break
    grown = last[-1]["resident_mb"] - early["resident_mb"]
    if abs(grown) > max(5.0, 0.02 * early["resident_mb"]) and grown > 0:
        wrong.append(f"memory grew by {grown:.1f} MB from {early['resident_mb']:.1f}")
    if last[-1]["descriptors"] != early["descriptors"]:
        wrong.append(f"descriptors went from {early['descriptors']} to {last[-1]['descriptors']}")
    if not sum(leg["codes"].get("backend_failure", 0) for leg in legs):
        wrong.append("no engine failure was injected: the soak is too short")
    if kept["servers"] > 1:
        asked = sum(leg["done"] for leg in last)
        wrong.append(f"{kept['servers']} servers were needed; memory and descriptors are those of the last, after {asked} requests")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=FULL)
    parser.add_argument("--cycles", type=int, default=2_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--fail-every", type=int, default=1000, help="steps and frames between two failures of the engine")
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "soak", help="folder of the state file and the server's log")
    args = parser.parse_args()
    import uvloop

    state = State(args.state, args.requests, args.cycles, args.fail_every)
    if not uvloop.run(soak(state, args.clients)):
        print(f"stopped after {state.total('done')} requests; the same command goes on (the server runs on for {IDLE_S // 60} minutes)")
        return 130
    wrong = verdict(state.kept)
    print("\n".join(wrong) or "all counts add up, memory and descriptors stayed")
    results = {"clients": args.clients, "fail_every": args.fail_every, "wrong": wrong, **state.kept}
    print(f"kept in {keep('soak', results) if args.requests >= FULL else keep('soak', results, args.state)}")
    os.kill(state.kept["server"]["pid"], signal.SIGTERM)
    state.file.unlink()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
