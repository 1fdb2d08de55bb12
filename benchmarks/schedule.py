"""Iteration-level scheduling beside request-level batching: same engine, same programs, same noise, in turn in one run.

    python benchmarks/schedule.py [--artifact checkpoints/mnist-iterative/1] [--seconds 3] [--rounds 5]

Request-level batching takes all that waits, without a window, steps the whole batch, answers and drops each row as it
finishes, and only then takes the next batch. Two loads, each from clients in this process:

    mixed   32 clients, each sending its next one-row request when the last is answered; steps 1, 1, 2, 2, 4, 4, 8, 16
    burst   16 such clients that want 1 step, and every 0.5 s a burst of 64 requests for 64 steps

Every request asks for the posterior and its ELBO. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _report import keep, table

from models.artifact import Artifact, list_versions
from service.engine.base import Engine, Slots
from service.scheduler.job import Ask, Budget, Job
from service.scheduler.scheduler import Scheduler
from service.scheduler.static_lane import StaticLane

BUDGETS = (1, 1, 2, 2, 4, 4, 8, 16)
CLIENTS, BURST_CLIENTS, BURST, BURST_STEPS, BURST_EVERY_S = 32, 16, 64, 64, 0.5


class RequestLevelLane(StaticLane):
    """What most servers do: a batch runs to its end before the next one is formed."""

    def _admit(self, budget_s: float) -> None:
        if not self._rows.in_flight:
            super()._admit(math.inf)

    def _choose(self, budget_s: float) -> Slots:
        return self._rows.active


@dataclass
class Tally:
    """Latencies in seconds by number of steps, and how much was done in how long."""

    latencies: dict[int, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, steps: int, seconds: float) -> None:
        self.latencies.setdefault(steps, []).append(seconds)

    def figures(self) -> dict[str, float]:
        short = np.array(self.latencies[1]) * 1e3
        requests = sum(map(len, self.latencies.values()))
        steps = sum(steps * len(times) for steps, times in self.latencies.items())
        return {
            "p50_ms": float(np.percentile(short, 50)),
            "p99_ms": float(np.percentile(short, 99)),
            "requests_per_s": requests / self.seconds,
            "steps_per_s": steps / self.seconds,
        }


def request(x: np.ndarray[Any, Any], number: int, steps: int) -> Job:
    row = x[number % len(x)][None]
    return Job("model", np.array([number], np.uint64), Budget(steps=steps), Ask(), x=row)


async def client(scheduler: Scheduler, x: np.ndarray[Any, Any], first: int, budgets: tuple[int, ...], tally: Tally, until: float) -> None:
    number = first
    while time.perf_counter() < until:
        steps, started = budgets[number % len(budgets)], time.perf_counter()
        await scheduler.submit(request(x, number, steps))
        tally.add(steps, time.perf_counter() - started)
        number += 1


async def burst(scheduler: Scheduler, x: np.ndarray[Any, Any], tally: Tally, until: float) -> None:
    async def one(number: int) -> None:
        started = time.perf_counter()
        await scheduler.submit(request(x, number, BURST_STEPS))
        tally.add(BURST_STEPS, time.perf_counter() - started)

    number = 10**6
    while time.perf_counter() + BURST_EVERY_S / 2 < until:
        await asyncio.gather(asyncio.sleep(BURST_EVERY_S), *(one(number + i) for i in range(BURST)))
        number += BURST


async def load(kind: str, scheduler: Scheduler, x: np.ndarray[Any, Any], seconds: float) -> Tally:
    tally, started = Tally(), time.perf_counter()
    until = started + seconds
    if kind == "mixed":
        await asyncio.gather(*(client(scheduler, x, i * 1000 + i, BUDGETS, tally, until) for i in range(CLIENTS)))
    else:
        ones = (client(scheduler, x, i * 1000, (1,), tally, until) for i in range(BURST_CLIENTS))
        await asyncio.gather(burst(scheduler, x, tally, until), *ones)
    tally.seconds = time.perf_counter() - started
    return tally


async def measure(make_engine: Any, x: np.ndarray[Any, Any], seconds: float, rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """load -> scheduler -> figures of every round."""
    schedulers = {"iteration-level": Scheduler(), "request-level": Scheduler(lane=RequestLevelLane)}
    for scheduler in schedulers.values():
        scheduler.add_model("model", make_engine())
        scheduler.start()
    results: dict[str, dict[str, list[dict[str, float]]]] = {kind: {name: [] for name in schedulers} for kind in ("mixed", "burst")}
    for scheduler in schedulers.values():
        await load("mixed", scheduler, x, 0.5)
    for _ in range(rounds):
        for kind, by_scheduler in results.items():
            for name, scheduler in schedulers.items():
                by_scheduler[name].append((await load(kind, scheduler, x, seconds)).figures())
    for scheduler in schedulers.values():
        await scheduler.stop(1.0)
    return results


def artifact_in(folder: Path) -> Path | None:
    """The first iterative artifact of the static family below `folder`."""
    found = (path for _, _, path in list_versions(folder) if (card := Artifact.open(path).card).iterative and card.family == "static")
    return next(found, None)


def engine_maker(path: Path | None) -> tuple[Any, str]:
    if path is None:
        from service.engine.closed_form import ClosedFormEngine

        # As long as the MNIST model takes on one thread: about 140 µs for one row, 1.9 ms for 64.
        cost = {"step": (1.1e-4, 2.8e-5), "score": (5e-5, 1e-5), "init": (3e-5, 2e-6)}

        def delay(program: str, size: int) -> float:
            fixed, each = cost.get(program, (0.0, 0.0))
            return fixed + each * size

        return lambda: ClosedFormEngine(delay=delay), "closed form with the delays of the MNIST model"
    from service.engine.onnx import OnnxEngine

    artifact = Artifact.open(path)

    def make() -> Engine:
        return OnnxEngine(artifact, threads=1)

    return make, f"{artifact.card.name} {artifact.card.version}, ONNX Runtime, 1 thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="an iterative artifact; default: one under checkpoints/, else the closed form")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load, scheduler and round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    make, engine = engine_maker(args.artifact or artifact_in(Path(__file__).parents[1] / "checkpoints"))
    card = make().card
    x = (np.random.default_rng(0).random((256, *card.x.shape)) < 0.2).astype(np.float32)
    rounds = asyncio.run(measure(make, x, args.seconds, args.rounds))

    rows: list[list[Any]] = []
    medians = {}
    for kind, by_scheduler in rounds.items():
        median = {
            name: {figure: statistics.median(one[figure] for one in figures) for figure in figures[0]}
            for name, figures in by_scheduler.items()
        }
        ours, theirs = median["iteration-level"], median["request-level"]
        median["ratio"] = {figure: ours[figure] / theirs[figure] for figure in ours}
        medians[kind] = median
        rows.extend([kind, name, *figures.values()] for name, figures in median.items())
    print(f"{engine}; {args.rounds} rounds of {args.seconds:g} s; latencies are those of 1-step requests")
    print(table(("load", "scheduling", "p50 ms", "p99 ms", "requests/s", "steps/s"), rows))
    print(f"kept in {keep('schedule', {'engine': engine, 'seconds': args.seconds, 'medians': medians, 'rounds': rounds})}")


if __name__ == "__main__":
    main()
