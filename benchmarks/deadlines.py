"""Deadlines from 5 to 100 ms over HTTP, measured at the server from the request's head to the last byte of the reply.

    python benchmarks/deadlines.py [--seconds 20]

Idle: one request at a time. Loaded: an open loop at 0.8 of capacity, where capacity is the closed-loop maximum of exact 64-step
requests in the same run. Both with deadlines in turn, one row each, steps as many as fit. For every admitted request:

    met         the last byte left the server before the deadline
    hindsight   steps used + those that the spare time would have held at this request's own time per step; K_max at most

Deadlines at which K_max binds are left out of `used / hindsight` (on an idle machine 128 steps take 60 ms). Idle also asks for
deadlines just above twice the time of 0 steps, none of which may be refused. At last, tolerance 0.05 beside 64 steps on 500
validation digits, with the data in ELBOW_DATA.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import numpy as np
import orjson
from _report import keep, table
from _served import Pool, closed_loop, encode_request, open_loop, server

DEADLINES_MS = (5, 7, 10, 15, 20, 30, 50, 70, 100)
STEPS, CLIENTS, LOAD, MAX_STEPS = 64, 64, 0.8, 128


async def ask_all(pool: Pool, x: list[Any], deadlines: tuple[float, ...], drive: Any, label: str) -> list[dict[str, Any]]:
    """One record per request: deadline, status, what the reply says, and the milliseconds measured at the server."""
    records: dict[str, dict[str, Any]] = {}

    async def send(number: int) -> None:
        deadline, name = deadlines[number % len(deadlines)], f"{label}-{number}"
        body = {"inputs": [x[number % len(x)]], "deadline_ms": deadline, "seed": number}
        status, _, raw = await pool.ask(encode_request(body, name))
        record: dict[str, Any] = {"deadline_ms": deadline, "status": status}
        if status == 200:
            reply = orjson.loads(raw)
            record |= {"steps": reply["results"][0]["steps_used"], "reason": reply["results"][0]["stop_reason"], **reply["timing"]}
        records[name] = record

    await drive(send)
    measured = json.loads(await pool.get("/measured"))
    return [{**record, "ms": measured[name]} for name, record in records.items()]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    admitted = [one for one in records if one["status"] == 200]
    late = [one for one in records if one["status"] == 504 and one["ms"] > 2.0]
    """504 after some time: admitted, and then not answered in time."""
    met = sum(one["ms"] <= one["deadline_ms"] for one in admitted)
    bound = [one for one in admitted if one["steps"] < MAX_STEPS]
    used = sum(one["steps"] for one in bound)
    possible = sum(_hindsight(one) for one in bound)
    return {
        "requests": len(records),
        "refused": len(records) - len(admitted),
        "met": met / max(1, len(admitted) + len(late)),
        "used": used / max(1, len(bound)),
        "of_hindsight": used / possible if possible else float("nan"),
        "spare_ms_p1": float(np.percentile([one["deadline_ms"] - one["ms"] for one in admitted], 1)) if admitted else float("nan"),
        "spare_ms_p50": float(np.median([one["deadline_ms"] - one["ms"] for one in admitted])) if admitted else float("nan"),
        "k_max": len(admitted) - len(bound),
    }


def _hindsight(one: dict[str, Any]) -> int:
    step_ms = one["compute_ms"] / (one["steps"] + 1)  # the one more is init and score
    return int(min(MAX_STEPS, one["steps"] + max(0.0, one["deadline_ms"] - one["ms"]) // step_ms))


async def measure(port: int, seconds: float) -> dict[str, Any]:
    x = (np.random.default_rng(0).random((64, 784)) < 0.2).astype(int).tolist()
    exact = [encode_request({"inputs": [row], "steps": STEPS, "seed": i}) for i, row in enumerate(x)]
    pool = Pool(port)
    answered = 0

    async def send(number: int) -> None:
        nonlocal answered
        status, _, _ = await pool.ask(exact[number % len(exact)])
        answered += status == 200

    await closed_loop(send, CLIENTS, 1.0)
    answered = 0
    took = await closed_loop(send, CLIENTS, max(3.0, seconds / 4))
    capacity = answered / took

    for number in range(200):
        body = {"inputs": [x[number % 64]], "steps": 0, "seed": number}
        await pool.ask(encode_request(body, f"zero-{number}"))
    zero = list(json.loads(await pool.get("/measured")).values())
    zero_ms = float(np.median(zero))

    async def one_by_one(send: Any) -> None:
        await closed_loop(send, 1, seconds)

    async def loaded(send: Any) -> None:
        await open_loop(send, LOAD * capacity, seconds)

    tight = tuple(float(value) for value in 2 * zero_ms * np.linspace(1.0, 1.5, 11))
    results = {
        "capacity_per_s": capacity,
        "zero_steps_ms": zero_ms,
        "tight": await ask_all(pool, x, tight, one_by_one_for(3.0), "tight"),
    }
    await ask_all(pool, x, DEADLINES_MS, one_by_one_for(2.0), "learn")
    results["idle"] = await ask_all(pool, x, DEADLINES_MS, one_by_one, "idle")
    await ask_all(pool, x, DEADLINES_MS, lambda send: open_loop(send, LOAD * capacity, 3.0), "relearn")
    results["loaded"] = await ask_all(pool, x, DEADLINES_MS, loaded, "loaded")
    results["tolerance"] = await tolerance(pool)
    pool.close()
    return results


def one_by_one_for(seconds: float) -> Any:
    async def drive(send: Any) -> None:
        await closed_loop(send, 1, seconds)

    return drive


async def tolerance(pool: Pool) -> dict[str, float] | None:
    """500 validation digits: steps used and mean ELBO with tolerance 0.05, and with 64 steps; both scored anew with 64 samples."""
    try:
        import torch

        from training.data.binarise import observe
        from training.data.catalogue import load

        images = load("mnist")
    except (ImportError, OSError) as exc:
        print(f"no tolerance measured, the training extra and its data are needed: {exc}")
        return None
    digits = observe(torch.as_tensor(images.valid[:500]), images.kind, "bernoulli", torch.Generator().manual_seed(1)).numpy()
    found = {}
    for name, budget in (("tolerance", {"tolerance": 0.05}), ("64 steps", {"steps": STEPS})):
        body = {"inputs": digits.astype(int).tolist(), "seed": list(range(500)), "return": ["posterior", "elbo"], **budget}
        status, _, raw = await pool.ask(encode_request(body))
        assert status == 200, raw[:200]
        found[name] = orjson.loads(raw)["results"]
    scored = {}
    for name, rows in found.items():
        body = {"inputs": digits.astype(int).tolist(), "posterior": [row["posterior"] for row in rows], "steps": 0, "samples": 64}
        status, _, raw = await pool.ask(encode_request(body, path="/v1/models/mnist-iterative/refine"))
        assert status == 200, raw[:200]
        scored[name] = float(np.mean([row["elbo"] for row in orjson.loads(raw)["results"]]))
    return {
        "steps": float(np.mean([row["steps_used"] for row in found["tolerance"]])),
        "elbo": scored["tolerance"],
        "elbo_64": scored["64 steps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    args = parser.parse_args()
    with server() as (port, _):
        results = asyncio.run(measure(port, args.seconds))
    kept: dict[str, Any] = {key: results[key] for key in ("capacity_per_s", "zero_steps_ms", "tolerance")}
    rows: list[list[Any]] = []
    for load in ("tight", "idle", "loaded"):
        kept[load] = {"all": summary(results[load])}
        for deadline in sorted({one["deadline_ms"] for one in results[load]}) if load != "tight" else ():
            kept[load][f"{deadline:g}"] = summary([one for one in results[load] if one["deadline_ms"] == deadline])
        rows.extend([load, name, *one.values()] for name, one in kept[load].items())
    print(f"0 steps take {results['zero_steps_ms']:.2f} ms at the server; capacity {results['capacity_per_s']:.0f} 64-step requests/s")
    print(table(("load", "deadline ms", "requests", "refused", "met", "steps", "of hindsight", "spare p1", "spare p50", "K_max"), rows))
    if results["tolerance"]:
        print("tolerance 0.05: {steps:.1f} steps on average, ELBO {elbo:.2f}; 64 steps: {elbo_64:.2f}".format(**results["tolerance"]))
    print(f"kept in {keep('deadlines', {'seconds': args.seconds, **kept})}")


if __name__ == "__main__":
    main()
